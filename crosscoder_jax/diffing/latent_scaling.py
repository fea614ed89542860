"""Latent Scaling: is a latent that looks exclusive to one model really absent from the other?

One streaming pass, ``init -> update -> finalize``, for every latent, both models and all four
targets. The accumulator is a pytree of groups x latents that adds up over batches, devices and files.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.crosscoder import Crosscoder, require_one_code
from crosscoder_jax.diffing.closed_form import STATISTICS, TARGETS, solve_in_float64
from crosscoder_jax.diffing.compensated import CompensatedSum
from crosscoder_jax.diffing.decoder_norms import check_two_sources_of_one_width
from crosscoder_jax.sharding import Shardings, place, to_host
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import Acts, DecoderWeights, Latents, PerWidth

NUM_GROUPS = 20
"""Jackknife groups: enough for a standard error good to about a sixth, few enough to keep."""
MIN_ACTIVE_TOKENS = 50
"""Simulated 95 % intervals hold the truth in 92 to 94 % of cases from here on, and in fewer below."""
RATIO_TARGETS = ("error", "reconstruction")
"""Targets of ``nu_error`` and ``nu_recon``."""
MIN_ACTIVE_GROUPS = 3
"""With activity in fewer groups of documents the spread between groups cannot be seen."""


@runtime_checkable
class ScalingBatch(Protocol):
    """A batch that knows its documents, as the activation store yields them."""

    acts: np.ndarray
    """``[batch, width]`` raw activations, any float dtype."""
    documents: np.ndarray
    """``[batch]`` document index of each token."""
    is_valid: np.ndarray
    """``[batch]`` false for padding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalingDecoders:
    """What the pass needs of a crosscoder, raw activation units."""

    w_dec: Float[Array, "latent width"]
    b_dec: Float[Array, "width"]
    directions: Float[Array, "latent source_width"]
    """``d_j``: each latent's decoder in its reference source."""
    gram: Float[Array, "source latent"]
    """``d_j^m . d_j`` for each source m."""
    bias: Float[Array, "source latent"]
    """``b_dec^m . d_j`` for each source m."""
    reference: Int[Array, "latent"]
    """The reference source of each latent."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScalingSums:
    """Everything Latent Scaling keeps of the tokens it has seen."""

    sums: CompensatedSum
    """``[statistic, group, latent]`` in the order of ``STATISTICS``."""
    tokens: CompensatedSum
    """``[group]`` valid tokens."""

    def merge(self, other: "ScalingSums") -> "ScalingSums":
        """Return the sums over both sets of tokens, in O(groups x latents)."""
        return ScalingSums(self.sums.merge(other.sums), self.tokens.merge(other.tokens))


@dataclasses.dataclass(frozen=True)
class LatentScaling:
    """The outcome for every latent, float64 on the host; nothing is dropped."""

    beta: Float[np.ndarray, "target source latent"]
    """Coefficients in the order of ``TARGETS``; NaN for a latent that never fires."""
    se_beta: Float[np.ndarray, "target source latent"]
    nu_error: Float[np.ndarray, "latent"]
    """beta_error of the other source over that of the reference: high means Complete Shrinkage."""
    se_nu_error: Float[np.ndarray, "latent"]
    nu_recon: Float[np.ndarray, "latent"]
    """beta_reconstruction likewise: high means Latent Decoupling."""
    se_nu_recon: Float[np.ndarray, "latent"]
    has_evidence: Bool[np.ndarray, "latent"]
    """Whether the ratios mean anything; see :func:`finalize_scaling`."""
    active_tokens: Int[np.ndarray, "latent"]
    active_groups: Int[np.ndarray, "latent"]
    reference: Int[np.ndarray, "latent"]
    """Index of the source whose decoder was the direction."""
    num_tokens: int
    num_groups: int
    """Groups of documents that hold any token: what the standard errors were estimated from."""


def jackknife_groups(documents: Int[Array, "batch"], num_groups: int = NUM_GROUPS) -> Int[Array, "batch"]:
    """Assign each token to a group by its document, the same on every host and in every pass."""
    # The index is mixed before the remainder is taken: texts that alternate with a period, or a
    # held-out split of every tenth document, would otherwise fill only some of the groups.
    mixed = documents.astype(jnp.uint32)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(multiplier)
    return ((mixed ^ (mixed >> 16)) % jnp.uint32(num_groups)).astype(jnp.int32)


def scaling_decoders(
    w_dec: DecoderWeights,
    b_dec: PerWidth,
    sources: Sources,
    *,
    reference: int | Int[Array, "latent"] = 1,
    shardings: Shardings = Shardings(),
) -> ScalingDecoders:
    """Prepare the decoders and their products for a pass.

    Args:
        w_dec: decoders in raw activation units.
        b_dec: decoder bias in raw activation units.
        sources: two sources of one width, the base first.
        reference: the source whose decoder is the direction ``d_j`` for both models: 1, the chat
            model, tests whether a latent is absent from the base; 0 is the mirrored test for
            base-only latents. One index per latent tests each on the side it points to.
        shardings: layout of the mesh that is set.

    Raises:
        ValueError: if there are not two sources of one width, or a reference is neither 0 nor 1.
    """
    check_two_sources_of_one_width(sources, "latent_scaling")
    if isinstance(reference, int) and reference not in (0, 1):
        raise ValueError(f"reference={reference} must be 0 (the base) or 1 (the chat model)")
    chosen = jnp.broadcast_to(jnp.asarray(reference, jnp.int32), (w_dec.shape[0],))
    if shardings.per_latent_l is not None:
        chosen = jax.reshard(chosen, shardings.per_latent_l)
    return _products(w_dec, b_dec, chosen, sources)


@functools.partial(jax.jit, static_argnames="sources")
def _products(
    w_dec: DecoderWeights, b_dec: PerWidth, chosen: Int[Array, "latent"], sources: Sources
) -> ScalingDecoders:
    decoders, biases = sources.split(w_dec), sources.split(b_dec)
    directions = jnp.where(chosen[:, None] == 1, decoders[1], decoders[0])
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    gram = jnp.stack([exact("lw,lw->l", part, directions) for part in decoders])
    bias = jnp.stack([exact("w,lw->l", part, directions) for part in biases])
    return ScalingDecoders(w_dec, b_dec, directions, gram, bias, chosen)


def init_scaling(
    num_latents: int,
    *,
    num_groups: int = NUM_GROUPS,
    dtype: str = "float32",
    shardings: Shardings = Shardings(),
) -> ScalingSums:
    """Return the sums over no tokens.

    Args:
        num_latents: of the crosscoder.
        num_groups: groups of documents.
        dtype: that of the decoders.
        shardings: layout of the mesh that is set.

    Raises:
        ValueError: if there are fewer than two groups, which give no standard error.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups={num_groups} must be at least 2: standard errors compare groups")
    spec = None if shardings.per_group_gl is None else jax.P(None, *shardings.per_group_gl)
    return ScalingSums(
        CompensatedSum.zeros((len(STATISTICS), num_groups, num_latents), spec, dtype),
        CompensatedSum.zeros((num_groups,), None, dtype),
    )


