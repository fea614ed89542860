"""Kill the writer with SIGKILL and write again: the store is byte for byte the uninterrupted one."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from activations_cases import LONG, SETTINGS, corpus, files, write_store

from crosscoder_jax.activations import ActivationStore, StoreError, StoreWriter, read_json

SCRIPT = Path(__file__).with_name("activations_cases.py")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    # Other pieces and checkpoints than the script's: the files do not depend on them.
    folder = tmp_path_factory.mktemp("reference") / "store"
    write_store(folder, corpus(LONG), step=997, vocabulary={1: b"\xff"})
    return files(folder)


def start(folder, *kill):
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, kill)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()  # imports are done, writing begins
    return child


def end(child):
    child.stdout.close()
    return child.wait()


@pytest.mark.parametrize("seed", range(2))
def test_random_moments(tmp_path, reference, seed):
    folder, rng, kills = tmp_path / "store", random.Random(seed), 0
    for _ in range(3):
        child = start(folder)
        time.sleep(rng.uniform(0.0, 0.3))
        child.kill()
        kills += end(child) == -signal.SIGKILL
    assert kills, "every child finished before it was killed: make the text longer"
    if not (folder / "manifest.json").exists() and (folder / "partial.json").exists():
        with pytest.raises(StoreError, match="half-written"):
            ActivationStore.open(folder)
    assert end(start(folder)) == 0
    assert files(folder) == reference
    assert ActivationStore.open(folder).verify() == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("file", "count"),
    [("partial.json", 1), ("partial.json", 3), ("vocabulary.json", 1), ("manifest.json", 1)],
)
def test_every_replacement_of_a_file(tmp_path, reference, file, count, when):
    folder = tmp_path / "store"
    assert end(start(folder, file, count, when)) == -signal.SIGKILL
    is_finished = (file, when) == ("manifest.json", "after")
    assert (folder / "manifest.json").exists() == is_finished
    if file == "partial.json" and when == "after":
        # The first is written before any token, the others every third piece of 101 tokens.
        assert read_json(folder / "partial.json")["num_tokens"] == (count - 1) * 303
    write_store(folder, corpus(LONG), step=101, vocabulary={1: b"\xff"})
    assert files(folder) == reference


def test_files_that_a_killed_writer_never_renamed_are_removed(tmp_path):
    text = corpus()
    write_store(tmp_path / "reference", text)
    folder = tmp_path / "store"
    with StoreWriter.create_or_resume(folder, **SETTINGS) as writer:
        text.append(writer, 0, 40)
        writer.checkpoint(None)
    # TensorStore's name for a file until it is renamed, and ours.
    (folder / "acts" / "base" / "c" / "900").mkdir()
    (folder / "acts" / "base" / "c" / "900" / "0.__lock").write_bytes(b"part")
    (folder / "tokens" / "zarr.json.__lock").write_bytes(b"part")
    (folder / ".partial.json.0123456789ab.tmp").write_bytes(b"part")
    write_store(folder, text)
    assert files(folder) == files(tmp_path / "reference")
