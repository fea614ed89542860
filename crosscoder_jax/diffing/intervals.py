"""How sure a ratio of Latent Scaling is: its 95 % interval, and the verdicts that hold throughout it."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from scipy.special import stdtrit

from crosscoder_jax.diffing.latent_scaling import LatentScaling
from crosscoder_jax.diffing.verdicts import MAX_NU_ERROR, MAX_NU_RECON, Verdict


def errors_in_half_interval(num_groups: int) -> float:
    """Return the standard errors on either side of an estimate in its 95 % interval.

    A jackknife over few groups is unsure of the standard error itself, so the quantile is Student's t
    with one degree of freedom less than groups; with many groups it is 1.96.

    Args:
        num_groups: groups of documents that hold any token.

    Returns:
        NaN for fewer than two groups, which give no standard error.

    Examples:
        >>> round(errors_in_half_interval(20), 3)
        2.093
    """
    return float(stdtrit(num_groups - 1, 0.975)) if num_groups > 1 else float("nan")


def is_beyond_interval(
    found: Sequence[Verdict],
    scaling: LatentScaling,
    *,
    max_nu_error: float = MAX_NU_ERROR,
    max_nu_recon: float = MAX_NU_RECON,
) -> Bool[np.ndarray, "latent"]:
    """Tell which verdicts hold anywhere in the 95 % intervals of the ratios they were found by.

    Of a confirmed latent both intervals end below the cut-offs; of one that was refuted as an artefact one
    begins at its cut-off or above. False for latents without such a verdict.

    Args:
        found: from :func:`~crosscoder_jax.diffing.verdicts.verdicts`.
        scaling: what they were found in.
        max_nu_error: as there.
        max_nu_recon: as there.
    """
    errors = errors_in_half_interval(scaling.num_groups)
    tested = (
        (scaling.nu_error, scaling.se_nu_error, max_nu_error),
        (scaling.nu_recon, scaling.se_nu_recon, max_nu_recon),
    )
    is_below = np.all([nu + errors * se < limit for nu, se, limit in tested], axis=0)
    is_above = np.any([nu - errors * se >= limit for nu, se, limit in tested], axis=0)
    is_confirmed = np.array([verdict is Verdict.CONFIRMED for verdict in found], bool)
    is_refuted = np.array([verdict.is_artefact for verdict in found], bool)
    return (is_confirmed & is_below) | (is_refuted & is_above)
