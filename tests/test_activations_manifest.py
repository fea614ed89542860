"""The manifest says what it holds and refuses what it cannot understand."""

import copy
import json

import pytest
from activations_cases import SOURCES, copied_store, corpus, write_store

from crosscoder_jax.activations.manifest import Manifest, StoredSource, StoreError, describe_differences


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("written") / "store", corpus())


@pytest.fixture
def store(written, tmp_path):
    return copied_store(written, tmp_path / "store")


def edited(store, **changes):
    data = json.loads((store.path / "manifest.json").read_text()) | changes
    return {key: value for key, value in data.items() if value is not ...}


def test_round_trip_is_exact(store):
    data = store.manifest.to_json()
    again = Manifest.from_json(json.loads(json.dumps(data)))
    assert again.to_json() == json.loads(json.dumps(data))
    assert again.fingerprint() == store.manifest.fingerprint()
    assert again.sources == SOURCES


def test_fingerprint_tells_other_content(tmp_path, store):
    other = write_store(tmp_path / "other", corpus(seed=1))
    assert other.manifest.identity() == store.manifest.identity()
    assert other.manifest.fingerprint() != store.manifest.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version=2 is not 1"),
        ({"format_version": ...}, "format_version=None"),
        ({"num_tokens": ...}, r"fields \['num_tokens'\] are missing"),
        ({"extra": 1}, r"fields \['extra'\] are unknown"),
        ({"dtype": "float16"}, "dtype='float16' must be one of"),
        ({"num_tokens": 0}, "num_tokens=0 must be a positive integer"),
        ({"num_tokens": "many"}, "num_tokens='many'"),
        ({"sources": [{"name": "base"}]}, "a field is malformed"),
        ({"statistics": {}}, "statistics of source 'base'"),
        ({"labels": None}, "a field is malformed"),
    ],
)
def test_malformed_manifest_is_refused_naming_file_and_field(store, changes, message):
    (store.path / "manifest.json").write_text(json.dumps(edited(store, **changes)))
    with pytest.raises(StoreError, match=message) as error:
        Manifest.read(store.path)
    assert str(store.path / "manifest.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[1]", '{"format_version'])
def test_damaged_manifest_is_refused_naming_the_file_once(store, content):
    (store.path / "manifest.json").write_text(content)
    with pytest.raises(StoreError) as error:
        Manifest.read(store.path)
    assert str(error.value).count("manifest.json") == 1


def test_missing_store_and_missing_manifest(tmp_path, store):
    with pytest.raises(StoreError, match="there is no such folder"):
        Manifest.read(tmp_path / "nowhere")
    (store.path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest\.json is missing: this is no activation store"):
        Manifest.read(store.path)


def test_differences_are_named_leaf_by_leaf(store):
    expected = store.manifest.identity()
    found = copy.deepcopy(expected)
    found["base"]["model"] = "org/other"
    found["third"] = found.pop("chat")
    assert describe_differences(expected, expected) == []
    lines = describe_differences(expected, found)
    assert lines[0] == "base.model: expected 'org/model', found 'org/other'"
    assert lines[1].startswith("chat: expected {'name': 'chat'")
    assert lines[1].endswith("found nothing")
    assert lines[2].startswith("third: expected nothing")
    assert describe_differences({"a": (1, (2,))}, {"a": [1, [2]]}) == []
    assert describe_differences({"a": None}, {}) == ["a: expected None, found nothing"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", ".hidden"])
def test_source_names_are_safe_folders(name):
    with pytest.raises(ValueError, match="becomes a folder"):
        StoredSource(name, 4, "m", None, "h")


def test_source_width_must_be_positive():
    with pytest.raises(ValueError, match="width=0 of source 'a'"):
        StoredSource("a", 0, "m", None, "h")
