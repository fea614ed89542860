"""The same commands on models of the same architectures that are too small to know anything."""

import dataclasses
import json
from pathlib import Path

from crosscoder_jax.commands import Train
from crosscoder_jax.language_models import HarvestConfig, TextSource
from experiments.minder2025.pairs import Pair

WIDTH, BLOCKS, VOCABULARY = 32, 18, 400
"""Blocks enough for every layer that is read."""
_WORDS = ("the whale", "a ship", "the sea", "my captain", "sailed about", "was white", "came near", "at dawn")
_NUM_DOCUMENTS = 400


def small_pair(pair: Pair, folder: Path) -> Pair:
    """Make two random models of the pair's family in a folder; what is there is kept."""
    names = [folder / "models" / pair.name / name for name in ("base", "chat")]
    for seed, path in enumerate(names):
        if not (path / "config.json").is_file():
            _write_model(path, pair.family, seed)
    return dataclasses.replace(pair, base=str(names[0]), chat=str(names[1]), width=WIDTH)


def small_harvest(command: HarvestConfig, folder: Path) -> HarvestConfig:
    """Return the harvest of as few tokens as tell that it works, of text made up in a folder."""
    texts = tuple(TextSource(text.label, str(_write_text(text.label, folder))) for text in command.texts)
    return dataclasses.replace(command, texts=texts, max_tokens=6_000, context=32, model_dtype="float32")


def small_train(command: Train) -> Train:
    """Return a training of a few steps."""
    return dataclasses.replace(
        command,
        num_latents=64,
        k=8,
        num_steps=60,
        batch_size=256,
        warmup_steps=10,
        learning_rate=1e-2,
        held_out=0.2,
        dead_after_tokens=2_000,
    )


def _write_model(path: Path, family: str, seed: int) -> None:
    import torch
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    kinds = {"gemma2": transformers.Gemma2Config, "llama": transformers.LlamaConfig}
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(kinds[family](**sizes)).save_pretrained(path)
    _tokenizer().save_pretrained(path)


def _tokenizer():
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    made.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    )
    return made


def _write_text(label: str, folder: Path) -> Path:
    """Write documents of one sentence each, as conversations where the label says so."""
    path = folder / f"{label}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(_NUM_DOCUMENTS):
        words = [_WORDS[(index * step) % len(_WORDS)] for step in (1, 3, 5, 7)]
        turns = [{"role": "user", "content": words[0]}, {"role": "assistant", "content": " ".join(words[1:])}]
        row = {"messages": turns} if label == "chat" else {"text": " ".join(words)}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path
