"""What the report says, against tables made by hand."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the report draws with plotly: install the extra 'report'")

from report_cases import make_run

from crosscoder_jax.configs import config_to_json
from crosscoder_jax.objectives import DeltaLoss
from crosscoder_jax.report import comparison, content, plots, tables, wording
from crosscoder_jax.report.cards import (
    CardLimits,
    build_card,
    build_snippet,
    card_groups,
    top_tokens,
)
from crosscoder_jax.report.choice import choose_concentrated
from crosscoder_jax.report.config import ReportConfig
from crosscoder_jax.report.files import LatentTable, RunFiles, read_run
from crosscoder_jax.report.numbers import Figure
from crosscoder_jax.report.recipe import recipe_rows
from crosscoder_jax.report.tables import class_row, class_rows, latent_rows, method_rows

TOKENS_BY_TEXT = [("novel", "8,020"), ("conversation", "13,100"), ("speeches", "9,091")]
LIMITS = CardLimits(num_cards=4, tokens_before=2, tokens_after=1)


def files_of(columns: dict, **parts) -> RunFiles:
    """Make the files of a run around a small table."""
    arrays = {k: np.array(v, dtype=object if isinstance(v[0], str) else float) for k, v in columns.items()}
    arrays.setdefault("latent", np.arange(len(next(iter(arrays.values()))), dtype=float))
    defaults = {
        "config": {},
        "metrics": (),
        "evaluation": None,
        "summary": {},
        "snippets": None,
        "provenance": {},
    }
    return RunFiles(folder=Path("run"), latents=LatentTable(arrays), **(defaults | parts))


def crosscoder_of(classes: list[str], verdicts: list[str], **columns) -> content.Method:
    """Make a crosscoder with these classes and verdicts."""
    return content.build_method(files_of({"latent_class": classes, "verdict": verdicts, **columns}), 0)


MIXED = crosscoder_of(
    ["chat-only"] * 6 + ["base-only"] + ["shared"] * 2 + ["other", "dead"],
    [
        "confirmed",
        "confirmed",
        "complete shrinkage",
        "latent decoupling",
        "undetermined",
        "",
        "confirmed",
        "",
        "",
        "",
        "",
    ],
    delta_norm=[0.95, 0.92, 0.91, 0.99, 0.97, 0.93, 0.04, 0.5, 0.55, 0.7, np.nan],
    energy=[1, 9, 50, 3, 4, 5, 6, 7, 8, 9, 0],
)


def test_counts_by_class_and_verdict():
    assert MIXED.class_counts == {"base-only": 1, "shared": 2, "chat-only": 6, "other": 1, "dead": 1}
    found = MIXED.all_found()
    # An empty verdict on a claimed latent is a test that was not made; on a shared one it is nothing.
    assert (found.claimed, found.confirmed, found.refuted, found.undetermined, found.untested) == (
        7,
        3,
        2,
        1,
        1,
    )
    assert MIXED.found["chat-only"].confirmed == 2
    assert found.beyond is None  # the table does not tell
    row = class_row(MIXED, "chat-only")
    assert row.claimed == sum(part.number for part in row.segments) == 6
    assert sum(part.percent for part in row.segments) == pytest.approx(100, abs=0.05)
    assert row.confirmed.text == "2"


def test_counts_of_a_null_run_stand_beside_those_of_the_run():
    columns = {"latent_class": ["chat-only", "shared"], "verdict": ["confirmed", ""]}
    null = {"run": "n", "kind": {"type": "SwapDocuments"}, "counts": {"chat-only": 5, "base-only": 1200}}
    confirmed = {"confirmed_by_class": {"chat-only": 2, "base-only": 0}}
    for more, expected in ((confirmed, ("2", "0")), ({}, ("n/a", "n/a"))):
        method = content.build_method(files_of(columns, summary={"null": null | more}), 0)
        rows = [class_row(method, name) for name in ("chat-only", "base-only")]
        assert [row.null_claimed.text for row in rows] == ["5", "1,200"]
        assert tuple(row.null_confirmed.text for row in rows) == expected
    assert class_row(MIXED, "chat-only").null_claimed == Figure("n/a", "diffed without a null run")


def test_conclusion_with_claims():
    assert wording.headline([MIXED]) == (
        "Of 7 latents claimed for one model only, Latent Scaling confirms 3, refutes 2 as artefacts, leaves "
        "1 "
        "undetermined and did not test 1."
    )
    assert wording.conclusion([MIXED]) == (
        "Of 11 latents, the decoder-norm histogram alone claims 6 as chat-only and 1 as base-only. "
        "Latent Scaling confirms 3 of them; it refutes 2 (1 looks like complete shrinkage and 1 looks like "
        "latent decoupling), 1 has too little evidence to tell and 1 was not tested.",
    )


def test_conclusion_without_claims_says_so():
    method = crosscoder_of(["shared", "other", "dead"], ["", "", ""], delta_norm=[0.5, 0.72, np.nan])
    assert wording.headline([method]) == "Decoder norms claim no latent for one model only."
    text = wording.conclusion([method])[0]
    assert "claims none as chat-only and none as base-only" in text
    assert "runs from 0.50 to 0.72" in text
    assert class_row(method, "chat-only").confirmed.text == "0"


C, R, U = "confirmed", "latent decoupling", "undetermined"


@pytest.mark.parametrize(
    ("verdicts", "is_beyond", "headline", "sentence"),
    [
        (
            [C],
            None,
            "The one latent claimed for one model only is confirmed by Latent Scaling.",
            "Latent Scaling confirms it.",
        ),
        (
            [C],
            [1],
            "The one latent claimed for one model only is confirmed by Latent Scaling, beyond the 95 % "
            "interval.",
            "Latent Scaling confirms it.",
        ),
        (
            [C],
            [0],
            "The one latent claimed for one model only is confirmed by Latent Scaling, though not beyond the "
            "95 % interval.",
            "Latent Scaling confirms it.",
        ),
        (
            [R],
            [1],
            "The one latent claimed for one model only is refuted by Latent Scaling as an artefact.",
            "Latent Scaling confirms none of them; it refutes 1 (1 looks like latent decoupling).",
        ),
        (
            [U],
            [0],
            "The one latent claimed for one model only is undetermined: there is too little evidence to test "
            "it.",
            "Latent Scaling confirms none of them; 1 has too little evidence to tell.",
        ),
        (
            [C, C],
            [1, 1],
            "Of 2 latents claimed for one model only, Latent Scaling confirms all 2 (all of them beyond the "
            "95 % interval).",
            "confirms all 2 (all of them beyond the 95 % interval).",
        ),
        (
            [C, C, C, U],
            [1, 0, 1, 0],
            "Of 4 latents claimed for one model only, Latent Scaling confirms 3 (2 of them beyond the 95 % "
            "interval) and leaves 1 undetermined.",
            "confirms 3 of them (2 of them beyond the 95 % interval); 1 has too little evidence to tell.",
        ),
        (
            [C, R, R, U],
            [0, 1, 1, 0],
            "Of 4 latents claimed for one model only, Latent Scaling confirms 1 (not beyond the 95 % "
            "interval), refutes 2 as artefacts and leaves 1 undetermined.",
            "it refutes 2 (2 look like latent decoupling) and 1 has too little evidence to tell.",
        ),
        (
            [U] * 3,
            None,
            "Of 3 latents claimed for one model only, Latent Scaling confirms none and leaves 3 "
            "undetermined.",
            "confirms none of them; 3 have too little evidence to tell.",
        ),
        (
            ["shrinkage and decoupling", U],
            None,
            "Of 2 latents claimed for one model only, Latent Scaling confirms none, refutes 1 as an artefact "
            "and leaves 1 undetermined.",
            "it refutes 1 (1 looks like both) and 1 has too little evidence",
        ),
        (
            ["", ""],
            None,
            "Decoder norms claim 2 model-specific latents, none of them tested.",
            "was not run on them",
        ),
    ],
)
def test_the_three_outcomes_are_told_apart(verdicts, is_beyond, headline, sentence):
    more = {} if is_beyond is None else {"is_beyond_interval": is_beyond}
    method = crosscoder_of(["chat-only"] * len(verdicts), verdicts, **more)
    assert wording.headline([method]) == headline
    assert sentence in wording.conclusion([method])[0]


DESIGNED = crosscoder_of(
    ["chat-only"] * 3 + ["base-only"] * 2 + ["shared"],
    ["confirmed", "confirmed", "undetermined", "confirmed", "latent decoupling", ""],
    by_design=[0, 1, 1, 0, 1, 0],
    is_beyond_interval=[1, 1, 0, 0, 1, 0],
    energy=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
)


def test_what_is_exclusive_by_design_is_no_finding():
    assert wording.headline([DESIGNED]) == (
        "Of 2 latents claimed for one model only, Latent Scaling confirms all 2 (1 of them beyond the 95 % "
        "interval)."
    )
    assert wording.conclusion([DESIGNED])[0].endswith(
        "claims 1 as chat-only and 1 as base-only. Latent Scaling confirms all 2 (1 of them beyond the 95 % "
        "interval). Not counted: 3 latents that are exclusive by design, because a group of the recipe "
        "writes to "
        "one model only; of these Latent Scaling confirms 1 (beyond the 95 % interval), refutes 1 as "
        "an artefact and leaves 1 undetermined."
    )
    (row,) = method_rows([DESIGNED])
    numbers = [f.text for f in (row.claimed, row.confirmed, row.refuted, row.undetermined)]
    assert numbers == ["2", "2", "0", "0"]
    assert row.confirmed.reason == "1 beyond the interval"
    rows = [(row.latent_class, row.is_by_design, row.claimed) for row in class_rows([DESIGNED])]
    assert rows == [
        ("chat-only", False, 1),
        ("base-only", False, 1),
        ("chat-only", True, 2),
        ("base-only", True, 1),
    ]


def test_only_designed_latents_are_no_claim():
    method = crosscoder_of(["chat-only", "shared"], ["confirmed", ""], by_design=[1, 0])
    assert wording.headline([method]) == "Decoder norms claim no latent for one model only."
    assert "it Latent Scaling confirms 1." in wording.conclusion([method])[0]


def test_designed_latents_have_cards_of_their_own():
    chat, base, designed = card_groups(DESIGNED, LIMITS)
    assert [card.latent for card in chat.cards] == [0]
    assert [card.latent for card in base.cards] == [3]
    assert [card.latent for card in designed.cards] == [1, 4, 2]  # the confirmed one, then by energy
    assert "no finding" in designed.rule


def test_designed_latents_of_a_null_run_are_not_counted_either():
    null = {"counts": {"chat-only": 7}, "by_design": {"counts": {"chat-only": 5}}}
    files = files_of({"latent_class": ["chat-only"], "verdict": ["confirmed"]}, summary={"null": null})
    assert class_row(content.build_method(files, 0), "chat-only").null_claimed.text == "2"


def test_the_table_of_latents_tells_verdict_class_and_documents():
    found = latent_rows(DESIGNED)
    # By verdict, those beyond their interval first, then by number.
    assert [row.latent for row in found.rows] == [0, 1, 3, 4, 2]
    assert [row.latent_class for row in found.rows][1:4] == [
        "chat-only, by design",
        "base-only",
        "base-only, by design",
    ]
    assert found.rows[2].note == "by its estimate; its 95 % interval crosses a cut-off"
    assert found.rows[0].note == ""


def test_a_long_table_of_latents_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(tables, "MAX_LATENT_ROWS", 2)
    found = latent_rows(DESIGNED)
    assert (found.number, len(found.rows)) == (5, 2)


@pytest.mark.parametrize(
    ("number", "total", "text"), [(12.0, 55, "12 of 55"), (12.0, None, "12"), (None, 55, "n/a")]
)
def test_a_card_counts_documents(number, total, text):
    columns = {"latent_class": ["shared"]} | ({} if number is None else {"active_documents": [number]})
    files = files_of(columns, summary={} if total is None else {"num_documents": total})
    shown = dict(build_card(content.build_method(files, 0), 0, LIMITS).numbers)
    assert shown["in documents"].text == text


def reads(*entries) -> dict:
    """Make the config of a run that reads these sources: a name, or a name with its combination."""
    named = [(entry, None) if isinstance(entry, str) else entry for entry in entries]
    sources = {"entries": [{"name": n, "width": 3, "combination": c} for n, c in named]}
    return {"train": {"crosscoder": {"sources": sources, "sparsity": {"type": "BatchTopK", "k": 3.0}}}}


DIFFERENCE = reads(("difference", [["chat", 1.0], ["base", -1.0]]))


def test_difference_sae_counts_latents_on_one_text():
    # Latent 2 has fired on 5 tokens only: its shares say nothing.
    shares = {"share_novel": [0.9, 0.2, 1.0, 0.85], "share_chat": [0.1, 0.8, 0.0, 0.15]}
    columns = {**shares, "active_tokens": [100, 100, 5, 100]}
    method = content.build_method(files_of(columns, config=DIFFERENCE, evaluation={"fve": 0.561}), 1)
    assert method.kind is content.Kind.DIFFERENCE
    assert method.name == "Difference SAE"
    assert method.concentrated == {"novel": 2, "chat": 0}
    assert wording.conclusion([method]) == (
        "Difference SAE: 4 latents explain 56.1 % of the variance of the difference between the models; "
        "2 put more than 80 % of their activation on a single text (2 on novel), not counting those that "
        "fire on "
        "fewer than 20 tokens.",
    )
    assert wording.headline([method]).startswith("No crosscoder")
    row = method_rows([method])[0]
    assert (row.claimed.text, row.explained.text) == ("n/a", "56.1 %")
    assert "one decoder" in row.claimed.reason


def test_a_run_of_two_models_at_two_layers_is_no_difference():
    # Four sources: norms of each, but no two models to class latents by.
    names = ("base.L10", "base.L13", "chat.L10", "chat.L13")
    columns = {f"norm_{name}": [1.5 + i, 1.0] for i, name in enumerate(names)}
    columns |= {"share_novel": [0.9, 0.2], "share_chat": [0.1, 0.8], "active_tokens": [100, 100]}
    files = files_of(columns, config=reads(*names), evaluation={"fve": 0.7})
    method = content.build_method(files, 0)
    assert method.kind is content.Kind.MANY
    assert method.name == "BatchTopK crosscoder of 4 sources"
    assert wording.conclusion([method]) == (
        "BatchTopK crosscoder of 4 sources: 2 latents explain 70.0 % of the variance of the 4 sources "
        "base.L10, base.L13, chat.L10 and chat.L13, and none is claimed for one model, because classes "
        "compare two sources; 1 puts more than 80 % of its activation on a single text (1 on novel), not "
        "counting those that fire on fewer than 20 tokens.",
    )
    assert wording.headline([method]).startswith("No crosscoder of two models")
    row = method_rows([method])[0]
    assert (row.claimed.text, row.claimed.reason) == ("n/a", "classes compare two sources")
    card = build_card(method, 0, LIMITS)
    assert [(name, figure.text) for name, figure in card.numbers[:4]] == [
        ("norm, base.L10", "1.50"),
        ("norm, base.L13", "2.50"),
        ("norm, chat.L10", "3.50"),
        ("norm, chat.L13", "4.50"),
    ]
    assert not {"difference", "delta_norm"} & set(
        " ".join(group.rule for group in card_groups(method, LIMITS)).split()
    )


def test_a_run_of_one_stored_source_is_no_difference():
    method = content.build_method(
        files_of({"energy": [1.0]}, config=reads("chat"), evaluation={"fve": 0.7}), 0
    )
    assert (method.kind, method.name) == (content.Kind.ONE, "SAE of chat")
    assert "of the variance of chat;" in wording.conclusion([method])[0]
    assert "one decoder" in method_rows([method])[0].claimed.reason


def test_a_run_that_does_not_say_what_it_reads_is_refused_by_file():
    with pytest.raises(
        ValueError, match=r"run/config.json names no sources: make it with `crosscoder-jax tra"
    ):
        content.build_method(files_of({"energy": [1.0]}), 0)


def test_numbers_that_were_not_evaluated_are_not_made_up():
    row = method_rows([MIXED])[0]
    assert (row.explained.text, row.mean_active.text) == ("n/a", "n/a")
    assert "evaluate" in row.explained.reason
    assert row.dead.text == "9.1 %"  # counted in the table: 1 of 11


@pytest.mark.parametrize(
    ("sparsity", "name"),
    [
        ({"type": "BatchTopK", "k": 32.0}, "BatchTopK crosscoder"),
        ({"type": "ReLU"}, "L1 crosscoder"),
        (None, "Crosscoder"),
    ],
)
def test_names_of_methods(sparsity, name):
    config = {"train": {"crosscoder": {"sparsity": sparsity}}}
    assert content.method_name(config, content.Kind.PAIR) == name


def test_equal_names_are_told_apart(tmp_path):
    runs = [read_run(make_run(tmp_path / name, num_latents=40)) for name in ("seed-0", "seed-1")]
    assert [m.name for m in content.build_methods(runs)] == [
        "BatchTopK crosscoder (seed-0)",
        "BatchTopK crosscoder (seed-1)",
    ]
    assert [m.name for m in content.build_methods(runs, ("one", "two"))] == ["one", "two"]


def test_cutoffs_are_those_of_the_diff():
    assert content.read_cutoffs({}) == content.Cutoffs()
    stated = {"cutoffs": {"classes": {"chat_only_min": 0.85}, "max_nu_error": 0.3, "unknown": 1}}
    assert content.read_cutoffs(stated) == content.Cutoffs(chat_only_min=0.85, max_nu_error=0.3)


@pytest.mark.parametrize(
    ("stated", "half"),
    [
        ({"num_groups": 20, "groups_with_tokens": 5}, 0.278),  # 2.776 standard errors of 0.1
        ({"num_groups": 20}, 0.209),
        ({}, 0.209),
    ],
)
def test_intervals_know_how_many_groups_they_come_from(stated, half):
    columns = {"latent_class": ["chat-only"], "verdict": ["confirmed"], "reference": ["chat"]}
    columns |= {"nu_error": [0.05], "se_nu_error": [0.1], "nu_recon": [0.2], "se_nu_recon": [0.1]}
    summary = {"latent_scaling": stated, "sources": ["base", "chat"]}
    method = content.build_method(files_of(columns, summary=summary), 0)
    assert method.half_interval("nu_error")[0] == pytest.approx(half, abs=5e-4)
    shown = dict(build_card(method, 0, LIMITS).numbers)
    assert (shown["nu_error"].text, shown["nu_recon"].text) == (f"0.05 ± {half:.2f}", f"0.20 ± {half:.2f}")
    candidates = plots.scatter_plot(method).figure.data[-1]
    assert candidates.error_y.array[0] == candidates.error_x.array[0] == pytest.approx(half, abs=5e-4)
    assert f"0.05 ± {half:.2f}" in candidates.hovertext[0]


def test_cards_show_confirmed_latents_first_then_energy():
    chat, base = card_groups(MIXED, LIMITS)
    # Confirmed: 1 (energy 9), 0 (energy 1); then 2 (50), 5 (5).
    assert [card.latent for card in chat.cards] == [1, 0, 2, 5]
    assert [card.latent for card in base.cards] == [6]
    assert (chat.hue, base.hue) == ("chat", "base")
    assert chat.cards[0].snippets == ()


def test_a_card_tells_what_its_verdict_rests_on():
    reasons = [
        "",
        "",
        "nu_error 0.41 is not below 0.2",
        "nu_error 0.21 is not below 0.2",
        "fires on 3 tokens",
        "",
    ]
    method = crosscoder_of(
        ["chat-only"] * 5 + ["shared"],
        ["confirmed", "confirmed", "complete shrinkage", "complete shrinkage", "undetermined", ""],
        why_not=reasons,
        is_beyond_interval=[1, 0, 1, 0, 0, 0],
    )
    assert [build_card(method, row, LIMITS).note for row in range(6)] == [
        "",
        "by its estimate; its 95 % interval crosses a cut-off",
        "refuted: nu_error 0.41 is not below 0.2",
        "refuted: nu_error 0.21 is not below 0.2; its 95 % interval crosses the cut-off",
        "neither confirmed nor refuted: fires on 3 tokens",
        "",
    ]


def test_a_table_without_intervals_says_nothing_of_them():
    method = crosscoder_of(["chat-only"] * 2, ["confirmed", "latent decoupling"], why_not=["", "why"])
    assert [build_card(method, row, LIMITS).note for row in range(2)] == ["", "refuted: why"]


def test_a_card_of_an_untested_claim_tells_why_nothing_was_tested():
    summary = {"latent_scaling": {"why_not": "the sources have different widths, (3, 5)"}}
    files = files_of({"latent_class": ["base-only", "shared"]}, summary=summary)
    method = content.build_method(files, 0)
    assert build_card(method, 0, LIMITS).note == "the sources have different widths, (3, 5)"
    assert build_card(method, 1, LIMITS).note == ""


def test_cards_without_claims_show_what_leans_that_way():
    method = crosscoder_of(["other", "shared", "other", "other"], [""] * 4, delta_norm=[0.65, 0.5, 0.8, 0.3])
    chat, base = card_groups(method, LIMITS)
    assert [card.latent for card in chat.cards] == [2, 0]
    assert [card.latent for card in base.cards] == [3]
    assert "no evidence" in chat.rule


def test_concentrated_latents_are_measured_against_the_usual_share():
    # Everyone has 70 % on "big"; latent 1 has 75 % there, latent 3 has 60 % on "small": 3 stands out more.
    big = [0.7, 0.75, 0.7, 0.4, 0.7]
    method = content.build_method(
        files_of(
            {"share_big": big, "share_small": [1 - x for x in big], "energy": [5, 4, 3, 2, 1]},
            config=DIFFERENCE,
        ),
        0,
    )
    assert choose_concentrated(method, 2).tolist() == [3, 1]


def snippet(**changes) -> dict:
    """Make a snippet of six tokens with its peak on the fourth."""
    made = {"tokens": ["a", " b", "\n", " whale", "!", "z"], "activations": [0, 1, 0, 4.0, -1, 9]}
    return made | {"peak": 3, "value": 4.0, "document": 7, "position": 9, "label": "novel"} | changes


def test_a_snippet_is_cut_around_its_peak():
    made = build_snippet(snippet(), 8.0, LIMITS)
    assert [(t.space, t.text) for t in made.tokens] == [(" ", "b"), ("", "⏎"), (" ", "whale"), ("", "!")]
    assert [t.strength for t in made.tokens] == [0.125, 0, 0.5, 0]
    assert [t.is_peak for t in made.tokens] == [False, False, True, False]
    assert (made.is_cut_before, made.is_cut_after) == (True, True)
    assert made.place == "document 7, position 9"


def test_snippets_of_a_silent_latent_have_no_colour():
    made = build_snippet(snippet(activations=[0.0] * 6), 0.0, CardLimits(1, 9, 9))
    assert {t.strength for t in made.tokens} == {0.0}
    assert (made.is_cut_before, made.is_cut_after) == (False, False)


def test_top_tokens_are_different_ones_in_order():
    assert top_tokens([snippet(), snippet(peak=4), snippet()]) == ("“whale”", "“!”")


def test_what_was_compared(tmp_path):
    method = content.build_method(read_run(make_run(tmp_path / "run")), 0)
    before, after = comparison.compared_sources(method)
    assert (before.name, before.model, before.revision) == ("before", "SmolLM2-135M-Instruct", "12fd25f")
    assert (after.hook_point, after.width, after.revision) == ("blocks.15.resid_post", "576", "not recorded")
    assert [(t.label, t.tokens.text) for t in comparison.text_shares(method)] == TOKENS_BY_TEXT
    tokens = {row.heading: row.values[0].text for row in comparison.token_rows([method])}
    assert tokens == {
        "Held-out tokens analysed": "30,211",
        "in documents": "120",
        "Held-out share of documents": "20.0 %",
    }


def test_the_recipe_tells_none_from_not_recorded(tmp_path):
    sparse, dense = (
        read_run(make_run(tmp_path / name, sparsity={"type": name} | more))
        for name, more in (("BatchTopK", {"k": 32.0}), ("ReLU", {}))
    )
    del dense.config["train"]["seed"], dense.config["split"]["seed"], dense.config["train"]["data_seed"]
    rows = {
        row.heading: tuple((value.text, value.reason) for value in row.values)
        for row in recipe_rows([content.build_method(files, i) for i, files in enumerate((sparse, dense))])
    }
    assert rows["Sparsity"] == (("BatchTopK, k 32", ""), ("ReLU: every positive one", ""))
    aux_k = "AuxK, weight 0.03125, for latents silent for 10,000,000 tokens"
    assert rows["Dead-latent loss"] == ((aux_k, ""), ("none", ""))
    assert rows["Sparsity penalty"] == (("none", ""), ("L1 (summed strength), weight 0.041", ""))
    assert rows["Steps"][0] == ("1,200", "")
    assert rows["Seed"] == (("0", ""), ("n/a", "not recorded in the run"))
    # What no run uses is left out, be it recorded as none or not at all.
    assert not {"Groups", "Resampling", "Null data", "Loss on the difference"} & set(rows)


def test_the_recipe_tells_sources_and_groups_in_words():
    config = reads("base", ("difference", [["chat", 1.0], ["base", -0.5]]))
    group = {
        "type": "LatentGroup",
        "name": "chat-dedicated",
        "share": 0.15,
        "reads": None,
        "writes": ["chat"],
    }
    tied = {"type": "LatentGroup", "name": "tied", "share": 0.1, "is_tied": True, "cost": 0.2, "k": 3.0}
    config["train"]["crosscoder"]["groups"] = [group, tied]
    rows = {
        row.heading: row.values[0].text
        for row in recipe_rows(
            [content.build_method(files_of({"latent_class": ["shared"]}, config=config), 0)]
        )
    }
    assert rows["Reads"] == "base, difference = chat \N{MINUS SIGN} 0.5 base"
    assert rows["Groups"] == (
        "chat-dedicated: 15 %, writes chat only; tied: 10 %, one decoder for all, k 3 of its own, "
        "activity costs 0.2 times as much"
    )


def test_the_recipe_names_the_sources_of_the_loss_on_their_difference():
    config = reads("base", "chat")
    config["train"]["delta"] = config_to_json(DeltaLoss(10.0, "base", "chat"))
    method = content.build_method(files_of({"latent_class": ["shared"]}, config=config), 0)
    rows = {row.heading: row.values[0].text for row in recipe_rows([method])}
    assert rows["Loss on the difference"] == "chat \N{MINUS SIGN} base, weight 10"


def test_a_crosscoder_in_another_basis_is_named_by_what_it_reads():
    config = reads("base", ("difference", [["chat", 1.0], ["base", -1.0]]))
    assert content.method_name(config, content.Kind.PAIR) == "BatchTopK crosscoder on base and difference"
    assert content.method_name(reads("base", "chat"), content.Kind.PAIR) == "BatchTopK crosscoder"


@pytest.mark.parametrize(
    ("model", "short"),
    [
        ("/data/models/a-long-name/", "a-long-name"),
        ("./model", "model"),
        ("C:\\models\\thing", "thing"),
        ("org/name", "org/name"),
        ("name", "name"),
    ],
)
def test_models_are_named_without_their_folders(model, short):
    assert comparison.short_model(model) == short


def test_only_the_stored_sources_that_a_run_reads_are_listed():
    stored = {
        name: {"model": f"org/{name}", "width": 3} for name in ("base.L1", "base.L2", "chat.L1", "chat.L2")
    }
    columns = {"latent_class": ["shared"]}

    def listed(config):
        identity = {"store_identity": {"fingerprint": "0123", **stored}}
        method = content.build_method(files_of(columns, config=config | identity), 0)
        return [source.name for source in comparison.compared_sources(method)]

    assert listed(reads("base.L2", "chat.L2")) == ["base.L2", "chat.L2"]
    assert listed(reads(("difference", [["chat.L1", 1.0], ["base.L1", -1.0]]))) == ["base.L1", "chat.L1"]
    assert listed({}) == list(stored)
    assert comparison.compared_sources(MIXED) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ()}, "names no run folder"),
        ({"names": ("a", "b")}, "2 names for 1 runs"),
        ({"num_cards": 0}, "num_cards=0 must be at least 1"),
        ({"tokens_after": -1}, "tokens_after=-1 must not be negative"),
    ],
)
def test_a_config_that_makes_no_report_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ReportConfig(**({"runs": (Path("run"),)} | changes))
