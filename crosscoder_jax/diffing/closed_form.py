"""Latent Scaling in closed form: coefficients, ratios and their standard errors from sums."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

TARGETS = ("activation", "activation_no_bias", "reconstruction", "error")
"""What a latent's reference decoder is scaled to fit, for each model."""

STATISTICS = ("code", "code_squared", "active", "residual_0", "residual_1", "recon_0", "recon_1")
"""What is summed over tokens per latent and group: f, f^2, [f > 0], and f (y . d) for y the residual
``h - hhat`` and the reconstruction ``hhat`` of sources 0 and 1."""

Sums = Float[Array, "statistic *group"]


def scaling_coefficients(
    sums: Sums, gram: Float[Array, "source"], bias: Float[Array, "source"], reference: Int[Array, ""]
) -> Float[Array, "target source *group"]:
    """Return the least-squares coefficients beta of one latent for every target and source.

    ``beta = d . sum f y / (||d||^2 sum f^2)`` with the latent's reference decoder ``d`` for both
    sources. Each target is linear in the sums:
    ``h = residual + recon``; ``h - b_dec`` subtracts ``sum f * (b . d)``; the error target, with
    the latent's own contribution ``f d^m`` put back, adds ``sum f^2 * (d^m . d)`` to the residual.

    Args:
        sums: one latent's sums over tokens, in the order of :data:`STATISTICS`.
        gram: ``d^m . d`` of each source m.
        bias: ``b_dec^m . d`` of each source m.
        reference: the source whose decoder is ``d``.

    Returns:
        Coefficients in the order of :data:`TARGETS`; NaN for a latent that never fires.

    References:
        Minder et al. 2025, arXiv 2504.02922, section 3.2.
    """
    code, code_squared = sums[0], sums[1]
    residual, recon = sums[3:5], sums[5:7]
    gram_column, bias_column = (jnp.expand_dims(x, tuple(range(1, residual.ndim))) for x in (gram, bias))
    activation = residual + recon
    numerators = jnp.stack(
        [activation, activation - code * bias_column, recon, residual + code_squared * gram_column]
    )
    return numerators / (code_squared * gram[reference])


def nu_ratios(
    beta: Float[Array, "target source *group"], reference: Int[Array, ""]
) -> Float[Array, "2 *group"]:
    """Return nu_error and nu_recon of one latent: the other source's beta over the reference's."""
    pair = jnp.stack([beta[TARGETS.index("error")], beta[TARGETS.index("reconstruction")]])
    return pair[:, 1 - reference] / pair[:, reference]


def jackknife_error(
    left_out: Float[Array, "*value group"], is_used: Shaped[Array, "group"]
) -> Float[Array, "*value"]:
    """Return the delete-one-group standard error of estimates.

    ``sqrt((G - 1) / G * sum_g (v_g - mean v)^2)``, where ``v_g`` is the estimate without group g.
    Tokens of one document belong to one group, so correlation within documents is respected.

    Args:
        left_out: the estimate without each group.
        is_used: groups that hold any token; the others say nothing and do not count.

    Returns:
        NaN with fewer than two groups, or where leaving out a group leaves no estimate.

    References:
        Efron & Stein 1981; Kuensch 1989 (groups).
    """
    count = jnp.sum(is_used)
    mean = jnp.sum(jnp.where(is_used, left_out, 0), axis=-1, keepdims=True) / count
    squared = jnp.sum(jnp.where(is_used, jnp.square(left_out - mean), 0), axis=-1)
    return jnp.where(count > 1, jnp.sqrt((count - 1) / count * squared), jnp.nan)


def solve_one_latent(
    sums: Float[Array, "statistic group"],
    gram: Float[Array, "source"],
    bias: Float[Array, "source"],
    reference: Int[Array, ""],
    tokens: Float[Array, "group"],
) -> dict[str, Array]:
    """Return one latent's coefficients and ratios, each with its standard error."""
    total = jnp.sum(sums, axis=-1)
    # Left-out sums are differences of totals: this is what needs float64, since the spread between
    # groups may be a thousandth of the value and its square is what counts.
    left_out = total[:, None] - sums
    beta = scaling_coefficients(total, gram, bias, reference)
    beta_left_out = scaling_coefficients(left_out, gram, bias, reference)
    nu = nu_ratios(beta, reference)
    return {
        "beta": beta,
        "se_beta": jackknife_error(beta_left_out, tokens > 0),
        "nu": nu,
        "se_nu": jackknife_error(nu_ratios(beta_left_out, reference), tokens > 0),
    }


_solve_all_latents = jax.jit(jax.vmap(solve_one_latent, in_axes=(-1, -1, -1, 0, None), out_axes=-1))


def solve_in_float64(
    sums: Float[np.ndarray, "statistic group latent"],
    gram: Float[np.ndarray, "source latent"],
    bias: Float[np.ndarray, "source latent"],
    reference: Int[np.ndarray, "latent"],
    tokens: Float[np.ndarray, "group"],
) -> dict[str, np.ndarray]:
    """Solve for every latent in float64, whatever precision the process computes in otherwise.

    The sums are small (groups x latents), so the cost does not matter even where float64 is emulated.
    """
    with jax.enable_x64(True):
        solved = _solve_all_latents(sums, gram, bias, reference, tokens)
        return {name: np.asarray(value) for name, value in solved.items()}
