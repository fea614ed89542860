"""The writer keeps what was checkpointed, refuses what is wrong, and says what and where."""

import dataclasses
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from activations_cases import (
    CHUNK,
    DOCUMENT_LENGTHS,
    SETTINGS,
    SOURCES,
    copied_store,
    corpus,
    files,
    write_store,
)

from crosscoder_jax.activations import ActivationStore, StoredSource, StoreError, StoreWriter

TEXT = corpus()


def begin(path, **changes):
    return StoreWriter.create_or_resume(path, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("written") / "store", TEXT)


@pytest.fixture
def reference(written, tmp_path):
    return copied_store(written, tmp_path / "reference")


@pytest.mark.parametrize(
    ("step", "checkpoint_every"),
    [(1, 20), (CHUNK - 1, 1), (CHUNK, 1), (CHUNK, 1000), (CHUNK + 1, 3), (16 * CHUNK, 1), (1000, 1000)],
)
def test_files_do_not_depend_on_the_pieces(tmp_path, reference, step, checkpoint_every):
    write_store(tmp_path / "store", TEXT, step=step, checkpoint_every=checkpoint_every)
    assert files(tmp_path / "store") == files(reference.path)


def test_layout(reference):
    names = {name.split("/c/")[0] for name in files(reference.path)}
    arrays = {"acts/base", "acts/chat", "tokens", "documents", "positions", "labels"}
    assert names == {"manifest.json"} | arrays | {f"{array}/zarr.json" for array in arrays}
    manifest = reference.manifest
    assert manifest.num_tokens == sum(DOCUMENT_LENGTHS)
    assert manifest.num_documents == len(DOCUMENT_LENGTHS)
    assert manifest.provenance == {"written by": "a test"}
    assert manifest.config == {"layer": 1, "texts": ["a", "b"]}


def test_statistics_are_those_of_what_is_stored(reference):
    stored = TEXT.stored().astype(np.float64)
    for part, source in zip((slice(0, 5), slice(5, 8)), SOURCES, strict=True):
        statistics, rows = reference.manifest.statistics[source.name], stored[:, part]
        # Sums of 199 float64: relative error well below 1e-13.
        np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(statistics.std, rows.std(axis=0), rtol=1e-12)
        np.testing.assert_allclose(statistics.mean_norm, np.linalg.norm(rows, axis=1).mean(), rtol=1e-13)


def test_resumes_at_the_last_checkpoint(tmp_path, reference):
    path = tmp_path / "store"
    with begin(path) as writer:
        assert (writer.cursor, writer.num_tokens, writer.num_documents) == (None, 0, 0)
        TEXT.append(writer, 0, 40)
        writer.checkpoint({"row": 40})
        TEXT.append(writer, 40, 120)  # more than a chunk, written and not checkpointed
    with begin(path) as writer:
        assert (writer.cursor, writer.num_tokens, writer.num_documents) == ({"row": 40}, 40, 4)
        assert not writer.is_finished
    write_store(path, TEXT)
    assert files(path) == files(reference.path)


def test_what_follows_the_checkpoint_may_differ_after_a_crash(tmp_path, reference):
    path = tmp_path / "store"
    other = corpus(seed=5)
    with begin(path) as writer:
        TEXT.append(writer, 0, 40)
        writer.checkpoint(None)
        other.append(writer, 40, sum(DOCUMENT_LENGTHS))
    write_store(path, TEXT)
    assert files(path) == files(reference.path)


def test_a_shorter_second_attempt_leaves_no_stale_files(tmp_path):
    path = tmp_path / "store"
    short = corpus(DOCUMENT_LENGTHS[:3])
    with begin(path) as writer:
        TEXT.append(writer, 0, sum(DOCUMENT_LENGTHS))
    write_store(path, short)
    expected = write_store(tmp_path / "short", short)
    assert {n: b for n, b in files(path).items() if n != "manifest.json"} == {
        n: b for n, b in files(expected.path).items() if n != "manifest.json"
    }


