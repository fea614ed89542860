"""Groups of latents: which sources each reads and writes, and what its decoders share."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from crosscoder_jax.sharding import Shardings, reshard
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import DecoderWeights, EncoderWeights, PerLatent

FREE = "free"
"""What latents of no group are called."""


@dataclasses.dataclass(frozen=True)
class LatentGroup:
    """A share of the latents under rules of their own; one mechanism for the crosscoders of many papers.

    ======================================= ==========================================================
    designated shared latents               ``is_tied``, ``cost`` 0.1 to 0.2 (Anthropic 2025)
    the same, where shared concepts turn    ``is_norm_tied``
    dedicated exclusive latents             ``writes`` one source (arXiv 2602.11729); ``reads`` it, too
    dual k: a budget for what changed       ``k`` of the latents that write to the difference
    weakly causal crosscoder over layers    for each layer a group that ``reads`` it and ``writes`` it
                                            and those after it (Lindsey et al. 2024)
    strictly causal: cross-layer transcoder the same, with the outputs of layers as sources of their own
    ======================================= ==========================================================

    Raises:
        ValueError: if a number is out of range, or a source is named twice.
    """

    name: str
    """How the group is called in tables and metrics."""
    share: float
    """Of all latents, above 0 and at most 1."""
    reads: tuple[str, ...] | None = None
    """Names of the sources its encoders read; ``None`` for all."""
    writes: tuple[str, ...] | None = None
    """Names of the sources its decoders write; ``None`` for all. The decoders of others are exactly zero."""
    is_tied: bool = False
    """Whether a latent has one decoder, in normalised units, for all sources it writes."""
    is_norm_tied: bool = False
    """Whether a latent's decoders have one norm, in normalised units, in all sources it writes; their
    directions are free. After every step each is scaled to the root mean square of their norms."""
    cost: float = 1.0
    """What a unit of score costs: L1 multiplies its penalty by it, rankings divide scores by it."""
    k: float | None = None
    """Mean number of its latents kept per token, ranked among themselves and with a threshold of their own;
    ``None`` ranks them with the latents of no group for the sparsity's k."""

    def __post_init__(self) -> None:
        if self.name in ("", FREE):
            raise ValueError(f"name={self.name!r} of a group must not be empty, nor that of latents of none")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} of group {self.name!r} must lie above 0 and at most at 1")
        if not 0 < self.cost < float("inf"):
            raise ValueError(f"cost={self.cost} of group {self.name!r} must be positive and finite")
        if self.is_tied and self.is_norm_tied:
            raise ValueError(
                f"is_norm_tied=True of group {self.name!r} says nothing beside is_tied=True: leave it out"
            )
        if self.k is not None and not 0 < self.k < float("inf"):
            raise ValueError(f"k={self.k} of group {self.name!r} must be positive and finite")
        for field in ("reads", "writes"):
            names = getattr(self, field)
            if names is not None and (not names or len(set(names)) != len(names)):
                raise ValueError(
                    f"{field}={names} of group {self.name!r} must name at least one source, and none twice"
                )


