"""Reading run folders."""

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the report draws with plotly: install the extra 'report'")

import pyarrow as pa
import pyarrow.parquet as pq
from report_cases import make_run

from crosscoder_jax.activations.atomic import write_json_atomically
from crosscoder_jax.report.files import (
    LatentTable,
    find,
    is_recorded,
    read_latents,
    read_metrics,
    read_run,
    read_snippets,
)


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
    write_json_atomically(path, {"7": [{"tokens": ["a", "b"], "activations": activations, "peak": peak}]})
    with pytest.raises(ValueError, match="latent 7 has 2 tokens"):
        read_snippets(path)


def test_the_provenance_of_the_published_crosscoder_is_read(tmp_path):
    run = make_run(tmp_path / "run")
    write_json_atomically(
        run / "crosscoder" / "config.json", {"provenance": {"num_tokens": 152_000}, "weights_sha256": "f"}
    )
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


def test_a_field_that_is_null_is_recorded():
    content = {"train": {"l1": None, "entries": [{"name": "base"}]}}
    assert [is_recorded(content, name) for name in ("l1", "name", "l0")] == [True, True, False]
