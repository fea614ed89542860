"""Saved crosscoders come back bit for bit or are refused by name."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import VARIABLES, random_crosscoder, two_sources
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize

import crosscoder_jax as cc
from crosscoder_jax import publishing
from crosscoder_jax.publishing import load, load_provenance, save
from crosscoder_jax.sharding import Shardings, make_mesh

FILES = {"config.json", "crosscoder.safetensors"}


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved crosscoder."""
    return save(random_crosscoder(threshold=1 / 3), tmp_path / "crosscoder", provenance={"layer": 13})


def assert_same(mine, other):
    assert mine.config == other.config
    for name in VARIABLES:
        left, right = np.asarray(getattr(mine, name)[...]), np.asarray(getattr(other, name)[...])
        assert left.dtype == right.dtype == np.float32
        assert left.tobytes() == right.tobytes(), name
        assert type(getattr(mine, name)) is type(getattr(other, name))


def edit_config(folder, **changes):
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not ...}))


def replace_weights(folder, tensors):
    """Put other tensors in, with a config that names them as its own."""
    data = serialize(tensors)
    (folder / "crosscoder.safetensors").write_bytes(data)
    edit_config(folder, weights_sha256=publishing.hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": cc.BatchTopK(k=2.5)},
        {"sparsity": cc.ReLU(), "dtype": "bfloat16"},
        {"sources": cc.Sources((cc.Source("d", 4, (("chat", 1.0), ("base", -1.0))),))},
        {"sources": two_sources(2, 5)},
        {"code_norm": cc.MixedNorms(total=0.3)},
        {"code_norm": cc.Decoupled()},
        {"sparsity": cc.JumpReLU()},
        {"sparsity": cc.Gated()},
    ],
)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, changes):
    crosscoder = random_crosscoder(threshold=0.1, **changes)
    # Values that a detour over text, float64 or bfloat16 would change.
    crosscoder.b_enc[...] = crosscoder.b_enc[...].at[:3].set(jnp.array([-0.0, 1e-42, 0.1]))
    again = load(save(crosscoder, tmp_path))
    assert_same(again, crosscoder)
    acts = jax.random.normal(jax.random.key(0), (4, crosscoder.config.sources.width))
    np.testing.assert_array_equal(again.encode(acts), crosscoder.encode(acts))
    np.testing.assert_array_equal(again(acts), crosscoder(acts))


def test_a_folded_crosscoder_comes_back_folded(tmp_path):
    folded = cc.fold_normalization(random_crosscoder(threshold=2.0))
    assert_same(load(save(folded, tmp_path)), folded)


def test_a_crosscoder_on_a_mesh_is_saved_whole(tmp_path):
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        save(random_crosscoder(shardings=Shardings.for_mesh(mesh)), tmp_path)
    assert_same(load(tmp_path), random_crosscoder())


@pytest.mark.parametrize("shape", [(2, 4), (1, 8)])
def test_a_saved_crosscoder_goes_straight_to_a_mesh(saved, shape):
    mesh = make_mesh(*shape)
    acts = jax.random.normal(jax.random.key(0), (4, 6))
    expected = load(saved)
    with jax.set_mesh(mesh):
        spread = load(saved, shardings=Shardings.for_mesh(mesh))
        assert_same(spread, expected)
        assert spread.shardings == Shardings.for_mesh(mesh)
        fresh = cc.Crosscoder(expected.config, key=jax.random.key(0), shardings=Shardings.for_mesh(mesh))
        for name in VARIABLES:
            ours, theirs = (getattr(c, name)[...] for c in (spread, fresh))
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim), name
        assert spread.w_dec[...].addressable_shards[0].data.shape == (16 // shape[1], 6)
        placed = jax.device_put(acts, jax.P("data", None))
        # Partial sums of sixteen latents in another order.
        np.testing.assert_allclose(spread(placed), expected(acts), rtol=1e-5, atol=1e-5)


def test_a_mesh_that_does_not_divide_the_latents_is_refused(tmp_path):
    save(random_crosscoder(num_latents=12), tmp_path)
    mesh = make_mesh(1, 8)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="num_latents=12 must be divisible by the 'latent'"),
    ):
        load(tmp_path, shardings=Shardings.for_mesh(mesh))


def test_the_folder_holds_two_files_and_the_provenance(saved):
    assert {path.name for path in saved.iterdir()} == FILES
    assert load_provenance(saved) == {"layer": 13}
    document = json.loads((saved / "config.json").read_text())
    assert document["format"] == "crosscoder_jax"
    assert document["format_version"] == publishing.FORMAT_VERSION


def test_saving_again_replaces_the_old_crosscoder(saved):
    other = random_crosscoder(1, num_latents=24)
    assert_same(load(save(other, saved)), other)
    assert load_provenance(saved) == {}


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", '{"train": {}}'), ("notes.txt", "mine"), ("model.safetensors", "")]
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"holds {name} and no saved crosscoder to replace"):
        save(random_crosscoder(), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: content}


