"""Run folders with known numbers, written as training, evaluation and diffing write them."""

import atexit
import dataclasses
import functools
import itertools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from crosscoder_jax.activations import ActivationStore, Split, StoredSource, StoreWriter
from crosscoder_jax.activations.atomic import write_json_atomically
from crosscoder_jax.configs import value_from_json
from crosscoder_jax.crosscoder import Crosscoder, CrosscoderConfig
from crosscoder_jax.diffing import DiffConfig, DiffResult, write_diff
from crosscoder_jax.diffing.snippets import Snippet
from crosscoder_jax.diffing.summary import class_summary
from crosscoder_jax.diffing.table import trajectory_columns
from crosscoder_jax.objectives import AuxK, L1OfNorms
from crosscoder_jax.publishing import save
from crosscoder_jax.sources import Source, Sources
from crosscoder_jax.sparsity import ReLU, Sparsity
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.folders import claim_folder, run_identity
from crosscoder_jax.training.options import RunOptions
from crosscoder_jax.training.runs import Run
from crosscoder_jax.training.tracking import JsonLinesTracker

HOSTILE = "</script><img src=x onerror=\"alert('x')\">{{7*7}}<b>%{x}"
WIDTH = 576
LABELS = ("novel", "conversation", "speeches")
PASSAGE = (
    " the| whale| rose| slowly| before| the| ship|,| and| Captain| Ahab| stood| upon| the| deck|;|\n|“|There|"
    " she| blows|!|”| cried| the| mast|-|head|.| What| would| you| like| for| dinner|?| I| think|"
    " we| should| go| home|."
)
WORDS = PASSAGE.split("|")


def make_run(
    folder: Path,
    *,
    num_latents: int = 400,
    num_chat: int = 12,
    num_base: int = 3,
    sources: tuple[str, ...] = ("before", "after"),
    sparsity: dict | None = None,
    seed: int = 0,
    hostile: str = "",
) -> Path:
    """Write a run folder as training, evaluation and diffing leave it.

    Of the chat-only latents, every fourth is complete shrinkage, every sixth latent decoupling, and the last
    has too little evidence; the others are confirmed, every fifth latent with an interval that crosses a
    cut-off.
    """
    shutil.copytree(
        _made(num_latents, num_chat, num_base, sources, json.dumps(sparsity), seed, hostile), folder
    )
    return folder


@functools.cache
def _made(
    num_latents: int,
    num_chat: int,
    num_base: int,
    sources: tuple[str, ...],
    sparsity: str,
    seed: int,
    hostile: str,
) -> Path:
    """Write such a run once, with the writers of training, evaluation and diffing."""
    folder = _scratch() / f"run-{next(_NUMBERS)}"
    rng = np.random.default_rng(seed)
    is_pair = len(sources) == 2
    columns = (
        crosscoder_columns(rng, num_latents, num_chat, num_base)
        if is_pair
        else unclassed_columns(rng, num_latents, sources)
    )
    store, config = _store(), make_config(num_latents, sources, json.loads(sparsity))
    folder.mkdir()
    claim_folder(folder, run_identity(config, store, RunOptions(split=Split(0.2))), store, None)
    save(Crosscoder(config.crosscoder, key=jax.random.key(0)), folder / "crosscoder")
    measured_on = Run.open(folder).measured_on()
    evaluation = make_evaluation(sources, 0.853 if is_pair else 0.56)
    write_json_atomically(folder / "evaluation.json", {**evaluation, "measured_on": measured_on})
    summary = {
        "sources": list(sources),
        "num_latents": num_latents,
        "num_tokens": 30_211,
        "num_documents": 120,
        "tokens_by_label": dict(zip(LABELS, (8_020, 13_100, 9_091), strict=True)),
        "measured_on": measured_on,
    }
    if is_pair:
        settings = DiffConfig()
        summary["cutoffs"] = dataclasses.asdict(settings.cutoffs) | settings.limits
        summary |= class_summary(columns)
    snippets = make_snippets(rng, columns, num_chat + num_base, hostile)
    write_diff(DiffResult(columns, summary, snippets), folder / "diff")
    tracker = JsonLinesTracker(folder / "metrics.jsonl")
    for row in make_metrics(rng, sources):
        tracker.log(row.pop("step"), row)
    tracker.close()
    return folder


_NUMBERS = itertools.count()


