"""The experiment on nulls, small: its exact expectations, its table, and what breaks them."""

import dataclasses

import numpy as np
import pytest

from experiments.nulls.config import Nulls, recipe
from experiments.nulls.data import DOCUMENT_TOKENS, planted
from experiments.nulls.measure import COLUMNS, SAME, SEEDS, broken_expectations, measure, table_rows

SMALL = Nulls(width=16, num_shared=6, num_chat_only=2, num_tokens=8_000, num_latents=16, num_steps=400)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return measure(dataclasses.replace(SMALL, output=tmp_path_factory.mktemp("nulls")))


def test_what_follows_from_algebra_holds(found):
    assert broken_expectations(found) == []


def test_the_table_has_a_row_a_run(found):
    """How many of the planted latents so short a training finds is not asked; on which side they are, is."""
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table_rows(found)}
    assert len(rows) == 7
    assert rows[SAME]["delta_norm"] == "0.500 to 0.500"
    for name in (
        SAME,
        "nothing planted",
        "nothing planted, documents swapped",
        "planted, coordinates swapped",
    ):
        assert (rows[name]["base-only"], rows[name]["chat-only"]) == ("0 / 0", "0 / 0")
        assert rows[name]["recur"] == "-"
    for name in SEEDS:
        claimed = int(rows[name]["chat-only"].split()[0])
        assert 1 <= claimed <= 2
        assert rows[name]["base-only"] == "0 / 0"
        assert rows[name]["recur"].endswith(f" of {claimed}")


def broken(found, **columns):
    """The expectations that fail when some columns of the run of one model are changed."""
    run = found.runs[SAME]
    changed = dataclasses.replace(run, columns={**run.columns, **columns})
    return broken_expectations(dataclasses.replace(found, runs={**found.runs, SAME: changed}))


def test_every_exact_expectation_can_fail(found):
    columns = found.runs[SAME].columns
    latent = int(np.flatnonzero(found.runs[SAME].is_live)[0])

    def with_value(name, value):
        values = columns[name].copy()
        values[latent] = value
        return {name: values}

    (one,) = broken(found, **with_value("delta_norm", np.nextafter(0.5, 1)))
    assert one.endswith("delta_norm of every live latent is exactly 0.5")
    (one,) = broken(found, **with_value("latent_class", "base-only"))
    assert one.endswith("no latent is exclusive")
    for name in ("cosine", "nu_error", "nu_recon"):
        (one,) = broken(found, **with_value(name, 1.001))
        assert one.endswith(f"{name} of every live latent is 1")
    (one,) = broken(found, latent_class=np.full(len(columns["latent_class"]), "dead", object))
    assert one.endswith("some latent is live")
    lost = dataclasses.replace(found.itself, num_recurring=found.itself.num_recurring - 1)
    (one,) = broken_expectations(dataclasses.replace(found, itself=lost))
    assert one == "a run matched with itself: every claim recurs as itself"


def test_planted_activations():
    acts = planted(SMALL, 2)
    assert acts.shape == (8_000, 2, 16)
    assert len(acts) % DOCUMENT_TOKENS == 0
    difference = acts[:, 1] - acts[:, 0]
    # Two chat-only directions, then the noise of both models: 0.02 sqrt(2) per coordinate.
    spectrum = np.linalg.svd(difference, compute_uv=False) / np.sqrt(len(acts))
    assert np.all(spectrum[:2] > 0.2)
    np.testing.assert_allclose(spectrum[2:], 0.02 * np.sqrt(2), rtol=0.1)
    nothing = planted(SMALL, 0)
    assert np.abs(nothing[:, 1] - nothing[:, 0]).max() < 0.02 * np.sqrt(2) * 7


def test_settings_of_the_output_have_one_folder():
    assert SMALL.folder != dataclasses.replace(SMALL, num_steps=401).folder
    assert SMALL.folder == dataclasses.replace(SMALL, update_readme=True).folder


def test_seeds_share_the_data(found):
    sources = found.runs[SAME].crosscoder.config.sources
    first, second = (recipe(SMALL, sources, seed) for seed in (0, 1))
    assert (first.order_seed, second.order_seed) == (0, 0)