def update_scaling(
    sums: ScalingSums,
    decoders: ScalingDecoders,
    acts: Acts,
    code: Latents,
    groups: Int[Array, "batch"],
    is_valid: Bool[Array, "batch"],
    *,
    sources: Sources,
    shardings: Shardings = Shardings(),
) -> ScalingSums:
    """Return the sums with one batch added.

    Args:
        sums: from :func:`init_scaling` or an earlier update.
        decoders: from :func:`scaling_decoders`.
        acts: raw activations; rows that are not valid may hold anything, NaN included.
        code: the inference code.
        groups: jackknife group of each token, from :func:`jackknife_groups`.
        is_valid: false for padding.
        sources: how the width axis divides.
        shardings: layout of the mesh that is set.

    The work is four projections ``[batch, source_width] x [source_width, latent]``: with
    ``y . d_j`` known per token, every target is a sum over tokens. No ``[latent, batch, width]``
    intermediate exists. All products are in the decoders' dtype at highest precision.
    """
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    # where, not a product: 0 * NaN would be NaN.
    dtype = decoders.w_dec.dtype
    acts = jnp.where(is_valid[:, None], acts.astype(dtype), 0.0)
    code = jnp.where(is_valid[:, None], code.astype(dtype), 0.0)
    decoded = exact("bl,lw->bw", code, decoders.w_dec, out_sharding=shardings.acts_bw)
    recon = jnp.where(is_valid[:, None], decoded + decoders.b_dec, 0.0)

    num_groups = sums.tokens.high.shape[0]
    in_group = (groups[:, None] == jnp.arange(num_groups)) & is_valid[:, None]
    membership = in_group.astype(dtype)

    def total(values: Latents) -> Float[Array, "group latent"]:
        return exact("bg,bl->gl", membership, values, out_sharding=shardings.per_group_gl)

    def projected(part: Float[Array, "batch source_width"]) -> Float[Array, "group latent"]:
        products = exact("bw,lw->bl", part, decoders.directions, out_sharding=shardings.code_bl)
        return total(code * products)

    parts = (*sources.split(acts - recon), *sources.split(recon))
    statistics = [total(code), total(jnp.square(code)), total((code > 0).astype(dtype))]
    statistics += [projected(part) for part in parts]
    tokens = jnp.sum(membership, axis=0)
    return ScalingSums(sums.sums.add(jnp.stack(statistics)), sums.tokens.add(tokens))


