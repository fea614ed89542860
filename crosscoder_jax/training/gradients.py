"""What a step minimises, and its gradient: of a whole batch at once, or part by part in less memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P, lax
from jaxtyping import Array, Bool, Int

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.kernels import native
from crosscoder_jax.metrics import ReconstructionSums, fired_counts, l0, reconstruction_sums
from crosscoder_jax.objectives import gate_loss
from crosscoder_jax.sparsity import Gated, SparseCode
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.forward import Forward, count_silence, dead_latents, encode
from crosscoder_jax.training.kept import can_be_listed, gradients_of_kept
from crosscoder_jax.training.state import TrainState
from crosscoder_jax.typing import Acts, Code, Latents, Scalar, Threshold


class _Batch(NamedTuple):
    """What the loss of some tokens depends on besides them."""

    step: Int[Array, ""]
    is_dead: Bool[Array, "latent"] | None
    spread: Scalar | None
    """Of the residuals of all tokens; ``None`` takes that of the tokens given."""


_PartSums = tuple[tuple[Array | np.ndarray | np.floating, ...], dict[str, Scalar]]
"""Sums of the reconstruction, in their order, and parts of the loss."""


def gradients(state: TrainState, normalized: Acts, config: TrainConfig) -> tuple[Scalar, Forward, nnx.State]:
    """Return the loss of a batch, what its forward pass leaves, and the gradient of the parameters.

    Args:
        state: before the step.
        normalized: the batch.
        config: the recipe.
    """
    if config.micro_batches > 1 or config.is_rematerialized:
        return _gradients_by_parts(state, normalized, config)
    if can_be_listed(config) and _platform(normalized) == "cpu" and native.is_available():
        return gradients_of_kept(state, normalized, config)
    return _gradients_at_once(state, normalized, config)


def _platform(array: Array) -> str:
    """Return what an array is computed on: its mesh's devices, which need not be here, or else JAX's own."""
    mesh = jax.typeof(array).sharding.mesh
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def _gradients_at_once(
    state: TrainState, normalized: Acts, config: TrainConfig
) -> tuple[Scalar, Forward, nnx.State]:
    def objective(params: nnx.State) -> tuple[Scalar, Forward]:
        crosscoder = nnx.merge(state.graphdef, params, state.fixed)
        pre_acts = encode(crosscoder, normalized, config)
        sparse = _select(crosscoder, pre_acts, state)
        since_fired = count_silence(state.tokens_since_fired, fired_counts(sparse.code), len(normalized))
        batch = _Batch(state.step, dead_latents(since_fired, config), None)
        sums, parts = _losses(crosscoder, normalized, pre_acts, sparse.code, batch, config)
        forward = Forward(sums, l0(sparse.code), sparse.smallest_score, since_fired, parts)
        return jax.tree.reduce(jnp.add, parts), lax.stop_gradient(forward)

    (loss, forward), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    return loss, forward, grads


def _gradients_by_parts(
    state: TrainState, normalized: Acts, config: TrainConfig
) -> tuple[Scalar, Forward, nnx.State]:
    """Return the same, decoding one part of the batch after the other, or all of it as one part.

    Pre-activations are kept of the whole batch, over which is decided what the code keeps; that is made anew
    from them and the cut, so that nothing else of the forward pass stays for the backward pass.
    """
    crosscoder = nnx.merge(state.graphdef, state.params, state.fixed)
    pre_acts = encode(crosscoder, normalized, config)
    sparse = _select(crosscoder, pre_acts, state)
    since_fired = count_silence(state.tokens_since_fired, fired_counts(sparse.code), len(normalized))
    # What lies above the next smaller number is what reaches the cut.
    below = jnp.nextafter(sparse.smallest_score, jnp.zeros_like(sparse.smallest_score))
    batch = _Batch(state.step, dead_latents(since_fired, config), None)
    if batch.is_dead is not None:
        measure = functools.partial(_spread, crosscoder, pre_acts, normalized, below, config)
        nothing = functools.partial(jnp.zeros, (), normalized.dtype)
        batch = batch._replace(spread=lax.cond(jnp.any(batch.is_dead), measure, nothing))

    def add(grads: nnx.State, index: Array) -> tuple[nnx.State, _PartSums]:
        encoded, acts = (_part(values, index, config.micro_batches) for values in (pre_acts, normalized))
        more, sums = _part_gradients(state, encoded, acts, below, batch, config)
        return jax.tree.map(jnp.add, grads, more), sums

    nothing = jax.tree.map(jnp.zeros_like, state.params)
    grads, of_parts = lax.scan(add, nothing, jnp.arange(config.micro_batches))
    sums, parts = jax.tree.map(lambda of_part: jnp.sum(of_part, axis=0), of_parts)
    forward = Forward(ReconstructionSums(*sums), l0(sparse.code), sparse.smallest_score, since_fired, parts)
    return jax.tree.reduce(jnp.add, parts), forward, grads


def _part_gradients(
    state: TrainState,
    pre_acts: Latents,
    normalized: Acts,
    below: Threshold,
    batch: _Batch,
    config: TrainConfig,
) -> tuple[nnx.State, _PartSums]:
    """Return what some tokens of a batch add to the gradient, to its sums and to the parts of its loss."""

    def objective(params: nnx.State, pre_acts: Latents) -> tuple[Scalar, _PartSums]:
        crosscoder = nnx.merge(state.graphdef, params, state.fixed)
        code = crosscoder.inference_code(pre_acts, threshold=below)
        sums, parts = _losses(crosscoder, normalized, pre_acts, code, batch, config)
        parts = {name: loss / config.micro_batches for name, loss in parts.items()}
        plain = sums.tokens, sums.total, sums.energy, sums.error
        return jax.tree.reduce(jnp.add, parts), lax.stop_gradient((plain, parts))

    def encoded(params: nnx.State) -> Latents:
        return encode(nnx.merge(state.graphdef, params, state.fixed), normalized, config)

    differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)
    (grads, of_pre_acts), sums = differentiate(state.params, pre_acts)
    (of_encoder,) = jax.vjp(encoded, state.params)[1](of_pre_acts)
    return jax.tree.map(jnp.add, grads, of_encoder), sums


def _spread(
    crosscoder: Crosscoder, pre_acts: Latents, normalized: Acts, below: Threshold, config: TrainConfig
) -> Scalar:
    """Return the mean squared distance of the residuals of a batch from their mean."""
    number, num_tokens = config.micro_batches, len(normalized)

    def add(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        code = crosscoder.inference_code(_part(pre_acts, index, number), threshold=below)
        residual = _part(normalized, index, number) - crosscoder.decode_normalized(code)
        return sums[0] + jnp.sum(residual, axis=0), sums[1] + jnp.sum(jnp.square(residual))

    nothing = jnp.zeros_like(crosscoder.b_dec[...]), jnp.zeros((), normalized.dtype)
    total, energy = lax.fori_loop(0, number, add, nothing)
    return (energy - jnp.sum(jnp.square(total)) / num_tokens) / num_tokens


def _part(values: Array, index: Array, number: int) -> Array:
    """Return one of ``number`` parts of the rows: as many of each shard, neighbours in its memory."""
    sharding, rest, num_rows = jax.typeof(values).sharding, values.shape[1:], len(values) // number
    if sharding.mesh.empty:
        return lax.dynamic_slice_in_dim(values, index * num_rows, num_rows)
    axis, *others = sharding.spec
    shards = 1 if axis is None else sharding.mesh.shape[axis]
    parts = values.reshape(
        shards, number, num_rows // shards, *rest, out_sharding=P(axis, None, None, *others)
    )
    part = lax.dynamic_index_in_dim(parts, index, axis=1, keepdims=False)
    return part.reshape(num_rows, *rest, out_sharding=sharding.spec)


def _select(crosscoder: Crosscoder, pre_acts: Latents, state: TrainState) -> SparseCode:
    with jax.named_scope("selection"):
        return crosscoder.training_code(pre_acts, step=state.step, threshold=state.threshold)


def _losses(
    crosscoder: Crosscoder,
    normalized: Acts,
    pre_acts: Latents,
    code: Code,
    batch: _Batch,
    config: TrainConfig,
) -> tuple[ReconstructionSums, dict[str, Scalar]]:
    """Return the sums of the reconstruction and every part of the loss, a mean over the tokens given."""
    sources = config.crosscoder.sources
    recon = crosscoder.decode_normalized(code)
    parts = {"loss/reconstruction": _reconstruction_loss(crosscoder, normalized, code, recon, config)}
    if config.delta is not None:
        parts["loss/delta"] = config.delta(crosscoder, normalized - recon, config.loss)
    is_gated = isinstance(config.crosscoder.sparsity, Gated)
    if config.l1 is not None:
        penalised, norms = code, crosscoder.penalty_weights()
        if is_gated:  # it closes gates and shrinks no decoder, whose gains would make up for it without end
            penalised, norms = jax.nn.relu(pre_acts), lax.stop_gradient(norms)
        parts["loss/l1"] = config.l1(penalised, norms, batch.step)
    if is_gated:
        parts["loss/gate"] = gate_loss(crosscoder, pre_acts, normalized, config.loss)
    if config.l0 is not None:
        parts["loss/l0"] = config.l0(crosscoder, pre_acts, batch.step)
    if config.aux_k is not None and batch.is_dead is not None:
        with jax.named_scope("aux_k"):
            parts["loss/aux_k"] = config.aux_k(
                crosscoder, pre_acts, normalized - recon, batch.is_dead, spread=batch.spread
            )
    return reconstruction_sums(normalized, recon, sources), parts


def _reconstruction_loss(
    crosscoder: Crosscoder, normalized: Acts, code: Code, recon: Acts, config: TrainConfig
) -> Scalar:
    if config.matryoshka is None:
        return config.loss(normalized - recon, config.crosscoder.sources)
    return config.matryoshka(crosscoder, normalized, code, recon, config.loss)
