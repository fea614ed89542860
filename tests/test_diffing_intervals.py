"""Which verdicts hold throughout the intervals, against bounds worked out by hand."""

import math

import numpy as np
import pytest
from diffing_cases import scaling_of

from crosscoder_jax.diffing.intervals import errors_in_half_interval, is_beyond_interval
from crosscoder_jax.diffing.verdicts import Verdict, verdicts

CHAT_ONLY = 2


# Quantiles at 0.975 of Student's t from a printed table: 1, 4 and 19 degrees of freedom.
@pytest.mark.parametrize(("groups", "errors"), [(2, 12.706), (5, 2.776), (20, 2.093)])
def test_an_interval_of_few_groups_is_wider(groups, errors):
    assert errors_in_half_interval(groups) == pytest.approx(errors, abs=5e-4)


def test_many_groups_give_the_normal_interval_and_one_gives_none():
    # t differs from the normal's 1.959964 by about 2.4 / n.
    assert errors_in_half_interval(10**6) == pytest.approx(1.959964, abs=1e-5)
    assert math.isnan(errors_in_half_interval(1))


@pytest.mark.parametrize(
    ("nu_error", "nu_recon", "verdict", "is_beyond"),
    [
        # Errors of 0.05 in 20 groups: half an interval is 0.105, so it ends below 0.2 from 0.09 down and
        # below 0.5 from 0.39 down; it begins above 0.2 from 0.31 up and above 0.5 from 0.61 up.
        (0.09, 0.39, Verdict.CONFIRMED, True),
        (0.10, 0.39, Verdict.CONFIRMED, False),
        (0.09, 0.40, Verdict.CONFIRMED, False),
        (-0.50, -0.50, Verdict.CONFIRMED, True),
        (0.31, 0.10, Verdict.SHRINKAGE, True),
        (0.30, 0.10, Verdict.SHRINKAGE, False),
        (0.10, 0.61, Verdict.DECOUPLING, True),
        (0.10, 0.60, Verdict.DECOUPLING, False),
        (0.30, 0.61, Verdict.BOTH, True),  # one of the two is reason enough
        (0.30, 0.60, Verdict.BOTH, False),
    ],
)
def test_bounds_of_what_holds_throughout_the_interval(nu_error, nu_recon, verdict, is_beyond):
    tested = scaling_of([nu_error], [nu_recon], error=0.05)
    found = verdicts(np.array([CHAT_ONLY]), tested)
    assert found == [verdict]
    assert is_beyond_interval(found, tested).tolist() == [is_beyond]


def test_what_is_undetermined_or_not_claimed_is_never_sure():
    tested = scaling_of([0.0, 0.0, 0.9], [0.0, 0.0, 0.9], error=0.01)
    found = [Verdict.UNDETERMINED, Verdict.NONE, Verdict.NONE]
    assert is_beyond_interval(found, tested).tolist() == [False] * 3


def test_an_error_that_could_not_be_estimated_is_no_certainty():
    tested = scaling_of([0.0, 0.9], [0.0, 0.9], error=np.nan)
    assert is_beyond_interval([Verdict.CONFIRMED, Verdict.BOTH], tested).tolist() == [False, False]


def test_cutoffs_are_arguments():
    tested = scaling_of([0.3], [0.6], error=0.01)
    limits = {"max_nu_error": 0.4, "max_nu_recon": 0.7}
    assert is_beyond_interval([Verdict.CONFIRMED], tested, **limits).tolist() == [True]
    assert is_beyond_interval([Verdict.CONFIRMED], tested).tolist() == [False]
