"""Crosscoders and the files and arrays of other programs."""

from crosscoder_jax.interop.arrays import EncodedArray as EncodedArray
from crosscoder_jax.interop.arrays import encode_array as encode_array
