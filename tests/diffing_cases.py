"""Small crosscoders and activations whose answers are known, shared by the tests of diffing."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crosscoder_jax.crosscoder import Crosscoder, CrosscoderConfig, Fixed
from crosscoder_jax.sharding import Shardings
from crosscoder_jax.sources import Source, Sources

GOLDEN = Path(__file__).parent / "golden"
TARGETS = ("activation", "activation_no_bias", "reconstruction", "error")


def pair(width):
    return Sources((Source("base", width), Source("chat", width)))


def make_crosscoder(
    sources, w_enc, b_enc, w_dec, b_dec, threshold=0.0, mean=None, scale=None, shardings=None
):
    """A crosscoder with given weights in normalised units."""
    shardings = Shardings() if shardings is None else shardings
    config = CrosscoderConfig(sources, num_latents=w_dec.shape[0])
    crosscoder = Crosscoder(config, key=jax.random.key(0), mean=mean, scale=scale, shardings=shardings)

    def put(values, spec):
        values = jnp.asarray(values, jnp.float32)
        return values if spec is None else jax.device_put(values, spec)

    crosscoder.w_enc = nnx.Param(put(w_enc, shardings.w_enc_wl))
    crosscoder.b_enc = nnx.Param(put(b_enc, shardings.per_latent_l))
    crosscoder.w_dec = nnx.Param(put(w_dec, shardings.w_dec_lw))
    crosscoder.b_dec = nnx.Param(put(b_dec, None))
    crosscoder.threshold = Fixed(jnp.asarray(threshold, jnp.float32))
    return crosscoder


def random_crosscoder(seed=0, width=6, num_latents=16, threshold=0.5, shardings=None, **kwargs):
    """A crosscoder with random weights, biases and per-source scales: nothing symmetric to hide behind."""
    rng = np.random.default_rng(seed)
    return make_crosscoder(
        pair(width),
        w_enc=rng.standard_normal((2 * width, num_latents)) / np.sqrt(width),
        b_enc=0.3 * rng.standard_normal(num_latents),
        w_dec=rng.standard_normal((num_latents, 2 * width)) / np.sqrt(width),
        b_dec=rng.standard_normal(2 * width),
        threshold=threshold,
        mean=rng.standard_normal(2 * width),
        scale=np.array([0.7, 1.9]),
        shardings=shardings,
        **kwargs,
    )


@dataclasses.dataclass
class Batch:
    """What the store yields, as far as Latent Scaling looks at it."""

    acts: np.ndarray
    documents: np.ndarray
    is_valid: np.ndarray


def batches_of(acts, documents, batch_size):
    """Cut into batches of one size; the last is padded with NaN rows that are not valid."""
    out = []
    for start in range(0, len(acts), batch_size):
        part, docs = acts[start : start + batch_size], documents[start : start + batch_size]
        missing = batch_size - len(part)
        out.append(
            Batch(
                np.concatenate([part, np.full((missing, acts.shape[1]), np.nan, acts.dtype)]),
                np.concatenate([docs, np.zeros(missing, docs.dtype)]),
                np.arange(batch_size) < len(part),
            )
        )
    return out


def oracle_betas(acts, code, w_dec, b_dec, reference):
    """Latent Scaling by least squares, latent by latent, in float64, straight from its definition.

    acts [token, source, d], code [token, latent], w_dec [latent, source, d], b_dec [source, d].
    """
    acts, code, w_dec, b_dec = (np.asarray(x, np.float64) for x in (acts, code, w_dec, b_dec))
    beta = np.full((4, 2, code.shape[1]), np.nan)
    recon = np.einsum("nl,lsd->nsd", code, w_dec) + b_dec
    for j in range(code.shape[1]):
        direction = w_dec[j, reference[j]]
        design = np.outer(code[:, j], direction).ravel()  # f_j d_j over tokens and coordinates
        if not design.any():
            continue
        for m in range(2):
            without_j = recon[:, m] - np.outer(code[:, j], w_dec[j, m])
            ys = (acts[:, m], acts[:, m] - b_dec[m], recon[:, m], acts[:, m] - without_j)
            for t, y in enumerate(ys):
                beta[t, m, j] = design @ y.ravel() / (design @ design)
    return beta
