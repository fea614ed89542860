import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crosscoder_jax.diffing import init_documents, room_for_documents, update_documents
from crosscoder_jax.sharding import Shardings, make_mesh

step = jax.jit(update_documents, static_argnames=("room", "shardings"))


def text(seed=0, num_tokens=300, num_latents=12, density=0.05):
    """A code and documents of 1 to 40 tokens whose indices come in any order."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 41, num_tokens)
    documents = np.repeat(rng.permutation(num_tokens), lengths)[:num_tokens].astype(np.int32)
    code = rng.random((num_tokens, num_latents)) * (rng.random((num_tokens, num_latents)) < density)
    return code.astype(np.float32), documents


def oracle(code, documents):
    """For each latent the number of different documents on which it fires."""
    return [len(set(documents[column > 0].tolist())) for column in code.T]


def counted(code, documents, size, place=lambda x, _: x, shardings=Shardings()):
    """Count in batches of one size; the last is padded with rubbish that is not valid."""
    counts = init_documents(code.shape[1], shardings=shardings)
    room = 1
    for start in range(0, len(code), size):
        part, where = code[start : start + size], documents[start : start + size]
        missing = size - len(part)
        room = room_for_documents(where, room)
        counts = step(
            counts,
            place(np.pad(part, ((0, missing), (0, 0)), constant_values=np.nan), shardings.code_bl),
            place(np.pad(where, (0, missing), constant_values=-1), shardings.per_batch_b),
            place(np.arange(size) < len(part), shardings.per_batch_b),
            room=room,
            shardings=shardings,
        )
    return counts


@pytest.mark.parametrize("size", [1, 7, 64, 300, 512])
def test_every_document_counts_once_however_batches_cut_it(size):
    code, documents = text()
    counts = counted(code, documents, size)
    assert counts.active.tolist() == oracle(code, documents)
    assert int(counts.num_documents) == len(set(documents.tolist()))


def test_a_document_longer_than_several_batches():
    # Latent 0 fires at its beginning and end, latent 1 in its middle, latent 2 in the next one alone.
    code = np.zeros((10, 3), np.float32)
    code[[0, 8], 0] = code[4, 1] = code[9, 2] = 1
    documents = np.array([5] * 9 + [2], np.int32)
    for size in (1, 2, 3, 4):
        counts = counted(code, documents, size)
        assert (int(counts.num_documents), counts.active.tolist()) == (2, [1, 1, 1])
        assert (int(counts.first), int(counts.last)) == (5, 2)
        assert counts.is_active_in_first.tolist() == [True, True, False]
        assert counts.is_active_in_last.tolist() == [False, False, True]


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 60), (1, 2), (20, 22), (7, 41), (60, 60)])
def test_stretches_of_text_merge_wherever_they_are_cut(low, high):
    code, documents = text(1, num_tokens=60)
    first, middle, last = (
        counted(code[start:stop], documents[start:stop], 60)
        for start, stop in ((0, low), (low, high), (high, 60))
    )
    early, late = first.merge(middle).merge(last), first.merge(middle.merge(last))
    for whole, *found in zip(*map(jax.tree.leaves, (counted(code, documents, 60), early, late)), strict=True):
        for value in found:
            np.testing.assert_array_equal(value, whole)


def test_no_tokens_are_no_documents():
    empty = init_documents(3)
    assert int(empty.merge(empty).num_documents) == 0
    padding = step(empty, jnp.full((4, 3), jnp.nan), jnp.full(4, -1), jnp.zeros(4, bool), room=1)
    for a, b in zip(jax.tree.leaves(padding), jax.tree.leaves(empty), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("number", "least", "room"), [(1, 1, 1), (3, 1, 4), (4, 4, 4), (5, 4, 8), (1, 8, 8)])
def test_the_room_grows_in_powers_of_two(number, least, room):
    assert room_for_documents(np.repeat(np.arange(number), 3), least) == room


def test_eight_devices_count_the_same():
    code, documents = text(2, num_tokens=64, num_latents=16)
    layout = Shardings.data_latent()
    with jax.set_mesh(make_mesh(2, 4)):
        counts = counted(code, documents, 32, jax.device_put, layout)
        assert jax.typeof(counts.active).sharding.spec == jax.P("latent")
    assert counts.active.tolist() == oracle(code, documents)


def test_counting_on_a_mesh_does_not_gather_the_code():
    layout = Shardings.data_latent()
    with jax.set_mesh(make_mesh(2, 4)):
        code = jax.device_put(np.zeros((32, 208), np.float32), layout.code_bl)
        column = jax.device_put(np.zeros(32, np.int32), layout.per_batch_b)
        is_valid = jax.device_put(np.ones(32, bool), layout.per_batch_b)

        def step(code, column, is_valid):
            counts = init_documents(208, shardings=layout)
            return jax.tree.leaves(update_documents(counts, code, column, is_valid, room=8, shardings=layout))

        hlo = jax.jit(step).lower(code, column, is_valid).compile().as_text()
    gathers = [line for line in hlo.splitlines() if " all-gather(" in line]
    assert not [line for line in gathers if "208" in line or ",52]" in line], gathers
    # What is added up over the data axis: [document, latent] of this device's 52 latents.
    assert [line for line in hlo.splitlines() if " all-reduce(" in line and "8,52]" in line]
