"""The optimiser: clip by the global norm, Adam or Muon, and the schedule of its rate."""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from crosscoder_jax.sharding import Shardings
from crosscoder_jax.sparsity import JumpReLU
from crosscoder_jax.training.adam import Factors
from crosscoder_jax.training.config import TrainConfig

CLIP_EPSILON = 1e-6
"""Added to the norm that gradients are divided by, as PyTorch and so the published runs do."""


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Return the rate at each step: linear warm-up, constant, linear decay to zero.

    Where dead latents are resampled it warms up again each time.
    """
    decay_steps = min(round(config.decay_fraction * config.num_steps), config.num_steps - config.warmup_steps)
    every = config.resampling.every_steps if config.resampling else config.num_steps + 1

    def rate(count: ArrayLike) -> Array:
        step = jnp.asarray(count, config.crosscoder.param_dtype)
        rise = step % every / config.warmup_steps if config.warmup_steps else 1.0
        fall = (config.num_steps - step) / max(decay_steps, 1)
        return config.learning_rate * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

    return rate


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the recipe's optimiser under the learning-rate schedule, after clipping by the global norm."""
    clip = optax.identity() if config.clip_norm is None else clip_by_global_norm(config.clip_norm)
    scale = config.optimizer.transformation()
    rate = optax.scale_by_learning_rate(learning_rate_schedule(config))
    if isinstance(config.crosscoder.sparsity, JumpReLU):
        return optax.chain(clip, scale, rate, _faster_thresholds(math.sqrt(config.crosscoder.sources.width)))
    return optax.chain(clip, scale, rate)


def _faster_thresholds(factor: float) -> optax.GradientTransformation:
    """Multiply the updates of JumpReLU's thresholds, whose unit is that of scores and not of weights."""

    def scale(updates: optax.Updates) -> optax.Updates:
        return jax.tree.map_with_path(
            lambda path, update: (
                update * factor if "latent_threshold" in jax.tree_util.keystr(path) else update
            ),
            updates,
        )

    return optax.stateless(lambda updates, params: scale(updates))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Return ``g * min(1, max_norm / (||g|| + 1e-6))``, ``||g||`` over all parameters.

    Optax divides by the norm itself, which is undefined for a gradient of zero and differs by a
    millionth otherwise.
    """

    def clip(grads: optax.Updates) -> optax.Updates:
        factor = jnp.minimum(1.0, max_norm / (global_norm(grads) + CLIP_EPSILON))
        return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)

    return optax.stateless(lambda grads, params: clip(grads))


def global_norm(tree: optax.Updates) -> Float[Array, ""]:
    """Return the L2 norm of all leaves together."""
    return jnp.sqrt(jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]).sum())


def spread_moments(opt_state: optax.OptState, shardings: Shardings) -> optax.OptState:
    """Return the state of :func:`make_optimizer` with the moments of encoder and decoder laid out anew."""
    specs = {"w_enc": shardings.moments_wl, "w_dec": shardings.moments_lw}

    def spread(moments: optax.Updates) -> optax.Updates:
        kept: Any = jax.tree.map(lambda leaf: leaf, moments)
        for name, spec in specs.items():
            if spec is not None:
                kept[name] = kept[name].replace(_spread(kept[name].get_value(), spec))
        return kept

    clip, adam, *rest = cast(tuple[Any, ...], opt_state)
    return clip, adam._replace(mu=spread(adam.mu), nu=spread(adam.nu)), *rest


def _spread(moment: Array | Factors | optax.EmptyState, spec: jax.P) -> Array | Factors | optax.EmptyState:
    if isinstance(moment, optax.EmptyState):
        return moment
    if isinstance(moment, Factors):
        return Factors(jax.reshard(moment.rows, jax.P(spec[0])), jax.reshard(moment.columns, jax.P(spec[1])))
    return jax.reshard(moment, spec)


def as_moments(grads: optax.Updates, opt_state: optax.OptState) -> optax.Updates:
    """Return gradients laid out as the moments that they are added to."""
    return jax.tree.map(_laid_out_as, grads, cast(tuple[Any, ...], opt_state)[1].mu)


def add_updates(params: nnx.State, updates: optax.Updates) -> nnx.State:
    """Return parameters, laid out as they are, with updates added."""
    return jax.tree.map(lambda param, update: param + _laid_out_as(update, param), params, updates)


def _laid_out_as(values: Array, like: Array) -> Array:
    mine, wanted = jax.typeof(values).sharding, jax.typeof(like).sharding
    return values if mine.spec == wanted.spec else jax.reshard(values, wanted.spec)


def forget_moments(
    opt_state: optax.OptState, is_forgotten: Mapping[str, Bool[Array, "..."]]
) -> optax.OptState:
    """Return the state of :func:`make_optimizer` with zero moments where a mask says so.

    Args:
        opt_state: not changed.
        is_forgotten: masks that broadcast to the parameters of these names.
    """
    clip, adam, *rest = cast(tuple[Any, ...], opt_state)

    def forget(moments: optax.Updates) -> optax.Updates:
        kept: Any = jax.tree.map(lambda leaf: leaf, moments)
        for name, mask in is_forgotten.items():
            if not isinstance(values := kept[name].get_value(), optax.EmptyState):
                kept[name] = kept[name].replace(jnp.where(mask, jnp.zeros_like(values), values))
        return kept

    return clip, adam._replace(mu=forget(adam.mu), nu=forget(adam.nu)), *rest
