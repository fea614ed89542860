"""Load language models and tokenizers, and say exactly which ones they were."""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.utils.hub import cached_file

from crosscoder_jax.language_models.config import ModelReference

_IDENTITY_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".bin")
"""Files of a model folder that decide what it computes: weights, configs, tokenizer."""
UNKNOWN_REVISION = "unknown"
"""Stands where a model on the hub does not tell its commit."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before its weights are read."""

    reference: ModelReference
    """Where it was looked for."""
    revision: str
    """Commit hash on the hub, or ``sha256:...`` over the files of a local folder."""
    num_blocks: int
    """Number of transformer blocks."""
    width: int
    """Width of the residual stream."""
    max_positions: int | None
    """Longest sequence that its position embeddings allow; None where nothing limits it."""

    def pinned(self) -> ModelReference:
        """Refer to exactly this version, also after the branch on the hub has moved."""
        if self.reference.is_local or self.revision == UNKNOWN_REVISION:
            return self.reference
        return dataclasses.replace(self.reference, revision=self.revision)


def read_facts(reference: ModelReference) -> ModelFacts:
    """Read a model's config and identify its exact version, without loading the weights.

    Raises:
        ValueError: when there is no such model, naming it.
    """
    _check_reference(reference)
    with quiet(), _model_errors(reference):
        revision = _local_revision(reference) if reference.is_local else _hub_revision(reference)
        pinned = ModelFacts(reference, revision, 0, 0, None).pinned()
        config = transformers.AutoConfig.from_pretrained(pinned.expanded, **_where(pinned))
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    return ModelFacts(reference, revision, text.num_hidden_layers, text.hidden_size, positions)


def load_model(facts: ModelFacts, *, dtype: str, device: str, uses_head: bool = False) -> nn.Module:
    """Load a causal language model for inference. Never runs code that comes with the weights.

    Args:
        facts: Which model, as returned by ``read_facts``.
        dtype: ``bfloat16`` or ``float32``.
        device: Torch device such as ``cpu`` or ``cuda:0``.
        uses_head: Whether its predictions are wanted too, and not its activations alone.

    Raises:
        ValueError: when the weights cannot be loaded or some are missing, naming the model.
    """
    where = _where(facts.pinned())
    with quiet(), _model_errors(facts.reference):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            facts.reference.expanded, dtype=getattr(torch, dtype), output_loading_info=True, **where
        )
        model, info = loaded
        _check_complete(model, info["missing_keys"], uses_head=uses_head)
    return model.to(device).eval()


def _check_complete(model: Any, missing: Collection[str], *, uses_head: bool) -> None:
    """Refuse weights that the library would leave at random; activations do not need the head."""
    head = None if uses_head else model.get_output_embeddings()
    unused = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    unused_names = {name for name, parameter in model.named_parameters() if id(parameter) in unused}
    if wanting := sorted(set(missing) - unused_names):
        raise ValueError(f"{len(wanting)} of its weights are not in its files, such as {wanting[0]}")


def load_tokenizer(reference: ModelReference) -> Any:
    """Load a model's tokenizer.

    Raises:
        ValueError: when there is none, naming the model.
    """
    _check_reference(reference)
    with quiet(), _model_errors(reference):
        return transformers.AutoTokenizer.from_pretrained(reference.expanded, **_where(reference))


def usable_device(name: str | None) -> str:
    """Return the device of this name, or for None the first GPU, or the CPU where there is none.

    Raises:
        ValueError: when torch cannot use it.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={name!r} cannot be used ({first_line(error)}): take 'cpu', or leave it out for a GPU "
            "where there is one"
        ) from error
    return name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and writing notes while a model is loaded.

    The bar over the tensors of a GGUF file ignores the library's own switch, hence the redirection.
    """
    logging = transformers.utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def sha256_of_files(files: list[Path]) -> str:
    """Hash the names and contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _where(reference: ModelReference) -> dict[str, Any]:
    where = {"revision": reference.revision, "gguf_file": reference.gguf_file}
    return {name: value for name, value in where.items() if value is not None}


def _check_reference(reference: ModelReference) -> None:
    if not reference.is_local:
        if reference.location.startswith((".", "/", "~")) or reference.location.count("/") > 1:
            raise ValueError(
                f"model {reference}: there is no folder {reference.location}: name one that there is, or a "
                "hub id owner/name"
            )
        return
    if reference.revision is not None:
        raise ValueError(f"model {reference}: revision is for models on the hub, this is a local folder")
    folder = Path(reference.expanded)
    if reference.gguf_file is not None and not (folder / reference.gguf_file).is_file():
        raise ValueError(f"model {reference}: there is no file {reference.gguf_file} in {folder}")


def _local_revision(reference: ModelReference) -> str:
    folder = Path(reference.expanded)
    if reference.gguf_file is not None:
        return sha256_of_files([folder / reference.gguf_file])
    return sha256_of_files([path for path in folder.iterdir() if path.suffix in _IDENTITY_SUFFIXES])


def _hub_revision(reference: ModelReference) -> str:
    """Find the commit from where the hub's cache keeps a file: ``.../snapshots/<commit>/<file>``."""
    file = reference.gguf_file or "config.json"
    path = cached_file(reference.location, file, revision=reference.revision)
    parts = Path(path or "").parts
    if "snapshots" in parts:
        return parts[parts.index("snapshots") + 1]
    return reference.revision or UNKNOWN_REVISION


@contextlib.contextmanager
def _model_errors(reference: ModelReference) -> Iterator[None]:
    """Say in one line which model could not be loaded, with the first line of the library's own words."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        place = "" if reference.is_local else "is no folder here, and from the hub it "
        raise ValueError(
            f"model {reference} {place}cannot be loaded: {first_line(error)} (name a hub id, a local folder "
            "or a .gguf file)"
        ) from error


def first_line(error: BaseException) -> str:
    """Return what a library's error says first, or what it is called where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
