"""Fast versions, per platform, of what :mod:`crosscoder_jax.sparsity` defines."""