def test_a_finished_store_is_found_finished(reference):
    before = files(reference.path)
    with begin(reference.path) as writer:
        assert writer.is_finished
        assert writer.num_tokens == TEXT.num_tokens
        assert writer.manifest.to_json() == reference.manifest.to_json()
        with pytest.raises(ValueError, match="the store is finished"):
            TEXT.append(writer, 0, 1)
    assert files(reference.path) == before


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"layer": 2, "texts": ["a", "b"]}}, "config.layer: stored 1, asked for 2"),
        ({"config": {"layer": 1}}, r"config.texts: stored \['a', 'b'\], asked for nothing"),
        ({"dtype": "float32"}, "dtype: stored 'bfloat16', asked for 'float32'"),
        ({"chunk_tokens": 32}, "chunk_tokens: stored 16, asked for 32"),
        ({"labels": ("prose",)}, "labels: stored"),
        (
            {"sources": SOURCES[::-1]},
            r"source_order: stored \['base', 'chat'\], asked for \['chat', 'base'\]",
        ),
        (
            {"sources": (SOURCES[0], dataclasses.replace(SOURCES[1], model="org/else"))},
            "sources.chat.model: stored 'org/model-chat', asked for 'org/else'",
        ),
    ],
)
def test_another_setting_is_refused_with_the_difference(tmp_path, reference, changes, message, is_finished):
    path = reference.path
    if not is_finished:
        path = tmp_path / "store"
        with begin(path) as writer:
            TEXT.append(writer, 0, 5)
    before = files(path)
    with pytest.raises(StoreError, match=f"was written under other settings .*{message}") as error:
        begin(path, **changes)
    assert "\n" not in str(error.value)
    assert files(path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be positive"),
        ({"sources": ()}, "must be at least one"),
        ({"sources": (SOURCES[0], SOURCES[0])}, "with names that differ"),
        ({"labels": ()}, "labels="),
        ({"config": {"x": object()}}, "cannot be written as JSON"),
        ({"config": {"x": float("nan")}}, "cannot be written as JSON"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / "store", **changes)


def test_foreign_folder_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match=r"holds \['thesis.tex'\] but neither"):
        begin(tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"precious"}


def test_lost_manifest_is_not_taken_for_an_empty_folder(reference):
    (reference.path / "manifest.json").unlink()
    before = files(reference.path)
    with pytest.raises(StoreError, match="its manifest was lost"):
        begin(reference.path)
    assert files(reference.path) == before


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "store"
    with begin(path):
        with pytest.raises(StoreError, match="another process is writing this store"):
            begin(path)
        script = f"import activations_cases as c; c.StoreWriter.create_or_resume({str(path)!r}, **c.SETTINGS)"
        child = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True)
        assert b"another process is writing this store" in child.stderr
    with begin(path) as writer:
        assert writer.num_tokens == 0


def refused(writer, message, start=0, stop=10, acts=None, **columns):
    """Expect an append to be refused in one line that names folder and tokens."""
    good_acts, good_columns = TEXT.part(start, stop)
    with pytest.raises(StoreError, match=message) as error:
        writer.append(good_acts | (acts or {}), **(good_columns | columns))
    text = str(error.value)
    assert "\n" not in text
    assert f"tokens {start} to {stop}" in text
    assert str(writer._folder) in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_that_are_not_finite_are_refused_and_nothing_is_lost(tmp_path, value, dtype):
    reference = write_store(tmp_path / "reference", TEXT, dtype=dtype)
    with begin(tmp_path / "store", dtype=dtype) as writer:
        TEXT.append(writer, 0, 20)
        bad = TEXT.acts["chat"][20:60].copy()
        bad[30, 2] = bad[33, 0] = value
        # Token 50 is the first of document 4 (7 + 1 + 30 + 12 = 50).
        message = f"source 'chat': 2 rows are not finite as {dtype}; the first is document 4, position 0, "
        refused(writer, message + f"where coordinate 2 is {value}", 20, 60, {"chat": bad})
        assert writer.num_tokens == 20
        TEXT.append(writer, 20, TEXT.num_tokens)  # this writer goes on
        writer.finish({"written by": "a test"})
    assert files(tmp_path / "store") == files(reference.path)


