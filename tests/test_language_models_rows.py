"""Rows of every kind of file, from any row on, and a word about the file that cannot be read."""

import gzip
import json

import pytest

pytest.importorskip("torch", reason="language models run in torch: install the extra 'lm'")
pytest.importorskip("datasets", reason="texts are read with datasets: install the extra 'lm'")

import datasets
import pyarrow
import pyarrow.parquet
from language_models_cases import write_jsonl

from crosscoder_jax.language_models.config import TextSource
from crosscoder_jax.language_models.rows import open_rows, text_fingerprint

ROWS = [{"text": f"document {i}", "source": i} for i in range(7)]


def write_as(kind, folder):
    """Write ``ROWS`` in the format and return the location."""
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    if kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        lines = [comma.join(("text", "source")), *(f"{row['text']}{comma}{row['source']}" for row in ROWS)]
        path.write_text("\n".join(lines) + "\n")
    if kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    if kind == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", ROWS)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "csv", "tsv", "saved", "folder"])
def test_every_format_gives_the_same_rows_from_any_row_on(kind, tmp_path, capfd):
    source = TextSource("a", write_as(kind, tmp_path))
    capfd.readouterr()
    assert list(open_rows(source)) == ROWS
    assert list(open_rows(source, skip=5)) == ROWS[5:]
    assert list(open_rows(source, skip=9)) == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("line", ["one", "two", "", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("file", ["one\ntwo\n\nthree\n"]),
    ],
)
def test_a_plain_text_file_is_cut_into_its_units(unit, expected, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    rows = open_rows(TextSource("a", str(tmp_path / "a.txt"), unit=unit))
    assert [row["text"].rstrip("\n") for row in rows] == [text.rstrip("\n") for text in expected]


def test_a_pattern_reads_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "c", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    rows = open_rows(TextSource("x", str(tmp_path / "*.jsonl")))
    assert [row["text"] for row in rows] == ["a", "b", "c"]


def test_a_saved_dataset_with_splits_names_them(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "d"))
    assert list(open_rows(TextSource("a", str(tmp_path / "d"), split="test"))) == ROWS[:2]
    with pytest.raises(ValueError, match=r"text 'a' .* no split 'dev', only train, test"):
        open_rows(TextSource("a", str(tmp_path / "d"), split="dev"))


def test_shuffled_rows_are_all_there_and_the_same_for_the_same_seed(tmp_path):
    source = TextSource("a", write_as("jsonl", tmp_path))
    first, again, other = (list(open_rows(source, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != ROWS
    assert first != other
    assert sorted(first, key=lambda row: row["source"]) == ROWS
    assert list(open_rows(source, 1, skip=3)) == first[3:]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nowhere.jsonl", r"text 'a' \(nowhere.jsonl\) cannot be read: there is no such file"),
        ("/nowhere/at/all", "there is no such file"),
        ("./nowhere", "there is no such file"),
        ("nowhere/*.parquet", "there is no such file"),
    ],
)
def test_a_file_that_is_not_there_is_named(location, message):
    with pytest.raises(ValueError, match=message):
        open_rows(TextSource("a", location))


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"the ending of a.docx must be one of .json, .jsonl"):
        open_rows(TextSource("a", str(tmp_path / "a.docx")))


def test_a_broken_file_is_named_when_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"text 'a' \(.*a.jsonl\) cannot be read"):
        list(open_rows(TextSource("a", str(tmp_path / "a.jsonl"))))


def test_the_fingerprint_follows_the_content_of_local_files(tmp_path):
    source = TextSource("a", write_jsonl(tmp_path / "a.jsonl", ROWS))
    first = text_fingerprint(source)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    assert text_fingerprint(source) == first
    write_jsonl(tmp_path / "a.jsonl", ROWS[:-1])
    assert text_fingerprint(source) != first
    assert text_fingerprint(TextSource("a", str(tmp_path))) == text_fingerprint(source)
    assert text_fingerprint(TextSource("a", "org/dataset")) is None
