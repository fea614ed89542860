"""What to harvest: models, layers, texts and what is kept of them. Nothing here needs torch."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

STORED_DTYPES = ("bfloat16", "float32")
"""Never float16: residual streams pass its largest number, 65,504."""
_TEXT_FIELDS = ("subset", "split", "column", "share", "unit")
"""What can be said of a text beside its label and its location."""


@dataclass(frozen=True)
class ModelReference:
    """Where a language model is: a hub id, a local folder, or a GGUF file inside either."""

    location: str
    """Hub id such as ``HuggingFaceTB/SmolLM2-135M``, or a local folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; None is the default branch. Not for local folders."""
    gguf_file: str | None = None
    """Name of a GGUF file inside ``location``, read in place of the usual weights."""

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> "ModelReference":
        """Read ``id``, ``folder``, ``folder/file.gguf`` or ``file.gguf`` in the working folder.

        >>> ModelReference.parse("models/tiny/tiny.Q4_1.gguf")
        ModelReference(location='models/tiny', revision=None, gguf_file='tiny.Q4_1.gguf')

        Raises:
            ValueError: when the text is empty.
        """
        if not text.strip():
            raise ValueError("a model is a hub id or a folder, got an empty name")
        if not text.endswith(".gguf"):
            return cls(text, revision)
        location, _, file = text.rpartition("/")
        return cls(location or ".", revision, file)

    @property
    def expanded(self) -> str:
        """``location`` with a home folder ``~`` written out, as the libraries that load models need it."""
        return os.path.expanduser(self.location)

    @property
    def is_local(self) -> bool:
        """Whether ``location`` is a folder of this machine."""
        return Path(self.expanded).is_dir()

    def __str__(self) -> str:
        name = self.location if self.gguf_file is None else f"{self.location}/{self.gguf_file}"
        return name if self.revision is None else f"{name}@{self.revision}"


@dataclass(frozen=True)
class TextSource:
    """Rows of text or of conversations, and the label that the tokens from them carry."""

    label: str
    """Name of this text in the store and in every table made from it."""
    location: str
    """Local file (json, jsonl, parquet, csv, tsv, txt; also with ``*``), local folder, or hub id."""
    subset: str | None = None
    """Name of the hub dataset's configuration, where it has several."""
    split: str = "train"
    """Split of the dataset to read; local files have only ``train``."""
    column: str | None = None
    """Column to read. None takes ``messages``, ``conversations`` or ``conversation`` (chat template), else
    ``text`` (plain)."""
    share: float = 1.0
    """Tokens taken from this text relative to the other texts' shares, while it lasts."""
    unit: str = "paragraph"
    """Document of a ``.txt`` file: ``line``, ``paragraph`` (parted by empty lines) or the whole ``file``."""

    def __post_init__(self) -> None:
        if not self.label or not self.location:
            raise ValueError(f"a text needs a label and a location, got {self.label!r} and {self.location!r}")
        if not 0 < self.share < float("inf"):
            raise ValueError(f"share={self.share} of text {self.label!r} must be a positive number")
        if self.unit not in ("line", "paragraph", "file"):
            raise ValueError(f"unit={self.unit!r} of text {self.label!r} must be line, paragraph or file")

    @classmethod
    def parse(cls, text: str) -> "TextSource":
        """Read ``label=location``, with more fields after a question mark, joined by ``&``.

        >>> TextSource.parse("web=HuggingFaceFW/fineweb?subset=sample-10BT&share=2").share
        2.0
        >>> TextSource.parse("novel=moby.jsonl").label
        'novel'

        Raises:
            ValueError: when there is no label, or a field after the question mark is not one of this class's.
        """
        label, equals, rest = text.partition("=")
        location, _, query = rest.partition("?")
        if not equals or not label or not location:
            raise ValueError(f"text {text!r} must be label=location, such as novel=moby.jsonl")
        given: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
        if unknown := sorted(set(given) - set(_TEXT_FIELDS)):
            raise ValueError(
                f"text {text!r} has the unknown field {unknown[0]!r}: the fields are "
                f"{', '.join(_TEXT_FIELDS)}"
            )
        if empty := sorted(name for name in given if not given[name]):
            raise ValueError(f"text {text!r} has no value of {empty[0]!r}: write {empty[0]}=VALUE")
        if "share" in given:
            given["share"] = _share(text, given["share"])
        try:
            return cls(label, location, **given)
        except ValueError as error:
            raise ValueError(f"text {text!r}: {error}") from error

    def __str__(self) -> str:
        """Write what :meth:`parse` reads.

        >>> str(TextSource("web", "some/data", subset="a b", share=2.0))
        'web=some/data?subset=a+b&share=2.0'
        """
        defaults = {field.name: field.default for field in fields(self)}
        given = {name: getattr(self, name) for name in _TEXT_FIELDS if getattr(self, name) != defaults[name]}
        return f"{self.label}={self.location}{'?' if given else ''}{urlencode(given)}"


