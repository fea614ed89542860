"""The three pairs of models, and the published recipe as commands of this package."""

import dataclasses
from pathlib import Path

from crosscoder_jax.commands import Train
from crosscoder_jax.language_models import HarvestConfig, TextSource

TEXTS = (
    TextSource("web", "HuggingFaceFW/fineweb", subset="sample-10BT"),
    TextSource("chat", "lmsys/lmsys-chat-1m"),
)
"""Equal shares of tokens. The second one asks for its licence to be accepted on the Hub."""
TOKENS = 100_000_000
"""To train on."""
HELD_OUT = 0.02
"""Share of the documents to analyse, harvested besides; the authors took other text for it."""
EPOCHS = 2
BATCH_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two models and where they are compared."""

    name: str
    base: str
    """Hub id, or a folder."""
    chat: str
    layer: int
    """Block whose output is read, from 0."""
    width: int
    """Of the residual stream."""
    family: str
    """Of architectures, as transformers calls it."""
    published: str
    """What the paper and its authors report, to compare with."""

    @property
    def num_latents(self) -> int:
        """32 times the width."""
        return 32 * self.width


PAIRS = {
    pair.name: pair
    for pair in (
        Pair(
            "gemma-2-2b",
            "google/gemma-2-2b",
            "google/gemma-2-2b-it",
            13,
            2304,
            "gemma2",
            "FVE 0.876, L0 100, 12 % dead, 134 chat-only, 5 base-only",
        ),
        Pair(
            "llama-3.2-1b",
            "meta-llama/Llama-3.2-1B",
            "meta-llama/Llama-3.2-1B-Instruct",
            8,
            2048,
            "llama",
            "-",
        ),
        Pair(
            "llama-3.1-8b",
            "meta-llama/Llama-3.1-8B",
            "meta-llama/Llama-3.1-8B-Instruct",
            16,
            4096,
            "llama",
            "-",
        ),
    )
}
"""By name. A re-run of the first by others, each model normalised, found 3 chat-only and 4 base-only latents
with 42.9 % dead: the counts hang on the recipe and are no target."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Chips, and how the run is spread over them."""

    name: str
    topology: str
    """As ``crosscoder-jax plan`` takes it."""
    data_shards: int
    latent_shards: int


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("h200", "1xH200-141GB", 1, 1),
        Hardware("v6e-8", "v6e:2x4", 1, 8),
        Hardware("v5p-16", "v5p:2x2x2", 1, 8),
        Hardware("cpu", "cpu:1", 1, 1),
    )
}
"""By name; v5p counts cores, two of which are a chip."""


def harvest_command(pair: Pair, folder: Path) -> HarvestConfig:
    """Return the harvest: half web text and half conversations, stored in bfloat16."""
    return HarvestConfig(
        store=str(folder / "store"),
        base=pair.base,
        chat=pair.chat,
        texts=TEXTS,
        layers=(pair.layer,),
        max_tokens=round(TOKENS / (1 - HELD_OUT)),
        context=1024,
        batch_size=16,
        shuffle_seed=0,
    )


def train_command(pair: Pair, folder: Path, hardware: Hardware) -> Train:
    """Return the published BatchTopK recipe: raw activations, float32, two epochs."""
    return Train(
        store=folder / "store",
        output=folder / "crosscoder",
        num_latents=pair.num_latents,
        k=100,
        num_steps=EPOCHS * TOKENS // BATCH_SIZE,
        batch_size=BATCH_SIZE,
        learning_rate=1e-4,
        warmup_steps=1000,
        decoder_norm=1.0,
        loss="norm",
        is_centred=False,
        is_scaled=False,
        held_out=HELD_OUT,
        checkpoint_every=5000,
        data_shards=hardware.data_shards,
        latent_shards=hardware.latent_shards,
    )
