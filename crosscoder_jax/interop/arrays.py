"""Crosscoders on plain arrays: activations in, sparse codes and reconstructions out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int32, Shaped

from crosscoder_jax.crosscoder import Crosscoder
from crosscoder_jax.sources import Sources


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedArray:
    """Codes of many tokens, padded to the most active latents that any of them has.

    The source axis is there where each source has its own code.
    """

    indices: Int32[np.ndarray, "token *source k"]
    """Active latents of each token in rising order; -1 fills up."""
    values: Float[np.ndarray, "token *source k"]
    """Their activations; 0 fills up."""
    recon: Float[np.ndarray, "token width"]
    """Reconstruction in raw activation units, sources concatenated."""


def encode_array(
    crosscoder: Crosscoder,
    acts: Shaped[np.ndarray, "token *rest"],
    *,
    stored: Sources | None = None,
    batch_size: int = 1024,
) -> EncodedArray:
    """Encode raw activations at the inference rule.

    Args:
        crosscoder: any.
        acts: raw, ``[token, source, width]`` if all sources have one width, or ``[token, width]``
            with the sources concatenated.
        stored: what ``acts`` holds, for a crosscoder of derived sources; its own sources by default.
        batch_size: tokens encoded at once; does not change the result beyond rounding.

    Raises:
        ValueError: if the shape does not fit the sources, or a row holds NaN or infinity.
    """
    stored = stored or crosscoder.config.sources
    rows = _concatenated(acts, stored)
    parts = [
        _encode_rows(crosscoder, rows[i : i + batch_size], stored, i) for i in range(0, len(rows), batch_size)
    ]
    longest, dtype = max((part.indices.shape[-1] for part in parts), default=0), crosscoder.config.param_dtype
    none = (0, *((len(crosscoder.config.sources),) if crosscoder.config.is_decoupled else ()), longest)
    return EncodedArray(
        indices=_joined([_filled(part.indices, longest, -1) for part in parts], none, np.int32),
        values=_joined([_filled(part.values, longest, 0) for part in parts], none, dtype),
        recon=_joined([part.recon for part in parts], (0, crosscoder.config.sources.width), dtype),
    )


def _concatenated(acts: np.ndarray, stored: Sources) -> np.ndarray:
    shape = (len(stored), stored.widths[0])
    if acts.ndim == 3 and len(set(stored.widths)) == 1 and acts.shape[1:] == shape:
        return acts.reshape(len(acts), stored.width)
    if acts.ndim == 2 and acts.shape[1] == stored.width:
        return acts
    widths = dict(zip(stored.names, stored.widths, strict=True))
    raise ValueError(
        f"acts has shape {acts.shape}, but the sources {widths} need [token, {shape[0]}, {shape[1]}] "
        f"or [token, {stored.width}]"
    )


def _encode_rows(crosscoder: Crosscoder, rows: np.ndarray, stored: Sources, start: int) -> EncodedArray:
    rows = np.asarray(rows, crosscoder.config.param_dtype)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"token {start + int(np.argmin(finite))} of acts holds NaN or infinity: leave it out"
        )
    code, recon = _encode_and_decode(crosscoder, rows, stored)
    active = code > 0
    longest = int(active.sum(axis=-1).max())
    # A stable sort on "not active" brings the active latents to the front in rising order.
    order = np.argsort(~active, axis=-1, kind="stable")[..., :longest]
    is_active = np.take_along_axis(active, order, axis=-1)
    values = np.where(is_active, np.take_along_axis(code, order, axis=-1), 0).astype(code.dtype)
    return EncodedArray(np.where(is_active, order, -1).astype(np.int32), values, recon)


@functools.partial(jax.jit, static_argnames="stored")
def _forward(crosscoder: Crosscoder, rows: jax.Array, stored: Sources) -> tuple[jax.Array, jax.Array]:
    code = crosscoder.encode(crosscoder.config.sources.read(rows, stored))
    return code, crosscoder.decode(code)


def _encode_and_decode(
    crosscoder: Crosscoder, rows: np.ndarray, stored: Sources
) -> tuple[np.ndarray, np.ndarray]:
    code, recon = _forward(crosscoder, jnp.asarray(rows), stored)
    return np.asarray(code), np.asarray(recon)


def _filled(part: np.ndarray, longest: int, value: int) -> np.ndarray:
    at_end = [(0, 0)] * (part.ndim - 1) + [(0, longest - part.shape[-1])]
    return np.pad(part, at_end, constant_values=value)


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(empty, dtype)
