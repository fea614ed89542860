"""One contract for every format of another library, and how a format is recognised."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core_cases import random_crosscoder, two_sources
from interop_cases import (
    CROSSCODERS,
    edit_tensors,
    needs_torch,
    over,
    read_tensors,
    without_normalizer,
    write_tensors,
)

import crosscoder_jax as cc
from crosscoder_jax.interop import FORMATS, load_provenance, locate

over_all_formats = over(FORMATS.values())

OPTIONAL = {
    "activation_mean",
    "activation_std",
    "code_normalization_id",
    "is_folded",
    "b_enc_L",
    "_b_dec_XoDo",
}
"""Tensors that files are known to lack."""
UNREAD = {
    *("target_rms", "activation_std", "folded_scaling_factors_in_Xi", "folded_scaling_factors_out_Xo"),
    *(f"dataset_average_activation_norm.{name}" for name in ("base", "chat")),
}
"""Tensors that are only there for the library whose format it is."""


def saved(known, folder, crosscoder=None):
    """A folder in this format, and its file of tensors."""
    cc.save(crosscoder or CROSSCODERS[known.name](), folder, format=known.name)
    return folder / known.files[0]


def acts_of(crosscoder, num_tokens=32):
    return jax.random.normal(jax.random.key(1), (num_tokens, crosscoder.config.sources.width))


def assert_same_function(again, crosscoder, atol):
    acts = acts_of(crosscoder)
    code = np.asarray(crosscoder.encode(acts))
    assert 0 < (code > 0).mean() < 1
    np.testing.assert_allclose(again.encode(acts), code, rtol=0, atol=atol)
    np.testing.assert_allclose(again(acts), crosscoder(acts), rtol=0, atol=atol)


def test_a_file_of_another_library_goes_to_a_mesh(tmp_path):
    crosscoder = random_crosscoder()
    path = saved(FORMATS["dictionary_learning"], tmp_path, crosscoder)
    mesh = cc.make_mesh(2, 4)
    with jax.set_mesh(mesh):
        spread = cc.load(path, sources=crosscoder.config.sources, shardings=cc.Shardings.for_mesh(mesh))
    assert spread.w_dec[...].addressable_shards[0].data.shape == (4, 6)  # 16 latents over 4 devices
    alone = cc.load(path, sources=crosscoder.config.sources)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "mean", "scale", "threshold"):
        np.testing.assert_array_equal(getattr(spread, name)[...], getattr(alone, name)[...])


def test_every_format_has_a_crosscoder_to_test_it():
    assert set(CROSSCODERS) == set(FORMATS)


@over_all_formats
def test_what_is_saved_comes_back_to_float32_rounding(known, tmp_path):
    crosscoder = CROSSCODERS[known.name]()
    saved(known, tmp_path, crosscoder)
    again = cc.load(tmp_path)
    assert again.config.sparsity == crosscoder.config.sparsity
    assert again.config.num_latents == crosscoder.config.num_latents
    # Sums of at most 16 terms below 60, each rounded to 6e-8 of itself: 16 * 60 * 6e-8.
    assert_same_function(again, crosscoder, atol=6e-5)


@over_all_formats
def test_without_a_normaliser_every_bit_comes_back(known, tmp_path):
    crosscoder = without_normalizer(CROSSCODERS[known.name]())
    if known.name == "sparsify":
        # Its bias is taken off the input: it has none of its own on the output.
        crosscoder.b_dec[...] = jnp.zeros_like(crosscoder.b_dec[...])
    saved(known, tmp_path, crosscoder)
    assert_same_function(cc.load(tmp_path), crosscoder, atol=0)


@over_all_formats
def test_saving_again_replaces_the_old_crosscoder(known, tmp_path):
    saved(known, tmp_path)
    known_config = CROSSCODERS[known.name]().config
    rules = {"sparsity": known_config.sparsity, "code_norm": known_config.code_norm}
    other = random_crosscoder(5, threshold=0.5, sources=known_config.sources, **rules)
    if isinstance(known_config.sparsity, cc.ReLU):
        other.threshold[...] = jnp.zeros(())
    without_normalizer(other).b_dec[...] = jnp.zeros_like(other.b_dec[...])
    saved(known, tmp_path, other)
    assert_same_function(cc.load(tmp_path), other, atol=0)


@over_all_formats
@pytest.mark.parametrize("beside", ["config.json", "tokenizer.json"])
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(known, beside, tmp_path):
    # Beside a file of tensors a tokenizer tells that it is a language model's, a config alone is any run's.
    if beside == "tokenizer.json":
        (tmp_path / known.files[0]).write_text("weights")
    (tmp_path / beside).write_text("mine")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"already holds .*: choose another output folder"):
        saved(known, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_crosscoder_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be saved as 'openmoss'"):
        cc.save(random_crosscoder(sparsity=cc.BatchTopK(k=3)), tmp_path / "new" / "deep", format="openmoss")
    assert not (tmp_path / "new").exists()


@over_all_formats
def test_the_file_alone_is_recognised_too(known, tmp_path):
    path = saved(known, tmp_path)
    assert cc.load(path).config == cc.load(tmp_path).config


@over_all_formats
@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(known, kept, tmp_path):
    path = saved(known, tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path.name}: is not a whole (safetensors|torch) file"):
        cc.load(tmp_path)


@over_all_formats
def test_every_missing_tensor_is_named(known, tmp_path):
    path = saved(known, tmp_path)
    tensors = read_tensors(path)
    # Without k a file is one of ReLU, and whole.
    for name in {*tensors} - OPTIONAL - UNREAD - {"k"}:
        write_tensors(path, {key: value for key, value in tensors.items() if key != name})
        with pytest.raises(ValueError, match=rf"{path.name}: has no tensor '{name}': it holds"):
            cc.load(tmp_path)


@over_all_formats
def test_every_tensor_of_a_wrong_shape_is_named(known, tmp_path):
    path = saved(known, tmp_path)
    tensors = read_tensors(path)
    for name in {*tensors} - UNREAD:
        wrong = np.zeros((*tensors[name].shape[:-1], 3, 3), np.float32)
        write_tensors(path, tensors | {name: wrong})
        with pytest.raises(ValueError, match=rf"{path.name}: .*shape|{name} is"):
            cc.load(tmp_path)


@over_all_formats
def test_every_tensor_with_one_length_off_is_refused(known, tmp_path):
    path = saved(known, tmp_path)
    tensors = read_tensors(path)
    for name, value in tensors.items():
        if not value.ndim or name in UNREAD:
            continue
        write_tensors(path, tensors | {name: np.concatenate([value, value[..., :1]], axis=-1)})
        with pytest.raises(ValueError, match=rf"{path.name}: .* has shape .*, but .* makes \["):
            cc.load(tmp_path)


@over_all_formats
def test_weights_that_are_not_finite_are_refused_by_name(known, tmp_path):
    path = saved(known, tmp_path)
    tensors = read_tensors(path)
    name = next(name for name, value in tensors.items() if value.ndim > 1 and name not in OPTIONAL)
    broken = tensors[name].copy()
    broken.flat[3] = np.nan
    write_tensors(path, tensors | {name: broken})
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinity"):
        cc.load(tmp_path)


@over_all_formats
def test_half_precision_weights_are_read_as_float32(known, tmp_path):
    path = saved(known, tmp_path, without_normalizer(CROSSCODERS[known.name]()))
    tensors = read_tensors(path)
    for name in tensors:
        if tensors[name].ndim > 1 and name not in OPTIONAL | UNREAD:
            tensors[name] = tensors[name].astype(np.float16)
    write_tensors(path, tensors)
    again = cc.load(tmp_path)
    assert again.w_enc[...].dtype == np.float32
    # Ten bits of mantissa: 2^-11 of values below 5.
    np.testing.assert_allclose(
        again.w_enc[...], CROSSCODERS[known.name]().w_enc[...], rtol=0, atol=5 * 2**-11
    )


@over_all_formats
def test_sources_can_be_named_or_given_whole(known, tmp_path):
    crosscoder = CROSSCODERS[known.name]()
    saved(known, tmp_path, crosscoder)
    widths = crosscoder.config.sources.widths
    names = [f"model {i}" for i in range(len(widths))]
    assert list(cc.load(tmp_path, sources=names).config.sources.names) == names
    derived = cc.Sources(
        tuple(cc.Source(name, width, (("chat", 1.0),)) for name, width in zip(names, widths, strict=True))
    )
    assert cc.load(tmp_path, sources=derived).config.sources == derived
    with pytest.raises(ValueError, match=r"names 3, but the file holds"):
        cc.load(tmp_path, sources=("a", "b", "c"))
    with pytest.raises(ValueError, match=r"sources have the widths \(9,\), but the file holds"):
        cc.load(tmp_path, sources=cc.Sources((cc.Source("a", 9),)))


@over_all_formats
def test_nothing_is_written_of_a_crosscoder_that_is_refused(known, tmp_path):
    two_widths = cc.Sources((cc.Source("a", 2), cc.Source("b", 3)))
    rules = CROSSCODERS[known.name]().config
    crosscoder = random_crosscoder(sources=two_widths, sparsity=rules.sparsity, code_norm=rules.code_norm)
    with pytest.raises(ValueError, match=r"the sources have the widths|which has 1"):
        cc.save(crosscoder, tmp_path, format=known.name)
    assert not list(tmp_path.iterdir())


@over_all_formats
def test_provenance_is_kept_by_the_own_format_only(known, tmp_path):
    with pytest.raises(ValueError, match="provenance cannot be kept by"):
        cc.save(CROSSCODERS[known.name](), tmp_path, format=known.name, provenance={"layer": 13})


@over(known for known in FORMATS.values() if known.takes_scales)
def test_scales_are_taken_where_files_do_not_tell(known, tmp_path):
    crosscoder = without_normalizer(CROSSCODERS[known.name]())
    path = saved(known, tmp_path, crosscoder)
    num_sources = len(crosscoder.config.sources)
    if known.name == "saelens":
        config = json.loads((tmp_path / "cfg.json").read_text())
        (tmp_path / "cfg.json").write_text(json.dumps(config | {"normalize_activations": True}))
        with pytest.raises(ValueError, match=r"does not say by how much: give scales"):
            cc.load(tmp_path)
    if known.name == "crosscode":
        with pytest.raises(ValueError, match=r"has its scales folded into the weights: leave scales out"):
            cc.load(tmp_path, scales=[2.0, 3.0])
        edit_tensors(path, is_folded=np.array(False))
    again = cc.load(tmp_path, scales=[2.0, 3.0][:num_sources])
    np.testing.assert_array_equal(again.scale[...], [2.0, 3.0][:num_sources])
    for scales in ([2.0] * 3, [-1.0] * num_sources, [float("nan")] * num_sources):
        with pytest.raises(ValueError, match=rf"must be {num_sources} positive numbers"):
            cc.load(tmp_path, scales=scales)


@over(known for known in FORMATS.values() if not known.takes_scales)
def test_scales_are_refused_where_files_tell(known, tmp_path):
    saved(known, tmp_path)
    with pytest.raises(ValueError, match="tells how its inputs are scaled: leave scales out"):
        cc.load(tmp_path, scales=[1.0])


@over(FORMATS[name] for name in ("sparsify", "dfc"))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sparsity": cc.ReLU()},
            r"sparsity=ReLU\(\) cannot be saved as .* the k largest latents of each token",
        ),
        ({"sparsity": cc.TopK(k=3)}, r"code_norm=SumOfNorms\(\) .*: save crosscoder_jax.fold_normalization"),
    ],
)
def test_only_top_k_of_activations_as_they_are_is_saved_as_such(known, changes, message, tmp_path):
    sources = CROSSCODERS[known.name]().config.sources
    with pytest.raises(ValueError, match=message):
        cc.save(random_crosscoder(sources=sources, **changes), tmp_path, format=known.name)
    assert not list(tmp_path.iterdir())


@over(FORMATS[name] for name in ("sparsify", "dfc", "saelens"))
def test_a_folded_top_k_crosscoder_is_saved_and_comes_back(known, tmp_path):
    sources = CROSSCODERS[known.name]().config.sources
    crosscoder = random_crosscoder(sources=sources, sparsity=cc.TopK(k=3))
    folded = cc.fold_normalization(crosscoder)
    cc.save(folded, tmp_path, format=known.name)
    again = cc.load(tmp_path)
    assert again.config.sparsity == cc.TopK(k=3)
    acts = acts_of(crosscoder)
    # Codes below 300 after folding, rounded as in the round trip above.
    np.testing.assert_allclose(again.encode(acts), folded.encode(acts), rtol=1e-5, atol=3e-4)
    np.testing.assert_allclose(again(acts), crosscoder(acts), rtol=0, atol=3e-4)


@over(FORMATS[name] for name in ("kissane", "openmoss", "crosscode"))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": cc.BatchTopK(k=3)}, r"sparsity=BatchTopK\(k=3.* which keeps every positive latent"),
        ({"sparsity": cc.ReLU(), "threshold": 0.5}, r"threshold=0.5 cannot be saved as"),
    ],
)
def test_a_threshold_is_not_lost_in_a_format_without_one(known, changes, message, tmp_path):
    sources = CROSSCODERS[known.name]().config.sources
    with pytest.raises(ValueError, match=message):
        cc.save(random_crosscoder(sources=sources, **changes), tmp_path, format=known.name)


def test_our_own_format_is_loaded_by_the_same_function(tmp_path):
    crosscoder = random_crosscoder(threshold=1 / 3, sources=two_sources(2, 5))
    cc.save(crosscoder, tmp_path, provenance={"layer": 13})
    assert_same_function(cc.load(tmp_path), crosscoder, atol=0)
    assert cc.load(tmp_path / "crosscoder.safetensors").config == crosscoder.config
    assert cc.load(str(tmp_path), format="crosscoder_jax").config == crosscoder.config
    assert load_provenance(tmp_path) == {"layer": 13}
    with pytest.raises(ValueError, match="leave sources and scales out"):
        cc.load(tmp_path, sources=("a", "b"))


def test_an_incomplete_folder_of_ours_is_refused_as_ours(tmp_path):
    cc.save(random_crosscoder(), tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "lost")
    with pytest.raises(ValueError, match=r"config.json: is missing"):
        cc.load(tmp_path)
    (tmp_path / "lost").rename(tmp_path / "config.json")
    (tmp_path / "crosscoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"crosscoder.safetensors: is missing"):
        cc.load(tmp_path)


def test_other_formats_have_no_provenance(tmp_path):
    saved(FORMATS["dictionary_learning"], tmp_path)
    assert load_provenance(tmp_path) == {}


def test_unknown_tensors_are_refused_with_the_known_formats(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"lm_head.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"\(lm_head.weight, ...\) are of no known crosscoder: there are"):
        cc.load(tmp_path)


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    saved(FORMATS["dictionary_learning"], tmp_path)
    message = "format='sae' is unknown: there are crosscoder_jax, dictionary_learning, "
    with pytest.raises(ValueError, match=message):
        cc.load(tmp_path, format="sae")
    with pytest.raises(ValueError, match=message):
        cc.save(random_crosscoder(), tmp_path, format="sae")


def test_a_format_that_was_asked_for_is_not_replaced_by_another(tmp_path):
    path = saved(FORMATS["dictionary_learning"], tmp_path)
    with pytest.raises(ValueError, match="holds no file of a crosscoder"):
        cc.load(tmp_path, format="kissane")
    with pytest.raises(ValueError, match="has no tensor 'W_enc'"):
        cc.load(path, format="kissane")


def test_a_folder_with_two_crosscoders_asks_which(tmp_path):
    saved(FORMATS["dictionary_learning"], tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "sae.safetensors")
    with pytest.raises(ValueError, match=r"holds model.safetensors, sae.safetensors: name the file"):
        cc.load(tmp_path)
    assert (
        cc.load(tmp_path / "sae.safetensors").config == cc.load(tmp_path, format="dictionary_learning").config
    )


def test_a_folder_without_one_says_what_lies_nearby(tmp_path):
    with pytest.raises(ValueError, match=r"holds no file of a crosscoder$"):
        cc.load(tmp_path)
    saved(FORMATS["openmoss"], tmp_path / "layer 3")
    with pytest.raises(ValueError, match=r"but the folder layer 3 inside it may"):
        cc.load(tmp_path)
    (tmp_path / "checkpoint_40.pt").touch()
    with pytest.raises(ValueError, match=r"name the file to load, such as .*checkpoint_40.pt"):
        cc.load(tmp_path)


def test_a_path_that_is_neither_local_nor_a_repository_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no such file or folder, nor is it a Hub repository"):
        cc.load(tmp_path / "missing")
    assert locate(tmp_path) == tmp_path


@needs_torch
def test_a_torch_file_with_more_than_tensors_is_refused(tmp_path):
    import torch

    torch.save({"encoder.weight": torch.zeros(2, 3, 4), "optimizer": [1, 2]}, tmp_path / "model_final.pt")
    with pytest.raises(ValueError, match=r"model_final.pt: 'optimizer' is no tensor"):
        cc.load(tmp_path)


@pytest.mark.skipif(needs_torch.args[0] is False, reason="torch is installed: nothing to ask for")
def test_without_torch_the_extra_that_brings_it_is_named(tmp_path):
    (tmp_path / "model_final.pt").touch()
    with pytest.raises(ModuleNotFoundError, match=r"needs torch: pip install 'crosscoder-jax\[lm\]'"):
        cc.load(tmp_path)
