"""The run that tests train in one process and in several, in float64."""

import dataclasses
import json
import unittest.mock
from pathlib import Path

import numpy as np
from training_cases import activations, recipe, selected, write_store

import crosscoder_jax as cc
from crosscoder_jax.activations import ActivationStore, Split, TokenView
from crosscoder_jax.diffing import DiffConfig, diff_run
from crosscoder_jax.sharding import make_mesh, on_mesh, to_host
from crosscoder_jax.training import loop
from crosscoder_jax.training.evaluate import calibrate, evaluate
from crosscoder_jax.training.loop import RunOptions, fit

CHUNK = 16
STEPS, BATCH, LANES = 20, 24, 4
WIDTHS = (5, 5)
"""Equal, for Latent Scaling."""
# Sums over shards are taken in another order, and Adam makes a step of the rate's size of whatever is left
# where a gradient cancels: float32 would need a tolerance that hides mistakes.
RECIPE = recipe(
    widths=WIDTHS,
    num_steps=STEPS,
    batch_size=BATCH,
    dtype="float64",
    sparsity=cc.BatchTopK(k=1.0),
    aux_k=cc.AuxK(0.5, k_aux=8, dead_after_tokens=2 * BATCH),
)
OPTIONS = RunOptions(split=Split(0.2), window_tokens=120, lanes=LANES, log_every=1, checkpoint_every=4)

DIFF = DiffConfig(batch_size=BATCH, num_snippet_latents=2, min_active_tokens=2, num_groups=4)


def make_store(place):
    """A store of 493 tokens: no multiple of its files, the windows, the lanes or the batch."""
    return write_store(
        Path(place) / "store", widths=WIDTHS, acts=activations(493, WIDTHS), chunk_tokens=CHUNK
    )


def begun_with(run):
    """A recipe of more latents that begins with those of a run, which are held."""
    wider = dataclasses.replace(RECIPE.crosscoder, num_latents=2 * RECIPE.crosscoder.num_latents)
    start = cc.WarmStart(str(run / "crosscoder"), is_frozen=True)
    return dataclasses.replace(RECIPE, crosscoder=wider, start=start)


def train(folder, shape, seen, progress=None, options=OPTIONS, *, is_warm=False):
    """Train the run, or one that begins with it.

    Notes what was kept of each token at each step, which files were read, and what it is.
    """
    folder = Path(folder)
    store = ActivationStore.open(folder.parent / "store")
    kept, files = [], set()
    step, read_rows = loop.train_step, ActivationStore.read_rows

    def noted_step(*arguments, **settings):
        kept.append(to_host(selected(*arguments)))
        state, metrics = step(*arguments, **settings)
        # What the step itself kept, by the latents.
        np.testing.assert_array_equal(to_host(state.tokens_since_fired) == 0, kept[-1].any(axis=0))
        return state, metrics

    def noted_rows(self, token_index):
        files.update((token_index // CHUNK).tolist())
        return read_rows(self, token_index)

    # The normaliser is of a sample that one process reads; files are those of the batches.
    def sample(view, num_tokens):
        rows = spread_sample(view, num_tokens)
        files.clear()
        return rows

    spread_sample = loop.spread_sample
    mesh = None if shape is None else make_mesh(*shape)
    with (
        unittest.mock.patch.object(loop, "train_step", noted_step),
        unittest.mock.patch.object(loop, "spread_sample", sample),
        unittest.mock.patch.object(ActivationStore, "read_rows", noted_rows),
    ):
        try:
            crosscoder = fit(
                begun_with(folder.parent / "alone") if is_warm else RECIPE,
                store,
                folder,
                options=dataclasses.replace(options),
                mesh=mesh,
                progress=progress,
            )
        finally:
            seen.update(kept=np.array(kept), files=np.array(sorted(files)))
    view = TokenView.of_split(store, OPTIONS.split, held_out=True)
    with on_mesh(mesh):
        measured = evaluate(calibrate(crosscoder, view, batch_size=BATCH), view, batch_size=BATCH)
        diffed = diff_run(crosscoder, view, DIFF)
    seen.update({f"measured {name}": value for name, value in measured.items()})
    for name, column in diffed.columns.items():
        seen[f"diffed {name}"] = column.astype(str) if column.dtype == object else column
    peaks = {latent: [(s.document, s.position) for s in found] for latent, found in diffed.snippets.items()}
    seen["peaks"] = json.dumps(peaks)
