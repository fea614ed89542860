"""The table of latents, and the files it is written to with its summary."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Integer

from crosscoder_jax.activations.atomic import write_bytes_atomically, write_json_atomically
from crosscoder_jax.diffing.closed_form import TARGETS
from crosscoder_jax.diffing.decoder_norms import LatentClass, class_labels
from crosscoder_jax.diffing.evidence import Activity
from crosscoder_jax.diffing.latent_scaling import LatentScaling
from crosscoder_jax.diffing.snippets import Snippet
from crosscoder_jax.diffing.trajectories import appearance, turning
from crosscoder_jax.diffing.verdicts import Verdict
from crosscoder_jax.groups import FREE, Layout
from crosscoder_jax.sharding import to_host
from crosscoder_jax.sources import Sources
from crosscoder_jax.typing import DecoderWeights

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DiffResult:
    """What a diff found: one row a latent, a summary, and text for the strongest latents."""

    columns: Columns
    """Name -> ``[latent]``, in the order of the table; NaN where a number does not exist."""
    summary: dict[str, Any]
    """Plain data."""
    snippets: dict[int, list[Snippet]]
    """Latent -> snippets, strongest first."""

    @property
    def num_latents(self) -> int:
        """Number of rows."""
        return len(self.columns["latent"])


def norm_columns(norms: Float[np.ndarray, "source latent"], sources: Sources) -> Columns:
    """Return each latent's number and its decoder norm in each source, raw activation units."""
    columns: Columns = {"latent": np.arange(norms.shape[1])}
    return columns | {f"norm_{name}": norms[i] for i, name in enumerate(sources.names)}


def group_columns(layout: Layout, norms: Float[np.ndarray, "source latent"]) -> Columns:
    """Return each latent's group, and whether that makes it exclusive: no decoder in one source, by design.

    Without groups there are no such columns.
    """
    if not layout.groups:
        return {}
    names = np.array(layout.names(), object)
    is_closed = (norms == 0).any(axis=0) & (norms > 0).any(axis=0) & (names != FREE)
    return {"group": names, "by_design": is_closed}


def trajectory_columns(
    norms: Float[np.ndarray, "source latent"], w_dec: DecoderWeights, sources: Sources
) -> Columns:
    """Return in which of several sources each latent appears first, and how it turns towards the last.

    Of fewer than three sources there are no such columns; of sources of different widths nothing turns.
    """
    if len(sources) < 3:
        return {}
    first = np.asarray(appearance(jnp.asarray(norms)))
    columns: Columns = {"appears_in": np.array(sources.names, object)[first]}
    if len(set(sources.widths)) == 1:
        cosines = to_host(turning(w_dec, sources)).astype(np.float64)
        columns |= {f"turning_{name}": cosines[i] for i, name in enumerate(sources.names)}
    return columns


def class_columns(delta: Float[np.ndarray, "latent"], classes: Integer[np.ndarray, "latent"]) -> Columns:
    """Return the columns of the decoder norm difference."""
    return {"delta_norm": delta, "latent_class": np.array(class_labels(classes), object)}


def activity_columns(
    activity: Activity,
    active_documents: Integer[np.ndarray, "latent"],
    norms: Float[np.ndarray, "source latent"],
    labels: Sequence[str],
) -> Columns:
    """Return how each latent fires, on how many documents, its energy, and its share on each text.

    ``energy = sum f^2 ||d||^2 / tokens`` over all sources, in squared raw activation units: the mean
    square of what the latent writes.
    """
    shares = {f"share_{label}": activity.label_shares[i] for i, label in enumerate(labels)}
    return {
        "frequency": activity.frequency,
        "active_tokens": activity.active_tokens,
        "active_documents": active_documents,
        "mean_activation": activity.mean_activation,
        "max_activation": activity.max_activation,
        "energy": activity.mean_square * np.square(norms).sum(axis=0),
    } | shares


