"""Crosscoders as files."""

from crosscoder_jax.interop.published import load as load
from crosscoder_jax.interop.published import save as save
