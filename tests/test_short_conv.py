"""The short convolution equals its definition, applied one token at a time."""

import jax
import numpy as np
import pytest

from race_jax.layers import short_conv

BATCH, LENGTH, FEATURES = 4, 12, 3
# Each row has another kind of padding: none, left, right, interior.
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1, 0],
    ],
    bool,
)
# Some runs meet between tokens, and some inside padding.
SEGMENTS = np.array(
    [
        [0, 0, 0, 0, 0, 1, 1, 2, 3, 3, 3, 3],
        [2, 2, 2, 2, 2, 2, 2, 2, 4, 4, 4, 4],
        [5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6],
        [5, 5, 5, 6, 6, 6, 6, 6, 6, 7, 7, 7],
    ]
)
SEGMENT = np.array([0, 2, 4, 5], np.int32)  # of the taps: goes on in all rows but the third

convolve = jax.jit(short_conv.short_convolution)


def naive(x, kernel, taps, segment, mask, ids):
    """Computes y_t = sum_j kernel_j x_{t-j} over a list of the tokens that are not padding."""
    out, new_taps = np.zeros_like(x), np.zeros_like(taps)
    for row in range(len(x)):
        tokens = [(segment[row], tap) for tap in taps[row]]
        for t in np.flatnonzero(mask[row]):
            tokens.append((ids[row, t], x[row, t]))
            earlier = [value for token_id, value in tokens if token_id == ids[row, t]][-4:]
            out[row, t] = sum(k * value for k, value in zip(kernel, earlier[::-1], strict=False))
        running = [value for token_id, value in tokens if token_id == tokens[-1][0]][-3:]
        new_taps[row, 3 - len(running) :] = running
    return out, new_taps


@pytest.fixture
def arrays(rng):
    shapes = (BATCH, LENGTH, FEATURES), (short_conv.WIDTH, FEATURES), (BATCH, 3, FEATURES)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def test_heads_have_kernels_of_their_own(rng, assert_close):
    heads = 2, FEATURES
    x = rng.normal(size=(BATCH, LENGTH, *heads)).astype(np.float32)
    kernel, taps = (rng.normal(size=(*n, *heads)).astype(np.float32) for n in ((4,), (BATCH, 3)))
    options = {"segment": SEGMENT, "mask": MASK, "segment_ids": SEGMENTS}
    out, after = convolve(x, kernel, taps=taps, **options)
    for n in range(2):
        flat = x[:, :, n], kernel[:, n], taps[:, :, n]
        want = naive(*flat, SEGMENT, MASK, SEGMENTS)
        assert_close(f"head {n}", (out[:, :, n], after[:, :, n]), want, kind="outputs")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_is_its_definition(arrays, assert_close, padded, packed):
    x, kernel, taps = arrays
    mask = MASK if padded else np.ones_like(MASK)
    ids = SEGMENTS if packed else np.repeat(SEGMENT[:, None], LENGTH, axis=1)
    want = naive(x, kernel, taps, SEGMENT, mask, ids)
    x, ids = np.where(mask[..., None], x, np.nan), np.where(mask, ids, -7)  # junk in padded slots
    options = {"mask": mask if padded else None, "segment_ids": ids if packed else None}
    got = convolve(x, kernel, taps=taps, segment=SEGMENT, **options)
    assert_close("output and taps", got, want, kind="outputs")


def test_split_anywhere_gives_the_whole(arrays, assert_close):
    x, kernel, taps = arrays
    ids = SEGMENTS
    whole, last = convolve(x, kernel, taps=taps, segment=SEGMENT, mask=MASK, segment_ids=ids)
    segment = SEGMENT
    parts = []
    for start in range(0, LENGTH, 2):
        now = slice(start, start + 2)
        mask = MASK[:, now]
        part, taps = convolve(
            x[:, now], kernel, taps=taps, segment=segment, mask=mask, segment_ids=ids[:, now]
        )
        parts.append(part)
        for slot in range(2):
            segment = np.where(mask[:, slot], ids[:, start + slot], segment).astype(np.int32)
    assert_close("output", np.concatenate(parts, axis=1), np.asarray(whole), kind="resumed")
    assert_close("taps", taps, last, kind="rerun")


def test_identity_kernel_passes_tokens_through(arrays, assert_close):
    x, _, taps = arrays
    kernel = short_conv.identity_kernel((FEATURES,))
    out, _ = convolve(x, kernel, taps=taps, segment=SEGMENT)
    assert_close("output", out, x, kind="rerun")


def test_no_tokens_leave_the_taps_as_they_are(arrays, assert_close):
    x, kernel, taps = arrays
    empty = np.zeros((BATCH, 0), int)
    out, after = convolve(
        x[:, :0], kernel, taps=taps, segment=SEGMENT, mask=empty.astype(bool), segment_ids=empty
    )
    assert out.shape == (BATCH, 0, FEATURES)
    assert_close("taps", after, taps, kind="rerun")
