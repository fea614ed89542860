"""What a latent does on the text: how often and how strongly it fires, on which texts, and where most.

Both accumulators are pytrees that merge over batches, devices and files.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from crosscoder_jax.diffing.compensated import CompensatedSum
from crosscoder_jax.sharding import Shardings, to_host
from crosscoder_jax.typing import Latents

_STATISTICS = ("active", "code", "code_squared")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivitySums:
    """Sums over the tokens of each text, per latent."""

    sums: CompensatedSum
    """``[statistic, label, latent]``: tokens it fires on, sum f, sum f^2."""
    maximum: Float[Array, "latent"]
    """Largest activation; zero for a latent that never fires."""
    tokens: CompensatedSum
    """``[label]`` valid tokens."""

    def merge(self, other: "ActivitySums") -> "ActivitySums":
        """Return the sums over both sets of tokens."""
        return ActivitySums(
            self.sums.merge(other.sums),
            jnp.maximum(self.maximum, other.maximum),
            self.tokens.merge(other.tokens),
        )


@dataclasses.dataclass(frozen=True)
class Activity:
    """How each latent fires, float64 on the host."""

    num_tokens: int
    tokens_by_label: Int[np.ndarray, "label"]
    active_tokens: Int[np.ndarray, "latent"]
    frequency: Float[np.ndarray, "latent"]
    """Share of tokens on which it fires."""
    mean_activation: Float[np.ndarray, "latent"]
    """Mean over the tokens on which it fires; NaN if there is none."""
    max_activation: Float[np.ndarray, "latent"]
    mean_square: Float[np.ndarray, "latent"]
    """``sum f^2 / tokens``."""
    label_shares: Float[np.ndarray, "label latent"]
    """Share of its summed activation on each text; NaN if it never fires."""


def init_activity(num_latents: int, num_labels: int, *, shardings: Shardings = Shardings()) -> ActivitySums:
    """Return the sums over no tokens.

    Raises:
        ValueError: if there is no label.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels={num_labels} must be at least 1: give all tokens one label")
    spec = None if shardings.per_group_gl is None else jax.P(None, *shardings.per_group_gl)
    return ActivitySums(
        CompensatedSum.zeros((len(_STATISTICS), num_labels, num_latents), spec),
        jnp.zeros((num_latents,), jnp.float32, out_sharding=shardings.per_latent_l),
        CompensatedSum.zeros((num_labels,)),
    )


def update_activity(
    sums: ActivitySums,
    code: Latents,
    labels: Int[Array, "batch"],
    is_valid: Bool[Array, "batch"],
    *,
    shardings: Shardings = Shardings(),
) -> ActivitySums:
    """Return the sums with one batch added.

    Sums per label are matrix products with the labels' indicator, so tokens of one label always add
    up, however often it occurs in the batch.
    """
    code = jnp.where(is_valid[:, None], code.astype(jnp.float32), 0.0)
    num_labels = sums.tokens.high.shape[0]
    membership = (labels[:, None] == jnp.arange(num_labels)) & is_valid[:, None]
    membership = membership.astype(jnp.float32)

    def total(values: Latents) -> Float[Array, "label latent"]:
        return jnp.einsum(
            "bk,bl->kl",
            membership,
            values,
            precision=lax.Precision.HIGHEST,
            out_sharding=shardings.per_group_gl,
        )

    batch = jnp.stack([total((code > 0).astype(jnp.float32)), total(code), total(jnp.square(code))])
    return ActivitySums(
        sums.sums.add(batch),
        jnp.maximum(sums.maximum, jnp.max(code, axis=0)),
        sums.tokens.add(jnp.sum(membership, axis=0)),
    )


