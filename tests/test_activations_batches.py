"""Views, shuffled batches and sequential batches against the arrays they were written from."""

import itertools
import threading

import ml_dtypes
import numpy as np
import pytest
from activations_cases import CHUNK, copied_store, corpus, write_store

from crosscoder_jax.activations import (
    ActivationStore,
    Batches,
    BatchSchedule,
    Split,
    StoreError,
    TokenView,
    sequential_batches,
    spread_sample,
)

LENGTHS = (7, 1, 30, 12, 50, 3, 3, 64, 20, 9, 40, 5, 31, 2, 17)
TEXT = corpus(LENGTHS)
NUM_TOKENS = sum(LENGTHS)
STORED = TEXT.stored()
SPLIT = Split(fraction=0.4, seed=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("written") / "store", TEXT)


@pytest.fixture(scope="module", params=["all", "training", "held out"])
def view(store, request):
    if request.param == "all":
        return TokenView(store)
    return TokenView.of_split(store, SPLIT, held_out=request.param == "held out")


def indices(view):
    """Token index of every position, written out."""
    return np.concatenate([np.arange(start, stop) for start, stop in view.ranges])


def test_view_is_dense(view):
    index = indices(view)
    assert view.num_tokens == len(view) == len(index)
    positions = np.random.default_rng(0).permutation(len(index))
    np.testing.assert_array_equal(view.token_index(positions), index[positions])
    np.testing.assert_array_equal(view.read_positions(positions), STORED[index[positions]])
    assert view.read_positions(np.zeros(0, np.int64)).shape == (0, 8)


def test_the_two_sides_share_no_document(store):
    sides = [TokenView.of_split(store, SPLIT, held_out=held_out) for held_out in (False, True)]
    documents = [set(TEXT.columns["documents"][indices(side)].tolist()) for side in sides]
    assert documents[0] | documents[1] == set(range(len(LENGTHS)))
    assert not documents[0] & documents[1]


@pytest.mark.parametrize("position", [-1, 10**6])
def test_positions_outside_the_view_are_refused(view, position):
    with pytest.raises(ValueError, match="are not within 0 to"):
        view.read_positions(np.array([0, position]))


@pytest.mark.parametrize(
    "ranges", [np.zeros((0, 2), int), [[3, 3]], [[5, 9], [2, 4]], [[0, 4], [3, 6]], [[0, 10**6]], [[-1, 5]]]
)
def test_impossible_ranges_are_refused(store, ranges):
    with pytest.raises(ValueError, match="token ranges"):
        TokenView(store, np.array(ranges))


def test_a_split_that_leaves_nothing_is_refused_with_the_remedy(store):
    with pytest.raises(ValueError, match="change the share"):
        TokenView.of_split(store, Split(fraction=0.0), held_out=True)


@pytest.mark.parametrize("block_tokens", [1, CHUNK, 3 * CHUNK, 1000])
def test_block_starts_are_where_files_begin(view, block_tokens):
    block = indices(view) // block_tokens
    expected = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist()]
    assert view.block_starts(block_tokens).tolist() == expected


