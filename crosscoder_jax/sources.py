"""What a crosscoder reads: one or more sources on one concatenated width axis."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
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

    def made_of(self, stored: "Sources") -> "Sources":
        """Return those of the stored sources that these are, or are combined of.

        They come in the order in which these name them, but what is subtracted comes before what it is
        subtracted from: of ``base`` and ``chat - base`` they are base and chat, however the store orders
        them and whatever else it holds.

        Raises:
            ValueError: as :meth:`derive`.

        Examples:
            >>> base, mid, chat = Source("base", 4), Source("mid", 4), Source("chat", 4)
            >>> Sources((difference(chat, base),)).made_of(Sources((chat, mid, base))).names
            ('base', 'chat')
        """
        pairs = [pair for row in self._rows(stored) for pair in row]
        subtracted = dict.fromkeys(i for i, coefficient in pairs if coefficient < 0)
        order = subtracted | dict.fromkeys(i for i, _ in pairs)
        return Sources(tuple(stored.entries[i] for i in order))

    def is_basis_of(self, stored: "Sources") -> bool:
        """Tell whether these sources determine all of the stored ones, as a difference alone does not.

        Raises:
            ValueError: as :meth:`derive`.
        """
        return _inverse(_dense(self._rows(stored), range(len(stored)))) is not None

    def to_stored_decoder(
        self, w_dec: Float[Array, "latent width"], stored: "Sources"
    ) -> Float[Array, "latent stored_width"]:
        """Read raw decoders of derived sources back in the space of the stored ones.

        If the sources are ``C @ stored`` with an invertible ``C``, a decoder ``d`` of them is
        ``C^-1 d`` in stored space: adding it there adds ``d`` here.

        Args:
            w_dec: raw decoders of these sources.
            stored: all of what these are made of, and nothing else, see :meth:`made_of`.

        Raises:
            ValueError: if the combination cannot be inverted, as for a difference alone.
        """
        matrix = self._coefficients(stored)
        if matrix is None:
            return w_dec
        inverse = _inverse(_dense(matrix, range(len(stored))))
        if inverse is None:
            raise ValueError(self._undetermined(stored.names))
        rows = _nonzero(inverse)
        return jnp.concatenate([_combine(row, self.split(w_dec)) for row in rows], axis=-1)

    def to_stored_acts(
        self,
        own_acts: Float[Array, "batch width"],
        stored_acts: Float[Array, "batch stored_width"],
        stored: "Sources",
    ) -> dict[str, Float[Array, "batch _"]]:
        """Return what activations of these sources make of the stored ones, by stored name.

        If the sources are ``C @ stored`` with an invertible ``C`` of the stored sources that they name,
        that is ``C^-1 own_acts``; what else is stored plays no part. If there are more than can be solved
        for, each source is solved for the first stored one it names, the others staying as they are stored:
        a difference ``after - before`` gives ``after = own_acts + before`` and nothing for ``before``.

        Args:
            own_acts: of these sources, such as a reconstruction, raw units.
            stored_acts: what was stored, raw units.
            stored: what ``stored_acts`` holds.

        Raises:
            ValueError: if the sources do not determine what they would be solved for.
        """
        rows = self._rows(stored)
        named = sorted({i for row in rows for i, _ in row})
        solved = named if len(named) == len(rows) else [row[0][0] for row in rows]
        inverse = _inverse(_dense(rows, solved))
        if inverse is None:
            raise ValueError(self._undetermined(dict.fromkeys(stored.names[i] for i in solved)))
        held = [i for i in named if i not in solved]
        # C_solved x = own - C_held held: what is solved for may also stand in another source's combination.
        combined = _nonzero(np.hstack([inverse, -inverse @ _dense(rows, held)]))
        stored_parts = stored.split(stored_acts)
        parts = (*self.split(own_acts), *(stored_parts[i] for i in held))
        return {stored.names[i]: _combine(row, parts) for i, row in zip(solved, combined, strict=True)}

    def _undetermined(self, names: Iterable[str]) -> str:
        return (
            f"sources {self.names} do not determine the stored sources {tuple(names)}: "
            "train on a basis of them, such as before and after - before"
        )

    def _coefficients(self, stored: "Sources") -> list[list[tuple[int, float]]] | None:
        """Return (index into stored, coefficient) pairs per source; ``None`` for the identity."""
        rows = self._rows(stored)
        return None if rows == [[(i, 1.0)] for i in range(len(stored))] else rows

    def _rows(self, stored: "Sources") -> list[list[tuple[int, float]]]:
        """Return (index into stored, coefficient) pairs per source."""
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
        return matrix


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


def _dense(rows: list[list[tuple[int, float]]], columns: Sequence[int]) -> np.ndarray:
    """Return some columns of a combination as a dense matrix."""
    dense = np.zeros((len(rows), len(columns)))
    for place, row in enumerate(rows):
        dense[place] = [dict(row).get(i, 0.0) for i in columns]
    return dense


def _inverse(dense: np.ndarray) -> np.ndarray | None:
    """Return the inverse of a matrix; ``None`` if it has none."""
    if dense.shape[0] != dense.shape[1] or np.linalg.matrix_rank(dense) < dense.shape[0]:
        return None
    return np.linalg.inv(dense)


def _nonzero(dense: np.ndarray) -> list[list[tuple[int, float]]]:
    """Return (column, coefficient) pairs per row."""
    return [[(i, float(value)) for i, value in enumerate(row) if value] for row in dense]
