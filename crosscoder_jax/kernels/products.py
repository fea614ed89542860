"""Decode what a batch keeps, and differentiate that, without the zeros of its code, on a mesh too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import P, lax
from jaxtyping import Array, Int

from crosscoder_jax.kernels import native
from crosscoder_jax.sharding import Shardings
from crosscoder_jax.sparsity.entries import ByLatent, Entries
from crosscoder_jax.typing import Acts, Count, DecoderWeights, EncoderWeights, Latents, PerLatent, Scalar


class Decoded(NamedTuple):
    """A batch decoded from its entries."""

    recon: Acts
    """Without the bias."""
    num_kept: Count
    fired: Int[Array, "latent"]
    """On how many tokens each latent fires."""
    entries: Entries
    """Of each shard, with its own rows and latents."""
    order: ByLatent


class Gradients(NamedTuple):
    """Gradients of what a batch is encoded and decoded with."""

    w_enc: EncoderWeights
    b_enc: PerLatent
    w_dec: DecoderWeights


def decode_kept(
    pre_acts: Latents,
    score_weights: PerLatent,
    cut: Scalar,
    w_dec: DecoderWeights,
    *,
    most: int,
    shardings: Shardings = Shardings(),
) -> Decoded:
    """Decode the pre-activations whose score reaches a cut.

    Args:
        pre_acts: of the batch, float32, normalised units.
        score_weights: what each latent's activation is multiplied by for ranking.
        cut: smallest score that is kept, positive.
        w_dec: the decoder.
        most: how many there are at most, over all shards; more are an error when run.
        shardings: of all of them.
    """
    data, latent = shardings.code_bl or (None, None)

    def of_shard(pre_acts: Latents, score_weights: PerLatent, cut: Scalar, w_dec: DecoderWeights) -> Decoded:
        entries = native.compress(pre_acts, score_weights, cut, min(most, pre_acts.size))
        order = native.by_latent(entries, len(w_dec))
        recon, num_kept = native.decode(entries, w_dec), entries.starts[-1]
        return Decoded(recon, num_kept, jnp.diff(order.starts), entries, order)

    arrays = (pre_acts, score_weights, cut, w_dec)
    if data is None:
        return of_shard(*arrays)

    def summed(*arrays: Array) -> Decoded:
        own = of_shard(*arrays)
        return own._replace(
            recon=lax.psum(own.recon, latent),
            num_kept=lax.psum(own.num_kept, (data, latent)),
            fired=lax.psum(own.fired, data),
        )

    own = _each_shards_own(shardings)
    given = (shardings.code_bl, shardings.per_latent_l, P(), shardings.w_dec_lw)
    found = _specs(Decoded, shardings.acts_bw, P(), shardings.per_latent_l, *own)
    return _over_mesh(summed, given, found)(*arrays)


def kept_gradients(
    decoded: Decoded, grad: Acts, acts: Acts, w_dec: DecoderWeights, *, shardings: Shardings = Shardings()
) -> Gradients:
    """Return the gradients of encoder and decoder.

    Args:
        decoded: from :func:`decode_kept`.
        grad: gradient of its reconstruction.
        acts: what the encoder read, normalised units.
        w_dec: the decoder.
        shardings: of all of them.
    """

    def of_shard(
        entries: Entries, order: ByLatent, grad: Acts, acts: Acts, w_dec: DecoderWeights
    ) -> Gradients:
        of_values = native.value_gradient(entries, grad, w_dec)
        of_w_enc, of_b_enc = native.encoder_gradient(of_values, order, acts)
        return Gradients(of_w_enc, of_b_enc, native.decoder_gradient(entries.values, order, grad))

    arrays = (decoded.entries, decoded.order, grad, acts, w_dec)
    if shardings.acts_bw is None:
        return of_shard(*arrays)
    data = shardings.acts_bw[0]

    def summed(*arrays: Any) -> Gradients:
        return lax.psum(of_shard(*arrays), data)

    rows = shardings.acts_bw
    given = (*_each_shards_own(shardings), rows, rows, shardings.w_dec_lw)
    found = _specs(Gradients, shardings.w_enc_wl, shardings.per_latent_l, shardings.w_dec_lw)
    return _over_mesh(summed, given, found)(*arrays)


def _each_shards_own(shardings: Shardings) -> tuple[Any, Any]:
    """Return the layout of entries and their order, which are each shard's own, one after the other."""
    assert shardings.code_bl is not None
    own: Any = P(tuple(shardings.code_bl))
    return Entries(own, own, own), ByLatent(own, own, own)


def _specs(kind: Callable[..., Any], *specs: Any) -> Any:
    return kind(*specs)


def _over_mesh(of_shard: Callable[..., Any], given: Any, found: Any) -> Callable[..., Any]:
    # JAX does not know over which axes the results of foreign functions vary.
    return jax.shard_map(of_shard, in_specs=given, out_specs=found, check_vma=False)
