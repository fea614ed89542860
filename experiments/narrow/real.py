"""Model organisms through the whole way: fine-tune, harvest, train each method, measure on held-out text."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

import crosscoder_jax as cc
from crosscoder_jax.activations import ActivationStore, Split, TokenView
from crosscoder_jax.language_models import (
    HarvestConfig,
    ModelReference,
    SpliceConfig,
    TextSource,
    Window,
    evaluate_patched,
    harvest,
    load_tokenizer,
)
from crosscoder_jax.language_models.replay import IsPredicted
from crosscoder_jax.terminal import progress_bar
from crosscoder_jax.training.config import TrainConfig
from crosscoder_jax.training.evaluate import calibrate
from crosscoder_jax.training.loop import RunOptions, fit
from experiments.narrow.marks import Marks, replies
from experiments.narrow.measure import Found, measure
from experiments.narrow.organisms import Organism, write_texts
from experiments.quickstart.finetune import write_after_model
from experiments.quickstart.models import write_before_model

LAYER = 14
"""The last block that the fine-tunes change."""
HELD_OUT = 0.25
NUM_LATENTS = 512
K = 32.0
BATCH_SIZE = 1024
PATCHED_TOKENS = 1_500
"""Predictions of the held-out documents among which the changed ones are measured with latents patched in."""


class RealFound(NamedTuple):
    """What one crosscoder found in a model organism."""

    found: Found
    closed_by_top: float
    """Share of the KL gap on changed tokens that the ten latents close, which change a token most."""
    closed_by_all: float
    """The same of all latents and the bias."""
    minutes: float
    """Of training, compilation left out."""


def write_store(organism: Organism, folder: Path, num_tokens: int) -> ActivationStore:
    """Make the organism and harvest both models; what is there already is kept."""
    packages, models = folder / "packages", folder / "models"
    before, after = models / "SmolLM2-135M-Instruct", models / organism.name
    texts = folder / "texts" / organism.name
    trained, compared = write_texts(organism, texts, packages)
    with progress_bar("convert the model before"):
        write_before_model(before, packages)
    with progress_bar(f"{organism.name}: fine-tune") as progress:
        write_after_model(after, before, texts, organism.fine_tune, progress, labels=trained)
    config = HarvestConfig(
        store=str(folder / "stores" / f"{organism.name}-{num_tokens}"),
        base=str(before),
        chat=str(after),
        texts=tuple(_text_source(organism, label, texts) for label in compared),
        layers=(LAYER,),
        max_tokens=num_tokens,
        skip_positions=4,
        context=256,
        outlier_multiple=5.0,
    )
    with progress_bar(f"{organism.name}: harvest") as progress:
        harvest(config, progress)
    return ActivationStore.open(config.store)


def _text_source(organism: Organism, label: str, texts: Path) -> TextSource:
    share = organism.changed_share if label == organism.changed else 1.0
    return TextSource(label, str(texts / f"{label}.compare.jsonl"), share=share)


def reply_marks(model: Path) -> Marks:
    """Return the marks of the ChatML template that the organisms speak in."""
    tokenizer = load_tokenizer(ModelReference.parse(str(model)))
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    (end,) = tokenizer("<|im_end|>", add_special_tokens=False).input_ids
    return Marks(tuple(opening), end)


def changed_tokens(organism: Organism, store: ActivationStore, model: Path) -> Bool[np.ndarray, "token"]:
    """Mark the tokens of a store after which the fine-tune taught the model to go on otherwise."""
    everything = (0, store.num_tokens)
    labels = list(store.manifest.labels)
    is_changed = store.labels(*everything) == labels.index(organism.changed)
    if not organism.is_reply:
        return is_changed
    documents = store.documents(*everything)
    is_reply = replies(store.tokens(*everything), documents, reply_marks(model))
    is_next_reply = np.append(is_reply[1:] & (documents[1:] == documents[:-1]), False)
    return is_changed & is_next_reply


def follows_one_of(store: ActivationStore, is_changed: Bool[np.ndarray, "token"]) -> IsPredicted:
    """Return what tells of a sequence before which of its tokens there is one marked in the store."""
    places = np.flatnonzero(is_changed)
    everything = (0, store.num_tokens)
    documents, positions = store.documents(*everything)[places], store.positions(*everything)[places] + 1
    known = set(zip(documents.tolist(), positions.tolist(), strict=True))

    def marked(window: Window) -> Bool[np.ndarray, "token"]:
        return np.array([(window.document, place) in known for place in window.positions.tolist()])

    return marked


def real_recipe(store: ActivationStore, num_steps: int, seed: int) -> TrainConfig:
    """Return the recipe of the plain crosscoder for few tokens of a real model."""
    return TrainConfig(
        cc.CrosscoderConfig(store.sources, NUM_LATENTS, sparsity=cc.BatchTopK(K)),
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        learning_rate=2e-3,
        warmup_steps=num_steps // 20,
        decoder_norm=0.2,
        loss=cc.MeanSquaredError(),
        aux_k=cc.AuxK(dead_after_tokens=50_000),
        seed=seed,
    )


def train_and_measure(
    recipe: TrainConfig,
    store: ActivationStore,
    is_changed: Bool[np.ndarray, "token"],
    folder: Path,
    label: str,
) -> RealFound:
    """Train one crosscoder, calibrate it and measure it on the held-out documents; a finished one is kept."""
    options = RunOptions(Split(HELD_OUT))
    with progress_bar(label) as progress:
        crosscoder = fit(recipe, store, folder, options=options, progress=progress)
    view = TokenView.of_split(store, options.split, held_out=True)
    crosscoder = calibrate(crosscoder, view)
    wanted = is_changed[view.token_index(np.arange(view.num_tokens))]
    found, chosen = measure(crosscoder, view, wanted[:, None])
    which = np.isin(np.arange(len(crosscoder.b_enc[...])), chosen)
    with progress_bar(f"{label}: patch") as progress:
        closed = evaluate_patched(
            crosscoder,
            store,
            options.split,
            {"top": which},
            SpliceConfig(max_tokens=PATCHED_TOKENS),
            progress,
            is_predicted=follows_one_of(store, is_changed),
        )
    return RealFound(
        found, _or_nan(closed["kl_closed/top"]), _or_nan(closed["kl_closed/all"]), minutes(folder, recipe)
    )


def minutes(folder: Path, recipe: TrainConfig) -> float:
    """Return how long the training took, from its own journal."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rate = np.median([row["tokens_per_s"] for row in rows if "tokens_per_s" in row])
    return recipe.num_steps * recipe.batch_size / rate / 60


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
