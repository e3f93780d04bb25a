"""Shares and entropies of buckets, the context of a gate, and the figure, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax import diagnostics, init_planes

pytestmark = pytest.mark.once

SHARP = 40.0  # tanh of 9 times this is one in float32, so that buckets are hard


def test_hard_tokens_are_counted(assert_close):
    planes = jnp.eye(2)[None]  # one table, whose two planes are the axes
    tokens = jnp.array([[9.0, 9.0], [9.0, 9.0], [9.0, -9.0], [-9.0, 9.0]])
    found = diagnostics.buckets(tokens, planes, SHARP)
    # Corners in order: --, -+, +-, ++.
    assert_close("share", found.share, np.array([[0.0, 0.25, 0.25, 0.5]]), kind="identity")
    assert_close("entropy", found.entropy, np.array([1.5]), kind="identity")
    assert_close("softness", found.softness, np.array([0.0]), kind="identity")
    assert_close("information", found.information, np.array([1.5]), kind="identity")


def test_tokens_that_are_not_told_apart_are_as_soft_as_can_be(assert_close):
    found = diagnostics.buckets(jnp.zeros((2, 5, 3, 4)), jnp.ones((2, 3, 4)), 1.0)
    assert_close("share", found.share, np.full((2, 8), 1 / 8), kind="identity")
    assert_close("entropy", found.entropy, np.full(2, 3.0), kind="identity")
    assert_close("softness", found.softness, found.entropy, kind="identity")


def test_soft_shares_are_those_of_the_sigmoids(assert_close):
    beta = jnp.array([1.0, 2.0])  # for each of two heads
    found = diagnostics.buckets(jnp.full((1, 1, 2, 1), 0.5), jnp.ones((1, 1, 1)), beta)
    right = np.mean(1 / (1 + np.exp(-2 * np.array([1.0, 2.0]) * math.tanh(0.5))))
    assert_close("share", found.share, np.array([[1 - right, right]]), kind="identity")


def test_the_context_of_a_constant_decay_and_of_none(assert_close):
    decay, length = 0.9, 50
    log_decay = jnp.stack([jnp.full(length, math.log(decay)), jnp.zeros(length)], axis=-1)[None]
    got = diagnostics.effective_context(log_decay)
    t = np.arange(1, length + 1)
    want = np.stack([(1 - decay**t) / (1 - decay), t], axis=-1)[None]
    assert_close("context", got, want, kind="outputs")


def test_the_context_is_the_sum_of_the_decays(rng, assert_close):
    log_decay = -rng.exponential(size=(2, 9, 3))
    total = np.cumsum(log_decay, axis=1)
    want = np.stack(
        [np.exp(total[:, t : t + 1] - total[:, : t + 1]).sum(axis=1) for t in range(9)], axis=1
    )
    got = diagnostics.effective_context(jnp.asarray(log_decay, jnp.float32))
    assert_close("context", got, want, kind="outputs")


def test_the_figure_shows_what_it_is_given(tmp_path):
    path = tmp_path / "found.svg"
    errors = diagnostics.Errors(np.array([1, 4]), np.array([0.4, 0.2]), np.array([0.1, 0.1]))
    assert errors.slope == pytest.approx(-0.5)
    found = diagnostics.buckets(jnp.zeros((5, 4)), jnp.ones((2, 3, 4)))
    diagnostics.draw(path, errors={"my line": errors}, buckets=found, context=jnp.ones((1, 4, 2)))
    text = path.read_text()
    for words in ("my line", "1 / √L", "entropy 3.00 of 3 bits", "effective context", "head 1"):
        assert words in text
    with pytest.raises(ValueError, match="nothing to draw"):
        diagnostics.draw(path)
    with pytest.raises(ValueError, match=r"an SVG file; got .*found.png"):
        diagnostics.draw(tmp_path / "found.png", buckets=found)
    with pytest.raises(TypeError, match="errors must be a dict"):
        diagnostics.draw(path, errors=errors)


def test_a_flat_target_is_met_by_the_softest_hash_and_a_sharp_one_by_a_harder_hash():
    # Four clusters of equal tokens, at right angles to each other.
    x = 3 * jnp.repeat(jnp.eye(4), 3, axis=0)[None, :, None]
    flat = jnp.ones((1, 1, 12, 12))
    sharp = jnp.kron(jnp.eye(4), jnp.ones((3, 3)))[None, None]

    def choose(target):
        return diagnostics.suggest(
            jax.random.key(0), x, x, features=8, target=target, sharpnesses=(0.5, 8.0)
        )

    flat, sharp = choose(flat), choose(sharp)
    assert flat.best[:3] == (1, 4, 0.5)
    assert sharp.best.sharpness == 8.0
    assert sharp.best.num_planes > 1
    assert sharp.best.error < 0.4
    for found in (flat, sharp):
        errors = [trial.error for trial in found.trials]
        assert errors == sorted(errors)
        sizes = {(t.num_planes, t.num_tables, t.sharpness) for t in found.trials}
        assert sizes == {(p, 8 // 2**p, b) for p in (1, 2, 3) for b in (0.5, 8.0)}


def test_a_trial_has_the_error_of_its_tables(assert_close):
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    found = diagnostics.suggest(
        jax.random.key(1), x, x, features=4, sharpnesses=(2.0,), is_causal=True, draws=1
    )
    (trial,) = (t for t in found.trials if t.num_planes == 1)
    (key,) = jax.random.split(jax.random.key(1), 1)
    planes = init_planes(key, num_tables=2, num_planes=1, head_dim=4, scale=0.5)
    weights = [
        diagnostics.attention_weights(kernel, is_causal=True)
        for kernel in (
            diagnostics.hash_kernel(x, x, planes, 2.0),
            diagnostics.softmax_kernel(x, x),
        )
    ]
    assert_close("error", trial.error, np.array(diagnostics.distance(*weights)), kind="outputs")


def test_a_budget_of_no_plane_is_refused():
    x = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="features must be at least 2"):
        diagnostics.suggest(jax.random.key(0), x, x, features=1)
