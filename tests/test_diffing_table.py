import numpy as np
import pytest

from crosscoder_jax.diffing.table import class_summary, strongest_latents

LABELS = ("prose", "novel")


def two_model_columns():
    """Eight latents: number, class, verdict, energy, active tokens, delta_norm."""
    rows = [
        ("shared", "", 9.0, 900, 0.50),
        ("chat-only", "complete shrinkage", 5.0, 300, 0.95),
        ("base-only", "confirmed", 1.0, 80, 0.05),
        ("other", "", 3.0, 400, 0.75),
        ("dead", "", 0.0, 0, 0.99),
        ("other", "", 3.0, 5, 0.85),  # further out than latent 3, but it fired on five tokens only
        ("chat-only", "confirmed", 2.0, 60, 0.97),
        ("chat-only", "undetermined", 7.0, 4, 1.00),
    ]
    classes, verdict, energy, active, delta = zip(*rows, strict=True)
    return {
        "latent": np.arange(8),
        "latent_class": np.array(classes, object),
        "verdict": np.array(verdict, object),
        "evidence": np.array(["too little" if n < 50 else "enough" for n in active], object),
        "energy": np.array(energy),
        "active_tokens": np.array(active),
        "delta_norm": np.array(delta),
    }


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


def test_class_summary_by_hand():
    summary = class_summary(two_model_columns())
    assert summary["counts"] == {"base-only": 1, "shared": 1, "chat-only": 3, "other": 2, "dead": 1}
    assert (summary["claimed"], summary["confirmed"]) == (4, 2)
    assert summary["confirmed_by_class"] == {"base-only": 1, "chat-only": 1}
    assert summary["verdicts"]["undetermined"] == 1
    assert summary["verdicts"]["latent decoupling"] == 0
    assert summary["too_little_evidence"] == 3
    counts = summary["delta_norm_histogram"]["counts"]
    # Bins are 0.02 wide; 1.0 belongs to the last one, and the dead latent's 0.99 is not counted.
    assert (sum(counts), counts[2], counts[25], counts[49]) == (7, 1, 1, 1)
