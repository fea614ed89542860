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
    assert made.delta == cc.DeltaLoss(2.0, "base", "chat")
    assert made.matryoshka == cc.Matryoshka((0.25, 1.0))
    assert (recipe().delta, recipe().matryoshka, recipe().loss) == (None, None, cc.ErrorNorm())


LAYERS = cc.Sources(tuple(cc.Source(name, 6) for name in ("base.L1", "base.L2", "chat.L1", "chat.L2")))


def recipe_of_layers(**options):
    return Train(Path("store"), Path("run"), num_latents=64, k=4.0, **options).recipe(LAYERS)


def test_the_loss_on_the_difference_is_of_the_sources_that_are_named():
    named = recipe_of_layers(delta_weight=2.0, delta_sources=("base.L2", "chat.L2"))
    assert named.delta == cc.DeltaLoss(2.0, "base.L2", "chat.L2")
    read = recipe_of_layers(delta_weight=2.0, sources=("base.L1", "chat.L1"))
    assert read.delta == cc.DeltaLoss(2.0, "base.L1", "chat.L1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"delta_weight=2.0 is of .* two sources, and \('base.L1', .* name two with --delta-sources",
        ),
        ({"delta_sources": ("base.L1", "mid")}, r"delta_sources=\('base.L1', 'mid'\) must be two of \('base"),
        ({"delta_sources": ("base.L1", "base.L1")}, r"delta_sources=.* must be two of"),
        (
            {"sources": ("base.L1", "chat.L1"), "reads": "delta"},
            r"delta_weight=2.0 with reads='delta' of \('base.L1', 'difference'\).* leave it out, or take",
        ),
        (
            {"sources": ("base.L1", "chat.L1"), "reads": "difference"},
            r"delta_weight=2.0 with reads='difference' of \('difference',\)",
        ),
        ({"sources": ("base.L1",)}, r"delta_weight=2.0 with reads='all' of \('base.L1',\)"),
        (
            {"delta_weight": 0.0, "delta_sources": ("base.L1", "chat.L1")},
            "delta_sources=.* are of the loss on their difference: give --delta-weight",
        ),
    ],
)
def test_a_loss_on_no_difference_of_two_models_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe_of_layers(**({"delta_weight": 2.0} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta_weight": -1.0}, "delta_weight=-1.0 weighs a loss: it must be finite and not negative"),
        ({"aux_k_weight": -1.0}, "aux_k_weight=-1.0 weighs a loss"),
        ({"l1": -1.0}, "l1=-1.0 weighs a loss"),
        ({"k": -1.0, "sparsity": "jump-relu"}, "k=-1.0 must be positive and finite"),
        ({"dedicated": 0.25, "dedicated_k": 0.5, "sparsity": "top-k"}, "dedicated_k=0.5 must be whole with"),
        (
            {"dedicated": 0.25, "dedicated_k": 1.0, "sparsity": "jump-relu"},
            "dedicated_k=1.0 with sparsity='jump-relu': only what ranks latents keeps to a k: leave it out",
        ),
        ({"dedicated": 0.25, "dedicated_k": 1.0, "l1": 0.1}, "dedicated_k=1.0 with l1=0.1: only what ranks"),
        ({"dedicated": 0.25, "dedicated_k": 0.0}, "dedicated_k=0.0 must be positive and finite"),
        # An eighth of 64 latents is 8 of each source.
        (
            {"dedicated": 0.125, "dedicated_k": 9.0},
            "dedicated_k=9.0 is more than the 8 latents of dedicated=0.125 of num_latents=64: take fewer, or",
        ),
        (
            {"dedicated": 0.6},
            r"dedicated=0.6 for each of \('base', 'chat'\) and tied=0.0 are shares of 1.2 .* take 0.5",
        ),
        (
            {"dedicated": 0.25, "tied": 0.75},
            r"and tied=0.75 are shares of 1.25 together, .* take 0.125 or less",
        ),
        ({"dedicated": -0.1}, "dedicated=-0.1 is a share of the latents: it must lie between 0 and 1"),
        ({"tied": 1.5}, "tied=1.5 is a share of the latents"),
        ({"tied": 0.001}, "tied=0.001 of num_latents=64 is no latent: take 0.016 or more"),
        ({"tied": 0.5, "tied_cost": 0.0}, "tied_cost=0.0 must be positive and finite"),
        ({"tied": 0.5, "reads": "delta"}, "tied=0.5 with reads='delta': one decoder for base and for the"),
        ({"reads": "delta", "is_parted": True, "dedicated": 1.0}, "dedicated=1.0 with --is-parted leaves no"),
        ({"reads": "difference", "dedicated": 0.1}, "dedicated=0.1 tells sources apart, and 'difference' is"),
        (
            {"reads": "difference", "tied": 0.1},
            "tied=0.1 tells sources apart, and 'difference' is read alone",
        ),
        ({"sources": ("base",), "tied": 0.1}, "tied=0.1 tells sources apart, and 'base' is read alone"),
        ({"nested": (0.5,)}, r"nested=\(0.5,\): shares=\(0.5,\) must be positive and ascend to 1, such as"),
        ({"nested": (0.001, 1.0)}, r"nested=\(0.001, 1.0\): .* of num_latents=64 are prefixes of \(0, 64\)"),
        (
            {"nested": (0.5, 1.0), "dedicated": 0.25},
            r"nested=\(0.5, 1.0\) with dedicated=0.25, tied=0.0: lat",
        ),
        (
            {"nested": (0.5, 1.0), "tied": 0.25},
            r"nested=.* tied=0.25: .* come first, .* leave one or the other",
        ),
        (
            {"nested": (0.5, 1.0), "reads": "delta", "dedicated": 0.25, "is_parted": True},
            r"nested=.* with dedicated=0.25",
        ),
    ],
)
def test_options_that_make_no_recipe_are_refused_by_their_names(options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**options)


def test_shares_may_take_all_latents_and_budgets_all_of_a_share():
    made = recipe(dedicated=0.5, dedicated_k=32.0).crosscoder
    assert (made.layout.sizes, [group.k for group in made.groups]) == ((32, 32), [32.0, 32.0])


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
