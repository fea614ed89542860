"""Small stores with known content, shared by the tests of the activation store.

Run as a script it writes one, to be killed on the way: ``python activations_cases.py FOLDER [FILE
COUNT WHEN]`` kills itself ``before`` or ``after`` the COUNT-th atomic replacement of FILE.
"""

import dataclasses
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from crosscoder_jax.activations import ActivationStore, StoredSource, StoreWriter

SOURCES = (
    StoredSource("base", 5, "org/model", "abc123", "blocks.1.resid_post"),
    StoredSource("chat", 3, "org/model-chat", None, "blocks.1.resid_post"),
)
CHUNK = 16
DOCUMENT_LENGTHS = (7, 1, 30, 12, 50, 3, 3, 64, 20, 9)
SETTINGS: dict[str, Any] = {
    "sources": SOURCES,
    "dtype": "bfloat16",
    "labels": ("prose", "novel"),
    "config": {"layer": 1, "texts": ("a", "b")},
    "chunk_tokens": CHUNK,
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is appended, whole."""

    acts: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]

    @property
    def num_tokens(self):
        return len(self.columns["tokens"])

    def part(self, start, stop):
        """Arguments of ``append`` for tokens ``start`` to ``stop``."""
        acts = {name: values[start:stop] for name, values in self.acts.items()}
        return acts, {name: values[start:stop] for name, values in self.columns.items()}

    def append(self, writer, start, stop):
        acts, columns = self.part(start, stop)
        writer.append(acts, **columns)

    def stored(self, dtype=ml_dtypes.bfloat16):
        """What a reader must find: the sources concatenated, rounded once to the stored type."""
        return np.concatenate([self.acts["base"], self.acts["chat"]], axis=1).astype(dtype)


def corpus(lengths=DOCUMENT_LENGTHS, seed=0, widths=(5, 3)):
    rng = np.random.default_rng(seed)
    num_tokens = sum(lengths)
    documents = np.repeat(np.arange(len(lengths)), lengths)
    return Corpus(
        acts={
            name: (rng.normal(size=(num_tokens, width)) * 3 + 10).astype(np.float32)
            for name, width in zip(("base", "chat"), widths, strict=True)
        },
        columns={
            "tokens": rng.integers(0, 50_000, num_tokens),
            "documents": documents,
            "positions": np.concatenate([np.arange(length) for length in lengths]),
            "labels": documents % 2,
        },
    )


def write_store(path, text, *, step=37, checkpoint_every=1, vocabulary=None, **changes):
    """Write ``text`` in pieces of ``step`` tokens, going on where an earlier writer stopped."""
    with StoreWriter.create_or_resume(path, **(SETTINGS | changes)) as writer:
        if not writer.is_finished:
            starts = range(writer.num_tokens, text.num_tokens, step)
            for i, start in enumerate(starts):
                text.append(writer, start, min(start + step, text.num_tokens))
                if (i + 1) % checkpoint_every == 0:
                    writer.checkpoint({"token": writer.num_tokens})
            writer.finish({"written by": "a test"}, vocabulary)
    return ActivationStore.open(path)


def files(folder):
    """Every file below ``folder`` with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def copied_store(store, folder):
    """A copy of a store that may be damaged; copying spares the syncs of writing."""
    shutil.copytree(store.path, folder)
    return ActivationStore.open(folder)


LONG = tuple(range(1, 60))
"""Lengths of the documents that the script writes: 1,770 tokens, 111 chunks of 16."""


def _kill_at(file, count, when):
    replace = Path.replace
    seen = []

    def replace_and_die(self, target):
        seen.append(target.name)
        is_now = seen.count(file) == count and target.name == file
        if is_now and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = replace(self, target)
        if is_now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.replace = replace_and_die


if __name__ == "__main__":
    if sys.argv[2:]:
        _kill_at(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    print("ready", flush=True)
    write_store(sys.argv[1], corpus(LONG), step=101, checkpoint_every=3, vocabulary={1: b"\xff"})