def test_what_was_put_beside_a_saved_crosscoder_stays_when_it_is_replaced(saved):
    (saved / "README.md").write_text("a card")
    save(random_crosscoder(1), saved)
    assert_same(load(saved), random_crosscoder(1))
    assert (saved / "README.md").read_text() == "a card"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"file: cannot be a folder"):
        save(random_crosscoder(), tmp_path / "file")


def test_the_same_crosscoder_gives_the_same_bytes(saved, tmp_path):
    again = save(load(saved), tmp_path / "again", provenance={"layer": 13})
    for name in ("config.json", "crosscoder.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, kept):
    path = saved / "crosscoder.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"crosscoder.safetensors: is not a whole safetensors file"):
        load(saved)


def test_a_flipped_bit_is_refused(saved):
    path = saved / "crosscoder.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"crosscoder.safetensors: holds other weights"):
        load(saved)


def test_the_config_of_another_crosscoder_is_refused(saved, tmp_path):
    # Same shapes: only the name of the weights tells them apart.
    other = save(random_crosscoder(1), tmp_path / "other")
    (saved / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"holds other weights than config.json beside it"):
        load(saved)


def snapshots_of_a_save(crosscoder, folder, copies, monkeypatch):
    """Save, and copy the folder as it is on the disk before and after every rename: what a kill leaves."""
    replace, taken = Path.replace, []

    def take():
        taken.append(shutil.copytree(folder, copies / str(len(taken))))

    def replace_between_copies(self, target):
        take()
        result = replace(self, target)
        take()
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replace_between_copies)
        save(crosscoder, folder)
    return taken


def test_a_save_stopped_at_any_moment_leaves_the_old_crosscoder_or_the_new(saved, tmp_path, monkeypatch):
    old, new, third = load(saved), random_crosscoder(1), random_crosscoder(2)
    copies = snapshots_of_a_save(new, saved, tmp_path, monkeypatch)
    # Three renames: the weights beside the old ones, the config, the weights in their place.
    found = [np.array_equal(load(copy).w_enc[...], new.w_enc[...]) for copy in copies]
    assert found == [False, False, False, True, True, True]
    for copy, is_new in zip(copies, found, strict=True):
        assert_same(load(copy), new if is_new else old)
        # What was stopped neither hinders the next save nor is lost when that one is stopped too.
        (tmp_path / "again").mkdir(exist_ok=True)
        for again in snapshots_of_a_save(third, copy, tmp_path / "again" / copy.name, monkeypatch):
            assert any(np.array_equal(load(again).w_enc[...], x.w_enc[...]) for x in (old, new, third))
        assert_same(load(copy), third)
        assert {path.name for path in copy.iterdir() if path.suffix != ".tmp"} == FILES


def test_a_first_save_that_is_stopped_leaves_nothing_to_load_or_all_of_it(tmp_path, monkeypatch):
    new = random_crosscoder(1)
    copies = snapshots_of_a_save(new, tmp_path / "new", tmp_path, monkeypatch)
    for copy in copies[:3]:
        with pytest.raises(ValueError, match=r"config.json: is missing"):
            load(copy)
    for copy in copies[3:]:
        assert_same(load(copy), new)


def test_what_a_stopped_save_left_is_put_in_place_only_if_it_is_whole_and_named(saved):
    before = load(saved)
    (saved / "crosscoder.safetensors.next").write_bytes(b"cut off")
    assert_same(load(saved), before)
    save(random_crosscoder(1), saved)
    assert_same(load(saved), random_crosscoder(1))


@pytest.mark.parametrize("provenance", [{"loss": float("nan")}, {"path": object()}])
def test_provenance_that_is_no_plain_data_is_refused_before_anything_is_written(saved, provenance):
    before = load(saved)
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        save(random_crosscoder(1), saved, provenance=provenance)
    assert_same(load(saved), before)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_missing_tensor_is_refused_by_name(saved, name):
    tensors = parse((saved / "crosscoder.safetensors").read_bytes())
    del tensors[name]
    replace_weights(saved, tensors)
    with pytest.raises(ValueError, match=f"crosscoder.safetensors: has no tensor '{name}'"):
        load(saved)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_tensor_of_another_shape_is_refused_by_name(saved, name):
    tensors = parse((saved / "crosscoder.safetensors").read_bytes())
    tensors[name] = np.zeros((1, *tensors[name].shape), np.float32)
    replace_weights(saved, tensors)
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,.*config.json beside it describes"):
        load(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, r"has format_version 2, this release reads 1: update"),
        ({"format_version": ...}, r"has format_version None"),
        ({"format": "dictionary_learning"}, "is not a crosscoder saved by this package"),
        ({"crosscoder": ...}, "has no 'crosscoder'"),
        ({"weights_sha256": ...}, "has no 'weights_sha256'"),
        ({"crosscoder": {"num_latent": 3}}, r"crosscoder has no field 'num_latent': did you mean"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_file(saved, changes, message):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=rf"config.json: {message}"):
        load(saved)


@pytest.mark.parametrize("text", ["[]", "{", "null"])
def test_a_config_that_is_no_object_is_refused_by_file(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: is not"):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "crosscoder.safetensors"])
def test_a_missing_file_is_refused_by_name(saved, name):
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: is missing"):
        load(saved)
