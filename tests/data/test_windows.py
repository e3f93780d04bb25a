"""The parts of the data pipelines are windows, pieces of documents, and short batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from race_jax.data.windows import Pieces, ShiftedWindows, TokenStream, filled

T = 8


def test_an_epoch_visits_windows_that_do_not_overlap():
    ids = np.arange(100)
    windows = ShiftedWindows(ids, T, seed=3)
    starts = []
    for epoch in range(6):
        seen = np.concatenate([windows[epoch * len(windows) + i][:-1] for i in range(11)])
        assert len(windows) == 11
        np.testing.assert_array_equal(seen, seen[0] + np.arange(11 * T))
        starts.append(int(seen[0]))
    assert len(set(starts)) > 2
    assert set(starts) <= set(range(T))


@given(st.integers(1, 12), st.integers(0, 40))
def test_every_window_is_whole_at_any_length(length, extra):
    ids = np.arange(length + 1 + extra)
    windows = ShiftedWindows(ids, length, seed=0)
    for index in range(4 * len(windows)):
        assert len(windows[index]) == length + 1


def test_an_epoch_uses_every_piece_once(rng):
    documents = [np.arange(n) for n in rng.integers(0, 30, size=20)]
    pieces = Pieces(TokenStream.of(documents), T)
    targets = np.concatenate([pieces[i][1:] for i in range(len(pieces))])
    np.testing.assert_array_equal(targets, np.concatenate([ids[1:] for ids in documents]))
    assert pieces.num_targets == len(targets)


def test_rows_of_a_short_batch_are_filled_with_zeros():
    batch = {"inputs": np.ones((3, 2), np.int32), "weights": np.ones((3, 2), np.float32)}
    whole = filled(batch, 4)
    for name in batch:
        np.testing.assert_array_equal(whole[name], [[1, 1], [1, 1], [1, 1], [0, 0]])
        assert whole[name].dtype == batch[name].dtype