@functools.cache
def _scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="report-runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _store() -> ActivationStore:
    """A store of a few tokens of two models, of which only the description matters."""
    stored = [
        StoredSource(name, WIDTH, model, revision, "blocks.15.resid_post")
        for name, model, revision in (
            ("before", "SmolLM2-135M-Instruct", "12fd25f"),
            ("after", "SmolLM2-135M-Instruct + LoRA on Moby-Dick", None),
        )
    ]
    index = np.arange(4)
    acts = {
        source.name: np.full((4, WIDTH), i + index[:, None], np.float32) for i, source in enumerate(stored)
    }
    with StoreWriter.create_or_resume(
        _scratch() / "store", sources=stored, dtype="float32", labels=LABELS, config={}, chunk_tokens=4
    ) as writer:
        writer.append(acts, tokens=index, documents=index, positions=0 * index, labels=index % 3)
        writer.finish({})
    return ActivationStore.open(_scratch() / "store")


def crosscoder_columns(rng: np.random.Generator, num_latents: int, num_chat: int, num_base: int) -> dict:
    """Make the columns of a two-source table: chat-only first, then base-only, two dead, the rest."""
    delta = np.clip(rng.normal(0.5, 0.055, num_latents), 0, 1)
    delta[:num_chat] = rng.uniform(0.91, 0.995, num_chat)
    delta[num_chat : num_chat + num_base] = rng.uniform(0.01, 0.09, num_base)
    classes = np.select(
        [delta <= 0.1, delta >= 0.9, (delta >= 0.4) & (delta <= 0.6)],
        ["base-only", "chat-only", "shared"],
        "other",
    ).astype(object)
    dead = slice(num_chat + num_base, num_chat + num_base + 2)
    classes[dead] = "dead"
    nu_error, nu_recon = (
        rng.normal(1 - 1.2 * np.abs(delta - 0.5), 0.07),
        rng.normal(1 - np.abs(delta - 0.5), 0.05),
    )
    chat = np.arange(num_chat)
    nu_error[chat] = np.where(
        chat % 4 == 3, rng.uniform(0.45, 1.0, num_chat), rng.uniform(0.0, 0.15, num_chat)
    )
    nu_recon[chat] = np.where(
        chat % 6 == 5, rng.uniform(0.65, 1.1, num_chat), rng.uniform(0.05, 0.42, num_chat)
    )
    nu_error[num_chat : num_chat + num_base], nu_recon[num_chat : num_chat + num_base] = 0.1, 0.3
    is_shrunk, is_decoupled, is_claimed = (
        nu_error >= 0.2,
        nu_recon >= 0.5,
        np.isin(classes, ["chat-only", "base-only"]),
    )
    verdict = np.select(
        [~is_claimed, is_shrunk & is_decoupled, is_shrunk, is_decoupled],
        ["", "shrinkage and decoupling", "complete shrinkage", "latent decoupling"],
        "confirmed",
    ).astype(object)
    if num_chat:
        nu_error[num_chat - 1] = nu_recon[num_chat - 1] = np.nan
        verdict[num_chat - 1] = "undetermined"
    nu_error[dead] = nu_recon[dead] = np.nan
    norm_after = rng.uniform(0.5, 2, num_latents)
    columns = {
        **activity_columns(rng, num_latents),
        "norm_before": norm_after * np.clip(2 * (1 - delta), 0, 1),
        "norm_after": norm_after,
        "delta_norm": np.where(classes == "dead", np.nan, delta),
        "latent_class": classes,
        "cosine": rng.uniform(0.6, 1, num_latents),
        "reference": np.where(delta < 0.5, "before", "after").astype(object),
        "nu_error": nu_error,
        "se_nu_error": rng.uniform(0.01, 0.05, num_latents),
        "nu_recon": nu_recon,
        "se_nu_recon": rng.uniform(0.01, 0.04, num_latents),
        "evidence": np.where(np.isnan(nu_error), "too little", "enough").astype(object),
        "verdict": verdict,
        "is_beyond_interval": (verdict == "confirmed") & (np.arange(num_latents) % 5 > 0),
        "why_not": np.array(
            [
                f"nu_error {x:.2f} is not below 0.2" if w and w != "confirmed" else ""
                for x, w in zip(nu_error, verdict, strict=True)
            ],
            object,
        ),
    }
    for name in ("frequency", "active_tokens", "active_documents"):
        columns[name][dead] = 0
    return columns


def unclassed_columns(rng: np.random.Generator, num_latents: int, sources: tuple[str, ...]) -> dict:
    """Make the columns of a table of one source, such as a difference, or of more than two."""
    entries = Sources(tuple(Source(name, 8) for name in sources))
    w_dec = np.float32(rng.normal(size=(num_latents, entries.width)) * rng.uniform(size=(num_latents, 1)))
    w_dec[::3, :8] *= 0.1  # every third latent is weak at first
    norms = np.asarray(entries.norms(jnp.asarray(w_dec)))
    columns = {f"norm_{name}": norms[i] for i, name in enumerate(sources)}
    return {
        **activity_columns(rng, num_latents),
        **columns,
        **trajectory_columns(norms, jnp.asarray(w_dec), entries),
    }