def test_overflow_of_the_stored_type_is_refused(tmp_path):
    big = TEXT.acts["base"][:10].astype(np.float64)
    big[4, 1] = 3.4e38  # fits float32 (3.403e38), not bfloat16 (3.390e38)
    with begin(tmp_path / "a") as writer:
        refused(writer, "source 'base': 1 rows are not finite as bfloat16.*is 3.4e[+]38", acts={"base": big})
    with begin(tmp_path / "b", dtype="float32") as writer:
        writer.append({**TEXT.part(0, 10)[0], "base": big}, **TEXT.part(0, 10)[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_are_converted_once(tmp_path, dtype):
    acts = {name: values.astype(dtype) for name, values in TEXT.acts.items()}
    text = dataclasses.replace(TEXT, acts=acts)
    store = write_store(tmp_path / "store", text, dtype="float32")
    np.testing.assert_array_equal(store.read(0, store.num_tokens), text.stored(np.float32))


def test_wrong_widths_sources_and_lengths_are_refused(tmp_path):
    with begin(tmp_path / "store") as writer:
        narrow = TEXT.acts["base"][:10, :4]
        refused(
            writer, r"source 'base': activations have shape \(10, 4\), but .*\(10, 5\)", acts={"base": narrow}
        )
        short = TEXT.acts["chat"][:9]
        refused(writer, r"source 'chat': activations have shape \(9, 3\)", acts={"chat": short})
        refused(writer, r"sources \['base', 'chat', 'x'\], but the store has", acts={"x": narrow})
        refused(writer, r"positions has shape \(9,\), not \(10,\)", positions=np.arange(9))
        assert writer.num_tokens == 0


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tokens", -1, "tokens lie between -1 and"),
        ("tokens", 2**31, "must lie between 0 and 2147483647"),
        ("labels", 2, "labels lie between 0 and 2, but must lie between 0 and 1"),
        ("positions", -5, "positions lie between -5"),
        ("documents", -1, "documents lie between -1"),
    ],
)
def test_values_that_cannot_be_stored_are_refused(tmp_path, column, value, message):
    values = TEXT.part(0, 10)[1][column].astype(np.int64)
    values[3] = value
    with begin(tmp_path / "store") as writer:
        refused(writer, message, **{column: values})


def test_documents_must_be_contiguous(tmp_path):
    path = tmp_path / "store"
    with begin(path) as writer:
        refused(writer, "document 3 comes back", documents=np.array([3] * 4 + [2] * 4 + [3] * 2))
        acts, columns = TEXT.part(0, 10)
        writer.append(acts, **(columns | {"documents": np.array([9] * 5 + [2] * 5)}))
        writer.append(acts, **(columns | {"documents": np.array([2] * 5 + [4] * 5)}))  # 2 goes on
        refused(writer, "document 9 comes back", 20, 30, documents=np.array([4] * 5 + [9] * 5))
        writer.checkpoint(None)
    with begin(path) as writer:  # and a resumed writer still knows
        assert writer.num_documents == 3
        refused(writer, "document 2 comes back", 20, 30, documents=np.array([2] * 10))
        writer.append(acts, **(columns | {"documents": np.array([4] * 10)}))
        assert writer.finish({}).num_documents == 3


def test_empty_appends_change_nothing(tmp_path, reference):
    with begin(tmp_path / "store") as writer:
        TEXT.append(writer, 0, 0)
        TEXT.append(writer, 0, TEXT.num_tokens)
        TEXT.append(writer, 5, 5)
        writer.finish({"written by": "a test"})
    assert files(tmp_path / "store") == files(reference.path)


def test_nothing_to_finish(tmp_path):
    with begin(tmp_path / "store") as writer, pytest.raises(StoreError, match="no token was appended"):
        writer.finish({})


def test_closed_writer_refuses(tmp_path):
    with begin(tmp_path / "store") as writer:
        pass
    with pytest.raises(ValueError, match="this writer is closed"):
        TEXT.append(writer, 0, 1)


