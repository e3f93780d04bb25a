"""The scan over spans, by its two ways, against one span after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.core import scan

SPANS = 8


def draw_spans(rng):
    """Factors, two leaves of sums, and what enters the first span. Some factors are 0."""
    factors = rng.uniform(0.1, 1.0, (2, 3, SPANS))
    factors[0, :, 3] = factors[1, 0, 6] = 0.0
    shapes = {"numerator": (4, 5), "mass": (4,)}
    sums = {name: rng.standard_normal((2, 3, SPANS, *rest)) for name, rest in shapes.items()}
    first = {name: rng.standard_normal((2, 3, *rest)) for name, rest in shapes.items()}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), (factors, sums, first))


@pytest.fixture
def spans(rng):
    return draw_spans(rng)


def one_after_the_other(factors, sums, first, reverse=False):
    """The definition, in float64: what enters every span, and what leaves the last."""
    order = range(SPANS)[::-1] if reverse else range(SPANS)
    entering = {name: np.zeros(x.shape) for name, x in sums.items()}
    state = {name: np.float64(x) for name, x in first.items()}
    for span in order:
        for name, x in sums.items():
            entering[name][:, :, span] = state[name]
            factor = factors[:, :, span].reshape(2, 3, *(1,) * (x.ndim - 3))
            state[name] = factor * state[name] + x[:, :, span]
    return entering, state


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "back in time"])
@pytest.mark.parametrize("by", ["scan", "product"])
def test_scan_is_one_span_after_the_other(spans, by, reverse, assert_close):
    run = jax.jit(functools.partial(scan.exclusive, by=by, reverse=reverse))
    assert_close(by, run(*spans), one_after_the_other(*spans, reverse=reverse), kind="streamed")


def test_factors_are_the_decay_between_borders(rng):
    """The last span reaches past the sequence; a segment that ends in a span cuts it off."""
    log_decay = -rng.uniform(0, 1, (1, 10, 2)).astype(np.float32)
    segment = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1]])
    like = jnp.zeros((1, 2, 3))
    got = scan.span_factors(log_decay, segment, jnp.array([0]), count=3, size=4, like=like)
    assert got.shape == (1, 2, 3)
    np.testing.assert_allclose(got[0, :, 0], np.exp(log_decay[0, :4].sum(0)), rtol=1e-6)
    np.testing.assert_array_equal(got[0, :, 1], 0.0)
    np.testing.assert_allclose(got[0, :, 2], np.exp(log_decay[0, 8:].sum(0)), rtol=1e-6)
    other = scan.span_factors(None, segment, jnp.array([7]), count=3, size=4, like=like)
    np.testing.assert_array_equal(other[0, 0], [0.0, 0.0, 1.0])


def test_an_unknown_way_is_an_error(spans):
    with pytest.raises(KeyError):
        scan.exclusive(*spans, by="guess")
