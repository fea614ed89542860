"""Small recipes, activations and stores, shared by the tests of training."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

import crosscoder_jax as cc
from crosscoder_jax.activations import ActivationStore, Split, StoredSource, StoreWriter
from crosscoder_jax.training.loop import RunOptions, fit, fit_together

WIDTHS = (6, 5)
NUM_LATENTS = 16
K3 = cc.BatchTopK(k=3.0)


def sources(widths=WIDTHS):
    names = ("base", "chat", "third")[: len(widths)]
    return cc.Sources(tuple(cc.Source(name, width) for name, width in zip(names, widths, strict=True)))


def recipe(*, widths=WIDTHS, num_latents=NUM_LATENTS, sparsity: Any = K3, **changes: Any):
    """A recipe of a few steps; fields of the crosscoder and of the training by name."""
    of_crosscoder = {f.name for f in dataclasses.fields(cc.CrosscoderConfig)}
    shape = {name: changes.pop(name) for name in list(changes) if name in of_crosscoder}
    crosscoder = cc.CrosscoderConfig(
        **({"sources": sources(widths), "num_latents": num_latents, "sparsity": sparsity} | shape)
    )
    small = {"num_steps": 20, "batch_size": 32, "learning_rate": 1e-2, "warmup_steps": 3, "decoder_norm": 1.0}
    return cc.TrainConfig(crosscoder, **(small | changes))


def activations(num_tokens, widths=WIDTHS, seed=0):
    """Tokens made of a few planted directions, of unequal size and far from zero, as real ones are."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(8, sum(widths)))
    strengths = rng.exponential(size=(num_tokens, 8)) * (rng.random((num_tokens, 8)) < 0.3)
    noise = 0.1 * rng.normal(size=(num_tokens, sum(widths)))
    offset = np.repeat(np.arange(1.0, len(widths) + 1), widths)
    size = np.repeat([1.0, 3.0, 0.5][: len(widths)], widths)
    return (size * (strengths @ directions + noise) + offset).astype(np.float32)


def write_store(folder, *, num_tokens=1500, widths=WIDTHS, acts=None, dtype="float32", chunk_tokens=64):
    """A finished store of documents of 20 tokens."""
    acts = activations(num_tokens, widths) if acts is None else acts
    of_sources = sources(widths)
    index = np.arange(len(acts))
    stored = [StoredSource(s.name, s.width, f"org/{s.name}", None, "blocks.1.resid_post") for s in of_sources]
    with StoreWriter.create_or_resume(
        folder, sources=stored, dtype=dtype, labels=("text",), config={}, chunk_tokens=chunk_tokens
    ) as writer:
        if not writer.is_finished:
            writer.append(
                dict(zip(of_sources.names, of_sources.split(acts), strict=True)),
                tokens=index % 50,
                documents=index // 20,
                positions=index % 20 + 1,
                labels=np.zeros(len(acts), np.int64),
            )
            writer.finish({"texts": "made up"})
    return ActivationStore.open(folder)


def to_numpy(tree):
    """Every leaf by name, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for path, x in leaves
    }


def weights(state):
    """The parameters of a state by their short names."""
    crosscoder = state.crosscoder()
    return {name: np.asarray(getattr(crosscoder, name)[...]) for name in ("w_enc", "b_enc", "w_dec", "b_dec")}


@jax.jit
def selected(state, acts):
    """Which latents a state's training rule keeps of each token of a batch."""
    crosscoder = state.crosscoder()
    return crosscoder.training_code(crosscoder.pre_acts(crosscoder.normalize(acts))).code > 0


def files(folder):
    """Every file below ``folder`` with its bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


OPTIONS = RunOptions(split=Split(0.2), window_tokens=256, log_every=4, checkpoint_every=5)


def small_run(store, folder, **changes):
    """The run of the script, whole, in this process."""
    settings = {"options": OPTIONS} | changes
    config = settings.pop("config", recipe(num_steps=23))
    return fit(config, store, Path(folder), **settings)


def seed_recipes(seeds):
    """The recipes of a few seeds on the batches of the first."""
    return [recipe(num_steps=23, seed=seed, data_seed=0) for seed in range(seeds)]


def small_runs(store, folder, seeds, **settings):
    """The runs of a few seeds, trained together in this process."""
    folders = [Path(folder) / f"seed-{seed}" for seed in range(seeds)]
    return fit_together(seed_recipes(seeds), store, folders, **({"options": OPTIONS} | settings))