class Budget(NamedTuple):
    """Latents that are ranked among themselves."""

    name: str
    """Of the group, or ``FREE`` for all latents without a k of their own."""
    k: float | None
    """Its own; ``None`` for that of the sparsity."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the groups lie on the latent axis: one after the other, and the free latents last.

    Raises:
        ValueError: if the groups do not fit the latents or the sources.
    """

    groups: tuple[LatentGroup, ...]
    sources: Sources
    num_latents: int

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise ValueError(f"group names {names} must differ: rename one of them")
        total = sum(group.share for group in self.groups)
        if total > 1 + 1e-9:
            raise ValueError(f"the groups {names} have shares of {total:g} together, more than all latents")
        for group, size in zip(self.groups, self.sizes, strict=True):
            if size < 1:
                raise ValueError(
                    f"share={group.share} of num_latents={self.num_latents} leaves group {group.name!r} "
                    "without a latent: give it a larger one"
                )
            self._check_sources(group)

    def _check_sources(self, group: LatentGroup) -> None:
        for name in (*(group.reads or ()), *(group.writes or ())):
            if name not in self.sources.names:
                raise ValueError(
                    f"group {group.name!r} names the source {name!r}, but there is {self.sources.names}"
                )
        widths = {entry.width for entry in self.sources if _has(group.writes, entry.name)}
        if group.is_tied and len(widths) > 1:
            raise ValueError(
                f"group {group.name!r} is tied over sources of the widths {sorted(widths)}: "
                "one decoder needs one width"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Latents of each group; rounding never takes more than there are."""
        ends = self._ends
        return tuple(end - start for start, end in zip((0, *ends), ends, strict=False))

    @property
    def _ends(self) -> tuple[int, ...]:
        ends, total = [], 0.0
        for group in self.groups:
            total += group.share
            ends.append(min(round(total * self.num_latents), self.num_latents))
        return tuple(ends)

    def names(self) -> list[str]:
        """Return the name of each latent's group; ``FREE`` for those in none."""
        of_groups = [
            group.name for group, size in zip(self.groups, self.sizes, strict=True) for _ in range(size)
        ]
        return of_groups + [FREE] * (self.num_latents - len(of_groups))

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """Latents that are ranked apart, those without a k of their own first; empty if all are together."""
        own = {
            group: size for group, size in zip(self.groups, self.sizes, strict=True) if group.k is not None
        }
        common = (Budget(FREE, None),) if own and sum(own.values()) < self.num_latents else ()
        return (*common, *(Budget(group.name, group.k) for group in own))

    def budget_of(self, shardings: Shardings) -> Int[Array, "latent"]:
        """Return which of the budgets each latent has a part in."""
        index = self._index(shardings)
        names = [budget.name for budget in self.budgets]
        found = jnp.zeros_like(index)
        for group, is_member in zip(self.groups, self._members(index), strict=True):
            if group.k is not None:
                found = jnp.where(is_member, names.index(group.name), found)
        return found

    def costs(self, shardings: Shardings) -> PerLatent:
        """Return what a unit of each latent's score costs."""
        index, costs = self._index(shardings), jnp.float32(1.0)
        for group, is_member in zip(self.groups, self._members(index), strict=True):
            costs = jnp.where(is_member, group.cost, costs)
        return costs * jnp.ones_like(index, jnp.float32)

    def constrain_encoder(self, values: EncoderWeights, shardings: Shardings) -> EncoderWeights:
        """Return encoder weights, or their gradient, with zeros where a group does not read."""
        return self.constrain(values.T, shardings, "reads").T

    def constrain_decoder(self, values: DecoderWeights, shardings: Shardings) -> DecoderWeights:
        """Return decoder weights, or their gradient, as the groups allow them.

        Zero where a group does not write, and the mean over the sources it writes where it is tied: the
        orthogonal projection, which leaves weights that are as they must be alone. A step along a projected
        gradient keeps them so; an optimiser's step may not, and its outcome is to be projected, too.
        """
        return self._tie(self.constrain(values, shardings, "writes"), shardings)

    def constrain(self, values: DecoderWeights, shardings: Shardings, field: str) -> DecoderWeights:
        """Return rows of one latent each with zeros in the sources that a field of its group leaves out."""
        if all(getattr(group, field) is None for group in self.groups):
            return values
        members = self._members(self._index(shardings))
        parts = []
        for entry, part in zip(self.sources, self.sources.split(values), strict=True):
            closed = [
                is_member
                for group, is_member in zip(self.groups, members, strict=True)
                if not _has(getattr(group, field), entry.name)
            ]
            for is_closed in closed:
                part = jnp.where(is_closed[:, None], jnp.zeros_like(part), part)
            parts.append(part)
        return jnp.concatenate(parts, axis=1)

    def _tie(self, values: DecoderWeights, shardings: Shardings) -> DecoderWeights:
        if not any(group.is_tied for group in self.groups):
            return values
        members = self._members(self._index(shardings))
        parts = list(self.sources.split(values))
        for group, is_member in zip(self.groups, members, strict=True):
            if not group.is_tied:
                continue
            written = [i for i, entry in enumerate(self.sources) if _has(group.writes, entry.name)]
            mean = sum(parts[i] for i in written) / len(written)
            for i in written:
                parts[i] = jnp.where(is_member[:, None], mean, parts[i])
        return jnp.concatenate(parts, axis=1)

    def equalise_norms(self, values: DecoderWeights, shardings: Shardings) -> DecoderWeights:
        """Return decoder weights with one norm in all written sources for latents whose norms are tied."""
        if not any(group.is_norm_tied for group in self.groups):
            return values
        members = self._members(self._index(shardings))
        parts = list(self.sources.split(values))
        for group, is_member in zip(self.groups, members, strict=True):
            if not group.is_norm_tied:
                continue
            written = [i for i, entry in enumerate(self.sources) if _has(group.writes, entry.name)]
            norms = {i: jnp.linalg.norm(parts[i], axis=1) for i in written}
            common = jnp.sqrt(sum(jnp.square(norm) for norm in norms.values()) / len(written))
            for i, norm in norms.items():
                # A decoder of zeros has no direction to scale.
                factor = jnp.where(is_member & (norm > 0), common / jnp.where(norm > 0, norm, 1.0), 1.0)
                parts[i] = parts[i] * factor[:, None]
        return jnp.concatenate(parts, axis=1)

    def _index(self, shardings: Shardings) -> Int[Array, "latent"]:
        return reshard(jnp.arange(self.num_latents), shardings.per_latent_l)

    def _members(self, index: Int[Array, "latent"]) -> Sequence[Bool[Array, "latent"]]:
        starts = (0, *self._ends)
        return [(index >= start) & (index < end) for start, end in zip(starts, self._ends, strict=False)]


def _has(names: tuple[str, ...] | None, name: str) -> bool:
    return names is None or name in names


def exclusive_groups(
    sources: Sources, share: float, *, is_encoder_masked: bool = False, k: float | None = None
) -> tuple[LatentGroup, ...]:
    """Return a group of dedicated latents for each source, which write it alone.

    Args:
        sources: of the crosscoder.
        share: of all latents, for each source.
        is_encoder_masked: whether they read it alone, too.
        k: of each group; ``None`` ranks all latents together.

    References:
        arXiv 2602.11729 (dedicated feature crosscoder).
    """
    return tuple(
        LatentGroup(
            f"{entry.name}-dedicated",
            share,
            reads=(entry.name,) if is_encoder_masked else None,
            writes=(entry.name,),
            k=k,
        )
        for entry in sources
    )


def causal_groups(layers: Sequence[tuple[str, Sequence[str]]]) -> tuple[LatentGroup, ...]:
    """Return groups of equal shares, each of which reads one source and writes some.

    Args:
        layers: for each group the source it reads and those it writes; for a weakly causal crosscoder
            the sources themselves from there on, for a cross-layer transcoder what the layers put out.

    References:
        Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders.

    Examples:
        >>> [(group.reads, group.writes) for group in causal_groups([("L1", ["L1", "L2"]), ("L2", ["L2"])])]
        [(('L1',), ('L1', 'L2')), (('L2',), ('L2',))]
    """
    share = 1 / len(layers)
    return tuple(
        LatentGroup(f"from {read}", share, reads=(read,), writes=tuple(written)) for read, written in layers
    )