def finalize_activity(sums: ActivitySums) -> Activity:
    """Return frequencies, means and shares from the sums."""
    active, code, code_squared = sums.sums.to_float64()
    by_label = np.rint(sums.tokens.to_float64()).astype(np.int64)
    active_tokens = np.rint(active.sum(axis=0)).astype(np.int64)
    num_tokens, total = int(by_label.sum()), code.sum(axis=0)
    fires = np.where(active_tokens > 0, 1.0, np.nan)
    return Activity(
        num_tokens=num_tokens,
        tokens_by_label=by_label,
        active_tokens=active_tokens,
        frequency=active_tokens / max(num_tokens, 1),
        mean_activation=total / (fires * np.maximum(active_tokens, 1)),
        max_activation=to_host(sums.maximum).astype(np.float64),
        mean_square=code_squared.sum(axis=0) / max(num_tokens, 1),
        label_shares=code / (fires * np.where(total > 0, total, 1.0)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopActivations:
    """The strongest activations of some latents, strongest first; unfilled places hold 0 and -1."""

    values: Float[Array, "latent place"]
    """Activations there, in the units of the code."""
    tokens: Int[Array, "latent place"]
    """Index of the token in the store."""
    documents: Int[Array, "latent place"]
    """Index of the token's document."""

    def merge(self, other: "TopActivations", *, one_per_document: bool = True) -> "TopActivations":
        """Return the strongest of both."""
        places = self.values.shape[1]
        return _strongest(
            *(
                jnp.concatenate([getattr(self, name), getattr(other, name)], axis=1)
                for name in ("values", "tokens", "documents")
            ),
            places=places,
            one_per_document=one_per_document,
        )


def init_top(num_selected: int, places: int) -> TopActivations:
    """Return the strongest activations of ``num_selected`` latents on no tokens."""
    shape = (num_selected, places)
    # Two separate buffers: a donated accumulator must not hold one twice.
    return TopActivations(
        jnp.zeros(shape, jnp.float32), jnp.full(shape, -1, jnp.int32), jnp.full(shape, -1, jnp.int32)
    )


def update_top(
    top: TopActivations,
    code: Latents,
    selected: Int[Array, "selected"],
    tokens: Int[Array, "batch"],
    documents: Int[Array, "batch"],
    is_valid: Bool[Array, "batch"],
    *,
    one_per_document: bool = True,
    shardings: Shardings = Shardings(),
) -> TopActivations:
    """Return the strongest activations with one batch added.

    Of equal activations the one with the smaller token index wins, so the result depends neither on
    the order of the tokens nor on how they are batched.

    Args:
        top: from :func:`init_top` or an earlier update.
        code: the inference code of all latents.
        selected: which latents ``top`` is about.
        tokens: index of each token in the store, below 2^31.
        documents: index of each token's document.
        is_valid: false for padding.
        one_per_document: keep only each document's strongest token, for variety: a long document
            about a latent's subject would otherwise fill every place.
        shardings: layout of the mesh that is set.
    """
    everywhere = None if shardings.code_bl is None else jax.P(None, None)
    own = code.at[:, selected].get(out_sharding=shardings.acts_bw)
    own = jnp.where(is_valid[:, None], own, 0.0).T
    if everywhere is not None:
        # Only the selected columns travel: [selected, batch].
        own, tokens, documents = (
            jax.reshard(own, everywhere),
            *(jax.reshard(x, jax.P(None)) for x in (tokens, documents)),
        )
    candidates = TopActivations(
        own, *(jnp.broadcast_to(x.astype(jnp.int32), own.shape) for x in (tokens, documents))
    )
    return top.merge(candidates, one_per_document=one_per_document)


@functools.partial(jax.jit, static_argnames=("places", "one_per_document"))
def _strongest(
    values: Float[Array, "latent candidate"],
    tokens: Int[Array, "latent candidate"],
    documents: Int[Array, "latent candidate"],
    *,
    places: int,
    one_per_document: bool,
) -> TopActivations:
    descending = -values
    if one_per_document:
        # Within each document the strongest, then earliest, token comes first and alone stays.
        documents, descending, tokens = lax.sort((documents, descending, tokens), dimension=1, num_keys=3)
        is_repeated = jnp.pad(documents[:, 1:] == documents[:, :-1], ((0, 0), (1, 0)))
        descending = jnp.where(is_repeated, 0.0, descending)
    descending, tokens, documents = lax.sort((descending, tokens, documents), dimension=1, num_keys=2)
    descending, tokens, documents = (x[:, :places] for x in (descending, tokens, documents))
    is_empty = descending >= 0
    return TopActivations(
        jnp.where(is_empty, 0.0, -descending),
        jnp.where(is_empty, -1, tokens),
        jnp.where(is_empty, -1, documents),
    )