def scaling_columns(
    scaling: LatentScaling,
    verdicts: Sequence[Verdict],
    why_not: Sequence[str],
    is_beyond: Bool[np.ndarray, "latent"],
    sources: Sources,
) -> Columns:
    """Return the columns of Latent Scaling."""
    columns: Columns = {"reference": np.array(sources.names, object)[scaling.reference]}
    for t, target in enumerate(TARGETS):
        for s, name in enumerate(sources.names):
            columns[f"beta_{target}_{name}"] = scaling.beta[t, s]
            columns[f"se_beta_{target}_{name}"] = scaling.se_beta[t, s]
    return columns | {
        "nu_error": scaling.nu_error,
        "se_nu_error": scaling.se_nu_error,
        "nu_recon": scaling.nu_recon,
        "se_nu_recon": scaling.se_nu_recon,
        "evidence": np.where(scaling.has_evidence, "enough", "too little").astype(object),
        "verdict": np.array([str(verdict) for verdict in verdicts], object),
        "is_beyond_interval": is_beyond,
        "why_not": np.array(why_not, object),
    }


def write_diff(result: DiffResult, folder: str | Path) -> None:
    """Write ``latents.parquet``, ``latents.csv``, ``snippets.json`` and ``summary.json`` into ``folder``.

    Each file is whole or not there; the summary is removed first and written last, so that the files
    beside a summary are its own. Numbers that do not exist are null in the parquet file and empty in
    the csv.

    Raises:
        OSError: if the folder cannot be written to.
    """
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    # from_pandas: a NaN is a number that does not exist.
    arrays = {name: pa.array(values, from_pandas=True) for name, values in result.columns.items()}
    table = pa.table(arrays)
    for name, write in (("parquet", pyarrow.parquet.write_table), ("csv", pyarrow.csv.write_csv)):
        buffer = io.BytesIO()
        write(table, buffer)
        write_bytes_atomically(folder / f"latents.{name}", buffer.getvalue())
    snippets = {str(latent): [s.to_json() for s in found] for latent, found in result.snippets.items()}
    write_json_atomically(folder / "snippets.json", snippets)
    write_json_atomically(folder / "summary.json", result.summary)


def strongest_latents(
    columns: Mapping[str, np.ndarray], labels: Sequence[str], count: int, enough: int
) -> np.ndarray:
    """Choose the latents whose text is worth reading, most telling first; dead ones never.

    Of two models: those claimed for one of them, confirmed ones first, by energy; then those that are
    exclusive by design, likewise; then those with the most extreme ``delta_norm``. Of a difference: by
    energy, and every other one by how much more of its activation lies on one text than on the latents'
    average.

    Args:
        columns: of the table.
        labels: names of the texts.
        count: how many.
        enough: latents that fire on fewer tokens come last; of two models' latents, last of those that are
            claimed for neither.
    """
    energy, active = columns["energy"], columns["active_tokens"]
    is_rare = active < enough
    if "delta_norm" in columns:
        keys = _two_model_keys(columns, is_rare)
        order = np.lexsort(keys[::-1])
    else:
        by_energy = np.lexsort((-energy, is_rare))
        excess = _label_excess(columns, labels)
        by_label = np.lexsort((-energy, -excess, is_rare)) if len(labels) > 1 else by_energy
        order = np.stack([by_energy, by_label], axis=1).ravel()
        _, first = np.unique(order, return_index=True)
        order = order[np.sort(first)]
    return order[active[order] > 0][:count]


def _two_model_keys(columns: Mapping[str, np.ndarray], is_rare: np.ndarray) -> list[np.ndarray]:
    classes = columns["latent_class"].astype(str)
    is_claimed = np.isin(classes, [c.label for c in LatentClass if c.is_exclusive])
    verdict = columns.get("verdict", np.full(len(classes), "", object)).astype(str)
    is_confirmed = is_claimed & (verdict == str(Verdict.CONFIRMED))
    is_designed = columns.get("by_design", np.zeros(len(classes), bool))
    extremity = np.abs(columns["delta_norm"] - 0.5)
    strength = np.where(is_claimed, columns["energy"], np.nan_to_num(extremity))
    return [~is_claimed, is_designed, ~is_confirmed, ~is_claimed & is_rare, -strength]


def _label_excess(columns: Mapping[str, np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Return by how much a latent's share on its most favoured text exceeds that text's usual share."""
    shares = np.stack([columns[f"share_{label}"] for label in labels])
    weights = np.nan_to_num(columns["energy"])
    usual = np.nansum(shares * weights, axis=1) / max(weights.sum(), np.finfo(float).tiny)
    return np.nan_to_num((shares - usual[:, None]).max(axis=0, initial=-1.0, where=np.isfinite(shares)))
