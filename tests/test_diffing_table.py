import numpy as np
import pytest
from diffing_cases import two_model_columns

from crosscoder_jax.diffing.table import strongest_latents

LABELS = ("prose", "novel")


def test_two_models_confirmed_first_then_claimed_then_extreme():
    order = strongest_latents(two_model_columns(), LABELS, 100, 50)
    # Confirmed by energy (6, 2), other claims by energy (7, 1), the rest by distance from 0.5 with the
    # rare one last (3, 0, 5); the dead latent never.
    assert order.tolist() == [6, 2, 7, 1, 3, 0, 5]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_as_many_as_asked_for(count):
    assert strongest_latents(two_model_columns(), LABELS, count, 50).tolist() == [6, 2, 7, 1][:count]


def test_two_models_without_verdicts():
    columns = two_model_columns()
    del columns["verdict"]
    assert strongest_latents(columns, LABELS, 4, 50).tolist() == [7, 1, 6, 2]


def test_what_is_exclusive_by_design_comes_after_what_was_found():
    columns = two_model_columns()
    columns["by_design"] = np.isin(columns["latent"], [6, 7])
    # Found: 2 is confirmed, 1 is not; by design: 6 is confirmed, 7 is not; then the rest as ever.
    assert strongest_latents(columns, LABELS, 100, 50).tolist() == [2, 1, 6, 7, 3, 0, 5]


def difference_columns(share_novel, energy, active):
    share = np.array(share_novel, float)
    return {
        "latent": np.arange(len(share)),
        "energy": np.array(energy, float),
        "active_tokens": np.array(active),
        "share_novel": share,
        "share_prose": 1 - share,
    }


def test_a_difference_takes_turns_between_energy_and_concentration():
    # By energy 0, 1, 2, 3. The novel holds about a third of the activation: latent 3 lies there
    # entirely and latent 2 mostly; latent 4 does too but fired on three tokens only; latent 5 is dead.
    columns = difference_columns(
        [0.3, 0.3, 0.7, 1.0, 1.0, np.nan], [10, 8, 3, 1, 0.1, 0], [900, 900, 300, 100, 3, 0]
    )
    order = strongest_latents(columns, LABELS, 100, 50).tolist()
    # Turns: energy 0, concentration 3, energy 1, concentration 2, then what is left, the rare one last.
    assert order == [0, 3, 1, 2, 4]


def test_a_difference_on_one_text_goes_by_energy_alone():
    columns = difference_columns([1.0, 1.0, 1.0], [1, 3, 2], [100, 100, 100])
    assert strongest_latents(columns, ("novel",), 3, 50).tolist() == [1, 2, 0]
