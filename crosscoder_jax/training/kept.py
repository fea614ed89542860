"""The gradient of a step from what BatchTopK keeps, a list of k entries a token, without a dense code."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.kernels.products import decode_kept, kept_gradients
from crosscoder_jax.metrics import reconstruction_sums
from crosscoder_jax.sparsity import BatchTopK
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.forward import Forward, count_silence, dead_latents, encode
from crosscoder_jax.training.state import TrainState
from crosscoder_jax.typing import Acts, Latents, Scalar


def can_be_listed(config: TrainConfig) -> bool:
    """Return whether a recipe's loss depends on the code through the reconstruction alone, in float32."""
    crosscoder = config.crosscoder
    return (
        isinstance(crosscoder.sparsity, BatchTopK)
        and not crosscoder.is_decoupled
        and not crosscoder.layout.budgets
        and crosscoder.dtype == "float32"
        and config.pre_acts == "full"
        and config.matryoshka is None
    )


def gradients_of_kept(
    state: TrainState, normalized: Acts, config: TrainConfig
) -> tuple[Scalar, Forward, nnx.State]:
    """Return the loss of a batch, what its forward pass leaves, and the gradient of the parameters.

    Args:
        state: before the step.
        normalized: the batch.
        config: a recipe whose codes :func:`can_be_listed`.
    """
    crosscoder = nnx.merge(state.graphdef, state.params, state.fixed)
    shardings, sparsity, weights = (
        crosscoder.shardings,
        config.crosscoder.sparsity,
        crosscoder.score_weights(),
    )
    assert isinstance(sparsity, BatchTopK)
    pre_acts = encode(crosscoder, normalized, config)
    with jax.named_scope("selection"):
        cut = sparsity.cut(pre_acts, weights, step=state.step, threshold=state.threshold)
    w_dec, most = crosscoder.w_dec[...], _most_kept(sparsity, len(normalized))
    decoded = decode_kept(pre_acts, weights, cut, w_dec, most=most, shardings=shardings)
    recon = decoded.recon + crosscoder.b_dec[...]

    def losses(recon: Acts) -> tuple[Scalar, dict[str, Scalar]]:
        parts = _reconstruction_losses(crosscoder, normalized - recon, config)
        return jax.tree.reduce(jnp.add, parts), parts

    (loss, parts), of_recon = jax.value_and_grad(losses, has_aux=True)(recon)
    found = kept_gradients(decoded, of_recon, normalized, w_dec, shardings=shardings)
    grads = jax.tree.map(jnp.zeros_like, state.params)
    grads["b_dec"][...] = jnp.sum(of_recon, axis=0)
    for name, grad in found._asdict().items():
        grads[name][...] = grad
    since_fired = count_silence(state.tokens_since_fired, decoded.fired, len(normalized))
    if config.aux_k is not None:
        parts["loss/aux_k"], grads = _with_dead(
            state, normalized, pre_acts, recon, since_fired, grads, config
        )
        loss = loss + parts["loss/aux_k"]
    sums = reconstruction_sums(normalized, recon, config.crosscoder.sources)
    l0 = decoded.num_kept.astype(jnp.float32) / len(normalized)
    return loss, Forward(sums, l0, cut, since_fired, parts), grads


def _most_kept(sparsity: BatchTopK, batch_size: int) -> int:
    """Return room for all that is kept: as much again for ties, and one latent that all tokens tie in."""
    return 2 * sparsity.most_kept(batch_size) + batch_size


def _reconstruction_losses(crosscoder: Crosscoder, residual: Acts, config: TrainConfig) -> dict[str, Scalar]:
    parts = {"loss/reconstruction": config.loss(residual, config.crosscoder.sources)}
    if config.delta is not None:
        parts["loss/delta"] = config.delta(crosscoder, residual, config.loss)
    return parts


def _with_dead(
    state: TrainState,
    normalized: Acts,
    pre_acts: Latents,
    recon: Acts,
    since_fired: jax.Array,
    grads: nnx.State,
    config: TrainConfig,
) -> tuple[Scalar, nnx.State]:
    """Return the loss of the dead latents and the gradient with theirs; nothing is computed without any."""
    aux_k, is_dead = config.aux_k, dead_latents(since_fired, config)
    assert aux_k is not None
    assert is_dead is not None
    residual = normalized - recon

    def loss_of(params: nnx.State, pre_acts: Latents) -> Scalar:
        return aux_k(nnx.merge(state.graphdef, params, state.fixed), pre_acts, residual, is_dead)

    def encoded(params: nnx.State) -> Latents:
        return encode(nnx.merge(state.graphdef, params, state.fixed), normalized, config)

    def revive(grads: nnx.State) -> tuple[Scalar, nnx.State]:
        loss, (of_params, of_pre_acts) = jax.value_and_grad(loss_of, argnums=(0, 1))(state.params, pre_acts)
        (of_encoder,) = jax.vjp(encoded, state.params)[1](of_pre_acts)
        return loss, jax.tree.map(lambda *parts: sum(parts), grads, of_params, of_encoder)

    def rest(grads: nnx.State) -> tuple[Scalar, nnx.State]:
        return jnp.zeros((), residual.dtype), grads

    with jax.named_scope("aux_k"):
        return lax.cond(jnp.any(is_dead), revive, rest, grads)
