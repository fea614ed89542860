"""Dead latents begin again with the directions of badly reconstructed tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.sharding import reshard
from crosscoder_jax.sources import safe_norm
from crosscoder_jax.training.laws import Resampling
from crosscoder_jax.training.optimizer import forget_moments
from crosscoder_jax.training.state import TrainState
from crosscoder_jax.typing import Acts, DecoderWeights, PRNGKey


def resample(state: TrainState, normalized: Acts, law: Resampling) -> TrainState:
    """Return the state in which the latents that are dead by the law have begun again.

    Args:
        state: after the optimiser step.
        normalized: the batch of that step, whose tokens the new latents take.
        law: when a latent is dead and how it begins.
    """
    crosscoder = nnx.merge(state.graphdef, state.params, state.fixed)
    sources, shardings = crosscoder.config.sources, crosscoder.shardings
    is_dead = state.tokens_since_fired > law.every_steps * normalized.shape[0] // 2
    errors = reshard(_errors(crosscoder, normalized, state.step), shardings.replicated)
    order = drawn_tokens(jax.random.fold_in(state.key, state.step), errors)
    # One bit and one number per latent: everything wider stays where it lives.
    rank = jnp.cumsum(reshard(is_dead, shardings.replicated)) - 1
    token = reshard(order[jnp.minimum(rank, len(order) - 1)], shardings.per_latent_l)
    # Latents beyond the last token stay as they are until the next time.
    is_new = is_dead & (reshard(rank, shardings.per_latent_l) < len(order))
    rows = reshard(normalized, shardings.replicated).at[token].get(out_sharding=shardings.w_dec_lw)
    directions = jnp.concatenate([_unit(part) for part in sources.split(rows)], axis=-1)
    encoder_norms = law.encoder_share * _mean_encoder_norms(crosscoder, ~is_dead)
    begun = {
        "w_enc": (directions * sources.per_source(encoder_norms)).T,
        "b_enc": jnp.zeros_like(crosscoder.b_enc[...]),
        "w_dec": law.decoder_norm * directions,
    }
    masks = {"w_enc": is_new, "b_enc": is_new, "w_dec": is_new[:, None]}
    for name, value in begun.items():
        variable = getattr(crosscoder, name)
        variable[...] = jnp.where(masks[name], value, variable[...])
    crosscoder.constrain()
    return dataclasses.replace(
        state,
        params=nnx.state(crosscoder, nnx.Param),
        opt_state=forget_moments(state.opt_state, masks),
    )


def drawn_tokens(key: PRNGKey, errors: Float[Array, "batch"]) -> Int[Array, "batch"]:
    """Return all tokens in the order in which they are drawn, without replacement.

    Each draw takes one of the tokens left in proportion to the square of its error; tokens without an
    error come last.
    """
    return jnp.argsort(-(2 * jnp.log(errors) + jax.random.gumbel(key, errors.shape, errors.dtype)))


def _errors(crosscoder: Crosscoder, normalized: Acts, step: Int[Array, ""]) -> Float[Array, "batch"]:
    """Return each token's error norm, the mean over the sources."""
    code = crosscoder.training_code(crosscoder.pre_acts(normalized), step=step).code
    residual = normalized - crosscoder.decode_normalized(code)
    parts = crosscoder.config.sources.split(residual)
    return jnp.mean(jnp.stack([safe_norm(part) for part in parts]), axis=0)


def _mean_encoder_norms(crosscoder: Crosscoder, is_alive: Bool[Array, "latent"]) -> Float[Array, "source"]:
    norms = crosscoder.config.sources.norms(crosscoder.w_enc[...].T)
    return jnp.sum(jnp.where(is_alive, norms, 0.0), axis=1) / jnp.maximum(jnp.sum(is_alive), 1)


def _unit(rows: DecoderWeights) -> DecoderWeights:
    norms = safe_norm(rows)[:, None]
    return rows / jnp.where(norms > 0, norms, 1.0)