def test_schedule_of_a_view_reads_no_file_twice_an_epoch(view, monkeypatch):
    schedule = view.schedule(10, window_tokens=50, seed=2)
    assert schedule.num_windows > 1
    reads = []
    original = ActivationStore.read_rows

    def counted(self, index):
        reads.extend(np.unique(index // CHUNK).tolist())
        return original(self, index)

    monkeypatch.setattr(ActivationStore, "read_rows", counted)
    batches = Batches(view, schedule)
    for window in schedule.windows(0, view.num_tokens):
        batches._load(window, *batches._shares(None), window.start, window.stop)
    assert sorted(reads) == sorted(set((indices(view) // CHUNK).tolist()))


def schedules(view):
    yield view.schedule(10, window_tokens=50, seed=2)
    yield BatchSchedule(num_tokens=len(view), batch_size=7, block_tokens=5, window_blocks=2, seed=0)
    yield BatchSchedule(num_tokens=len(view), batch_size=len(view) + 5, block_tokens=30, window_blocks=1)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("prefetch", [True, False])
def test_batches_follow_the_schedule(view, which, prefetch):
    schedule = next(itertools.islice(schedules(view), which, None))
    batches = Batches(view, schedule, prefetch=prefetch)
    steps = 2 * len(view) // schedule.batch_size + 2
    expected = [STORED[view.token_index(schedule.positions(step))] for step in range(steps)]
    iterated = list(batches.iterate(0, steps))
    assert len(iterated) == steps
    for step in range(steps):
        assert iterated[step].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(iterated[step], expected[step])
        np.testing.assert_array_equal(batches.batch(step), expected[step])
    # Starting late, asking backwards and a fresh reader give the same batches.
    for step in (steps - 1, steps // 2, 0):
        np.testing.assert_array_equal(Batches(view, schedule).batch(step), expected[step])
        np.testing.assert_array_equal(next(batches.iterate(step, steps)), expected[step])
    assert list(batches.iterate(3, 3)) == []


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 10), slice(9, 10), slice(None, 5), slice(-4, None)])
def test_a_host_gets_its_rows_of_the_global_batch(view, rows):
    batches = Batches(view, view.schedule(10, window_tokens=50, seed=2))
    steps = range(5, 5 + 2 * len(view) // 10)
    expected = [batches.batch(step)[rows] for step in steps]
    np.testing.assert_array_equal(list(batches.iterate(steps.start, steps.stop, rows)), expected)
    np.testing.assert_array_equal([batches.batch(step, rows) for step in steps], expected)


def test_a_host_reads_only_its_rows(store, monkeypatch):
    view = TokenView(store)
    counts = []
    original = TokenView.read_positions

    def counted(self, positions):
        counts.append(len(positions))
        return original(self, positions)

    monkeypatch.setattr(TokenView, "read_positions", counted)
    steps = NUM_TOKENS // 10
    assert (
        len(list(Batches(view, view.schedule(10, window_tokens=50)).iterate(0, steps, slice(2, 4)))) == steps
    )
    assert sum(counts) == 2 * steps


LANES = 4
SHARES = [
    # Rows of a batch of 12, of which every lane gives three.
    [slice(0, 12)],
    [slice(0, 6), slice(6, 12)],
    [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12)],
    [slice(0, 7), slice(7, 12)],  # a lane that two hosts have
    [np.array([0, 1, 2, 9, 10, 11]), slice(3, 9)],  # hosts that lie apart on the mesh
]


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_hosts_together_have_the_batches_of_one(view, shares, prefetch):
    schedule = view.schedule(12, window_tokens=100, seed=2, lanes=LANES)
    steps = range(3, 3 + 3 * len(view) // 12)
    expected = [STORED[view.token_index(schedule.positions(step))] for step in steps]
    for rows in shares:
        host = Batches(view, schedule, prefetch=prefetch)
        ours = list(host.iterate(steps.start, steps.stop, rows))
        np.testing.assert_array_equal(ours, [batch[rows] for batch in expected])
        np.testing.assert_array_equal([host.batch(step, rows) for step in steps], ours)


def test_a_host_reads_the_files_of_its_lanes_alone(store, monkeypatch):
    """Of 20 files in an epoch a host with one of four lanes reads 5, and what a cut between lanes divides."""
    view, files = TokenView(store), []
    original = ActivationStore.read_rows

    def counted(self, index):
        files[-1] |= set((index // CHUNK).tolist())
        return original(self, index)

    monkeypatch.setattr(ActivationStore, "read_rows", counted)
    schedule = view.schedule(12, window_tokens=100, seed=2, lanes=LANES)
    steps = NUM_TOKENS // 12  # within the first epoch
    for lane in range(LANES):
        files.append(set())
        list(Batches(view, schedule).iterate(0, steps, slice(3 * lane, 3 * lane + 3)))
    num_files = -(-NUM_TOKENS // CHUNK)
    assert set.union(*files) == set(range(num_files))
    assert sum(map(len, files)) <= num_files + LANES - 1
    assert max(map(len, files)) <= -(-num_files // LANES) + 1


def test_steps_in_order_read_each_window_once(store, monkeypatch):
    view = TokenView(store)
    batches = Batches(view, view.schedule(10, window_tokens=50))
    loads = []
    original = batches._load
    monkeypatch.setattr(batches, "_load", lambda *args: (loads.append(args[0]), original(*args))[1])
    for step in range(NUM_TOKENS // 10):
        batches.batch(step)
    assert len(loads) == len(set(loads)) == batches.schedule.num_windows
    assert len(batches._kept) == 2


def test_batches_are_the_callers_own(store):
    view = TokenView(store)
    batches = Batches(view, view.schedule(10, window_tokens=50))
    for make in (lambda: batches.batch(0), lambda: next(batches.iterate(0, 2))):
        before = make().copy()
        make()[:] = 0
        np.testing.assert_array_equal(make(), before)


@pytest.mark.parametrize(
    "rows", [slice(4, 4), slice(12, 20), slice(None, None, -1), np.array([3, 1]), np.array([2, 2])]
)
def test_impossible_rows_are_refused(store, rows):
    view = TokenView(store)
    with pytest.raises(ValueError, match="of a batch of 10: ask for some, in ascending order"):
        Batches(view, view.schedule(10)).batch(0, rows)


def test_schedule_of_another_view_is_refused(store):
    with pytest.raises(ValueError, match="the schedule is for 5 tokens, the view has"):
        Batches(TokenView(store), BatchSchedule(num_tokens=5, batch_size=2))


@pytest.mark.parametrize("prefetch", [True, False])
def test_damage_is_raised_by_the_batch_that_needs_it(store, tmp_path, prefetch):
    copy = copied_store(store, tmp_path / "store")
    path = copy.path / "acts" / "base" / "c" / "5" / "0"
    path.write_bytes(path.read_bytes()[:-9])
    view = TokenView(copy)
    schedule = view.schedule(4, window_tokens=32, seed=1)
    windows = list(schedule.windows(0, NUM_TOKENS))
    bad = next(w for w in windows if 5 in schedule.window_positions(w) // CHUNK)
    good_steps = bad.start // 4
    assert good_steps > 0  # else choose another seed
    iterator = Batches(view, schedule, prefetch=prefetch).iterate(0, NUM_TOKENS // 4)
    for step in range(good_steps):
        np.testing.assert_array_equal(next(iterator), STORED[schedule.positions(step)])
    with pytest.raises(StoreError, match="source 'base', tokens 80 to 96: it is truncated") as error:
        next(iterator)
    assert str(path) in str(error.value)
    assert not [t for t in threading.enumerate() if t.name.startswith("load-ahead")]


@pytest.mark.parametrize("batch_size", [1, 10, CHUNK, 97, NUM_TOKENS, 1000])
@pytest.mark.parametrize("prefetch", [True, False])
def test_sequential_batches_show_every_token_once_in_order(view, batch_size, prefetch):
    index = indices(view)
    batches = list(sequential_batches(view, batch_size, prefetch=prefetch))
    assert len(batches) == -(-len(index) // batch_size)
    valid = np.concatenate([batch.is_valid for batch in batches])
    assert valid.tolist() == [True] * len(index) + [False] * (len(valid) - len(index))
    whole = {
        name: np.concatenate([getattr(batch, name) for batch in batches])
        for name in ("acts", "tokens", "documents", "positions", "labels", "token_index")
    }
    np.testing.assert_array_equal(whole["acts"][valid], STORED[index])
    np.testing.assert_array_equal(whole["token_index"][valid], index)
    for name in ("tokens", "documents", "positions", "labels"):
        np.testing.assert_array_equal(whole[name][valid], TEXT.columns[name][index])
        assert np.all(whole[name][~valid] == -1)
    assert not np.any(whole["acts"][~valid].astype(np.float32))
    assert np.all(whole["token_index"][~valid] == -1)
    assert {batch.acts.shape for batch in batches} == {(batch_size, 8)}


def test_batch_size_must_be_positive(store):
    with pytest.raises(ValueError, match="batch_size=0 must be positive"):
        next(sequential_batches(TokenView(store), 0))


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 100, 10**6])
def test_spread_sample_is_spread_and_deterministic(view, num_tokens):
    count = min(num_tokens, len(view))
    sample = spread_sample(view, num_tokens)
    assert sample.shape == (count, 8)
    np.testing.assert_array_equal(sample, spread_sample(view, num_tokens))
    # Rows are distinct with certainty (random floats), so each gives its position away.
    rows = {STORED[i].tobytes(): position for position, i in enumerate(indices(view))}
    positions = [rows[row.tobytes()] for row in sample]
    assert positions == sorted(set(positions))
    if count == len(view):
        assert positions == list(range(count))
    elif count > 1:
        # Of equal parts each gives its share: no two neighbours are further apart than two parts.
        assert max(np.diff([0, *positions, len(view)])) <= 2 * -(-len(view) // min(count, 64))


def test_spread_sample_must_not_be_empty(store):
    with pytest.raises(ValueError, match="num_tokens=0 of a sample"):
        spread_sample(TokenView(store), 0)
