"""Batches as a pure function of seed and step: every token once an epoch, any step alone."""

import dataclasses
import itertools

import numpy as np
import pytest

from crosscoder_jax.activations import BatchSchedule
from crosscoder_jax.activations.hashing import permutation

SHAPES = [
    # num_tokens, batch_size, block_tokens, window_blocks
    (100, 10, 10, 2),
    (101, 10, 10, 3),  # a short last block and a short last window
    (97, 8, 16, 1),
    (5, 12, 2, 2),  # a batch longer than two epochs
    (64, 64, 100, 4),  # one block
    (30, 7, 1, 30),  # one window: a full shuffle
]
STARTS = {100: (0, 3, 40, 41, 90), 101: (0, 50), 97: (), 5: (0, 1, 2, 3, 4), 64: (0, 63), 30: (0, 29)}


def _schedules():
    for shape in SHAPES:
        for starts in sorted({(), STARTS[shape[0]]}):
            yield BatchSchedule(*shape, seed=3, block_starts=starts)


SCHEDULES = list(_schedules())


def stream(schedule, stop):
    """The first ``stop`` tokens of the stream from the definition, window after window."""
    edges = [
        *(schedule.block_starts or range(0, schedule.num_tokens, schedule.block_tokens)),
        schedule.num_tokens,
    ]
    blocks = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
    tokens, epoch = [], 0
    while len(tokens) < stop:
        order = permutation(schedule.seed, 0, epoch, size=len(blocks))
        for window, low in enumerate(range(0, len(blocks), schedule.window_blocks)):
            inside = [t for b in order[low : low + schedule.window_blocks] for t in blocks[b]]
            tokens += [inside[i] for i in permutation(schedule.seed, 1, epoch, window, size=len(inside))]
        epoch += 1
    return tokens[:stop]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_batches_are_consecutive_pieces_of_the_stream(schedule):
    steps = -(-3 * schedule.num_tokens // schedule.batch_size) + 1
    expected = np.reshape(stream(schedule, steps * schedule.batch_size), (steps, -1))
    for step in reversed(range(steps)):  # backwards: nothing depends on what was asked before
        np.testing.assert_array_equal(schedule.positions(step), expected[step])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_every_token_once_an_epoch(schedule):
    steps = -(-3 * schedule.num_tokens // schedule.batch_size)
    tokens = np.concatenate([schedule.positions(step) for step in range(steps)])
    epochs = tokens[: 3 * schedule.num_tokens].reshape(3, -1)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(schedule.num_tokens), (3, 1)))


def test_epochs_and_seeds_differ():
    schedule = BatchSchedule(num_tokens=200, batch_size=200, block_tokens=10, window_blocks=4, seed=0)
    other = dataclasses.replace(schedule, seed=1)
    orders = [schedule.positions(0), schedule.positions(1), other.positions(0), other.positions(1)]
    for i in range(4):
        for j in range(i):
            assert np.mean(orders[i] == orders[j]) < 0.1


