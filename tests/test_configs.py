"""Configs as plain data and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from core_cases import config, two_sources

import crosscoder_jax as cc
from crosscoder_jax.configs import config_differences, config_from_json, config_to_json, value_from_json
from crosscoder_jax.objectives import AuxK, ErrorNorm, L1OfNorms, SquaredError
from crosscoder_jax.sparsity import Unweighted


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    """A field of every kind that a config may have."""

    name: str
    rate: float = 0.5
    is_on: bool = False
    where: Path = Path("runs")
    mode: Literal["fast", "exact"] = "fast"
    inner: Inner = Inner()
    maybe: Inner | None = None
    limit: float | None = None
    place: Path | int = 0
    layers: tuple[int, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)
    many: tuple[Inner, ...] = ()
    table: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def through_json(value):
    return config_from_json(type(value), json.loads(json.dumps(config_to_json(value))))


FULL = Outer(
    name="full",
    rate=1e-300,
    is_on=True,
    where=Path("a/b"),
    mode="exact",
    inner=Inner(1),
    maybe=Inner(2),
    limit=0.1,
    place=Path("x"),
    layers=(1, 2, 3),
    pair=("b", 2.0),
    many=(Inner(4), Inner(5)),
    table={"a": [1, {"b": None}]},
)


@pytest.mark.parametrize("value", [Outer("default"), FULL], ids=["defaults", "everything set"])
def test_every_kind_of_field_comes_back(value):
    assert through_json(value) == value


@pytest.mark.parametrize(
    "value",
    [
        config(),
        config(sparsity=cc.ReLU(), code_norm=Unweighted(), dtype="bfloat16", precision="high"),
        config(sparsity=cc.BatchTopK(k=2.5, initial_k=7, anneal_steps=3)),
        config(cc.Sources((cc.Source("base", 3), cc.Source("d", 3, (("chat", 1.0), ("base", -1.0)))))),
    ],
)
def test_crosscoder_configs_come_back(value):
    assert through_json(value) == value


@pytest.mark.parametrize("loss", [ErrorNorm(), SquaredError()])
@pytest.mark.parametrize("aux_k", [None, AuxK(k_aux=3), AuxK()])
@pytest.mark.parametrize(
    ("sparsity", "l1"), [(cc.BatchTopK(k=3), None), (cc.ReLU(), L1OfNorms(0.04, warmup_steps=5))]
)
def test_recipes_with_every_alternative_come_back(loss, l1, aux_k, sparsity):
    recipe = cc.TrainConfig(
        config(sparsity=sparsity), num_steps=10, warmup_steps=2, loss=loss, l1=l1, aux_k=aux_k, clip_norm=None
    )
    assert through_json(recipe) == recipe


def test_a_member_of_a_union_says_which_one_it_is():
    assert config_to_json(config(sparsity=cc.ReLU()))["sparsity"] == {"type": "ReLU"}


def test_fields_left_out_take_their_defaults():
    assert config_from_json(Outer, {"name": "x"}) == Outer("x")


def test_whole_numbers_serve_as_floats():
    read = config_from_json(Outer, {"name": "x", "rate": 2, "limit": 3})
    assert (read.rate, read.limit) == (2.0, 3.0)
    assert isinstance(read.rate, float)
    assert isinstance(read.limit, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nmae": "x"}, "config has no field 'nmae': did you mean 'name'\\?"),
        ({"name": "x", "zzz": 1}, "config has no field 'zzz': it has name, rate"),
        ({"name": "x", "inner": {"sise": 1}}, r"config.inner has no field 'sise': did you mean 'size'\?"),
        ({"name": "x", "many": [{"size": 1}, {"siz": 1}]}, r"config.many\[1\] has no field 'siz'"),
        ({}, "config lacks the field 'name' of Outer"),
        ({"name": 3}, "config.name=3 must be a str"),
        ({"name": None}, "config.name=None must be a str"),
        ({"name": "x", "rate": "fast"}, "config.rate='fast' must be a float"),
        ({"name": "x", "rate": True}, "config.rate=True must be a float"),
        ({"name": "x", "is_on": 1}, "config.is_on=1 must be a bool"),
        ({"name": "x", "mode": "slow"}, "config.mode='slow' must be one of 'fast', 'exact'"),
        ({"name": "x", "inner": None}, "config.inner is None, but Inner needs named fields"),
        ({"name": "x", "inner": {"type": "Outer"}}, "config.inner.type='Outer' must be 'Inner'"),
        ({"name": "x", "maybe": {"type": "Other"}}, "config.maybe.type='Other' must be one of Inner"),
        ({"name": "x", "maybe": 3}, "config.maybe=3 must be one of Inner"),
        ({"name": "x", "limit": "low"}, "config.limit='low' must be a float"),
        ({"name": "x", "layers": 3}, "config.layers=3 must be a list"),
        ({"name": "x", "layers": [1, "2"]}, r"config.layers\[1\]='2' must be a int"),
        ({"name": "x", "layers": [True]}, r"config.layers\[0\]=True must be a int"),
        ({"name": "x", "layers": [1.5]}, r"config.layers\[0\]=1.5 must be a int"),
        ({"name": "x", "pair": ["a"]}, "must have 2 entries"),
        ([], r"config is \[\], but Outer needs named fields"),
        ({"type": "Inner", "name": "x"}, "config.type='Inner' must be 'Outer'"),
    ],
)
def test_wrong_data_are_refused_by_field(data, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(Outer, data)


def test_a_union_of_several_refuses_data_that_do_not_say_which():
    data = config_to_json(config())
    del data["sparsity"]["type"]
    with pytest.raises(ValueError, match=r"config.sparsity.type=None must be one of BatchTopK, "):
        config_from_json(cc.CrosscoderConfig, data)


def test_a_typo_in_a_nested_recipe_names_the_nearest_field():
    data = config_to_json(cc.TrainConfig(config(sparsity=cc.BatchTopK(k=4)), num_steps=2000))
    data["crosscoder"]["num_latent"] = data["crosscoder"].pop("num_latents")
    message = r"config.crosscoder has no field 'num_latent': did you mean 'num_latents'\?"
    with pytest.raises(ValueError, match=message):
        config_from_json(cc.TrainConfig, data)


def test_values_are_validated_as_if_given_in_code():
    data = config_to_json(config())
    data["sparsity"]["k"] = -1
    with pytest.raises(ValueError, match=r"k=-1.0 must be positive"):
        config_from_json(cc.CrosscoderConfig, data)


def test_errors_say_where_the_data_came_from():
    data = {"sources": config_to_json(two_sources()), "num_latents": 3, "dtype": 3}
    with pytest.raises(ValueError, match=r"^run/config.json: crosscoder.dtype=3 must be a str"):
        config_from_json(cc.CrosscoderConfig, data, where="run/config.json: crosscoder")


@pytest.mark.parametrize("value", [cc.BatchTopK(3.0), cc.ReLU(), None])
def test_a_value_of_a_union_reads_back_by_itself(value):
    assert value_from_json(cc.BatchTopK | cc.ReLU | None, config_to_json(value), where="x") == value


def test_a_value_of_no_member_of_the_union_is_refused_by_its_place():
    with pytest.raises(ValueError, match=r"^config.json: null.type='Gate' must be one of BatchTopK, ReLU"):
        value_from_json(cc.BatchTopK | cc.ReLU | None, {"type": "Gate"}, where="config.json: null")


def test_differences_are_listed_by_field():
    mine, theirs = config_to_json(FULL), config_to_json(dataclasses.replace(FULL, rate=2.0, inner=Inner(9)))
    assert config_differences(mine, theirs) == ["rate: 1e-300, was 2.0", "inner.size: 1, was 9"]
    assert config_differences(mine, mine) == []
    assert config_differences({"a": 1}, {"b": 2}) == ["a: 1, was None", "b: None, was 2"]