def finalize_scaling(
    sums: ScalingSums, decoders: ScalingDecoders, *, min_active_tokens: int = MIN_ACTIVE_TOKENS
) -> LatentScaling:
    """Return coefficients, ratios and standard errors from the sums.

    A latent's evidence is enough when it fired on at least ``min_active_tokens`` tokens in at least
    three groups of documents, and both reference coefficients, the denominators of the ratios, are
    at least two standard errors above zero: a model whose own target holds the opposite of the
    latent says nothing about the other model. The others keep their numbers and are marked.

    Args:
        sums: over all tokens.
        decoders: those the sums were taken with.
        min_active_tokens: see above.
    """
    by_group = sums.sums.to_float64()
    tokens = sums.tokens.to_float64()
    gram, bias = (to_host(one).astype(np.float64) for one in (decoders.gram, decoders.bias))
    reference = to_host(decoders.reference)
    solved = solve_in_float64(by_group, gram, bias, reference, tokens)
    active = by_group[STATISTICS.index("active")]
    active_tokens = np.rint(active.sum(axis=0)).astype(np.int64)
    active_groups = (active > 0).sum(axis=0)
    has_evidence = (
        (active_tokens >= min_active_tokens)
        & (active_groups >= MIN_ACTIVE_GROUPS)
        & is_reference_clear(solved["beta"], solved["se_beta"], reference).all(axis=0)
    )
    return LatentScaling(
        beta=solved["beta"],
        se_beta=solved["se_beta"],
        nu_error=solved["nu"][0],
        se_nu_error=solved["se_nu"][0],
        nu_recon=solved["nu"][1],
        se_nu_recon=solved["se_nu"][1],
        has_evidence=has_evidence,
        active_tokens=active_tokens,
        active_groups=active_groups,
        reference=reference,
        num_tokens=round(tokens.sum()),
        num_groups=int((tokens > 0).sum()),
    )


