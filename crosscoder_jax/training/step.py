"""One optimiser step, and one measurement, as pure functions."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Int

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.metrics import (
    ReconstructionSums,
    active_latents,
    explained_variance,
    fired_counts,
    named_thresholds,
    reconstruction_sums,
)
from crosscoder_jax.objectives import AuxK
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.gradients import Forward, gradients
from crosscoder_jax.training.laws import RunningMean
from crosscoder_jax.training.optimizer import (
    add_updates,
    as_moments,
    learning_rate_schedule,
    make_optimizer,
)
from crosscoder_jax.training.resampling import resample
from crosscoder_jax.training.state import TrainState
from crosscoder_jax.typing import Acts, Scalar, Threshold

Metrics = dict[str, Array | np.ndarray]


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(state: TrainState, acts: Acts, *, config: TrainConfig) -> tuple[TrainState, Metrics]:
    """Take one step; the state given is donated and must not be used again.

    Args:
        state: from :func:`init_state` or the step before.
        acts: one global batch of raw activations, all sources concatenated.
        config: the recipe; compiled in.

    Returns:
        The next state and scalar metrics of this batch before the update. ``is_finite/<tensor>``
        are False where the batch, the loss, a gradient or an updated weight holds a NaN or an infinity.

    Examples:
        >>> import crosscoder_jax as cc
        >>> sources = cc.Sources((cc.Source("base", 8), cc.Source("chat", 8)))
        >>> recipe = TrainConfig(
        ...     cc.CrosscoderConfig(sources, num_latents=32, sparsity=cc.BatchTopK(k=4)),
        ...     num_steps=10, batch_size=64, warmup_steps=2,
        ... )
        >>> state = cc.init_state(recipe)
        >>> acts = jax.random.normal(jax.random.key(0), (64, 16))
        >>> state, metrics = train_step(state, acts, config=recipe)
        >>> int(state.step), float(metrics["l0"])
        (1, 4.0)
    """
    normalized = nnx.merge(state.graphdef, state.params, state.fixed).normalize(acts)

    loss, forward, grads = gradients(state, normalized, config)
    held = _held_weights(state, config)
    nothing = jax.tree.map(jnp.zeros_like, grads)
    # What may not move shall have no part in moments and in the norm that is clipped either.
    grads = _put_back(held, _projected(grads, state), nothing)
    grads = jax.tree.map(_row_major, as_moments(grads, state.opt_state))
    with jax.named_scope("update"):
        updates, opt_state = make_optimizer(config).update(grads, state.opt_state, state.params)
        moved = _projected(add_updates(state.params, updates), state)
        params = _put_back(held, _with_tied_norms(moved, state), state.params)
    next_state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        running_threshold=_running_threshold(state, forward.smallest_score, config),
        tokens_since_fired=forward.tokens_since_fired,
    )
    if config.resampling is not None:
        begin_again = functools.partial(resample, normalized=normalized, law=config.resampling)
        next_state = jax.lax.cond(
            config.resampling.is_due(state.step), begin_again, lambda unchanged: unchanged, next_state
        )
    return next_state, _train_metrics(next_state, config, acts, loss, forward, grads)


def _projected(values: nnx.State, state: TrainState) -> nnx.State:
    """Return weights, or their gradient, as the groups allow them.

    A gradient alone is not enough: an optimiser that weighs coordinates by others than themselves, as Muon
    and a factored second moment do, makes updates that leave the groups.
    """
    crosscoder = nnx.merge(state.graphdef, values, state.fixed)
    crosscoder.constrain()
    return nnx.state(crosscoder, nnx.Param)


def _held_weights(state: TrainState, config: TrainConfig) -> dict[str, Array | bool]:
    """Return by name where weights do not move, for a frozen warm start or because the recipe says so."""
    masks: dict[str, Array | bool] = {}
    if state.held is not None:
        latents, width = state.held
        masks = dict.fromkeys(config.crosscoder.rule_parameters, latents)
        masks |= {
            "w_enc": width[:, None] & latents,
            "b_enc": latents,
            "w_dec": latents[:, None] & width,
            "b_dec": width,
        }
    return masks | dict.fromkeys(config.frozen, True)


def _put_back(held: Mapping[str, Array | bool], values: nnx.State, kept: nnx.State) -> nnx.State:
    """Return values of parameters, or of their gradients, with those kept wherever one is held.

    The very bits: what an optimiser, or a group's tie, does to a held weight is undone and not prevented.
    """
    mixed: Any = jax.tree.map(lambda leaf: leaf, values)
    for name, mask in held.items():
        value, before = mixed[name].get_value(), cast(Any, kept)[name].get_value()
        mixed[name] = mixed[name].replace(jnp.where(mask, before, value))
    return mixed


def _row_major(grad: Array) -> Array:
    """Keep a gradient in the memory layout of its weight.

    JAX writes the gradient of a product as the transpose of another product. Where an all-reduce comes
    between the two, XLA for TPU does not exchange them: it takes the whole update to the transposed layout,
    and weights and moments there and back, twelve copies that are larger than all temporaries.
    """
    sharding = jax.typeof(grad).sharding
    if grad.ndim != 2 or sharding.mesh.empty:
        return grad
    # Each shard on its own: XLA's partitioner takes the constraint for an operation that needs whole arrays.
    keep = jax.shard_map(
        lambda shard: with_layout_constraint(shard, Layout((0, 1))),
        in_specs=sharding.spec,
        out_specs=sharding.spec,
    )
    return keep(grad)


def _with_tied_norms(params: nnx.State, state: TrainState) -> nnx.State:
    crosscoder = nnx.merge(state.graphdef, params, state.fixed)
    crosscoder.equalise_norms()
    return nnx.state(crosscoder, nnx.Param)


def _running_threshold(state: TrainState, smallest: Threshold, config: TrainConfig) -> RunningMean:
    mean = state.running_threshold
    added = config.threshold(mean, smallest.astype(mean.total.dtype), state.step)
    # A batch that keeps nothing has no smallest score and says nothing about the threshold.
    is_known = jnp.isfinite(smallest)
    return RunningMean(*(jnp.where(is_known, new, old) for new, old in zip(added, mean, strict=True)))


def _train_metrics(
    state: TrainState, config: TrainConfig, acts: Acts, loss: Scalar, forward: Forward, grads: nnx.State
) -> Metrics:
    grad_norms = {
        str(path[0]): jnp.sqrt(jnp.sum(jnp.square(grad[...]))) for path, grad in nnx.to_flat_state(grads)
    }
    # The next step would notice, but by then a checkpoint may hold them.
    with jax.named_scope("update"):  # which it is compiled into
        finite_weights = {
            f"is_finite/{path[0]} after the update": jnp.all(jnp.isfinite(value[...]))
            for path, value in nnx.to_flat_state(state.params)
        }
    aux_k = AuxK if config.aux_k is None else config.aux_k
    return {
        "loss": loss,
        **forward.parts,
        **explained_variance(forward.sums, config.crosscoder.sources),
        "l0": forward.l0,
        # By how long it is since a latent fired; on held-out tokens "dead" is one that fires on none of them.
        "dead": jnp.mean(state.tokens_since_fired >= aux_k.dead_after_tokens),
        **named_thresholds(state.threshold, config.crosscoder.threshold_names),
        "lr": jnp.asarray(learning_rate_schedule(config)(state.step - 1)),
        "grad_norm": jnp.sqrt(sum(jnp.square(norm) for norm in grad_norms.values())),
        "is_finite/batch": jnp.isfinite(jnp.sum(forward.sums.energy)),
        "is_finite/loss": jnp.isfinite(loss),
        **{f"is_finite/gradient of {name}": jnp.isfinite(norm) for name, norm in grad_norms.items()},
        **finite_weights,
    }


class EvalBatch(NamedTuple):
    """Sums of one batch under both rules; add them up and finalise."""

    inference: ReconstructionSums
    training: ReconstructionSums
    """Zero for a batch that is filled up: BatchTopK would share out k of the padding too."""
    active_inference: Scalar
    """Latents active at the inference rule, summed over tokens."""
    active_training: Scalar
    """The same at the training rule, applied to this batch."""
    fired: Int[Array, "latent"]
    """Tokens on which each latent fires at the inference rule."""


@jax.jit
def eval_step(crosscoder: Crosscoder, acts: Acts, is_valid: Bool[Array, "batch"]) -> EvalBatch:
    """Measure one batch of raw activations; nothing changes state.

    (Logging a loss with the code behind arXiv 2504.02922 counts the batch as tokens without firing, so
    that latents are called dead earlier the more often one looks.)

    Args:
        crosscoder: whose inference threshold and training rule are measured.
        acts: raw activations; rows that are not valid are ignored, whatever they hold.
        is_valid: which rows are tokens.
    """
    sources = crosscoder.config.sources
    normalized = jnp.where(is_valid[:, None], crosscoder.normalize(acts), 0.0)
    pre_acts = jnp.where(is_valid[:, None], crosscoder.pre_acts(normalized), 0.0)
    inference = crosscoder.inference_code(pre_acts)
    training = crosscoder.training_code(pre_acts).code
    in_full_batch = is_valid & jnp.all(is_valid)

    def sums(code: Array, rows: Array) -> ReconstructionSums:
        return reconstruction_sums(normalized, crosscoder.decode_normalized(code), sources, rows)

    return EvalBatch(
        inference=sums(inference, is_valid),
        training=sums(training, in_full_batch),
        active_inference=active_latents(inference, is_valid),
        active_training=active_latents(training, in_full_batch),
        fired=fired_counts(inference, is_valid),
    )
