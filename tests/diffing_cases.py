"""Small crosscoders and activations whose answers are known, shared by the tests of diffing."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from crosscoder_jax.activations import ActivationStore, StoredSource, StoreWriter
from crosscoder_jax.crosscoder import Crosscoder, CrosscoderConfig, Fixed
from crosscoder_jax.diffing.latent_scaling import LatentScaling
from crosscoder_jax.sharding import Shardings
from crosscoder_jax.sources import Source, Sources
from crosscoder_jax.sparsity import BatchTopK

GOLDEN = Path(__file__).parent / "golden"
WIDTH, NUM_LATENTS = 8, 8
LABELS = ("prose", "novel")
# Latent: 0, 1 shared; 2 chat-only, genuine; 3 chat-only by its decoder, but in the base's error
# (shrunk); 4 base-only, genuine; 5 chat-only and 6 base-only firing together (decoupled); 7 never fires.
NOVEL_ONLY = 2
VOCABULARY = {i: f" w{i}".encode() for i in range(100)} | {100: "é".encode()[:1], 101: "é".encode()[1:]}
TARGETS = ("activation", "activation_no_bias", "reconstruction", "error")


def pair(width):
    return Sources((Source("base", width), Source("chat", width)))


def make_crosscoder(
    sources, w_enc, b_enc, w_dec, b_dec, threshold=0.0, mean=None, scale=None, shardings=None
):
    """A crosscoder with given weights in normalised units."""
    shardings = Shardings() if shardings is None else shardings
    # Every positive pre-activation is kept at the training rule.
    sparsity = BatchTopK(k=float(w_dec.shape[0]))
    config = CrosscoderConfig(sources, num_latents=w_dec.shape[0], sparsity=sparsity)
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


def planted(num_tokens=1800, seed=0):
    """Activations of two models made of eight orthogonal directions, and which features are on."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    documents = np.arange(num_tokens) // 15
    labels = documents % 2
    code = (0.5 + rng.random((num_tokens, NUM_LATENTS))) * (rng.random((num_tokens, NUM_LATENTS)) < 0.3)
    code[labels == 0, NOVEL_ONLY] = 0
    code[:, 6] = code[:, 5]
    code[:, 7] = 0
    directions[6] = directions[5]  # the same concept, coded twice
    strength = np.zeros((NUM_LATENTS, 2))  # decoder norm in each source
    strength[[0, 1]] = 1.0, 1.0
    strength[[2, 3, 5], 1] = 2.0
    strength[[4, 6], 0] = 2.0
    strength[7] = 1.0
    w_dec = strength[:, :, None] * directions[:, None]  # [latent, source, width]
    acts = np.einsum("nl,lsd->nsd", code, w_dec)
    acts[:, 0] += 0.6 * 2.0 * code[:, 3:4] * directions[3]
    return acts.astype(np.float32), code, w_dec, directions, documents, labels


def planted_crosscoder(w_dec, directions, shardings=None):
    """An encoder that reads each planted feature off the model that has it, exactly."""
    w_enc = np.zeros((2, WIDTH, NUM_LATENTS))
    for j, source in enumerate((1, 1, 1, 1, 0, 1, 0, 1)):
        norm = np.linalg.norm(w_dec[j, source])
        w_enc[source, :, j] = directions[j] / norm
    b_enc = np.zeros(NUM_LATENTS)
    b_enc[7] = -100.0
    return make_crosscoder(
        pair(WIDTH),
        w_enc.reshape(2 * WIDTH, NUM_LATENTS),
        b_enc,
        w_dec.reshape(NUM_LATENTS, -1),
        np.zeros(2 * WIDTH),
        threshold=0.1,
        shardings=shardings,
    )


def write_store(path, acts, documents, labels, names=("base", "chat")):
    sources = [
        StoredSource(name, acts.shape[2], f"org/{name}", None, "blocks.1.resid_post") for name in names
    ]
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 100, len(acts))
    positions = np.concatenate([np.arange(n) for n in np.bincount(documents)])
    with StoreWriter.create_or_resume(
        path, sources=sources, dtype="float32", labels=LABELS, config={}, chunk_tokens=64
    ) as writer:
        writer.append(
            {name: acts[:, i] for i, name in enumerate(names)},
            tokens=tokens,
            documents=documents,
            positions=positions,
            labels=labels,
        )
        writer.finish({}, VOCABULARY)
    return ActivationStore.open(path)


def scaling_of(nu_error, nu_recon, has_evidence=None, reference=None, error=0.0):
    """Well measured: every coefficient is 1 with an error of 0.1, over many tokens of many groups."""
    count = len(nu_error)
    return LatentScaling(
        beta=np.ones((4, 2, count)),
        se_beta=np.full((4, 2, count), 0.1),
        nu_error=np.array(nu_error, float),
        se_nu_error=np.full(count, error),
        nu_recon=np.array(nu_recon, float),
        se_nu_recon=np.full(count, error),
        has_evidence=np.ones(count, bool) if has_evidence is None else np.array(has_evidence),
        active_tokens=np.full(count, 100),
        active_groups=np.full(count, 10),
        reference=np.ones(count, int) if reference is None else np.array(reference),
        num_tokens=1000,
        num_groups=20,
    )


def two_model_columns():
    """Eight latents: number, class, verdict, energy, active tokens, delta_norm."""
    rows = [
        ("shared", "", 9.0, 900, 0.50),
        ("chat-only", "complete shrinkage", 5.0, 300, 0.95),
        ("base-only", "confirmed", 1.0, 80, 0.05),
        ("other", "", 3.0, 400, 0.75),
        ("dead", "", 0.0, 0, 0.99),
        ("other", "", 3.0, 5, 0.85),  # further out than latent 3, but it fired on five tokens only
        ("chat-only", "confirmed", 2.0, 60, 0.97),
        ("chat-only", "undetermined", 7.0, 4, 1.00),
    ]
    classes, verdict, energy, active, delta = zip(*rows, strict=True)
    return {
        "latent": np.arange(8),
        "latent_class": np.array(classes, object),
        "verdict": np.array(verdict, object),
        "evidence": np.array(["too little" if n < 50 else "enough" for n in active], object),
        "energy": np.array(energy),
        "active_tokens": np.array(active),
        "delta_norm": np.array(delta),
    }
