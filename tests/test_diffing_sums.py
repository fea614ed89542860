import numpy as np
import pytest
from diffing_cases import planted, planted_crosscoder, write_store

from crosscoder_jax.activations import TokenView
from crosscoder_jax.diffing import DiffConfig, decoder_norms, delta_norm
from crosscoder_jax.diffing.comparison import comparison
from crosscoder_jax.diffing.sums import measure


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    acts, code, w_dec, directions, documents, labels = planted(num_tokens=300)
    store = write_store(tmp_path_factory.mktemp("store"), acts, documents, labels)
    return planted_crosscoder(w_dec, directions), TokenView(store), code, labels


def measured(case, *, is_pair):
    crosscoder, view, *_ = case
    space = comparison(crosscoder, view.store.sources)
    delta = delta_norm(decoder_norms(space.w_dec, space.sources)) if is_pair else None
    # 300 tokens are two batches and a part.
    return measure(crosscoder, view, space, delta, DiffConfig(batch_size=128, num_groups=4), None)


@pytest.mark.parametrize("is_pair", [True, False])
def test_every_token_is_counted_once_on_its_text(case, is_pair):
    *_, code, labels = case
    sums, _ = measured(case, is_pair=is_pair)
    active, total, _ = sums.activity.sums.to_float64()
    for text in (0, 1):
        np.testing.assert_array_equal(active[text], (code[labels == text] > 0).sum(axis=0))
        # Sums of some fifty float32 codes of size 1.
        np.testing.assert_allclose(total[text], code[labels == text].sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(
        sums.activity.tokens.to_float64(), [(labels == 0).sum(), (labels == 1).sum()]
    )


def test_each_latent_is_tested_along_the_decoder_of_its_own_side(case):
    sums, decoders = measured(case, is_pair=True)
    assert sums.scaling is not None
    assert sums.scaling.tokens.to_float64().sum() == 300
    # Latents 4 and 6 are the base's alone; 0, 1 and 7 are as strong in both.
    assert decoders.reference.tolist() == [1, 1, 1, 1, 0, 1, 0, 1]


def test_without_two_models_there_is_no_latent_scaling(case):
    sums, decoders = measured(case, is_pair=False)
    assert sums.scaling is None
    assert decoders is None
