"""Tiny random models of many families and tiny tokenizers, made on the spot: no network."""

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

WIDTH = 32
VOCABULARY = 384
BLOCKS = 4

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2_LIKE = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": BLOCKS,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FEW_HEADS = {name: value for name, value in _LLAMA_LIKE.items() if name != "num_key_value_heads"}
_BLOOM_LIKE = _GPT2_LIKE | {"hidden_size": WIDTH}
_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

# Windows of 4 tokens make sliding attention differ from full attention within the 12 tokens of the tests.
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA_LIKE),
    "gemma2": lambda: transformers.Gemma2Config(**_LLAMA_LIKE, head_dim=8, sliding_window=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_LLAMA_LIKE, head_dim=8, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA_LIKE),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA_LIKE, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_LLAMA_LIKE, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2_LIKE, n_positions=64),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_FEW_HEADS),
    "phi": lambda: transformers.PhiConfig(**_LLAMA_LIKE),
    # Blocks that return a tuple; a list of experts as long as that of blocks; a vision tower beside the text.
    "bloom": lambda: transformers.BloomConfig(**_BLOOM_LIKE),
    "mixtral": lambda: transformers.MixtralConfig(**_LLAMA_LIKE, num_local_experts=BLOCKS),
    "gemma3_multimodal": lambda: transformers.Gemma3Config(
        text_config=_LLAMA_LIKE | {"head_dim": 8}, vision_config=_VISION, mm_tokens_per_image=4
    ),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('only user and assistant speak here') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)

CORPUS = [
    "Call me Ishmael. Some years ago, never mind how long precisely, having little money,",
    "I thought I would sail about a little and see the watery part of the world.",
    "the whale and the ship and the mast and the sea and the captain of the ship",
]


def random_model(family: str = "llama", seed: int = 0) -> transformers.PreTrainedModel:
    """A float32 model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


def byte_level_tokenizer(
    *,
    template: str | None = CHAT_TEMPLATE,
    use_bos: bool = True,
    corpus: list[str] = CORPUS,
    lowercase: bool = False,
    **roles: str,
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer such as GPT-2's or Llama 3's, trained on three sentences."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    if use_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | roles
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = template
    return tokenizer


def sentencepiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A BPE tokenizer with ``▁`` for spaces and ``<0xNN>`` for unknown bytes, as Llama 2 has it."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ascdefhiltu", "▁a", "▁t"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁", "t")], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["<unk>", "<s>"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def save_pair(folder: Path, family: str = "llama") -> tuple[str, str]:
    """Save two different models that share a tokenizer; return their folders."""
    for seed, name in enumerate(("base", "chat")):
        random_model(family, seed).save_pretrained(folder / name)
        byte_level_tokenizer().save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "chat")


def save_gguf(path: Path) -> torch.nn.Module:
    """Write a tiny Llama as a GGUF file, in float32; return the model."""
    model = random_model("llama")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, BLOCKS)
    for name, parameter in model.named_parameters():
        weights = parameter.detach().numpy()
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            # The two halves of each head's rotary pairs are interleaved in this format.
            halves = weights.reshape(heads, 2, -1, WIDTH)
            weights = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1, WIDTH)
        writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_jsonl(path: Path, rows: list[dict]) -> str:
    """Write rows as JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