def latent_scaling(
    crosscoder: Crosscoder,
    batches: Iterable[ScalingBatch | Acts | np.ndarray],
    *,
    reference: int | Int[Array, "latent"] = 1,
    num_groups: int = NUM_GROUPS,
    min_active_tokens: int = MIN_ACTIVE_TOKENS,
) -> LatentScaling:
    """Test every latent in one pass over raw activations.

    ``beta_j^m = argmin_beta sum_i || beta f_j(x_i) d_j - y_i^m ||^2`` with ``d_j`` the reference
    decoder for both models m and f the inference code; ``nu`` divides the other model's beta by the
    reference's. A latent is genuinely exclusive iff nu_recon < 0.5 and nu_error < 0.2, see
    :func:`~crosscoder_jax.diffing.verdicts.verdicts`. Everything is in raw activation units; the code
    behind the paper mixes raw activations and normalised decoders when there is a normaliser.

    Args:
        crosscoder: of two sources of one width, the base first. They are taken as they are: of base and
            chat - base it compares these two; :func:`~crosscoder_jax.diffing.diff_run` compares the models.
        batches: from the held-out part of a store, or bare ``[batch, width]`` arrays, whose rows are
            then taken to be independent of each other; if they are not, standard errors are too small.
        reference: 1 for chat-only candidates, 0 for base-only ones, or one index per latent.
        num_groups: groups of documents for the standard errors.
        min_active_tokens: below this the evidence counts as too little.

    Raises:
        ValueError: if there are not two sources of one width, there is no batch, or each source has
            its own code.

    References:
        Minder et al. 2025, arXiv 2504.02922, section 3.2 and appendix.

    Examples:
        >>> from crosscoder_jax.crosscoder import CrosscoderConfig
        >>> from crosscoder_jax.sources import Source
        >>> config = CrosscoderConfig(Sources((Source("base", 4), Source("chat", 4))), num_latents=8)
        >>> acts = jax.random.normal(jax.random.key(1), (256, 4))
        >>> same_twice = jnp.concatenate([acts, acts], axis=1)
        >>> result = latent_scaling(Crosscoder(config, key=jax.random.key(0)), [same_twice])
        >>> bool(np.allclose(result.nu_error, 1.0))
        True
    """
    require_one_code(crosscoder, "latent_scaling")
    sources, shardings = crosscoder.config.sources, crosscoder.shardings
    w_dec, b_dec = crosscoder.raw_decoder()
    decoders = scaling_decoders(w_dec, b_dec, sources, reference=reference, shardings=shardings)
    sums = init_scaling(
        crosscoder.config.num_latents,
        num_groups=num_groups,
        dtype=crosscoder.config.param_dtype,
        shardings=shardings,
    )
    rows_seen = 0
    for batch in batches:
        acts, documents, is_valid = _unpack(batch, rows_seen, shardings)
        rows_seen += acts.shape[0]
        sums = _encode_and_update(sums, decoders, crosscoder, acts, documents, is_valid)
    if not rows_seen:
        raise ValueError("batches is empty: Latent Scaling needs at least one batch of activations")
    return finalize_scaling(sums, decoders, min_active_tokens=min_active_tokens)


@functools.partial(jax.jit, donate_argnames="sums")
def _encode_and_update(
    sums: ScalingSums,
    decoders: ScalingDecoders,
    crosscoder: Crosscoder,
    acts: Acts,
    documents: Int[Array, "batch"],
    is_valid: Bool[Array, "batch"],
) -> ScalingSums:
    groups = jackknife_groups(documents, sums.tokens.high.shape[0])
    return update_scaling(
        sums,
        decoders,
        acts,
        crosscoder.encode(acts),
        groups,
        is_valid,
        sources=crosscoder.config.sources,
        shardings=crosscoder.shardings,
    )


def _unpack(
    batch: ScalingBatch | Acts | np.ndarray, rows_seen: int, shardings: Shardings
) -> tuple[Array, Array, Array]:
    if isinstance(batch, ScalingBatch):
        acts, documents, is_valid = batch.acts, batch.documents, batch.is_valid
    else:
        acts = batch
        documents = rows_seen + np.arange(acts.shape[0])
        is_valid = np.ones(acts.shape[0], bool)
    return (
        place(acts, shardings.acts_bw),
        place(np.asarray(documents, np.int32), shardings.per_batch_b),
        place(is_valid, shardings.per_batch_b),
    )


def is_reference_clear(
    beta: Float[np.ndarray, "target source latent"],
    se_beta: Float[np.ndarray, "target source latent"],
    reference: Int[np.ndarray, "latent"],
) -> Bool[np.ndarray, "2 latent"]:
    """Tell of :data:`RATIO_TARGETS` whether the ratio's denominator is two standard errors above zero."""
    latents = np.arange(reference.size)
    rows = np.array([TARGETS.index(target) for target in RATIO_TARGETS])[:, None]
    own, error = beta[rows, reference, latents], se_beta[rows, reference, latents]
    # A NaN on either side compares false: an unknown error is no evidence.
    return (own > 0) & (own >= 2 * error)
