"""The plane of Latent Scaling: what is in the frame, at its edge, and where its labels are."""

import itertools

import numpy as np
import pytest

pytest.importorskip("plotly", reason="the report draws with plotly: install the extra 'report'")

from crosscoder_jax.report.content import Cutoffs
from crosscoder_jax.report.labels import CHARACTER, LINE, MAX_POINTS, PLOT, place_labels
from crosscoder_jax.report.scatter import FRAME, WIDEST_FRAME, ScatterPoints, frame_of, scatter


def points_of(*pairs) -> ScatterPoints:
    """Make latents numbered from 0 at these pairs of nu_recon and nu_error."""
    recon, error = np.array(pairs, float).reshape(-1, 2).T
    numbers = tuple(str(i) for i in range(len(pairs)))
    return ScatterPoints(error, recon, np.full(len(pairs), 0.05), np.full(len(pairs), 0.02), numbers, numbers)


NONE = points_of()


def drawn(**points):
    """Draw these candidates by verdict; give the traces that are not ground, and the numbers written."""
    figure = scatter(points, NONE, NONE, Cutoffs())
    numbers = [note.text for note in figure.layout.annotations if note.showarrow is not False]
    return figure, figure.data[2:], numbers


def test_a_candidate_has_its_95_percent_bars_and_its_number():
    figure, (trace,), numbers = drawn(confirmed=points_of((0.3, 0.1)))
    assert (trace.x[0], trace.y[0]) == (0.3, 0.1)  # nu_recon across, nu_error up
    assert [trace.error_x.array[0], trace.error_y.array[0]] == [0.02, 0.05]
    corner = figure.layout.shapes[0]
    assert (corner.x1, corner.y1) == (0.5, 0.2)
    assert numbers == ["0"]


@pytest.mark.parametrize(
    ("values", "frame"),
    [
        ([], FRAME),
        ([np.nan, 0.5], FRAME),
        ([-0.2], (-0.32, FRAME[1])),  # twice the margin of 0.06 below, where the regions have their names
        ([1.5], (FRAME[0], 1.56)),
        ([-9.0, 9.0], WIDEST_FRAME),
    ],
)
def test_the_frame_grows_with_the_claimed_latents_up_to_a_bound(values, frame):
    assert frame_of(np.array(values, float)) == pytest.approx(frame)


@pytest.mark.parametrize(
    ("place", "angle"),
    [
        ((9, 0.5), 90),
        ((-9, 0.5), -90),
        ((0.5, 9), 0),
        ((0.5, -9), 180),
        ((9, 9), 45),
        ((-9, -9), -135),
        ((-0.15, 9), 0),
    ],
)
def test_what_lies_outside_is_an_arrow_at_the_edge_that_points_there(place, angle):
    figure, (trace,), numbers = drawn(undetermined=points_of(place))
    assert trace.marker.symbol == "arrow"
    assert trace.marker.angle[0] % 360 == angle % 360
    for value, where, axis in zip(
        place, (trace.x[0], trace.y[0]), (figure.layout.xaxis, figure.layout.yaxis), strict=True
    ):
        low, high = axis.range
        assert low < where < high
        # A coordinate inside the frame is kept; one outside is drawn within a tenth of the edge.
        assert where == value if low < value < high else min(where - low, high - where) < 0.1 * (high - low)
    assert trace.error_x.array is None  # the interval belongs elsewhere
    assert numbers == ["0"]


def test_every_candidate_is_drawn_once_and_those_without_a_ratio_not_at_all():
    group = points_of((0.1, 0.1), (9, 0.1), (np.nan, 0.1), (0.4, 0.3), (0.2, np.inf))
    _, traces, numbers = drawn(confirmed=group)
    assert [len(trace.x) for trace in traces] == [2, 1]
    assert sorted(numbers) == ["0", "1", "3"]


def boxes_of(points, names, offsets):
    """Left, bottom, right and top of every label in pixels, from the documented sizes."""
    for point, name, offset in zip(points, names, offsets, strict=True):
        if offset is not None:
            x, y = point * PLOT + offset
            half = len(name) * CHARACTER / 2
            yield x - half, y - LINE / 2, x + half, y + LINE / 2


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("spread", [0.02, 0.1, 1.0])
def test_no_label_hides_another_or_a_mark(spread):
    rng = np.random.default_rng(0)
    points = 0.5 + spread * (rng.random((40, 2)) - 0.5)
    names = [str(rng.integers(0, 10 ** rng.integers(1, 5))) for _ in points]
    offsets = place_labels(points, names, np.full(40, 6.0))
    boxes = list(boxes_of(points, names, offsets))
    # Offsets are rounded to a tenth of a pixel: shrink the boxes by as much.
    boxes = [(a + 0.1, b + 0.1, c - 0.1, d - 0.1) for a, b, c, d in boxes]
    assert not [pair for pair in itertools.combinations(boxes, 2) if overlap(*pair)]
    labelled = [i for i, offset in enumerate(offsets) if offset is not None]
    for i, box in zip(labelled, boxes, strict=True):
        assert 0 <= box[0] < box[2] <= PLOT[0]
        assert 0 <= box[1] < box[3] <= PLOT[1]
        marks = [(*(p * PLOT - 6), *(p * PLOT + 6)) for j, p in enumerate(points) if j != i]
        assert not [mark for mark in marks if overlap(box, mark)]
    if spread == 1.0:
        assert len(labelled) == 40


def test_a_handful_in_one_place_are_all_labelled():
    offsets = place_labels(np.full((8, 2), 0.5), list("12345678"), np.full(8, 6.0))
    assert None not in offsets


def test_labels_keep_off_a_larger_mark():
    (usual,), (large,) = (
        place_labels(np.array([[0.5, 0.5]]), ["1"], np.array([size])) for size in (6.0, 16.0)
    )
    assert large[0] == usual[0] + 10


def test_what_has_no_name_or_no_room_gets_no_label():
    assert place_labels(np.zeros((0, 2)), [], np.zeros(0)) == []
    assert place_labels(np.array([[0.5, 0.5]]), [""], np.array([6.0])) == [None]
    assert set(
        place_labels(np.zeros((MAX_POINTS + 1, 2)), ["1"] * (MAX_POINTS + 1), np.zeros(MAX_POINTS + 1))
    ) == {None}
