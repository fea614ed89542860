"""Reading gives back what was written; every kind of damage is named and the rest stays readable."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from activations_cases import CHUNK, SETTINGS, SOURCES, copied_store, corpus, files, write_store

from crosscoder_jax.activations import ActivationStore, StoreError, StoreWriter

TEXT = corpus()
NUM_TOKENS = TEXT.num_tokens  # 199: twelve chunks of 16 and one of 7


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("written") / "store", TEXT)


@pytest.fixture
def store(written, tmp_path):
    return copied_store(written, tmp_path / "store")


def one_line(error, *parts):
    text = str(error.value) if hasattr(error, "value") else error
    assert "\n" not in text
    for part in parts:
        assert str(part) in text
    return text


def chunk_file(store, array, chunk):
    name = f"{chunk}/0" if array.startswith("acts/") else str(chunk)
    return store.path / array / "c" / name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reads_back_what_was_written(tmp_path, dtype):
    store = write_store(tmp_path / "store", TEXT, dtype=dtype)
    expected = TEXT.stored(np.dtype(dtype) if dtype == "float32" else ml_dtypes.bfloat16)
    assert store.num_tokens == NUM_TOKENS
    assert (store.sources.names, store.sources.widths) == (("base", "chat"), (5, 3))
    for start, stop in [(0, NUM_TOKENS), (0, 0), (3, 5), (15, 17), (16, 32), (190, 199), (199, 199)]:
        acts = store.read(start, stop)
        assert acts.dtype == expected.dtype == store.dtype
        np.testing.assert_array_equal(acts, expected[start:stop])
        for name in ("tokens", "documents", "positions", "labels"):
            np.testing.assert_array_equal(getattr(store, name)(start, stop), TEXT.columns[name][start:stop])
    assert store.tokens(0, 1).dtype == np.int32
    assert store.labels(0, 1).dtype == np.int16


@pytest.mark.parametrize(
    "index",
    [
        [5],
        [198, 0, 17, 16],
        [3, 3, 40, 3],
        [9, 3, 5],
        [3, 3, 5],
        [],
        list(range(NUM_TOKENS))[::-1],
        list(range(16, 48)),
    ],
)
def test_reads_any_rows_in_any_order(written, index):
    np.testing.assert_array_equal(written.read_rows(np.array(index, np.int64)), TEXT.stored()[index])


def test_reads_each_file_once(written, monkeypatch):
    reads = []
    start_read = type(written.arrays[0]).start_read

    def counted(array, start, stop):
        reads.append((array.spec.name, start // CHUNK, (stop - 1) // CHUNK))
        return start_read(array, start, stop)

    monkeypatch.setattr(type(written.arrays[0]), "start_read", counted)
    written.read_rows(np.random.default_rng(0).permutation(NUM_TOKENS))
    expected = [(name, chunk, chunk) for name in ("acts/base", "acts/chat") for chunk in range(13)]
    assert sorted(reads) == sorted(expected)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, NUM_TOKENS + 1)])
def test_ranges_outside_the_store_are_refused(written, start, stop):
    for read in (written.read, written.tokens, written.labels):
        with pytest.raises(ValueError, match=f"tokens {start} to {stop} are not within the store's 0 to 199"):
            read(start, stop)


def test_rows_outside_the_store_are_refused(written):
    with pytest.raises(ValueError, match="not within the store's 0 to 199"):
        written.read_rows(np.array([0, 199]))


DAMAGES = {
    "flipped": (lambda b: b[:9] + bytes([b[9] ^ 4]) + b[10:], "its checksum is wrong"),
    "flipped checksum": (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "its checksum is wrong"),
    "truncated": (lambda b: b[:-1], "it is truncated"),
    "short": (lambda b: b[:3], "it is truncated"),
    "empty": (lambda b: b"", "it is truncated"),
    "missing": (None, "it is missing"),
}


def damage(path, kind):
    change = DAMAGES[kind][0]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(("chunk", "tokens"), [(2, "tokens 32 to 48"), (12, "tokens 192 to 199")])
def test_damaged_chunk_is_named_and_nothing_else_is_lost(store, kind, chunk, tokens):
    path = chunk_file(store, "acts/chat", chunk)
    damage(path, kind)
    with pytest.raises(StoreError) as error:
        store.read(0, NUM_TOKENS)
    one_line(error, path, "source 'chat'", tokens, DAMAGES[kind][1], "restore this file")
    low, high = chunk * CHUNK, min(chunk * CHUNK + CHUNK, NUM_TOKENS)
    np.testing.assert_array_equal(store.read(0, low), TEXT.stored()[:low])
    np.testing.assert_array_equal(store.read(high, NUM_TOKENS), TEXT.stored()[high:])
    faults = store.verify()
    assert len(faults) == 1
    one_line(faults[0], path, "source 'chat'", tokens, DAMAGES[kind][1])


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_column_is_named(store, kind):
    damage(chunk_file(store, "documents", 0), kind)
    with pytest.raises(StoreError) as error:
        store.documents(0, 5)
    one_line(error, "documents/c/0", "column 'documents'", "tokens 0 to 199", DAMAGES[kind][1])
    assert len(store.tokens(0, 5)) == 5
    faults = store.verify()
    assert len(faults) == 1
    one_line(faults[0], "documents/c/0", DAMAGES[kind][1])


def test_lost_chunk_of_zeros_is_not_read_as_zeros(tmp_path):
    acts = {name: values * 0 for name, values in TEXT.acts.items()}
    store = write_store(tmp_path / "store", dataclasses.replace(TEXT, acts=acts))
    assert not np.any(store.read(0, NUM_TOKENS).astype(np.float32))
    chunk_file(store, "acts/base", 3).unlink()
    with pytest.raises(StoreError, match="tokens 48 to 64: it is missing"):
        store.read(0, NUM_TOKENS)


def test_verify_finds_every_fault_at_once(store):
    assert store.verify() == []
    damage(chunk_file(store, "acts/base", 0), "flipped")
    damage(chunk_file(store, "acts/base", 4), "missing")
    damage(chunk_file(store, "acts/chat", 1), "truncated")
    damage(chunk_file(store, "labels", 0), "empty")
    assert [fault.split(":")[0].removeprefix(f"{store.path}/") for fault in store.verify()] == [
        "acts/base/c/0/0",
        "acts/base/c/4/0",
        "acts/chat/c/1/0",
        "labels/c/0",
    ]


def test_verify_reports_progress(written):
    calls = []
    written.verify(lambda done, total, unit: calls.append((done, total, unit)))
    # Two sources of 13 chunks and four columns of one.
    assert len(calls) == 2 * 13 + 4
    assert calls[-1] == (6 * NUM_TOKENS, 6 * NUM_TOKENS, "tokens")


def rewrite(store, array, start, values):
    """Write into an array with a good checksum, as another program might."""
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{store.path / array}/"}}
    handle = ts.open(spec).result()
    handle[start : start + len(values)].write(values).result()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_names_rows_that_are_not_finite(store, value):
    rows = store.read(36, 38)[:, :5].copy()
    rows[1, 2] = value
    rewrite(store, "acts/base", 36, rows)
    faults = store.verify()
    assert len(faults) == 1
    one_line(
        faults[0],
        chunk_file(store, "acts/base", 2),
        "source 'base', tokens 32 to 48",
        "the first is token 37",
    )


def test_verify_notices_activations_that_are_not_those_of_the_manifest(store):
    rewrite(store, "acts/chat", 20, store.read(20, 21)[:, 5:] * 2)
    faults = store.verify()
    assert len(faults) == 1
    one_line(faults[0], "source 'chat'", "the manifest's mean is", "belongs to other activations")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("labels", np.array([2], np.int16), "values 0 to 2 are out of range"),
        ("tokens", np.array([-3], np.int32), "values -3 to"),
        ("documents", np.array([77], np.int32), "documents must be contiguous"),
    ],
)
def test_verify_checks_columns(store, column, values, message):
    rewrite(store, column, 20, values)
    faults = store.verify()
    assert len(faults) == 1
    one_line(faults[0], store.path / column, f"column '{column}', tokens 0 to 199", message)


def test_missing_manifest_half_written_store_and_no_store(tmp_path, store):
    (store.path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest\.json is missing"):
        ActivationStore.open(store.path)
    with StoreWriter.create_or_resume(tmp_path / "half", **SETTINGS) as writer:
        TEXT.append(writer, 0, 40)
        writer.checkpoint(None)
    with pytest.raises(StoreError, match=r"half-written \(40 tokens are safe") as error:
        ActivationStore.open(tmp_path / "half")
    one_line(error, tmp_path / "half", "run the command that writes it again")
    with pytest.raises(StoreError, match="there is no such folder"):
        ActivationStore.open(tmp_path / "nothing")


def _widen(manifest):
    manifest["sources"][0]["width"] = 6
    manifest["statistics"]["base"].update(mean=[0] * 6, std=[0] * 6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_widen, "source 'base' has"),
        (lambda m: m.update(dtype="float32"), "source 'base' has"),
        (lambda m: m.update(chunk_tokens=8), "source 'base' has"),
        (lambda m: m.update(num_tokens=200), "has 199 tokens, but the manifest says 200"),
    ],
)
def test_arrays_that_contradict_the_manifest_are_refused(store, edit, message):
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=message) as error:
        ActivationStore.open(store.path)
    one_line(error, "acts/base")


@pytest.mark.parametrize("content", [None, "{broken"])
def test_lost_or_broken_array_description_is_named(store, content):
    path = store.path / "acts" / "chat" / "zarr.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(StoreError) as error:
        ActivationStore.open(store.path)
    one_line(error, path, "source 'chat' cannot be opened")


def test_store_of_other_models_is_refused_with_the_difference(written, tmp_path):
    written.require_identity(written.manifest.identity())
    written.require_identity(json.loads(json.dumps(written.manifest.identity())))
    other = (SOURCES[0], dataclasses.replace(SOURCES[1], model="org/else", revision="fff"))
    store = write_store(tmp_path / "store", TEXT, sources=other)
    with pytest.raises(StoreError) as error:
        store.require_identity(written.manifest.identity())
    one_line(
        error,
        store.path,
        "chat.model: expected 'org/model-chat', stored 'org/else'",
        "chat.revision: expected None, stored 'fff'",
    )
    assert "base" not in str(error.value).split("other models: ")[1]


def test_a_store_can_be_moved_and_reading_changes_nothing(store, tmp_path):
    before = files(store.path)
    shutil.move(store.path, tmp_path / "elsewhere")
    moved = ActivationStore.open(str(tmp_path / "elsewhere"))
    assert moved.verify() == []
    np.testing.assert_array_equal(moved.read(0, NUM_TOKENS), TEXT.stored())
    assert files(moved.path) == before


def test_other_programs_can_read_the_arrays(written):
    # The format is plain zarr 3: chunk files are little-endian rows followed by four bytes of CRC32C.
    description = json.loads((written.path / "acts" / "base" / "zarr.json").read_text())
    assert (description["zarr_format"], description["shape"]) == (3, [NUM_TOKENS, 5])
    assert [codec["name"] for codec in description["codecs"]] == ["bytes", "crc32c"]
    raw = chunk_file(written, "acts/base", 1).read_bytes()
    rows = np.frombuffer(raw[:-4], ml_dtypes.bfloat16).reshape(CHUNK, 5)
    np.testing.assert_array_equal(rows, TEXT.stored()[16:32, :5])
    # What follows the last token is zero, whatever was there before.
    raw = chunk_file(written, "acts/base", 12).read_bytes()
    assert not np.any(np.frombuffer(raw[:-4], np.uint16).reshape(CHUNK, 5)[7:])