def activity_columns(rng: np.random.Generator, num_latents: int) -> dict:
    """Make the columns that every table has; the first five latents fire almost only on the novel."""
    shares = rng.dirichlet([8, 12, 9], num_latents)
    shares[:5] = [0.94, 0.04, 0.02]
    frequency = np.exp(rng.normal(-5, 1.2, num_latents)).clip(1e-5, 0.6)
    return {
        "latent": np.arange(num_latents),
        "frequency": frequency,
        "active_tokens": np.round(frequency * 30_211) + 25,
        "active_documents": np.round(frequency * 120) + 1,
        "mean_activation": rng.uniform(1, 5, num_latents),
        "max_activation": rng.uniform(8, 30, num_latents),
        "energy": np.exp(rng.normal(0, 1, num_latents)),
        **{f"share_{label}": shares[:, i] for i, label in enumerate(LABELS)},
    }


def make_config(num_latents: int, sources: tuple[str, ...], sparsity: dict | None) -> TrainConfig:
    """Make the recipe that training records of itself."""
    kind = value_from_json(Sparsity, sparsity or {"type": "BatchTopK", "k": 32.0}, where="sparsity")
    is_dense = isinstance(kind, ReLU)
    combination = (("after", 1.0), ("before", -1.0)) if sources == ("difference",) else None
    return TrainConfig(
        CrosscoderConfig(
            Sources(tuple(Source(name, WIDTH, combination) for name in sources)),
            num_latents,
            kind,
        ),
        l1=L1OfNorms(0.041) if is_dense else None,
        num_steps=1_200,
        batch_size=1_024,
        learning_rate=1e-3,
        warmup_steps=100,
        aux_k=None if is_dense else AuxK(),
    )


def make_evaluation(sources: tuple[str, ...], fve: float) -> dict:
    """Make the held-out numbers."""
    by_source = {f"fve/{name}": fve + 0.01 * i for i, name in enumerate(sources)}
    return {
        "split": "held-out",
        "num_tokens": 30_211,
        "fve": fve,
        **by_source,
        "l0_training_rule": 32.0,
        "l0_inference_rule": 31.4,
        "dead": 0.0049,
        "dense": 0.001,
    }


def make_metrics(rng: np.random.Generator, sources: tuple[str, ...]) -> list[dict]:
    """Make a training log of 120 rows."""
    rows = []
    for step in range(10, 1_210, 10):
        fit = 1 - np.exp(-step / 220)
        by_source = {
            f"fve/{name}": round(float((0.85 - 0.05 * i) * fit + rng.normal(0, 0.006)), 4)
            for i, name in enumerate(sources)
        }
        rows.append(
            {
                "step": step,
                "loss": float(900 * (1.08 - fit) * np.exp(rng.normal(0, 0.02))),
                "fve": 0.8 * float(fit),
                **by_source,
                "l0": float(32 + rng.normal(0, 0.3)),
                "dead": float(0.02 * np.exp(-step / 300)),
                "lr": 1e-3,
            }
        )
    return rows


def make_snippets(
    rng: np.random.Generator, columns: dict, num_kept: int, hostile: str
) -> dict[int, list[Snippet]]:
    """Make passages for the first latents; some hold text that tries to break the page."""
    snippets = {}
    for latent in range(min(max(num_kept, 10), len(columns["latent"]))):
        entries = []
        for rank in range(7):
            start = int(rng.integers(0, len(WORDS)))
            tokens = [WORDS[(start + i) % len(WORDS)] for i in range(64)]
            activations = np.where(rng.uniform(size=64) < 0.12, rng.uniform(0.5, 9 - rank, 64), 0.0)
            peak = int(rng.integers(10, 60))
            activations[peak] = 12.0 - rank
            if hostile and rank == 0:
                tokens[peak], tokens[peak - 1], tokens[peak + 1] = hostile, "\u202eabc\u200b", " שלום\tعرب"
            entries.append(
                Snippet(
                    tokens=tuple(tokens),
                    activations=tuple(round(float(a), 3) for a in activations),
                    peak=peak,
                    value=12.0 - rank,
                    document=40 + rank,
                    position=100 + peak,
                    label=LABELS[rank % 3 if latent >= 5 else 0],
                )
            )
        snippets[latent] = entries
    if num_kept > 2:
        snippets[1] = []
    return snippets
