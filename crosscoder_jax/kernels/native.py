"""The products of a code's entries on CPU: compiled C++ (entries.cc) that XLA calls without a copy.

The functions are those of :mod:`crosscoder_jax.sparsity.entries`, in float32. They are there where a C++
compiler was when the package was installed, and jaxlib is one that takes what it was compiled for.
"""

import ctypes
import functools
import importlib.util
import logging
import os
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from crosscoder_jax.sparsity.entries import ByLatent, Entries, EntryFloats
from crosscoder_jax.typing import Acts, DecoderWeights, EncoderWeights, Latents, PerLatent, Scalar

_logger = logging.getLogger(__name__)

SWITCH = "CROSSCODER_JAX_NATIVE"
"""Environment variable; 0 does without."""
_FUNCTIONS = (
    "compress",
    "by_latent",
    "decode",
    "value_gradient",
    "decoder_gradient",
    "encoder_gradient",
)


@functools.cache
def missing() -> str | None:
    """Return why the compiled products are not there, ``None`` if they are; XLA knows them after that."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    spec = importlib.util.find_spec("crosscoder_jax.kernels._entries")
    if spec is None or spec.origin is None:
        return (
            "no C++ compiler was there when crosscoder_jax was installed: install one, then the package again"
        )
    try:
        library = ctypes.CDLL(spec.origin)
        for name in _FUNCTIONS:
            handler = jax.ffi.pycapsule(getattr(library, f"crosscoder_{name}"))
            jax.ffi.register_ffi_target(f"crosscoder_{name}", handler, platform="cpu")
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{spec.origin} does not suit jaxlib {version('jaxlib')} ({error})"
    return None


@functools.cache
def is_available() -> bool:
    """Return whether the compiled products are there; if not, say once why."""
    reason = missing()
    if reason is not None:
        _logger.info("on CPU the decoder is multiplied with all of the code, zeros included: %s", reason)
    return reason is None


def compress(pre_acts: Latents, score_weights: PerLatent, cut: Scalar, capacity: int) -> Entries:
    """Return the entries whose score reaches a cut.

    Raises:
        jax.errors.JaxRuntimeError: when run, if there are more than the capacity.
    """
    values, latents, starts = _call(
        "compress",
        (_floats(capacity), _ints(capacity), _ints(len(pre_acts) + 1)),
        pre_acts,
        score_weights,
        cut,
    )
    return Entries(values, latents, starts)


def by_latent(entries: Entries, num_latents: int) -> ByLatent:
    """Return the entries in the order of their latents."""
    number = len(entries.latents)
    shapes = _ints(number), _ints(number), _ints(num_latents + 1)
    return ByLatent(*_call("by_latent", shapes, entries.latents, entries.starts))


def decode(entries: Entries, w_dec: DecoderWeights) -> Acts:
    """Return the code times the decoder, without the bias."""
    return _call("decode", _floats(len(entries.starts) - 1, w_dec.shape[1]), *entries, w_dec)


def value_gradient(entries: Entries, grad: Acts, w_dec: DecoderWeights) -> EntryFloats:
    """Return the gradient of the entries' values from that of what they decode to."""
    shape = _floats(len(entries.latents))
    return _call("value_gradient", shape, entries.latents, entries.starts, grad, w_dec)


def decoder_gradient(values: EntryFloats, order: ByLatent, grad: Acts) -> DecoderWeights:
    """Return the gradient of the decoder."""
    return _call("decoder_gradient", _floats(len(order.starts) - 1, grad.shape[1]), values, *order, grad)


def encoder_gradient(of_values: EntryFloats, order: ByLatent, acts: Acts) -> tuple[EncoderWeights, PerLatent]:
    """Return the gradients of the encoder and of its bias."""
    num_latents = len(order.starts) - 1
    shapes = _floats(acts.shape[1], num_latents), _floats(num_latents)
    of_encoder, of_bias = _call("encoder_gradient", shapes, of_values, *order, acts)
    return of_encoder, of_bias


def _call(name: str, shapes: Any, *arrays: jax.Array) -> Any:
    return jax.ffi.ffi_call(f"crosscoder_{name}", shapes, vmap_method="sequential")(*arrays)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