def test_vocabulary_keeps_any_bytes(tmp_path):
    vocabulary = {0: bytes(range(256)), 7: "é".encode(), 3: b""}
    assert write_store(tmp_path / "store", TEXT, vocabulary=vocabulary).vocabulary() == vocabulary
    assert write_store(tmp_path / "without", TEXT).vocabulary() == {}


@pytest.mark.parametrize("content", ["{", "{}", '{"num_tokens": 3}'])
def test_damaged_partial_state_is_refused_by_name(tmp_path, content):
    with begin(tmp_path / "store") as writer:
        TEXT.append(writer, 0, 30)
        writer.checkpoint(None)
    (tmp_path / "store" / "partial.json").write_text(content)
    with pytest.raises(ValueError, match="store") as error:
        begin(tmp_path / "store")
    assert "\n" not in str(error.value)


def test_lost_chunk_of_a_half_written_store_is_refused_by_name(tmp_path):
    with begin(tmp_path / "store") as writer:
        TEXT.append(writer, 0, 40)
        writer.checkpoint(None)
    tail = tmp_path / "store" / "acts" / "chat" / "c" / "2" / "0"
    tail.write_bytes(tail.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"acts/chat/c/2/0: source 'chat', tokens 32 to 48: it is truncated"):
        begin(tmp_path / "store")


def test_failed_write_of_the_state_keeps_the_last_checkpoint(tmp_path, monkeypatch, reference):
    path = tmp_path / "store"
    with begin(path) as writer:
        TEXT.append(writer, 0, 40)
        writer.checkpoint(40)
        TEXT.append(writer, 40, 80)

        def fail(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "partial.json")

        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.replace", fail)
            with pytest.raises(StoreError, match=r"No space left on device; the first 40 tokens .* are safe"):
                writer.checkpoint(80)
        with pytest.raises(StoreError, match="this writer gave up"):
            TEXT.append(writer, 80, 90)
    with begin(path) as writer:
        assert (writer.cursor, writer.num_tokens) == (40, 40)
    write_store(path, TEXT)
    assert files(path) == files(reference.path)


def mount_or_skip(folder, megabytes):
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip(
            f"a disk that fills up needs the right to mount one of 1 MiB: {done.stderr.decode().strip()}"
        )


WIDE = {"sources": (StoredSource("base", 512, "m", None, "h"), StoredSource("chat", 256, "n", None, "h"))}


def test_full_disk_is_one_line_and_the_store_goes_on_when_there_is_room(tmp_path):
    # 1,000 tokens x 768 coordinates x 2 bytes = 1.5 MB on a disk of 1 MiB.
    text = corpus([25] * 40, widths=(512, 256))
    disk = tmp_path / "disk"
    mount_or_skip(disk, 1)
    try:
        with pytest.raises(StoreError, match="No space left on device; the first") as error:
            write_store(disk / "store", text, **WIDE)
        message = str(error.value)
        assert "\n" not in message
        assert str(disk / "store" / "acts") in message
        assert "source '" in message
        assert " tokens " in message
        with pytest.raises(StoreError, match="half-written"):
            ActivationStore.open(disk / "store")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        with begin(disk / "store", **WIDE) as writer:
            assert writer.num_tokens > 300
            assert f"the first {writer.num_tokens} tokens" in message
        write_store(disk / "store", text, **WIDE)
        assert files(disk / "store") == files(write_store(tmp_path / "reference", text, **WIDE).path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_file_that_may_not_grow_is_one_line(tmp_path):
    # A quota or a limit on file size needs no rights to try: chunks of 1,284 bytes, limit 1,000.
    wide = (StoredSource("base", 40, "m", None, "h"), SOURCES[1])
    text = corpus(widths=(40, 3))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with begin(tmp_path / "store", sources=wide) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        try:
            with pytest.raises(
                StoreError, match=r"acts/base/c/\d+/0: source 'base', tokens .* File too large"
            ):
                text.append(writer, 0, text.num_tokens)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    store = write_store(tmp_path / "store", text, sources=wide)
    assert store.verify() == []
