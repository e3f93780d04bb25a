"""What goes wrong with data and arguments, and how the host reads ahead and reports."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax import streaming
from race_jax.streaming.segments import read_ahead
from tests.streaming.toy import scaled, scaled_state

pytestmark = pytest.mark.once

ROW = np.ones((1, 4))


def test_progress_counts_every_segment_of_every_pass():
    seen = []
    run = streaming.host_value_and_grad(scaled, progress=lambda *now: seen.append(now))
    run(2.0, (), streaming.Segments(np.ones((1, 9)), 1))
    assert seen == [(i + 1, 9 + 6 + 9) for i in range(24)]
    seen.clear()
    fold = streaming.host_fold(scaled, progress=lambda *now: seen.append(now))
    fold(2.0, (), streaming.Segments(np.ones((1, 9)), 1))
    assert seen == [(i + 1, 9) for i in range(9)]


def test_the_next_segment_is_read_ahead():
    asked = [threading.Event() for _ in range(3)]

    class Slow:
        def __len__(self):
            return len(asked)

        def __getitem__(self, index):
            asked[index].set()
            return np.full(1, index)

    reading = read_ahead(Slow(), [0, 1, 2, 1])
    assert next(reading) == [0]
    assert asked[1].wait(60)
    assert not asked[2].is_set()
    assert [int(x[0]) for x in reading] == [1, 2, 1]


class Changing:
    """Segments of which one changes after it was first read."""

    def __init__(self, change):
        self.change, self.reads = change, 0

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.reads += 1
        x = np.ones((1, 2), np.float32)
        return self.change(x) if index == 2 and self.reads > 4 else x


@pytest.mark.parametrize(
    "change", [lambda x: x + 1, lambda x: x[:, :1], lambda x: x.view(np.int32), lambda x: {"x": x}]
)
def test_data_that_changes_between_the_passes_is_noticed(change):
    with pytest.raises(ValueError, match="segment 2 of 4 differs from what was read before"):
        streaming.host_value_and_grad(scaled)(2.0, (), Changing(change))


def test_keys_of_random_numbers_are_refused():
    keys = jax.random.split(jax.random.key(0), 4)[None]
    with pytest.raises(TypeError, match=r"keys of dtype key<fry>.*jax\.random\.key_data"):
        streaming.host_value_and_grad(scaled)(2.0, (), streaming.Segments(keys, 2))


def test_a_file_that_is_cut_short_is_noticed(tmp_path):
    file = tmp_path / "tokens.bin"
    np.arange(100_000, dtype=np.uint16).tofile(file)
    tokens = np.memmap(file, np.uint16, mode="r")[None]
    sequence = {"x": tokens[:, :-1], "weight": np.broadcast_to(np.float32(1), (1, 99_999))}
    segments = streaming.Segments(sequence, 50_000)
    assert len(segments) == 2
    assert segments[1]["x"].shape == segments[1]["weight"].shape == (1, 49_999)
    with file.open("r+b") as stream:
        stream.truncate(150_000)
    with pytest.raises(ValueError, match=r"tokens.bin had 200000 bytes .* has 150000 now"):
        segments[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_segment_that_is_not_finite_is_named(bad):
    x = np.ones((1, 9), np.float32)
    x[0, 6] = bad
    segments = streaming.Segments(x, 2)
    for run in (
        streaming.host_value_and_grad(scaled),
        streaming.host_value_and_grad(scaled, truncated=True),
        streaming.host_fold(scaled),
    ):
        with pytest.raises(FloatingPointError, match="the sums of segment 3 "):
            run(2.0, (), segments)


def test_a_last_state_that_is_not_finite_is_named_in_every_form():
    def f(scale, state, x):
        return state * scale + jnp.log(8 - x.max()), (scale * x.sum(),)

    segments = streaming.Segments(np.arange(10, dtype=np.float32)[None], 4)
    for options in ({}, {"truncated": True}):
        with pytest.raises(FloatingPointError, match="state after segment 2 "):
            streaming.host_value_and_grad(f, **options)(1.0, jnp.float32(0), segments)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_narrow_integers_are_added_in_32_bits(dtype):
    def f(scale, state, x):
        return state, (scale * x.sum(), jnp.asarray(100, dtype))

    x = np.ones((1, 10), np.float32)
    here = streaming.value_and_grad(f, segment_length=2)(1.0, (), x).sums[1]
    there = streaming.host_value_and_grad(f)(1.0, (), streaming.Segments(x, 2)).sums[1]
    assert int(here) == int(there) == int(streaming.fold(f, segment_length=2)(1.0, (), x)[1][1])
    assert int(here) == 500


def run_toy(f=scaled, params=2.0, state=(), x=ROW, d_state=None, **options):
    options = {"segment_length": 2} | options
    return streaming.value_and_grad(f, **options)(params, state, x, d_state)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: run_toy(segment_length=0), ValueError, "segment_length must be at least 1, got 0"),
        (lambda: run_toy(group_size=0), ValueError, "group_size must be at least 1, got 0"),
        (
            lambda: streaming.host_value_and_grad(scaled, group_size=0),
            ValueError,
            "group_size must be at least 1, got 0",
        ),
        (
            lambda: run_toy(segment_length=2.0),
            TypeError,
            "segment_length must be an integer, got 2",
        ),
        (lambda: streaming.Segments(np.ones((1, 2)), 0), ValueError, "got 0"),
        (
            lambda: streaming.host_value_and_grad(scaled)(2.0, (), {"x": np.ones((1, 4))}),
            TypeError,
            "not by names; streaming.fold and value_and_grad take a dict",
        ),
        (
            lambda: streaming.host_fold(scaled)(2.0, (), {"x": np.ones((1, 4))}),
            TypeError,
            "not by names",
        ),
        (lambda: streaming.Segments(np.ones((1, 2)), 2)[1], IndexError, "there are 1 segments"),
        (
            lambda: run_toy(x={"a": np.ones((1, 4)), "b": np.ones((1, 3))}),
            ValueError,
            r"got sequence\['a'\] 4, sequence\['b'\] 3",
        ),
        (lambda: run_toy(x=()), ValueError, "got no arrays"),
        (lambda: run_toy(x=np.ones(4)), ValueError, r"shape \(4,\) and no axis 1"),
        (lambda: run_toy(params={"n": 2}), TypeError, r"params\['n'\] has dtype int32"),
        (
            lambda: run_toy(truncated=True, d_state=()),
            ValueError,
            "d_state has no meaning with truncated=True",
        ),
        (
            lambda: run_toy(scaled_state, state=np.ones((1, 3)), d_state=np.ones((1, 2))),
            ValueError,
            r"shapes \[\(1, 3\)\]; got \[\(1, 2\)\]",
        ),
        (
            lambda: run_toy(lambda p, s, x: (jnp.ones(2), p), state=jnp.ones(3)),
            TypeError,
            r"state was float32\[3\] and became float32\[2\]",
        ),
        (lambda: run_toy(lambda p, s, x: (None, p), state=0.0), TypeError, "a state like the one"),
        (lambda: run_toy(lambda p, s, x: p), TypeError, r"as \(state, sums\); got"),
        (
            lambda: run_toy(lambda p, s, x: (s, {"nats": p * x})),
            TypeError,
            r"sums\['nats'\] has shape \(1, 2\)",
        ),
        (lambda: run_toy(lambda p, s, x: (s, {"nats": p})), TypeError, r"such as \(nats, weight\)"),
        (lambda: run_toy(lambda p, s, x: (s, (1, p))), TypeError, r"such as \(nats, weight\)"),
    ],
)
def test_bad_arguments_are_refused_in_words(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_a_sequence_too_long_for_one_program_is_refused():
    shape = jax.ShapeDtypeStruct((1, 2**31), jnp.uint8)
    with pytest.raises(ValueError, match="may have 2147483647 tokens, got 2147483648"):
        jax.eval_shape(streaming.value_and_grad(scaled, segment_length=2**20), 1.0, (), shape)
