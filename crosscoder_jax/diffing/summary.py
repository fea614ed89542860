"""What a diff says of a crosscoder as a whole: counts of classes and verdicts, and how they were found."""

import collections
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool

from crosscoder_jax.activations.store import ActivationStore
from crosscoder_jax.diffing.comparison import Comparison
from crosscoder_jax.diffing.config import DiffConfig
from crosscoder_jax.diffing.decoder_norms import LatentClass
from crosscoder_jax.diffing.evidence import Activity
from crosscoder_jax.diffing.latent_scaling import ScalingSums
from crosscoder_jax.diffing.sums import DiffSums
from crosscoder_jax.diffing.table import Columns
from crosscoder_jax.diffing.verdicts import Verdict

HISTOGRAM_EDGES = np.linspace(0.0, 1.0, 51)
"""Bins of ``delta_norm``, 0.02 wide, so that the published cut-offs are edges."""


def diff_summary(
    columns: Columns,
    activity: Activity,
    sums: DiffSums,
    store: ActivationStore,
    space: Comparison,
    config: DiffConfig,
) -> dict[str, Any]:
    """Return everything that is said of a diff as a whole, as plain data.

    Args:
        columns: the finished table.
        activity: how the latents fire.
        sums: what the pass over the tokens added up.
        store: where the tokens are from.
        space: where the models were compared.
        config: the cut-offs that were used.
    """
    labels = store.manifest.labels
    summary: dict[str, Any] = {
        "sources": list(space.sources.names),
        "models": {s.name: dataclasses.asdict(s) for s in store.manifest.sources},
        "num_latents": len(columns["latent"]),
        "num_tokens": activity.num_tokens,
        "num_documents": int(sums.documents.num_documents),
        "tokens_by_label": dict(zip(labels, activity.tokens_by_label.tolist(), strict=False)),
        "num_dead": int(np.sum(activity.active_tokens == 0)),
    }
    if not space.is_pair:
        return summary
    return summary | {
        "cutoffs": dataclasses.asdict(config.cutoffs) | config.limits,
        "latent_scaling": {
            "is_done": not space.why_no_scaling,
            "why_not": space.why_no_scaling,
            "min_active_tokens": config.min_active_tokens,
            "num_groups": config.num_groups,
            "groups_with_tokens": _groups_with_tokens(sums.scaling),
        },
        **class_summary(columns),
    }


def class_summary(columns: Columns) -> dict[str, Any]:
    """Return class counts, what the histogram claims, what Latent Scaling leaves of it, and the histogram."""
    classes, delta = columns["latent_class"], columns["delta_norm"]
    is_exclusive = np.isin(classes.astype(str), [c.label for c in LatentClass if c.is_exclusive])
    is_live = (classes != LatentClass.DEAD.label) & np.isfinite(delta)
    is_confirmed = columns.get("verdict", np.full(len(classes), "", object)) == str(Verdict.CONFIRMED)
    is_designed = columns.get("by_design", np.zeros(len(classes), bool))

    def by_class(is_counted: Bool[np.ndarray, "latent"]) -> dict[str, int]:
        return {
            c.label: int(np.sum(is_counted & (classes == c.label))) for c in LatentClass if c.is_exclusive
        }

    summary: dict[str, Any] = {
        "counts": {c.label: int(np.sum(classes == c.label)) for c in LatentClass},
        "claimed": int(is_exclusive.sum()),
        "delta_norm_histogram": {
            "edges": [round(edge, 6) for edge in HISTOGRAM_EDGES.tolist()],
            "counts": np.histogram(np.clip(delta[is_live], 0, 1), HISTOGRAM_EDGES)[0].tolist(),
        },
    }
    if "by_design" in columns:
        summary["claimed_by_design"] = int(np.sum(is_exclusive & is_designed))
        summary["by_design"] = {"counts": by_class(is_designed)}
    if "verdict" in columns:
        found = collections.Counter(columns["verdict"][is_exclusive].tolist())
        summary["confirmed"] = int(is_confirmed.sum())
        summary["confirmed_by_class"] = by_class(is_confirmed)
        if "is_beyond_interval" in columns:
            summary["confirmed_beyond_interval"] = int(np.sum(is_confirmed & columns["is_beyond_interval"]))
        if "by_design" in columns:
            summary["by_design"]["confirmed_by_class"] = by_class(is_confirmed & is_designed)
        summary["verdicts"] = {str(v): found[str(v)] for v in Verdict if v is not Verdict.NONE}
        summary["too_little_evidence"] = int(np.sum(columns["evidence"] != "enough"))
    return summary


def _groups_with_tokens(scaling: ScalingSums | None) -> int:
    """Count the groups that the standard errors know of: few documents may leave some empty."""
    return 0 if scaling is None else int(np.sum(scaling.tokens.to_float64() > 0))
