"""The methods that the options of ``train`` name."""

from pathlib import Path

import pytest

import crosscoder_jax as cc
from crosscoder_jax.commands import Plan, Train

STORED = cc.Sources((cc.Source("base", 6), cc.Source("chat", 6)))


def recipe(**options):
    return Train(
        Path("store"), Path("run"), **({"num_latents": 64, "k": 4.0, "warmup_steps": 10} | options)
    ).recipe(STORED)


def test_the_delta_basis_is_base_and_the_change():
    sources = recipe(reads="delta").crosscoder.sources
    assert sources.names == ("base", "difference")
    assert sources.entries[1].combination == (("chat", 1.0), ("base", -1.0))


def test_a_delta_basis_needs_two_sources():
    three = cc.Sources((*STORED.entries, cc.Source("third", 6)))
    with pytest.raises(ValueError, match="reads='delta' needs two stored sources, not"):
        Train(Path("store"), Path("run"), reads="delta").recipe(three)


@pytest.mark.parametrize(
    ("sparsity", "expected", "l0"),
    [
        ("batch-top-k", cc.BatchTopK(4.0), None),
        ("top-k", cc.TopK(4), None),
        ("jump-relu", cc.JumpReLU(), cc.L0Penalty(1.0, target=4.0, warmup_steps=10)),
    ],
)
def test_every_sparsity_has_a_name(sparsity, expected, l0):
    made = recipe(sparsity=sparsity)
    assert made.crosscoder.sparsity == expected
    assert made.l0 == l0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "top-k", "k": 2.5}, "k=2.5 must be whole with sparsity='top-k'"),
        ({"sparsity": "gated"}, "sparsity='gated' is made sparse by an L1 penalty on its gates: give l1"),
        ({"sparsity": "top-k", "l1": 0.1}, "sparsity='top-k' and l1=0.1 do not go together"),
    ],
)
def test_sparsities_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_shares_of_the_latents_become_groups_the_tied_ones_first():
    groups = recipe(tied=0.5, tied_cost=0.2, dedicated=0.125).crosscoder.groups
    assert [(g.name, g.share, g.reads, g.writes, g.is_tied, g.cost) for g in groups] == [
        ("tied", 0.5, None, None, True, 0.2),
        ("base-dedicated", 0.125, None, ("base",), False, 1.0),
        ("chat-dedicated", 0.125, None, ("chat",), False, 1.0),
    ]
    alone = recipe(dedicated=0.125, is_encoder_dedicated=True).crosscoder.groups
    assert [g.reads for g in alone] == [("base",), ("chat",)]
    assert recipe().crosscoder.groups == ()


def test_losses_beside_the_reconstruction():
    made = recipe(delta_weight=2.0, source_weights=(1.0, 3.0), nested=(0.25, 1.0), loss="squared")
    assert made.loss == cc.SquaredError((1.0, 3.0))
    assert made.delta == cc.DeltaLoss(2.0)
    assert made.matryoshka == cc.Matryoshka((0.25, 1.0))
    assert (recipe().delta, recipe().matryoshka, recipe().loss) == (None, None, cc.ErrorNorm())


def test_in_the_delta_basis_latents_are_dedicated_to_the_change():
    (group,) = recipe(reads="delta", dedicated=0.25).crosscoder.groups
    assert (group.name, group.share, group.writes) == ("difference-dedicated", 0.25, ("difference",))


def test_in_the_delta_basis_all_others_can_be_left_to_what_is_shared():
    change, shared = recipe(
        reads="delta", dedicated=0.25, is_encoder_dedicated=True, dedicated_k=3.0, is_parted=True
    ).crosscoder.groups
    assert (change.writes, change.reads, change.k) == (("difference",), ("difference",), 3.0)
    assert (shared.name, shared.share, shared.writes, shared.reads) == ("shared", 0.75, ("base",), None)
    for options in (
        {"dedicated": 0.25},
        {"reads": "delta"},
        {"reads": "delta", "dedicated": 0.25, "tied": 0.5},
    ):
        with pytest.raises(ValueError, match="is_parted with reads="):
            recipe(is_parted=True, **options)


def test_dedicated_latents_can_have_a_budget_of_their_own():
    made = recipe(dedicated=0.125, dedicated_k=0.5)
    assert [group.k for group in made.crosscoder.groups] == [0.5, 0.5]
    assert made.crosscoder.threshold_names == ("free", "base-dedicated", "chat-dedicated")


def test_a_run_begins_with_the_crosscoder_of_a_run_or_of_a_folder(tmp_path):
    (tmp_path / "run" / "crosscoder").mkdir(parents=True)
    of_run = recipe(start_from=tmp_path / "run", start_sources=("chat",), is_start_frozen=True).start
    assert of_run == cc.WarmStart(str(tmp_path / "run" / "crosscoder"), ("chat",), True)
    assert recipe(start_from=tmp_path / "saved").start == cc.WarmStart(str(tmp_path / "saved"))
    assert recipe(frozen=("w_enc",)).frozen == ("w_enc",)


@pytest.mark.parametrize("options", [{"start_sources": ("chat",)}, {"is_start_frozen": True}], ids=str)
def test_how_to_begin_needs_what_to_begin_with(options):
    with pytest.raises(
        ValueError, match="start_sources and is_start_frozen say how to begin: give start_from"
    ):
        recipe(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dedicated_k": 0.5}, "dedicated_k and is_encoder_dedicated are of dedicated latents"),
        ({"is_encoder_dedicated": True}, "are of dedicated latents: give dedicated"),
        ({"tied_cost": 0.2}, "tied_cost=0.2 is of tied latents: give tied"),
    ],
)
def test_settings_of_groups_that_are_not_there_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_what_saves_memory_reaches_the_recipe_and_the_plan():
    given = {
        "first_moment": "bfloat16",
        "second_moment": "factored",
        "micro_batches": 4,
        "is_rematerialized": True,
        "pre_acts": "bfloat16",
    }
    plan = Plan(topology="cpu:8", sources="6,6", is_optimizer_spread=True, **given).config()
    for made in (recipe(**given), plan.recipe()):
        assert made.optimizer == cc.Adam(first_moment="bfloat16", second_moment="factored")
        assert (made.micro_batches, made.is_rematerialized, made.pre_acts) == (4, True, "bfloat16")
    assert plan.is_optimizer_spread


def test_muon_reaches_the_recipe_and_the_plan_and_has_no_second_moment_to_factor():
    plan = Plan(topology="cpu:8", sources="6,6", optimizer="muon", first_moment="bfloat16").config()
    for made in (recipe(optimizer="muon", first_moment="bfloat16"), plan.recipe()):
        assert made.optimizer == cc.Muon(first_moment="bfloat16")
    with pytest.raises(ValueError, match="second_moment='factored' with optimizer='muon'"):
        recipe(optimizer="muon", second_moment="factored")
