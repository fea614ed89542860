"""What a crosscoder reads: one or more sources on one concatenated width axis."""

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Source:
    """One model at one layer, or a linear combination of such.

    Raises:
        ValueError: if ``width`` is not positive, or the combination is empty or names a source twice.
    """

    name: str
    """How the source is called everywhere: in tables, files and plots."""
    width: int
    """Number of coordinates."""
    combination: tuple[tuple[str, float], ...] | None = None
    """``None`` for a stored source; else ``(stored name, coefficient)`` pairs that are summed."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name='' of a source must not be empty")
        if self.width <= 0:
            raise ValueError(f"width={self.width} of source {self.name!r} must be positive")
        if self.combination is not None and not self.combination:
            raise ValueError(f"combination=() of source {self.name!r} must name at least one stored source")
        names = [name for name, _ in self.combination or ()]
        if len(set(names)) != len(names):
            raise ValueError(
                f"combination={self.combination} of source {self.name!r} names a stored source twice: "
                "add its coefficients up"
            )


def difference(after: Source, before: Source, *, name: str = "difference") -> Source:
    """Derive the source ``after - before``: what a difference SAE reads.

    Raises:
        ValueError: if the two have different widths.

    Examples:
        >>> difference(Source("chat", 4), Source("base", 4)).combination
        (('chat', 1.0), ('base', -1.0))
    """
    if after.width != before.width:
        raise ValueError(
            f"{after.name!r} has width {after.width} and {before.name!r} has {before.width}: "
            "a difference needs two sources of one width"
        )
    return Source(name, after.width, ((after.name, 1.0), (before.name, -1.0)))


@dataclasses.dataclass(frozen=True)
class Sources:
    """The sources of a crosscoder, in the order in which they are concatenated.

    Raises:
        ValueError: if there is none, or two have one name.

    Examples:
        >>> sources = Sources((Source("base", 2), Source("chat", 3)))
        >>> sources.width, sources.offsets
        (5, (0, 2))
        >>> [part.shape for part in sources.split(jnp.zeros((7, 5)))]
        [(7, 2), (7, 3)]
    """

    entries: tuple[Source, ...]
    """The sources; names must differ."""

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entries]
        if not names:
            raise ValueError("entries=() must hold at least one source")
        if len(set(names)) != len(names):
            raise ValueError(f"source names {names} must differ: rename one of them")

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Source]:
        return iter(self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(entry.name for entry in self.entries)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths, in order."""
        return tuple(entry.width for entry in self.entries)

    @property
    def width(self) -> int:
        """Length of the concatenated axis."""
        return sum(self.widths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each source begins on the concatenated axis."""
        return tuple(sum(self.widths[:i]) for i in range(len(self.widths)))

    @property
    def is_derived(self) -> bool:
        """Whether any source is a combination of stored ones."""
        return any(entry.combination is not None for entry in self.entries)

    def slices(self) -> tuple[slice, ...]:
        """Return the slice of each source on the concatenated axis."""
        return tuple(
            slice(start, start + width) for start, width in zip(self.offsets, self.widths, strict=True)
        )

    def split(self, values: AnyArray) -> tuple[AnyArray, ...]:
        """Split ``[..., width]`` into one array per source (views where NumPy or XLA can).

        Raises:
            ValueError: if the last axis is not as long as all sources together.
        """
        if values.shape[-1] != self.width:
            raise ValueError(
                f"last axis has length {values.shape[-1]}, but the sources "
                f"{dict(zip(self.names, self.widths, strict=True))} have {self.width} together"
            )
        return tuple(values[..., part] for part in self.slices())

    def norms(self, w_dec: Float[Array, "latent width"]) -> Float[Array, "source latent"]:
        """Return the L2 norm of each latent's decoder in each source, in the units of ``w_dec``."""
        return jnp.stack([safe_norm(part) for part in self.split(w_dec)])

    def per_source(self, values: Float[Array, "source"]) -> Float[Array, "width"]:
        """Repeat each source's value over its coordinates."""
        return jnp.concatenate([jnp.broadcast_to(values[i], (width,)) for i, width in enumerate(self.widths)])

    def derive(
        self, stored_acts: Float[Array, "*lead stored_width"], stored: "Sources"
    ) -> Float[Array, "*lead width"]:
        """Compute these sources from the stored ones; combinations in float32.

        Args:
            stored_acts: raw activations of the stored sources, concatenated.
            stored: what ``stored_acts`` holds; sources are matched by name, so a crosscoder may
                read a subset of a store, in any order.

        Raises:
            ValueError: if a source is missing from the store or has another width there.
        """
        matrix = self._coefficients(stored)
        if matrix is None:
            return stored_acts
        parts = stored.split(stored_acts)
        return jnp.concatenate([_combine(row, parts) for row in matrix], axis=-1)

    def read(
        self, stored_acts: Float[Array, "*lead stored_width"], stored: "Sources"
    ) -> Float[Array, "*lead width"]:
        """Compute these sources from stored ones as a crosscoder takes them: in float32, or float64 if given.

        Args:
            stored_acts: raw activations of the stored sources in the type they are stored in.
            stored: what ``stored_acts`` holds.

        Raises:
            ValueError: as :meth:`derive`.
        """
        dtype = jnp.promote_types(stored_acts.dtype, jnp.float32)
        return self.derive(stored_acts.astype(dtype), stored)

    def to_stored_decoder(
        self, w_dec: Float[Array, "latent width"], stored: "Sources"
    ) -> Float[Array, "latent stored_width"]:
        """Read raw decoders of derived sources back in the space of the stored ones.

        If the sources are ``C @ stored`` with an invertible ``C``, a decoder ``d`` of them is
        ``C^-1 d`` in stored space: adding it there adds ``d`` here.

        Raises:
            ValueError: if the combination cannot be inverted, as for a difference alone.
        """
        matrix = self._coefficients(stored)
        if matrix is None:
            return w_dec
        inverse = _inverse(matrix, len(stored))
        if inverse is None:
            raise ValueError(
                f"sources {self.names} do not determine the stored sources {stored.names}: "
                "train on a basis of them, such as before and after - before"
            )
        return _combine_all(inverse, self.split(w_dec))

    def to_stored_acts(
        self,
        own_acts: Float[Array, "batch width"],
        stored_acts: Float[Array, "batch stored_width"],
        stored: "Sources",
    ) -> dict[str, Float[Array, "batch _"]]:
        """Return what activations of these sources make of the stored ones, by stored name.

        If the sources are ``C @ stored`` with an invertible ``C``, that is ``C^-1 own_acts``. If not,
        each source is solved for the first stored one it names, the others staying as they are
        stored: a difference ``after - before`` gives ``after = own_acts + before`` and nothing for
        ``before``.

        Args:
            own_acts: of these sources, such as a reconstruction, raw units.
            stored_acts: what was stored, raw units.
            stored: what ``stored_acts`` holds.

        Raises:
            ValueError: if two sources would be solved for the same stored one.
        """
        matrix = self._coefficients(stored)
        inverse = None if matrix is None else _inverse(matrix, len(stored))
        if matrix is None or inverse is not None:
            carried = own_acts if inverse is None else _combine_all(inverse, self.split(own_acts))
            return dict(zip(stored.names, stored.split(carried), strict=True))
        targets = [stored.names[row[0][0]] for row in matrix]
        if len(set(targets)) != len(targets):
            raise ValueError(
                f"sources {self.names} say two things of the same stored source ({', '.join(targets)}): "
                "train on a basis of the stored sources, such as before and after - before"
            )
        parts, solved = stored.split(stored_acts), {}
        for own, row, target in zip(self.split(own_acts), matrix, targets, strict=True):
            coefficient = row[0][1]
            others = [(i + 1, -c / coefficient) for i, c in row[1:]]
            solved[target] = _combine([(0, 1 / coefficient), *others], (own, *parts))
        return solved

    def _coefficients(self, stored: "Sources") -> list[list[tuple[int, float]]] | None:
        """Return (index into stored, coefficient) pairs per source; ``None`` for the identity."""
        positions = {name: i for i, name in enumerate(stored.names)}
        matrix = []
        for entry in self.entries:
            pairs = entry.combination or ((entry.name, 1.0),)
            for name, _ in pairs:
                if name not in positions:
                    raise ValueError(f"source {entry.name!r} reads {name!r}, but there is {stored.names}")
                if stored.entries[positions[name]].width != entry.width:
                    raise ValueError(
                        f"source {entry.name!r} has width {entry.width}, but {name!r} is stored with "
                        f"width {stored.entries[positions[name]].width}"
                    )
            matrix.append([(positions[name], coefficient) for name, coefficient in pairs])
        identity = [[(i, 1.0)] for i in range(len(stored))]
        return None if matrix == identity else matrix


def safe_norm(rows: Float[Array, "latent width"]) -> Float[Array, "latent"]:
    """Return the L2 norm of each row; its gradient at a zero row is zero instead of NaN."""
    squared = jnp.sum(jnp.square(rows), axis=-1)
    is_zero = squared == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, squared)))


def _combine(row: list[tuple[int, float]], parts: tuple[Array, ...]) -> Array:
    if len(row) == 1 and row[0][1] == 1.0:
        return parts[row[0][0]]
    # Sources that are close to each other, as two related models are, differ by less than bf16 resolves.
    terms = [coefficient * parts[i].astype(jnp.float32) for i, coefficient in row]
    return jax.tree.reduce(jnp.add, terms)


def _inverse(matrix: list[list[tuple[int, float]]], num_stored: int) -> np.ndarray | None:
    """Return the inverse of a combination as a dense matrix; ``None`` if it has none."""
    dense = np.array([[dict(row).get(i, 0.0) for i in range(num_stored)] for row in matrix])
    if dense.shape[0] != dense.shape[1] or np.linalg.matrix_rank(dense) < dense.shape[0]:
        return None
    return np.linalg.inv(dense)


def _combine_all(matrix: np.ndarray, parts: tuple[Array, ...]) -> Array:
    rows = [[(i, float(value)) for i, value in enumerate(row) if value] for row in matrix]
    return jnp.concatenate([_combine(row, parts) for row in rows], axis=-1)
