"""The figures of three sources or more show the numbers of the table, and only where there are any."""

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the report draws with plotly: install the extra 'report'")

from report_cases import HOSTILE, make_run

from crosscoder_jax.report import ReportConfig, write_report
from crosscoder_jax.report.content import build_method
from crosscoder_jax.report.files import read_run
from crosscoder_jax.report.trajectories import MAX_LATENTS, trajectory_plots

STEPS = ("base", "step60", "chat")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("three") / "run", sources=STEPS, num_latents=90)


@pytest.fixture(scope="module")
def method(run):
    return build_method(read_run(run), 0)


def test_bars_count_live_latents_by_where_they_appear(method):
    appearance, _ = trajectory_plots(method)
    (bars,) = appearance.figure.data
    live = method.latents.numbers("active_tokens") > 0
    first = method.latents.words("appears_in")[live]
    assert list(bars.x) == list(STEPS)
    assert list(bars.y) == [int((first == name).sum()) for name in STEPS]
    assert sum(bars.y) == live.sum()
    assert f"{bars.y[1]:,} in step60" in appearance.description


def test_the_strongest_latents_are_shown_relative_to_their_largest_norm_in_the_order_they_appear(method):
    _, strength = trajectory_plots(method)
    (heat,) = strength.figure.data
    shown = [int(label) for label in heat.y]
    energy = method.latents.numbers("energy")
    assert sorted(shown) == sorted(np.argsort(-energy, kind="stable")[:MAX_LATENTS].tolist())
    first = [STEPS.index(name) for name in method.latents.words("appears_in")[shown]]
    assert first == sorted(first)
    norms = np.stack([method.latents.numbers(f"norm_{name}")[shown] for name in STEPS], axis=1)
    np.testing.assert_allclose(heat.z, norms / norms.max(axis=1, keepdims=True), rtol=1e-6)
    cosine = method.latents.numbers("turning_base")[shown[0]]
    assert heat.customdata[0][0] == f"{cosine:.2f}"
    assert all(row[-1] == "1.00" for row in heat.customdata)


def test_two_sources_have_no_such_figures(tmp_path):
    assert trajectory_plots(build_method(read_run(make_run(tmp_path / "pair")), 0)) == ()


def test_the_page_has_the_figures_and_names_of_sources_cannot_break_it(tmp_path):
    names = ("base", HOSTILE, "chat")
    run = make_run(tmp_path / "run", sources=names, num_latents=60)
    page = write_report(ReportConfig((run,)), tmp_path / "report.html").read_text()
    assert 'id="trajectories"' in page
    assert "appearance-0" in page
    assert HOSTILE not in page
