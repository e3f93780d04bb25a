"""Linear attention over given features equals its weights, written out for all pairs of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.core.linear import linear_attention
from tests import quick

B, T, N, K, F, V = 2, 150, 4, 2, 5, 3
OPTIONS = {
    "bidirectional": (),
    "bidirectional, masked": ("mask",),
    "bidirectional, packed": ("segments", "mask"),
    "causal": ("causal",),
    "causal, gate": ("causal", "gate"),
    "causal, everything": ("causal", "gate", "mask", "segments"),
}


def problem(rng, parts):
    """Returns features, values and options. The gate has junk in padded slots."""
    draw = lambda *shape: jnp.asarray(rng.uniform(0.1, 1.0, shape), jnp.float32)  # noqa: E731
    arrays = {"phi_q": draw(B, T, N, F), "phi_k": draw(B, T, K, F)}
    # Values have a mean of zero. With a large mean, the gradients of features would be small
    # differences of large numbers.
    arrays["value"] = jnp.asarray(rng.normal(size=(B, T, K, V)), jnp.float32)
    options = {"is_causal": "causal" in parts}
    if "gate" in parts:
        arrays["log_decay"] = -draw(B, T, K)
    if "mask" in parts:
        options["key_value_mask"] = jnp.asarray(rng.random((B, T)) < 0.8)
    if "segments" in parts:
        options["segment_ids"] = jnp.broadcast_to(jnp.arange(T) // 40, (B, T))
    return arrays, options


def all_pairs(
    phi_q, phi_k, value, log_decay=None, *, is_causal, key_value_mask=None, segment_ids=None
):
    """Computes the definition: weights of all pairs, and then a weighted mean."""
    mask = jnp.ones((B, T), bool) if key_value_mask is None else key_value_mask
    visible = jnp.broadcast_to(mask[:, None, :], (B, T, T))
    if is_causal:
        visible &= jnp.tril(jnp.ones((T, T), bool)) & mask[:, :, None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    gate = jnp.zeros((B, T, K)) if log_decay is None else log_decay
    total = jnp.cumsum(jnp.where(mask[..., None], gate, 0.0), axis=1)
    decay = jnp.exp(jnp.where(visible[..., None], total[:, :, None] - total[:, None], -jnp.inf))
    repeat = lambda x: jnp.repeat(x, N // K, axis=-1)  # noqa: E731
    phi_k, value = jnp.repeat(phi_k, N // K, axis=2), jnp.repeat(value, N // K, axis=2)
    with jax.default_matmul_precision("highest"):
        weights = jnp.einsum("btnf,bsnf->btsn", phi_q, phi_k) * repeat(decay)
        rows = jnp.einsum("btsn,bsnv->btnv", weights, value)
    mass = weights.sum(axis=2)[..., None]
    return jnp.where(mass > 0, rows / jnp.where(mass > 0, mass, 1.0), 0.0)


@pytest.mark.parametrize("name", OPTIONS)
def test_linear_attention_is_its_definition(name, rng, assert_close):
    arrays, options = problem(rng, OPTIONS[name])
    cotangent = jnp.asarray(rng.normal(size=(B, T, N, V)), jnp.float32)
    kept = options.get("key_value_mask", jnp.ones((B, T), bool))[..., None, None]

    @quick.jit
    def both(arrays):
        def run(function):
            # A padded slot belongs to the segment before it. Its output is not compared.
            out, pull_back = jax.vjp(lambda arrays: function(**arrays, **options) * kept, arrays)
            return out, pull_back(cotangent)[0]

        return run(linear_attention), run(all_pairs)

    (out, gradients), (want, want_gradients) = both(arrays)
    assert_close("out", out, want, kind="outputs")
    assert_close("gradients", gradients, want_gradients, kind="gradients")


@pytest.mark.parametrize("is_causal", [False, True])
def test_small_features_have_the_gradients_of_large_ones(is_causal, rng, assert_close):
    arrays, _ = problem(rng, ())
    small = 1e-12  # the square of a mass of 1e-24 is zero in float32
    scales = {"phi_q": small, "phi_k": small, "value": 1.0}

    @quick.jit
    def gradients(arrays):
        def loss(arrays):
            return jnp.square(linear_attention(**arrays, is_causal=is_causal)).sum()

        return jax.grad(loss)(arrays)

    want = gradients(arrays)
    got = gradients({name: x * scales[name] for name, x in arrays.items()})
    got = {name: x * scales[name] for name, x in got.items()}
    assert_close("gradients", got, want, kind="gradients")


def test_a_sequence_in_two_parts_is_the_whole(rng, assert_close):
    arrays, options = problem(rng, OPTIONS["causal, everything"])
    vectors = {name: options.pop(name) for name in ("key_value_mask", "segment_ids")}

    def part(arrays, span, state):
        cut = {name: x[:, span] for name, x in arrays.items()}
        return linear_attention(**cut, is_causal=True, initial_state=state, return_state=True)

    @quick.jit
    def both(arrays):
        first, state = part(arrays, slice(0, 47), None)
        second, state = part(arrays, slice(47, T), state)
        whole = linear_attention(**arrays, is_causal=True, return_state=True)
        return (jnp.concatenate([first, second], axis=1), state), whole

    assert_close("out and state", *both(arrays | vectors), kind="resumed")


def test_no_tokens_and_wrong_calls():
    phi, value = jnp.ones((2, 0, 2, 3)), jnp.ones((2, 0, 2, 4))
    for is_causal in (False, True):
        assert linear_attention(phi, phi, value, is_causal=is_causal).shape == (2, 0, 2, 4)
    phi, value = jnp.ones((1, 4, 2, 3)), jnp.ones((1, 4, 2, 4))
    with pytest.raises(ValueError, match="equal features"):
        linear_attention(phi[..., :2], phi, value)
    with pytest.raises(ValueError, match="direction"):
        linear_attention(phi, phi, value, log_decay=jnp.zeros((1, 4, 2)))
    with pytest.raises(ValueError, match="mix segments"):
        linear_attention(phi, phi, value, segment_ids=np.zeros((1, 4), int), return_state=True)
