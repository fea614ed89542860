"""Crosscoders in JAX: which concepts belong to one of two language models only."""