def test_a_window_holds_whole_blocks_and_mixes_them():
    schedule = BatchSchedule(num_tokens=400, batch_size=40, block_tokens=20, window_blocks=5, seed=0)
    for window in schedule.windows(0, 400):
        positions = schedule.window_positions(window)
        assert len(np.unique(positions // 20)) == 5
        assert len(positions) == window.stop - window.start == 100
        # 40 draws without replacement from 5 blocks of 20 miss one with probability < 1e-3.
        assert len(np.unique(positions[:40] // 20)) == 5


def test_windows_tile_the_stream():
    schedule = BatchSchedule(*SHAPES[1], seed=0)
    windows = list(schedule.windows(150, 450))
    assert windows[0].start <= 150 < windows[0].stop
    assert windows[-1].start < 450 <= windows[-1].stop
    assert all(a.stop == b.start for a, b in itertools.pairwise(windows))
    assert {w.epoch for w in windows} == {1, 2, 3, 4}
    assert schedule.num_windows == 4
    assert list(schedule.windows(7, 7)) == []


LANED = [
    BatchSchedule(101, 12, 10, 3, seed=3, lanes=4),  # 101 tokens in four lanes: 25 and 26 in turns
    BatchSchedule(101, 12, 10, 3, seed=3, lanes=4, block_starts=(0, 50)),  # fewer blocks than lanes
    BatchSchedule(96, 16, 8, 100, seed=3, lanes=2),  # one window a lane
    BatchSchedule(37, 40, 5, 1, seed=3, lanes=8),  # a batch of more than an epoch
]


@pytest.mark.parametrize("schedule", LANED, ids=repr)
def test_lanes_take_an_epoch_between_them_to_the_token(schedule):
    """Each token once an epoch, lanes even to one token, and each lane whole spans of the shuffled blocks."""
    rows, epochs = schedule.batch_size // schedule.lanes, 5
    steps = -(-epochs * schedule.num_tokens // schedule.batch_size) + 1
    lanes = np.stack([schedule.positions(step) for step in reversed(range(steps))])[::-1]
    lanes = lanes.reshape(steps, schedule.lanes, rows).transpose(1, 0, 2).reshape(schedule.lanes, -1).tolist()
    edges = [*(schedule.block_starts or range(0, schedule.num_tokens, schedule.block_tokens)), 10**9]
    for epoch in range(epochs):
        blocks = permutation(schedule.seed, 0, epoch, size=len(edges) - 1)
        in_order = [t for b in blocks for t in range(edges[b], min(edges[b + 1], schedule.num_tokens))]
        sizes = []
        for lane in range(schedule.lanes):
            # Tokens of the epoch that fall to the lane when all are dealt out in turns, epoch after epoch.
            dealt = range(epoch * schedule.num_tokens, (epoch + 1) * schedule.num_tokens)
            sizes.append(sum(token % schedule.lanes == lane for token in dealt))
            ours, lanes[lane] = lanes[lane][: sizes[-1]], lanes[lane][sizes[-1] :]
            assert sorted(ours) == sorted(in_order[: sizes[-1]])
            in_order = in_order[sizes[-1] :]
        assert not in_order
        assert max(sizes) - min(sizes) <= 1


def test_a_lane_shuffles_its_share_of_a_window():
    schedule = BatchSchedule(num_tokens=400, batch_size=40, block_tokens=10, window_blocks=8, seed=0, lanes=4)
    windows = list(schedule.windows(0, 100, lane=2))
    assert [w.stop - w.start for w in windows] == [20] * 5
    assert all(a.stop == b.start for a, b in itertools.pairwise(windows))
    for window in windows:
        positions = schedule.window_positions(window)
        assert len(np.unique(positions // 10)) == 2
        assert positions.tolist() != sorted(positions.tolist())


def test_pinned_order_of_lanes():
    schedule = BatchSchedule(num_tokens=10, batch_size=4, block_tokens=2, window_blocks=2, seed=42, lanes=2)
    assert [schedule.positions(step).tolist() for step in range(3)] == [
        [4, 5, 9, 7],
        [0, 1, 6, 2],
        [8, 0, 3, 5],
    ]


@pytest.mark.parametrize(("batch_size", "lanes"), [(10, 4), (8, 8), (8, 16)])
def test_lanes_that_a_batch_cannot_hold_are_refused(batch_size, lanes):
    with pytest.raises(
        ValueError, match=f"lanes={lanes} must divide the batch of {batch_size} tokens and be"
    ):
        BatchSchedule(num_tokens=7, batch_size=batch_size, lanes=lanes)


def test_far_steps_need_nothing_before_them():
    schedule = BatchSchedule(num_tokens=10**7, batch_size=4096, block_tokens=4096, window_blocks=8, seed=0)
    far = schedule.positions(10**12)
    assert far.shape == (4096,)
    assert 0 <= far.min() <= far.max() < 10**7
    assert len(schedule._orders) <= 3


def test_pinned_order():
    # Resuming on another machine or with other libraries must meet the same batches.
    schedule = BatchSchedule(num_tokens=10, batch_size=5, block_tokens=2, window_blocks=2, seed=42)
    assert [schedule.positions(step).tolist() for step in range(4)] == [
        [4, 0, 1, 5, 9],
        [6, 8, 7, 3, 2],
        [1, 7, 0, 6, 3],
        [4, 2, 5, 9, 8],
    ]


@pytest.mark.parametrize("name", ["num_tokens", "batch_size", "block_tokens", "window_blocks", "lanes"])
def test_sizes_must_be_positive(name):
    sizes = {"num_tokens": 4, "batch_size": 2, "block_tokens": 2, "window_blocks": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
        BatchSchedule(**sizes)


@pytest.mark.parametrize("starts", [(1, 2), (0, 2, 2), (0, 4), (0, 3, 1)])
def test_block_starts_must_increase_within_the_view(starts):
    with pytest.raises(ValueError, match="block_starts"):
        BatchSchedule(num_tokens=4, batch_size=2, block_starts=starts)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="must not be negative"):
        BatchSchedule(num_tokens=4, batch_size=2).positions(-1)
