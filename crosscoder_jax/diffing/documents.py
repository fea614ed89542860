"""On how many documents each latent fires, counted exactly while tokens pass in the order of the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Integer

from crosscoder_jax.sharding import Shardings, reshard
from crosscoder_jax.typing import Latents

_NONE = -1
"""In place of a document where there is none."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DocumentCounts:
    """Documents of a stretch of text and how many of them each latent fires on: O(latents), however many.

    A document that a batch cuts must count once. So the outermost two are remembered, and stretches are
    merged in the order of the text.
    """

    num_documents: Int[Array, ""]
    active: Int[Array, "latent"]
    """Documents on at least one token of which each latent fires."""
    first: Int[Array, ""]
    """Index of the document that the stretch begins with; -1 without a token."""
    last: Int[Array, ""]
    is_active_in_first: Bool[Array, "latent"]
    is_active_in_last: Bool[Array, "latent"]

    def merge(self, after: "DocumentCounts") -> "DocumentCounts":
        """Return the counts of this stretch and the next one, which may begin in its last document."""
        is_joined = (self.last == after.first) & (self.last != _NONE)
        is_twice = is_joined & self.is_active_in_last & after.is_active_in_first
        # A joined document is the first of both where it is all that this stretch has, and so for the last.
        is_only_here = is_joined & (self.num_documents == 1)
        is_only_after = is_joined & (after.num_documents == 1)
        is_empty, is_end = self.first == _NONE, after.first == _NONE
        first = self.is_active_in_first | (is_only_here & after.is_active_in_first)
        last = after.is_active_in_last | (is_only_after & self.is_active_in_last)
        return DocumentCounts(
            self.num_documents + after.num_documents - is_joined,
            self.active + after.active - is_twice,
            jnp.where(is_empty, after.first, self.first),
            jnp.where(is_end, self.last, after.last),
            jnp.where(is_empty, after.is_active_in_first, first),
            jnp.where(is_end, self.is_active_in_last, last),
        )


def init_documents(num_latents: int, *, shardings: Shardings = Shardings()) -> DocumentCounts:
    """Return the counts of no text."""
    spec = shardings.per_latent_l

    def never() -> Bool[Array, "latent"]:
        return jnp.zeros((num_latents,), bool, out_sharding=spec)

    # A buffer each: a donated accumulator must not hold one twice.
    return DocumentCounts(
        jnp.zeros((), jnp.int32),
        jnp.zeros((num_latents,), jnp.int32, out_sharding=spec),
        jnp.full((), _NONE, jnp.int32),
        jnp.full((), _NONE, jnp.int32),
        never(),
        never(),
    )


def update_documents(
    counts: DocumentCounts,
    code: Latents,
    documents: Int[Array, "batch"],
    is_valid: Bool[Array, "batch"],
    *,
    room: int,
    shardings: Shardings = Shardings(),
) -> DocumentCounts:
    """Return the counts with one batch added, which follows in the text on those before it.

    Args:
        counts: from :func:`init_documents` or an earlier update.
        code: the inference code.
        documents: index of each token's document; the tokens of a document stand together.
        is_valid: false for padding, at the end.
        room: at least as many documents as the batch has, from :func:`room_for_documents`; what is
            computed has ``[room, latent]`` elements.
        shardings: layout of the mesh that is set.
    """
    everywhere = None if shardings.per_batch_b is None else jax.P(None)
    documents, is_valid_everywhere = (reshard(x, everywhere) for x in (documents, is_valid))
    is_new = is_valid_everywhere & (documents != jnp.roll(documents, 1).at[0].set(_NONE))
    rank = jnp.cumsum(is_new) - 1
    number = jnp.sum(is_new)
    membership = (jnp.arange(room)[:, None] == rank) & is_valid_everywhere
    if shardings.per_batch_b is not None:
        membership = jax.reshard(membership, jax.P(None, *shardings.per_batch_b))
    # where, not a product: a row that is not valid may hold anything, NaN included.
    fires = jnp.where(is_valid[:, None], code > 0, False)
    tokens = jnp.einsum(
        "db,bl->dl",
        membership.astype(jnp.float32),
        fires.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
        out_sharding=shardings.per_group_gl,
    )
    is_active = tokens > 0
    is_last = jnp.arange(room) == number - 1
    count = jnp.sum(is_valid_everywhere)
    batch = DocumentCounts(
        number,
        jnp.sum(is_active, axis=0, dtype=jnp.int32),
        jnp.where(count > 0, documents[0], _NONE),
        jnp.where(count > 0, documents[count - 1], _NONE),
        is_active[0],
        jnp.any(is_active & is_last[:, None], axis=0),
    )
    return counts.merge(batch)


def room_for_documents(documents: Integer[np.ndarray, "batch"], least: int = 1) -> int:
    """Return a power of two, ``least`` or more, that no fewer documents than a batch has fit into.

    It is the shape of a compiled function: with ``least`` that of the batch before, there are few.
    """
    room = least
    while room < len(np.unique(documents)):
        room *= 2
    return room
