"""The page as a browser gets it: parsed, not searched, so that escaping is tested for what it does."""

import base64
import datetime
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("plotly", reason="the report draws with plotly: install the extra 'report'")

from report_cases import HOSTILE, make_run

from crosscoder_jax.report import ReportConfig, figures, plots, write_report
from crosscoder_jax.report.content import Cutoffs, build_method
from crosscoder_jax.report.files import read_run
from crosscoder_jax.report.gaps import stale_parts
from crosscoder_jax.report.palette import METHOD_COLOURS, method_colour

DAY = datetime.date(2026, 11, 21)


class Page(HTMLParser):
    """Collect elements, scripts and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self.is_code = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.is_code = tag in ("script", "style")
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self.is_code = False

    def handle_data(self, data):
        if self.is_code and self.elements[-1][0] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self.is_code:
            self.text += data

    def named(self, tag: str) -> list[dict]:
        """Give the attributes of every element with a name."""
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder / "crosscoder", hostile=HOSTILE), make_run(
        folder / "difference", sources=("difference",)
    )


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Page:
    config = ReportConfig(
        runs=runs, title="A & B <i>changed</i>", names=(HOSTILE, "Difference SAE"), num_cards=12
    )
    path = write_report(config, tmp_path_factory.mktemp("out") / "report.html", today=DAY)
    return Page(path.read_text(encoding="utf-8"))


def test_hostile_text_stays_text(page):
    # Three scripts of ours: the figures as data, plotly and the page's own; no image and no handler.
    assert [attributes.get("type") for attributes, _ in page.scripts] == ["application/json", None, None]
    assert page.named("img") == []
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert HOSTILE in page.text  # the token, whole and literal
    assert "A & B <i>changed</i>" in page.text
    assert "{{7*7}}" in page.text
    assert "[U+202E]abc[U+200B]" in page.text
    assert not set("\u202e\u200b") & set(page.text)


def test_hostile_text_stays_text_inside_the_figures(page):
    _, code = page.scripts[0]
    assert not set("<>&") & set(code)
    content = json.loads(code)
    strings = [
        text for trace in content["scatter-0-chat-only"]["data"] for text in trace.get("hovertext", [])
    ]
    assert any("&lt;/script&gt;" in text for text in strings)
    # Of markup, plotly sees only our own.
    assert all(part.split(">")[0] in ("b", "/b", "br") for text in strings for part in text.split("<")[1:])
    names = [trace["name"] for trace in content["training-0"]["data"]]
    assert all("<" not in name and "{" not in name for name in names)


def test_nothing_is_fetched_and_only_our_scripts_may_run(page):
    policy = next(
        a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    for _, code in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert not [a for _, a in page.elements if "src" in a]
    assert [a["href"] for a in page.named("link")] == ["data:,"]
    assert sum("Plotly.newPlot(" in code for _, code in page.scripts[2:]) == 1


def test_every_figure_has_its_data_and_a_description(page):
    content = json.loads(page.scripts[0][1])
    holders = [a for a in page.named("div") if "data-figure" in a]
    assert {a["data-figure"] for a in holders} == set(content)
    assert all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in holders)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.named("a") if a.get("href", "").startswith("#")} <= set(ids)


def test_the_page_says_what_was_found_and_how_it_was_made(page, runs):
    fingerprint = read_run(runs[0]).config["store_identity"]["fingerprint"]
    for words in (
        "claims 12 as chat-only and 3 as base-only",
        "SmolLM2-135M-Instruct + LoRA on Moby-Dick",
        "No snippets were kept for this latent",
        "arXiv 2504.02922",
        "Written on 2026-11-21",
        fingerprint,
        "BatchTopK, k 32",
        "refuted: nu_error 0.",
        "neither confirmed nor refuted: ",
        "its 95 % interval crosses a cut-off",
        "Numbers on 120 held-out documents",
        "where one model is louder everywhere, shared latents gather on its side of 0.5",
    ):
        assert words in page.text


def edit_measured_on(path: Path, **changes):
    document = json.loads(path.read_text())
    document["measured_on"] = document["measured_on"] | changes
    path.write_text(json.dumps(document))


def test_numbers_of_other_weights_or_tokens_are_named(tmp_path):
    run = make_run(tmp_path / "run", num_latents=60)
    assert stale_parts([build_method(read_run(run), 0)]) == ()
    edit_measured_on(run / "evaluation.json", weights_sha256="of before the calibration")
    edit_measured_on(run / "diff" / "summary.json", store_fingerprint="another", weights_sha256="older")
    page = Page(write_report(ReportConfig(runs=(run,)), tmp_path).read_text(encoding="utf-8"))
    assert len([a for a in page.named("p") if a.get("class") == "note stale"]) == 3
    for words in (
        "The evaluation.json of the BatchTopK crosscoder is older than its crosscoder",
        f"run crosscoder-jax evaluate --run {run} again",
        "The table in diff/ of the BatchTopK crosscoder is older than its crosscoder",
        f"run crosscoder-jax diff --run {run} again",
        "The table in diff/ of the BatchTopK crosscoder is of another store than it was trained on",
    ):
        assert words in page.text


def test_numbers_that_do_not_say_what_they_were_measured_on_are_named(tmp_path):
    run = make_run(tmp_path / "run", num_latents=60)
    document = json.loads((run / "evaluation.json").read_text())
    del document["measured_on"]
    (run / "evaluation.json").write_text(json.dumps(document))
    (fault,) = stale_parts([build_method(read_run(run), 0)])
    assert fault.startswith("The evaluation.json of the BatchTopK crosscoder does not say which weights")


def test_optional_parts_are_left_out_with_a_sentence(tmp_path):
    run = make_run(tmp_path / "run", num_latents=60)
    for name in ("metrics.jsonl", "evaluation.json", "diff/snippets.json"):
        (run / name).unlink()
    text = Page(write_report(ReportConfig(runs=(run,)), tmp_path).read_text(encoding="utf-8")).text
    assert (tmp_path / "report.html").is_file()
    for name in ("metrics.jsonl", "evaluation.json", "diff/snippets.json"):
        assert f"has no {name}" in text
    assert "As logged on training batches" not in text


@pytest.mark.parametrize(
    "options",
    [
        {"num_chat": 0, "num_base": 0},
        {"num_chat": 1, "num_base": 0},
        {"sources": ("difference",)},
        {"sparsity": {"type": "ReLU"}, "num_base": 9},
    ],
)
def test_every_kind_of_run_makes_a_page(tmp_path, options):
    run = make_run(tmp_path / "run", num_latents=60, **options)
    path = write_report(ReportConfig(runs=(run,)), tmp_path / "deep" / "page.html")
    assert "How to read this" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("SwapCoordinates", "are claimed by mistake"),
        ("SwapDocuments", "It is no count of false latents"),
        ("SameModel", "a model was compared with itself"),
        ("Newer", "The null run was trained on Newer data"),
    ],
)
def test_a_null_run_beside_the_run_is_shown_and_explained(tmp_path, kind, sentence):
    run = make_run(tmp_path / "run", num_latents=60)
    summary = json.loads((run / "diff" / "summary.json").read_text())
    summary["null"] = {
        "run": "null",
        "kind": {"type": kind},
        "counts": {"chat-only": 1234, "base-only": 0},
        "confirmed_by_class": {"chat-only": 77, "base-only": 0},
    }
    (run / "diff" / "summary.json").write_text(json.dumps(summary))
    other = make_run(tmp_path / "other", num_latents=60)
    config = ReportConfig(runs=(run, other))
    text = Page(write_report(config, tmp_path / "page.html").read_text(encoding="utf-8")).text
    for words in (
        "Null run claimed",
        "Null run confirmed",
        "1,234",
        "77",
        sentence,
        "diffed without a null run",
    ):
        assert words in text
    without = Page(write_report(ReportConfig(runs=(other,)), tmp_path / "b.html").read_text(encoding="utf-8"))
    assert "Null run" not in without.text


def test_a_run_of_many_sources_is_not_called_a_difference(tmp_path):
    sources = ("before.L1", "before.L2", "after.L1", "after.L2")
    run = make_run(tmp_path / "run", num_latents=60, sources=sources)
    text = Page(write_report(ReportConfig(runs=(run,)), tmp_path).read_text(encoding="utf-8")).text
    body = text.split("How to read this\n", 1)[0]
    assert "BatchTopK crosscoder of 4 sources" in body
    assert "norm, before.L1" in body
    assert "Difference SAE" not in body
    assert "one decoder only" not in body


def test_a_run_that_was_not_diffed_names_the_command(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "diff" / "latents.parquet").unlink()
    with pytest.raises(
        ValueError, match=f"latents.parquet is missing: make it with `crosscoder-jax diff --run {run}`"
    ):
        write_report(ReportConfig(runs=(run,)), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_histogram_counts_every_latent_once_in_the_colour_of_its_class():
    values = np.array([0.0, 0.05, 0.45, 0.5, 0.5, 0.7, 0.95, 1.0])
    figure = figures.histogram(values, Cutoffs(), {"base-only": 2, "shared": 3, "chat-only": 2})
    bar = figure["data"][0]
    assert int(np.sum(bar.y)) == len(values)
    colours = dict(zip(np.round(bar.x, 2), bar.marker.color, strict=True))
    assert colours[0.01] == colours[0.09] == "#0072B2"
    assert colours[0.41] == colours[0.59] == "#8a939e"
    assert colours[0.91] == colours[0.99] == "#D55E00"
    assert colours[0.39] == colours[0.11] == colours[0.89]
    labels = [note.text for note in figure.layout.annotations]
    assert labels == ["<b>base-only</b><br>2", "<b>shared</b><br>3", "<b>chat-only</b><br>2"]


def test_a_single_latent_is_seen_on_the_log_axis():
    low, high = figures.log_count_axis(1)["range"]
    assert low < 0 < high  # log10(1) = 0 lies above the floor
    assert figures.linear_count_axis(100)["range"][1] > 100


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0.1, "base-only"),
        (0.11, "other"),
        (0.4, "shared"),
        (0.6, "shared"),
        (0.61, "other"),
        (0.9, "chat-only"),
    ],
)
def test_the_bounds_belong_to_their_class(value, name):
    assert figures.class_names(np.array([value]), Cutoffs()) == [name]


def test_the_ground_holds_no_inverse_ratios(tmp_path):
    # Two shared latents of the same strengths: 0.8 in base for 1 in chat is nu 0.8 from the side of chat and
    # 1.25 from that of base. Only the first may stand beside chat-only candidates.
    method = build_method(read_run(make_run(tmp_path / "run", num_latents=60)), 0)
    columns = method.latents.columns
    shared = np.flatnonzero(columns["latent_class"] == "shared")
    columns["nu_error"][shared] = columns["nu_recon"][shared] = np.where(
        columns["reference"][shared] == "after", 0.8, 1.25
    )
    drawn = {trace.name: trace for trace in plots.scatter_plot(method).figure.data}
    own = int(np.sum(columns["reference"][shared] == "after"))
    assert 0 < own < len(shared)
    assert drawn["shared"].y.tolist() == [0.8] * own
    leaning = (columns["latent_class"] == "other") & (columns["reference"] == "after")
    assert len(drawn["leaning to chat"].y) == int(leaning.sum()) > 0
    assert f"{own} shared latents in the background" in plots.scatter_plot(method).description
    assert not len(plots.scatter_plot(method, "base-only").figure.data[0].y)


def test_candidates_that_cannot_be_drawn_are_counted(tmp_path):
    method = build_method(read_run(make_run(tmp_path / "run")), 0)
    plot = plots.scatter_plot(method)
    assert plot.note == "Not drawn: 1 candidate without a defined ratio."
    assert "12 chat-only candidates" in plot.description


def test_candidates_outside_the_frame_are_named_with_their_ratios(tmp_path):
    method = build_method(read_run(make_run(tmp_path / "run")), 0)
    method.latents.columns["nu_error"][0] = 7.5
    method.latents.columns["nu_recon"][0] = -0.25
    assert plots.scatter_plot(method).note.startswith(
        "Arrows point to what lies outside the frame: 0 (\u03bd_error 7.50, \u03bd_recon \u22120.25). Not "
        "drawn: 1 "
    )
    method.latents.columns["nu_error"][:11] = 7.5  # of twelve, and the last has no ratio
    assert " and 5 more." in plots.scatter_plot(method).note


def test_candidates_by_design_are_not_drawn_as_findings(tmp_path):
    method = build_method(read_run(make_run(tmp_path / "run")), 0)
    method.latents.columns["by_design"] = np.arange(len(method.latents)) < 5.0
    method = build_method(method.files, 0)
    plot = plots.scatter_plot(method)
    assert "7 chat-only candidates" in plot.description
    assert plot.note.endswith("Not drawn: 5 exclusive by design.")
    assert plots.histogram_plot(method).note.endswith("Exclusive by design: 5 chat-only.")


def test_a_table_of_an_older_diff_is_named(tmp_path):
    run = make_run(tmp_path / "run", num_latents=60)
    table = pq.read_table(run / "diff" / "latents.parquet")
    pq.write_table(table.drop(["is_beyond_interval", "active_documents"]), run / "diff" / "latents.parquet")
    text = Page(write_report(ReportConfig(runs=(run,)), tmp_path).read_text(encoding="utf-8")).text
    assert "has no column is_beyond_interval" in text
    assert "has no column active_documents" in text
    assert "beyond the 95 % interval" not in text
    assert "crosses a cut-off" not in text.split("Confirmed is a rule")[0]


def test_training_panels_share_methods_and_drop_what_was_not_logged(runs):
    methods = [build_method(read_run(run), slot) for slot, run in enumerate(runs)]
    panels = plots.training_plots(methods)
    assert [plot.title for plot in panels] == [
        "Loss, log scale",
        "Variance explained: before",
        "Variance explained: after",
        "Variance explained: difference",
        "Active latents a token (L0)",
        "Dead latents",
    ]
    assert [len(plot.figure.data) for plot in panels] == [2, 1, 1, 1, 2, 2]
    assert panels[0].figure.data[1].line.color == method_colour(1)


def test_long_curves_are_thinned_and_keep_their_ends(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [json.dumps({"step": step, "loss": 1.0 / step}) for step in range(1, 5_001)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (panel,) = plots.training_plots([build_method(read_run(run), 0)])
    steps = panel.figure.data[0].x
    assert (len(steps), steps[0], steps[-1]) == (plots.MAX_CURVE_POINTS, 1, 5_000)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([70.0, 950.0], [50, 100, 200, 500, 1_000]),
        ([0.5, 900.0], [0.1, 1, 10, 100, 1_000]),  # 1, 2, 5 would be too many
        ([1e-9, 1.0], [1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
        ([0.0, -3.0], [1]),  # nothing that a log axis can show
    ],
)
def test_log_ticks_are_few_and_round(values, ticks):
    np.testing.assert_allclose(figures.log_ticks(values, most=10 if len(ticks) == 10 else 6), ticks)


def test_colours_begin_again_after_the_last():
    assert method_colour(len(METHOD_COLOURS)) == method_colour(0)
