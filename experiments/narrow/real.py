"""Model organisms through the whole way: fine-tune, harvest, train each method, measure on held-out text."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

import crosscoder_jax as cc
from crosscoder_jax.activations import ActivationStore, Split, TokenView
from crosscoder_jax.language_models import (
    HarvestConfig,
    ModelReference,
    TextSource,
    harvest,
    load_tokenizer,
)
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
NUM_LATENTS = 1024
K = 32.0
BATCH_SIZE = 1024


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
        texts=tuple(TextSource(label, str(texts / f"{label}.compare.jsonl")) for label in compared),
        layers=(LAYER,),
        max_tokens=num_tokens,
        skip_positions=4,
        context=256,
        outlier_multiple=5.0,
    )
    with progress_bar(f"{organism.name}: harvest") as progress:
        harvest(config, progress)
    return ActivationStore.open(config.store)


def reply_marks(model: Path) -> Marks:
    """Return the marks of the ChatML template that the organisms speak in."""
    tokenizer = load_tokenizer(ModelReference.parse(str(model)))
    opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
    (end,) = tokenizer("<|im_end|>", add_special_tokens=False).input_ids
    return Marks(tuple(opening), end)


def changed_tokens(organism: Organism, store: ActivationStore, model: Path) -> Bool[np.ndarray, "token"]:
    """Mark the tokens of a store that the fine-tune taught the model to write otherwise."""
    everything = (0, store.num_tokens)
    labels = list(store.manifest.labels)
    is_changed = store.labels(*everything) == labels.index(organism.changed)
    if not organism.is_reply:
        return is_changed
    marks = reply_marks(model)
    return is_changed & replies(store.tokens(*everything), store.documents(*everything), marks)


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
) -> Found:
    """Train one crosscoder, calibrate it and measure it on the held-out documents; a finished one is kept."""
    options = RunOptions(Split(HELD_OUT))
    with progress_bar(label) as progress:
        crosscoder = fit(recipe, store, folder, options=options, progress=progress)
    view = TokenView.of_split(store, options.split, held_out=True)
    everything = np.arange(view.num_tokens)
    stored = jnp.asarray(view.read_positions(everything), jnp.float32)
    return measure(
        calibrate(crosscoder, view), stored, store.sources, is_changed[view.token_index(everything)][:, None]
    )
