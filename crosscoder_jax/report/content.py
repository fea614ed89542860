"""What a report says, computed from the tables of its runs without a word of HTML.

A `Method` is one run seen as a way of finding differences; everything the page shows about it is a field or
a pure function of it.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosscoder_jax.diffing.decoder_norms import Cutoffs as ClassCutoffs
from crosscoder_jax.diffing.intervals import errors_in_half_interval
from crosscoder_jax.diffing.latent_scaling import NUM_GROUPS
from crosscoder_jax.diffing.verdicts import MAX_NU_ERROR, MAX_NU_RECON
from crosscoder_jax.report.files import LatentTable, RunFiles, find, source_entries
from crosscoder_jax.report.names import BASE_ONLY, CHAT_ONLY, CLASSES, DEAD, EXCLUSIVE_CLASSES
from crosscoder_jax.report.outcomes import Outcomes, count_outcomes, is_by_design

CONCENTRATED_SHARE = 0.8
"""A latent is about one text when this share of its summed activation lies there ..."""
CONCENTRATED_TOKENS = 20
"""... and it fires on as many held-out tokens: of fewer, a share says little."""


@dataclass(frozen=True)
class Cutoffs(ClassCutoffs):
    """Where classes begin and end and what Latent Scaling asks for (arXiv 2504.02922)."""

    max_nu_error: float = MAX_NU_ERROR
    """A latent is confirmed below this ..."""
    max_nu_recon: float = MAX_NU_RECON
    """... and below this."""


class Kind(enum.Enum):
    """What a run reads, which decides what can be said of its latents."""

    PAIR = enum.auto()
    """Two models: decoder norms tell whose a latent is."""
    DIFFERENCE = enum.auto()
    """A combination of sources alone, such as chat - base."""
    ONE = enum.auto()
    """One stored source alone."""
    MANY = enum.auto()
    """Three sources or more: there are norms, but no two models to class latents by."""


@dataclass(frozen=True)
class Method:
    """One run as a way of finding what changed."""

    name: str
    slot: int
    """Position among the runs of the report; decides its colour."""
    kind: Kind
    """What it reads."""
    files: RunFiles
    cutoffs: Cutoffs
    class_counts: Mapping[str, int]
    found: Mapping[str, Outcomes]
    """Class of exclusive latents -> what became of those that decoder norms claim as a finding."""
    designed: Mapping[str, Outcomes]
    """The same of those that the recipe makes exclusive, which decoder norms say nothing of."""
    concentrated: Mapping[str, int]
    """Text label -> number of latents with over 80 % of their activation on it."""

    @property
    def has_classes(self) -> bool:
        """Whether decoder norms tell which model a latent belongs to."""
        return self.kind is Kind.PAIR

    @property
    def latents(self) -> LatentTable:
        """The table of latents."""
        return self.files.latents

    @property
    def num_latents(self) -> int:
        """Size of the dictionary."""
        return len(self.files.latents)

    def null_count(self, what: str, latent_class: str) -> int | None:
        """Give how many latents of a class the null run found, by "counts" or "confirmed_by_class".

        `None` when the run was diffed without a null run, or that one without Latent Scaling.
        """
        null = self.files.summary.get("null") or {}
        number = null.get(what, {}).get(latent_class)
        by_design = null.get("by_design", {}).get(what, {}).get(latent_class, 0)
        return None if number is None else number - by_design

    def all_found(self) -> Outcomes:
        """Give what became of all latents that decoder norms claim for one model, of both classes."""
        return self.found[CHAT_ONLY] + self.found[BASE_ONLY]

    def all_designed(self) -> Outcomes:
        """Give what became of all latents that are exclusive by design."""
        return self.designed[CHAT_ONLY] + self.designed[BASE_ONLY]

    def claimed(self, latent_class: str) -> int:
        """Count the exclusive latents of a class that decoder norms alone claim as a finding."""
        return self.found[latent_class].claimed

    def is_claimed(self, latent_class: str) -> np.ndarray:
        """Tell which rows these are."""
        return (self.latents.words("latent_class") == latent_class) & ~is_by_design(self.latents)

    def num_documents(self) -> int | None:
        """Give the number of held-out documents that were analysed; `None` in older summaries."""
        return self.files.summary.get("num_documents")

    def half_interval(self, name: str) -> np.ndarray:
        """Give half the width of the 95 % interval of a column, such as `nu_error`, for every latent."""
        return errors_in_half_interval(num_groups(self.files.summary)) * self.latents.numbers(f"se_{name}")

    def fraction_explained(self, source: str | None = None) -> float | None:
        """Give the held-out fraction of variance explained, pooled or of one source."""
        return self._evaluated("fve" if source is None else f"fve/{source}")

    def mean_active(self) -> float | None:
        """Give the held-out mean number of active latents a token under the inference rule."""
        return self._evaluated("l0_inference_rule")

    def dead_fraction(self) -> float | None:
        """Give the held-out fraction of dead latents; counted in the table where evaluation is missing."""
        value = self._evaluated("dead")
        if value is None and DEAD in self.class_counts and self.num_latents:
            return self.class_counts[DEAD] / self.num_latents
        return value

    def _evaluated(self, key: str) -> float | None:
        value = (self.files.evaluation or {}).get(key)
        return float(value) if isinstance(value, int | float) else None


def build_method(files: RunFiles, slot: int, name: str = "") -> Method:
    """Compute a method from the files of its run; an empty name is replaced by one that says what it is."""
    kind = run_kind(files)
    has_classes = kind is Kind.PAIR
    return Method(
        name=name or method_name(files.config, kind),
        slot=slot,
        kind=kind,
        files=files,
        cutoffs=read_cutoffs(files.summary),
        class_counts=count_classes(files.latents) if has_classes else {},
        found=count_by_class(files.latents, ~is_by_design(files.latents)),
        designed=count_by_class(files.latents, is_by_design(files.latents)),
        concentrated=count_concentrated(files.latents),
    )


def build_methods(runs: Sequence[RunFiles], names: Sequence[str] = ()) -> tuple[Method, ...]:
    """Compute the methods of a report; equal names are told apart by the names of their folders."""
    methods = [build_method(files, slot, names[slot] if names else "") for slot, files in enumerate(runs)]
    all_names = [method.name for method in methods]
    if len(set(all_names)) == len(all_names):
        return tuple(methods)
    return tuple(
        build_method(files, slot, f"{name} ({files.folder.name})" if all_names.count(name) > 1 else name)
        for slot, (files, name) in enumerate(zip(runs, all_names, strict=True))
    )


def run_kind(files: RunFiles) -> Kind:
    """Tell what a run reads.

    Raises:
        ValueError: neither its table nor its config says so.
    """
    if files.latents.has("latent_class"):
        return Kind.PAIR
    entries = source_entries(files.config)
    if not entries:
        raise ValueError(
            f"{files.folder / 'config.json'} names no sources: make it with `crosscoder-jax train`"
        )
    if len(entries) > 1:
        return Kind.MANY
    return Kind.DIFFERENCE if len(entries[0].get("combination") or ()) > 1 else Kind.ONE


def method_name(config: Mapping[str, Any], kind: Kind) -> str:
    """Name a method after its sources and its sparsity."""
    entries = source_entries(config)
    if kind is Kind.DIFFERENCE:
        return "Difference SAE"
    if kind is Kind.ONE:
        return f"SAE of {entries[0]['name']}"
    words = str(find(config, "sparsity")).lower().replace("_", "")
    name = "L1 crosscoder" if "relu" in words or "l1" in words else "Crosscoder"
    if "batchtopk" in words or "'k'" in words:
        name = "BatchTopK crosscoder"
    if kind is Kind.MANY:
        return f"{name} of {len(entries)} sources"
    is_derived = any(entry.get("combination") for entry in entries)
    return f"{name} on {' and '.join(str(entry['name']) for entry in entries)}" if is_derived else name


def read_cutoffs(summary: Mapping[str, Any]) -> Cutoffs:
    """Read the cut-offs that diffing used; those it does not state are the paper's."""
    stated = summary.get("cutoffs")
    flat = _flatten(stated) if isinstance(stated, Mapping) else {}
    names = Cutoffs.__dataclass_fields__
    return Cutoffs(**{key: float(value) for key, value in flat.items() if key in names})


