import jax.numpy as jnp
import numpy as np
import pytest
from diffing_cases import scaling_of

from crosscoder_jax.diffing.closed_form import TARGETS
from crosscoder_jax.diffing.decoder_norms import LatentClass
from crosscoder_jax.diffing.verdicts import Verdict, verdicts, why_not_confirmed

BASE, SHARED, CHAT, OTHER, DEAD = (int(c) for c in LatentClass)


def test_the_four_outcomes_and_their_bounds():
    # Confirmed strictly below both cut-offs; a value at a cut-off is not below it.
    found = verdicts(
        np.full(6, CHAT), scaling_of([0.0, 0.2, 0.1, 0.9, 0.19, -0.5], [0.0, 0.1, 0.5, 0.9, 0.49, -0.1])
    )
    assert found == [
        Verdict.CONFIRMED,
        Verdict.SHRINKAGE,
        Verdict.DECOUPLING,
        Verdict.BOTH,
        Verdict.CONFIRMED,
        Verdict.CONFIRMED,
    ]
    assert [str(v) for v in found[:4]] == [
        "confirmed",
        "complete shrinkage",
        "latent decoupling",
        "shrinkage and decoupling",
    ]


def test_only_exclusive_latents_get_a_verdict():
    classes = jnp.array([BASE, SHARED, CHAT, OTHER, DEAD])
    found = verdicts(classes, scaling_of([0.0] * 5, [0.0] * 5, reference=[0, 1, 1, 0, 1]))
    assert [str(v) for v in found] == ["confirmed", "", "confirmed", "", ""]


def test_too_little_evidence_is_undetermined_whatever_the_ratios():
    ratios = [0.0, 0.9, np.nan]
    found = verdicts(np.full(3, CHAT), scaling_of(ratios, ratios, has_evidence=[False] * 3))
    assert set(found) == {Verdict.UNDETERMINED}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["nu_error", "nu_recon"])
def test_a_ratio_that_does_not_exist_confirms_nothing(which, value):
    ratios = {"nu_error": [0.1], "nu_recon": [0.1]} | {which: [value]}
    assert verdicts(np.array([CHAT]), scaling_of(**ratios)) == [Verdict.UNDETERMINED]


def test_each_reason_against_a_confirmation_is_told():
    shared, confirmed, shrunk, both, rare, narrow, unclear, missing = range(8)
    classes = np.array([SHARED, *[CHAT] * 7])
    has_evidence = np.array([True, True, True, True, False, False, False, True])
    nu_error = [0.9, 0.1, 0.41, 0.3, 0.1, 0.1, 0.9, np.nan]
    tested = scaling_of(nu_error, [0.9, 0.1, 0.1, 0.8, 0.1, 0.1, 0.1, 0.1], has_evidence)
    tested.active_tokens[rare], tested.active_groups[narrow] = 12, 2
    tested.beta[TARGETS.index("error"), 1, unclear] = 0.15  # its error is 0.1
    told = why_not_confirmed(verdicts(classes, tested), tested)
    assert told[shared] == told[confirmed] == ""
    assert told[shrunk] == "nu_error 0.41 is not below 0.2"
    assert told[both] == "nu_error 0.30 is not below 0.2; nu_recon 0.80 is not below 0.5"
    assert told[rare] == "fires on 12 tokens, fewer than 50"
    assert told[narrow] == "fires in 2 of the groups of documents, fewer than 3"
    # A ratio without evidence is no reason: only what is missing is told.
    assert told[unclear] == "its own model's error does not clearly hold it"
    assert told[missing] == "nu_error is nan"


def test_reasons_use_the_cutoffs_that_were_asked_for():
    tested = scaling_of([0.3], [0.6])
    limits = {"max_nu_error": 0.25, "max_nu_recon": 0.7}
    found = verdicts(np.array([CHAT]), tested, **limits)
    assert why_not_confirmed(found, tested, **limits) == ["nu_error 0.30 is not below 0.25"]


def test_cutoffs_are_arguments():
    tested = scaling_of([0.3], [0.6])
    assert verdicts(np.array([CHAT]), tested) == [Verdict.BOTH]
    assert verdicts(np.array([CHAT]), tested, max_nu_error=0.4, max_nu_recon=0.7) == [Verdict.CONFIRMED]


@pytest.mark.parametrize(("latent_class", "reference"), [(CHAT, 0), (BASE, 1)])
def test_refuses_a_test_from_the_wrong_side(latent_class, reference):
    with pytest.raises(ValueError, match=rf"latents \[1\].*reference={1 - reference}"):
        verdicts(np.array([SHARED, latent_class]), scaling_of([0, 0], [0, 0], reference=[1, reference]))
