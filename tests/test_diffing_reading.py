import jax.numpy as jnp
import numpy as np
import pytest
from diffing_cases import planted, write_store

from crosscoder_jax.activations import TokenView
from crosscoder_jax.diffing import DiffConfig
from crosscoder_jax.diffing.reading import placed_column, placed_tokens, read_pass
from crosscoder_jax.sharding import Shardings


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    acts, *_, documents, labels = planted(num_tokens=60)
    return TokenView(write_store(tmp_path_factory.mktemp("store"), acts, documents, labels))


@pytest.mark.parametrize(
    ("num_snippet_latents", "earlier_passes", "told"),
    [(0, 0, [(25, 60), (50, 60), (60, 60)]), (3, 1, [(85, 120), (110, 120), (120, 120)])],
)
def test_a_pass_tells_its_part_of_all_passes(view, num_snippet_latents, earlier_passes, told):
    config, reports = DiffConfig(batch_size=25, num_snippet_latents=num_snippet_latents), []
    batches = read_pass(view, config, lambda *report: reports.append(report), earlier_passes=earlier_passes)
    assert sum(int(batch.is_valid.sum()) for batch in batches) == 60
    assert reports == [(done, total, "tokens") for done, total in told]


def test_a_batch_is_done_when_the_next_is_asked_for(view):
    reports = []
    batches = read_pass(view, DiffConfig(batch_size=25), lambda *r: reports.append(r), earlier_passes=0)
    next(batches)
    assert reports == []
    next(batches)
    assert len(reports) == 1
    batches.close()


def test_tokens_are_placed_as_they_were_read(view):
    batch = next(read_pass(view, DiffConfig(batch_size=25), None, earlier_passes=0))
    acts, documents, is_valid = placed_tokens(batch, Shardings())
    np.testing.assert_array_equal(acts, batch.acts)
    np.testing.assert_array_equal(documents, np.arange(25) // 15)
    assert bool(is_valid.all())
    column = placed_column(np.array([3, -1], np.int64), Shardings())
    assert (column.dtype, column.tolist()) == (jnp.int32, [3, -1])