def num_groups(summary: Mapping[str, Any]) -> int:
    """Give the groups of documents behind the standard errors; those it does not state are the default's."""
    stated = summary.get("latent_scaling", {})
    return stated.get("groups_with_tokens") or stated.get("num_groups") or NUM_GROUPS


def count_classes(latents: LatentTable) -> dict[str, int]:
    """Count the latents of each class, in the order in which the page shows them."""
    words = latents.words("latent_class")
    return {name: int(np.sum(words == name)) for name in CLASSES}


def count_by_class(latents: LatentTable, is_counted: np.ndarray) -> dict[str, Outcomes]:
    """Count the outcomes of the rows that are meant in each exclusive class."""
    classes = latents.words("latent_class")
    return {name: count_outcomes(latents, is_counted & (classes == name)) for name in EXCLUSIVE_CLASSES}


def count_concentrated(latents: LatentTable) -> dict[str, int]:
    """Count, for each text label, the latents with over 80 % of their summed activation on it.

    Those that fire on fewer than `CONCENTRATED_TOKENS` tokens are not counted.
    """
    labels = latents.suffixes("share_")
    if len(labels) < 2:
        return {}
    is_seen = ~(latents.numbers("active_tokens") < CONCENTRATED_TOKENS)
    return {
        label: int(np.sum(is_seen & (latents.numbers(f"share_{label}") > CONCENTRATED_SHARE)))
        for label in labels
    }


def has_latent_scaling(method: Method) -> bool:
    """Tell whether any claimed latent of a method was tested."""
    found = method.all_found()
    return found.claimed > found.untested


def most_leaning(method: Method) -> tuple[float, float] | None:
    """Give the smallest and largest delta_norm among live latents; `None` if none is alive."""
    values = live_delta_norms(method)
    return None if not len(values) else (float(values.min()), float(values.max()))


def live_delta_norms(method: Method) -> np.ndarray:
    """Give the finite decoder norm differences of the latents that are not dead."""
    values = method.latents.numbers("delta_norm")
    is_live = (method.latents.words("latent_class") != DEAD) & np.isfinite(values)
    return values[is_live]


def _flatten(content: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flatten(value) if isinstance(value, Mapping) else {key: value})
    return flat