@dataclass(frozen=True)
class HarvestConfig:
    """Two models run on the same tokens, and which of their activations are stored.

    The batch shape ``[batch_size, context]`` is the same for both models and for every batch, because
    bfloat16 results differ between shapes.
    """

    store: str
    """Folder of the activation store; completed when it is half-written by the same config."""
    base: str
    """The model before: hub id, local folder, or a ``.gguf`` file in either. Its source is named ``base``."""
    chat: str
    """The model after, sharing the tokenizer. Its source is named ``chat``. May be the same as ``base``."""
    texts: tuple[TextSource, ...]
    """What both models read, mixed by tokens in the proportion of the shares: each ``label=location``, the
    location a file (json, jsonl, parquet, csv, tsv, txt; also with *), a folder or a hub id. After a question
    mark may follow ``subset=NAME`` and ``split=NAME`` of a hub dataset, ``column=NAME`` to read in place of
    a conversation or ``text``, ``share=NUMBER`` (1) and ``unit=line``, ``paragraph`` or ``file`` of a .txt
    file, joined by & and in quotes: 'web=HuggingFaceFW/fineweb?subset=sample-10BT&share=2'."""
    layers: tuple[int, ...] | None = None
    """Blocks after which the residual stream is read, from 0. None is the middle one, ``blocks // 2``."""
    chat_layers: tuple[int, ...] | None = None
    """The same for ``chat`` where its depth differs; None reads the same layers as in ``base``."""
    base_revision: str | None = None
    """Branch, tag or commit of ``base`` on the hub."""
    chat_revision: str | None = None
    """Branch, tag or commit of ``chat`` on the hub."""
    max_tokens: int = 1_000_000
    """Tokens to keep; fewer are kept when the texts end first."""
    context: int = 256
    """Tokens of one sequence, the padding included."""
    batch_size: int = 8
    """Sequences of one batch."""
    is_split: bool = False
    """Whether a document longer than ``context`` goes on in further sequences; else its rest is left out."""
    skip_positions: int = 1
    """First positions of each sequence to leave out: position 0 is a sink of 100 times the usual norm."""
    outlier_multiple: float | None = None
    """Tokens whose norm in a source is above this multiple of its median are left out of all. None: off."""
    chat_template: str | None = None
    """File with a Jinja chat template; None takes that of ``chat``, else that of ``base``."""
    model_dtype: str = "bfloat16"
    """Precision of weights and forward pass: ``bfloat16`` or ``float32``."""
    dtype: str = "bfloat16"
    """Precision of the stored activations: ``bfloat16`` or ``float32``."""
    device: str | None = None
    """Torch device such as ``cuda:0`` or ``cpu``; None takes a GPU where there is one."""
    shuffle_seed: int | None = None
    """Seed to shuffle the rows within a buffer of 10,000; None keeps the order of the files."""
    checkpoint_tokens: int = 65_536
    """Tokens between two points from which an interrupted harvest goes on."""
    between: tuple[str, ...] = ()
    """More models, such as checkpoints of the fine-tune in their order: each ``name=model``, or
    ``name=model@revision`` of a model on the hub. Their sources lie between ``base`` and ``chat``."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "context", "batch_size", "skip_positions", "checkpoint_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.context <= self.skip_positions:
            raise ValueError(
                f"context={self.context} must be larger than skip_positions={self.skip_positions}"
            )
        for name in ("model_dtype", "dtype"):
            if getattr(self, name) not in STORED_DTYPES:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(STORED_DTYPES)}")
        if self.outlier_multiple is not None and not self.outlier_multiple > 1:
            raise ValueError(f"outlier_multiple={self.outlier_multiple} must be above 1, the median itself")
        _check_texts(self.texts)
        _check_layers(self.layers, self.chat_layers)
        _ = self.references  # names that cannot be told apart are refused

    @property
    def references(self) -> dict[str, ModelReference]:
        """All models by name, in the order of their sources: ``base`` first, ``chat`` last."""
        found = {"base": ModelReference.parse(self.base, self.base_revision)}
        for text in self.between:
            name, reference = _named_model(text)
            if name in (*found, "chat"):
                raise ValueError(f"between has {name!r} twice, or as another model: give every model its own")
            found[name] = reference
        return {**found, "chat": ModelReference.parse(self.chat, self.chat_revision)}


@dataclass(frozen=True)
class SpliceConfig:
    """On what a crosscoder is measured when its reconstructions are spliced into the models."""

    texts: tuple[TextSource, ...] | None = None
    """Texts that were not trained on. None: the held-out documents of the texts of the harvest."""
    max_tokens: int = 100_000
    """Predictions to count; the last sequence is used whole."""
    batch_size: int | None = None
    """Sequences of one batch; None is that of the harvest, whose bfloat16 activations it repeats."""
    device: str | None = None
    """Torch device such as ``cuda:0`` or ``cpu``; None takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.texts is not None:
            _check_texts(self.texts)


def _named_model(text: str) -> tuple[str, ModelReference]:
    name, _, place = text.partition("=")
    location, _, revision = place.partition("@")
    if not name or not location or "." in name:
        raise ValueError(
            f"between={text!r} must be name=model, the name without a dot, such as step100=checkpoint-100"
        )
    return name, ModelReference.parse(location, revision or None)


def _share(text: str, given: str) -> float:
    try:
        return float(given)
    except ValueError as error:
        raise ValueError(f"text {text!r}: share={given} must be a number, such as share=2") from error


def _check_texts(texts: tuple[TextSource, ...]) -> None:
    if not texts:
        raise ValueError("texts is empty: name at least one text, such as novel=moby.jsonl")
    labels = [text.label for text in texts]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"texts has the label {repeated[0]!r} twice: every text needs its own")


def _check_layers(layers: tuple[int, ...] | None, chat_layers: tuple[int, ...] | None) -> None:
    for name, given in (("layers", layers), ("chat_layers", chat_layers)):
        if given is not None and (not given or len(set(given)) != len(given) or min(given) < 0):
            raise ValueError(f"{name}={given} must be one or more different block numbers from 0")
    if layers is not None and chat_layers is not None and len(layers) != len(chat_layers):
        raise ValueError(f"layers={layers} and chat_layers={chat_layers} must be equally many")
    if layers is None and chat_layers is not None:
        raise ValueError(f"chat_layers={chat_layers} needs layers: name the blocks of the base model too")
