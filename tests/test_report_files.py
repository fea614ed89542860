"""Reading run folders; also the maker of the synthetic runs that the other tests of the report use."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the report draws with plotly: install the extra 'report'")

import pyarrow as pa
import pyarrow.parquet as pq

from crosscoder_jax.report.files import LatentTable, find, read_latents, read_metrics, read_run, read_snippets

HOSTILE = "</script><img src=x onerror=\"alert('x')\">{{7*7}}<b>%{x}"
LABELS = ("novel", "conversation", "speeches")
PASSAGE = (
    " the| whale| rose| slowly| before| the| ship|,| and| Captain| Ahab| stood| upon| the| deck|;|\n|“|There|"
    " she| blows|!|”| cried| the| mast|-|head|.| What| would| you| like| for| dinner|?| I| think|"
    " we| should| go| home|."
)
WORDS = PASSAGE.split("|")


def make_run(
    folder: Path,
    *,
    num_latents: int = 400,
    num_chat: int = 12,
    num_base: int = 3,
    sources: tuple[str, ...] = ("before", "after"),
    sparsity: dict | None = None,
    seed: int = 0,
    hostile: str = "",
) -> Path:
    """Write a run folder as training, evaluation and diffing leave it.

    Of the chat-only latents, every fourth is complete shrinkage, every sixth latent decoupling, and the last
    has too little evidence; the others are confirmed.
    """
    rng = np.random.default_rng(seed)
    (folder / "diff").mkdir(parents=True)
    columns = (
        crosscoder_columns(rng, num_latents, num_chat, num_base)
        if len(sources) == 2
        else unclassed_columns(rng, num_latents, sources)
    )
    pq.write_table(pa.table(columns), folder / "diff" / "latents.parquet")
    _write(
        folder / "config.json",
        make_config(num_latents, sources, sparsity or {"type": "BatchTopK", "k": 32.0}),
    )
    measured_on = {"weights_sha256": "ab12", "store_fingerprint": "0123456789abcdef"}
    (folder / "crosscoder").mkdir()
    _write(folder / "crosscoder" / "config.json", {"weights_sha256": "ab12"})
    evaluation = make_evaluation(sources, 0.853 if len(sources) == 2 else 0.56)
    _write(folder / "evaluation.json", {**evaluation, "measured_on": measured_on})
    _write(
        folder / "diff" / "summary.json",
        {
            "sources": list(sources),
            "num_latents": num_latents,
            "num_tokens": 30_211,
            "cutoffs": {
                "base_only_max": 0.1,
                "shared_min": 0.4,
                "shared_max": 0.6,
                "chat_only_min": 0.9,
                "max_nu_error": 0.2,
                "max_nu_recon": 0.5,
            },
            "tokens_by_label": {"novel": 8_020, "conversation": 13_100, "speeches": 9_091},
            "measured_on": measured_on,
        },
    )
    _write(folder / "diff" / "snippets.json", make_snippets(rng, columns, num_chat + num_base, hostile))
    lines = [json.dumps(row) for row in make_metrics(rng, sources)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def crosscoder_columns(rng: np.random.Generator, num_latents: int, num_chat: int, num_base: int) -> dict:
    """Make the columns of a two-source table: chat-only first, then base-only, two dead, the rest."""
    delta = np.clip(rng.normal(0.5, 0.055, num_latents), 0, 1)
    delta[:num_chat] = rng.uniform(0.91, 0.995, num_chat)
    delta[num_chat : num_chat + num_base] = rng.uniform(0.01, 0.09, num_base)
    classes = np.select(
        [delta <= 0.1, delta >= 0.9, (delta >= 0.4) & (delta <= 0.6)],
        ["base-only", "chat-only", "shared"],
        "other",
    ).astype(object)
    dead = slice(num_chat + num_base, num_chat + num_base + 2)
    classes[dead] = "dead"
    nu_error, nu_recon = (
        rng.normal(1 - 1.2 * np.abs(delta - 0.5), 0.07),
        rng.normal(1 - np.abs(delta - 0.5), 0.05),
    )
    chat = np.arange(num_chat)
    nu_error[chat] = np.where(
        chat % 4 == 3, rng.uniform(0.45, 1.0, num_chat), rng.uniform(0.0, 0.15, num_chat)
    )
    nu_recon[chat] = np.where(
        chat % 6 == 5, rng.uniform(0.65, 1.1, num_chat), rng.uniform(0.05, 0.42, num_chat)
    )
    nu_error[num_chat : num_chat + num_base], nu_recon[num_chat : num_chat + num_base] = 0.1, 0.3
    is_shrunk, is_decoupled, is_claimed = (
        nu_error >= 0.2,
        nu_recon >= 0.5,
        np.isin(classes, ["chat-only", "base-only"]),
    )
    verdict = np.select(
        [~is_claimed, is_shrunk & is_decoupled, is_shrunk, is_decoupled],
        ["", "shrinkage and decoupling", "complete shrinkage", "latent decoupling"],
        "confirmed",
    ).astype(object)
    if num_chat:
        nu_error[num_chat - 1] = nu_recon[num_chat - 1] = np.nan
        verdict[num_chat - 1] = "undetermined"
    nu_error[dead] = nu_recon[dead] = np.nan
    norm_after = rng.uniform(0.5, 2, num_latents)
    columns = {
        **activity_columns(rng, num_latents),
        "norm_before": norm_after * np.clip(2 * (1 - delta), 0, 1),
        "norm_after": norm_after,
        "delta_norm": np.where(classes == "dead", np.nan, delta),
        "latent_class": classes.tolist(),
        "cosine": rng.uniform(0.6, 1, num_latents),
        "reference": np.where(delta < 0.5, "before", "after").tolist(),
        "nu_error": nu_error,
        "se_nu_error": rng.uniform(0.01, 0.05, num_latents),
        "nu_recon": nu_recon,
        "se_nu_recon": rng.uniform(0.01, 0.04, num_latents),
        "evidence": ["too little" if np.isnan(x) else "enough" for x in nu_error],
        "verdict": verdict.tolist(),
        "why_not": [
            f"nu_error {x:.2f} is not below 0.2" if w and w != "confirmed" else ""
            for x, w in zip(nu_error, verdict, strict=True)
        ],
    }
    columns["frequency"][dead] = columns["active_tokens"][dead] = 0
    return columns


def unclassed_columns(rng: np.random.Generator, num_latents: int, sources: tuple[str, ...]) -> dict:
    """Make the columns of a table of one source, such as a difference, or of more than two."""
    norms = {f"norm_{name}": rng.uniform(0.5, 2, num_latents) for name in sources}
    return {**activity_columns(rng, num_latents), **norms}


def activity_columns(rng: np.random.Generator, num_latents: int) -> dict:
    """Make the columns that every table has; the first five latents fire almost only on the novel."""
    shares = rng.dirichlet([8, 12, 9], num_latents)
    shares[:5] = [0.94, 0.04, 0.02]
    frequency = np.exp(rng.normal(-5, 1.2, num_latents)).clip(1e-5, 0.6)
    return {
        "latent": np.arange(num_latents),
        "frequency": frequency,
        "active_tokens": np.round(frequency * 30_211) + 25,
        "mean_activation": rng.uniform(1, 5, num_latents),
        "max_activation": rng.uniform(8, 30, num_latents),
        "energy": np.exp(rng.normal(0, 1, num_latents)),
        **{f"share_{label}": shares[:, i] for i, label in enumerate(LABELS)},
    }


def make_config(num_latents: int, sources: tuple[str, ...], sparsity: dict) -> dict:
    """Make what training records of itself."""
    stored = {
        name: {
            "name": name,
            "width": 576,
            "model": model,
            "revision": revision,
            "hook_point": "blocks.15.resid_post",
        }
        for name, model, revision in (
            ("before", "SmolLM2-135M-Instruct", "12fd25f"),
            ("after", "SmolLM2-135M-Instruct + LoRA on Moby-Dick", None),
        )
    }
    combination = [["after", 1.0], ["before", -1.0]] if sources == ("difference",) else None
    entries = [{"type": "Source", "name": name, "width": 576, "combination": combination} for name in sources]
    return {
        "train": {
            "type": "TrainConfig",
            "crosscoder": {
                "type": "CrosscoderConfig",
                "sources": {"type": "Sources", "entries": entries},
                "num_latents": num_latents,
                "sparsity": sparsity,
                "dtype": "float32",
            },
            "num_steps": 1_200,
            "batch_size": 1_024,
            "learning_rate": 1e-3,
            "warmup_steps": 100,
            "loss": {"type": "ErrorNorm"},
            "aux_k": {"type": "AuxK", "weight": 0.03125},
            "seed": 0,
        },
        "split": {"type": "Split", "fraction": 0.2, "seed": 0},
        "window_tokens": 131_072,
        "store_identity": {"fingerprint": "0123456789abcdef", **stored},
    }


def make_evaluation(sources: tuple[str, ...], fve: float) -> dict:
    """Make the held-out numbers."""
    by_source = {f"fve/{name}": fve + 0.01 * i for i, name in enumerate(sources)}
    return {
        "split": "held-out",
        "num_tokens": 30_211,
        "fve": fve,
        **by_source,
        "l0_training_rule": 32.0,
        "l0_inference_rule": 31.4,
        "dead": 0.0049,
        "dense": 0.001,
    }


def make_metrics(rng: np.random.Generator, sources: tuple[str, ...]) -> list[dict]:
    """Make a training log of 120 rows."""
    rows = []
    for step in range(10, 1_210, 10):
        fit = 1 - np.exp(-step / 220)
        by_source = {
            f"fve/{name}": round(float((0.85 - 0.05 * i) * fit + rng.normal(0, 0.006)), 4)
            for i, name in enumerate(sources)
        }
        rows.append(
            {
                "step": step,
                "loss": float(900 * (1.08 - fit) * np.exp(rng.normal(0, 0.02))),
                "fve": 0.8 * float(fit),
                **by_source,
                "l0": float(32 + rng.normal(0, 0.3)),
                "dead": float(0.02 * np.exp(-step / 300)),
                "lr": 1e-3,
            }
        )
    return rows


def make_snippets(rng: np.random.Generator, columns: dict, num_kept: int, hostile: str) -> dict:
    """Make passages for the first latents; some hold text that tries to break the page."""
    snippets = {}
    for latent in range(min(max(num_kept, 10), len(columns["latent"]))):
        entries = []
        for rank in range(7):
            start = int(rng.integers(0, len(WORDS)))
            tokens = [WORDS[(start + i) % len(WORDS)] for i in range(64)]
            activations = np.where(rng.uniform(size=64) < 0.12, rng.uniform(0.5, 9 - rank, 64), 0.0)
            peak = int(rng.integers(10, 60))
            activations[peak] = 12.0 - rank
            if hostile and rank == 0:
                tokens[peak], tokens[peak - 1], tokens[peak + 1] = hostile, "\u202eabc\u200b", " שלום\tعرب"
            entries.append(
                {
                    "tokens": tokens,
                    "activations": [round(float(a), 3) for a in activations],
                    "peak": peak,
                    "value": 12.0 - rank,
                    "document": 40 + rank,
                    "position": 100 + peak,
                    "label": LABELS[rank % 3 if latent >= 5 else 0],
                }
            )
        snippets[str(latent)] = entries
    if num_kept > 2:
        snippets["1"] = []
    return snippets


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_read_run_gives_every_part(tmp_path):
    files = read_run(make_run(tmp_path / "run"))
    assert len(files.latents) == 400
    assert len(files.metrics) == 120
    assert files.evaluation is not None
    assert files.evaluation["fve"] == 0.853
    assert files.snippets is not None
    assert len(files.snippets[0]) == 7
    assert files.provenance == {}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("config.json", "crosscoder-jax train"),
        ("diff/latents.parquet", "crosscoder-jax diff"),
        ("diff/summary.json", "crosscoder-jax diff"),
    ],
)
def test_a_missing_required_file_names_itself_and_its_command(tmp_path, name, command):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: make it with `{command}"):
        read_run(run)


def test_missing_optional_files_are_none(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "evaluation.json", "diff/snippets.json"):
        (run / name).unlink()
    files = read_run(run)
    assert (files.metrics, files.evaluation, files.snippets) == ((), None, None)


def test_damaged_files_are_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "diff" / "summary.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"summary.json is not JSON .*make it again with `crosscoder-jax diff"
    ):
        read_run(run)
    (run / "diff" / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match=r"summary.json holds list, not an object"):
        read_run(run)
    (run / "diff" / "latents.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"latents.parquet cannot be read as parquet"):
        read_latents(run / "diff" / "latents.parquet")


def test_a_table_without_latent_numbers_is_refused(tmp_path):
    path = tmp_path / "latents.parquet"
    pq.write_table(pa.table({"energy": [1.0]}), path)
    with pytest.raises(ValueError, match=r"no column 'latent' \(it has \['energy'\]\)"):
        read_latents(path)


def test_nulls_become_nan_and_empty_words(tmp_path):
    path = tmp_path / "latents.parquet"
    words = pa.array(["confirmed", None]).dictionary_encode()
    pq.write_table(pa.table({"latent": [3, 4], "nu_error": [0.5, None], "verdict": words}), path)
    table = read_latents(path)
    np.testing.assert_array_equal(table.numbers("nu_error"), [0.5, np.nan])
    assert table.words("verdict").tolist() == ["confirmed", ""]
    assert table.numbers("latent").tolist() == [3, 4]


def test_columns_that_are_not_there_are_empty():
    table = LatentTable({"latent": np.array([0.0, 1.0]), "share_a": np.ones(2), "share_b": np.ones(2)})
    assert np.isnan(table.numbers("nu_error")).all()
    assert table.words("verdict").tolist() == ["", ""]
    assert table.suffixes("share_") == ("a", "b")
    assert not table.has("latent_class")


def test_metrics_of_a_killed_and_resumed_run(tmp_path):
    # The run logged steps 1 and 2, was killed, resumed from 1 and logged 2 again; killed while writing 3.
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert read_metrics(path) == ({"step": 1, "loss": 3}, {"step": 2, "loss": 2})


def test_a_damaged_metrics_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{nonsense}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


@pytest.mark.parametrize(("activations", "peak"), [([1.0], 0), ([1.0, 2.0], 2), ([1.0, 2.0], -1)])
def test_snippets_that_do_not_fit_are_refused(tmp_path, activations, peak):
    path = tmp_path / "snippets.json"
    _write(path, {"7": [{"tokens": ["a", "b"], "activations": activations, "peak": peak}]})
    with pytest.raises(ValueError, match="latent 7 has 2 tokens"):
        read_snippets(path)


def test_the_provenance_of_the_published_crosscoder_is_read(tmp_path):
    run = make_run(tmp_path / "run")
    _write(run / "crosscoder" / "config.json", {"provenance": {"num_tokens": 152_000}, "weights_sha256": "f"})
    files = read_run(run)
    assert (files.provenance, files.weights_sha256) == ({"num_tokens": 152_000}, "f")
    (run / "crosscoder" / "config.json").unlink()
    files = read_run(run)
    assert (files.provenance, files.weights_sha256) == ({}, "")


def test_find_prefers_the_value_nearest_the_top():
    content = {"a": {"seed": 1, "b": {"rate": 3}}, "list": [{"k": 5}], "seed": 2}
    assert find(content, "seed") == 2
    # Both lie three levels down (a, b, rate and list, its first entry, k): the first name asked for wins.
    assert find(content, "rate", "k") == 3
    assert find(content, "k", "rate") == 5
    assert find(content, "absent") is None
