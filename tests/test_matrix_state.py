"""Gated linear attention and the gated delta rule equal their definitions, token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.core.gated_delta import gated_delta_attention
from race_jax.core.gated_linear import gated_linear_attention
from race_jax.core.matrix_state import MatrixState
from tests import quick

B, T, N, K, H, V = 2, 75, 4, 2, 5, 3
OPERATIONS = {
    "gated linear": (gated_linear_attention, {"log_decay": (K, H)}),
    "gated linear, one gate a head": (gated_linear_attention, {"log_decay": (K, 1)}),
    "gated delta": (gated_delta_attention, {"rate": (K,), "log_decay": (K,)}),
    "delta without a gate": (gated_delta_attention, {"rate": (K,)}),
}


def problem(rng, name):
    """Returns the arrays of a call, its masks, and a state that the first row continues."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=(B, T, *shape)), jnp.float32)  # noqa: E731
    arrays = {"query": draw(N, H), "key": draw(K, H), "value": draw(K, V)}
    if "delta" in name:
        arrays["key"] /= jnp.linalg.norm(arrays["key"], axis=-1, keepdims=True)
    for part, shape in OPERATIONS[name][1].items():
        arrays[part] = jax.nn.sigmoid(draw(*shape)) if part == "rate" else -jnp.abs(draw(*shape))
    masks = {
        "key_value_mask": jnp.asarray(rng.random((B, T)) < 0.8),
        "segment_ids": jnp.asarray(np.searchsorted([20, 41], np.arange(T)))[None]
        + jnp.array([[3], [4]]),
    }
    matrix = jnp.asarray(rng.normal(size=(B, K, H, V)), jnp.float32)
    return arrays, masks, MatrixState(matrix, jnp.array([3, 3], jnp.int32))


def token_by_token(
    query, key, value, rate=None, log_decay=None, *, key_value_mask, segment_ids, initial_state
):
    """Computes the definition by a loop over the tokens, with a gate a head or a channel."""
    decay = jnp.ones((B, T, K, 1)) if log_decay is None else jnp.exp(log_decay)
    decay = decay.reshape(B, T, K, -1)

    def add(state, token):
        (query, key, value, rate, decay), real, segment = token
        keep = jnp.where((segment == state.segment)[:, None, None], decay, 0.0)
        matrix = keep[..., None] * state.matrix
        if rate is not None:
            value = rate[..., None] * (value - jnp.einsum("bkh,bkhv->bkv", key, matrix))
        matrix = matrix + key[..., None] * value[..., None, :]
        matrix = jnp.where(real[:, None, None, None], matrix, state.matrix)
        state = MatrixState(matrix, jnp.where(real, segment, state.segment).astype(jnp.int32))
        out = jnp.einsum("bnh,bnhv->bnv", query, jnp.repeat(matrix, N // K, axis=1))
        return state, jnp.where(real[:, None, None], out, 0.0)

    tokens = (query, key, value, rate, decay), key_value_mask, segment_ids
    state, out = jax.lax.scan(
        add, initial_state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    )
    return jnp.moveaxis(out, 0, 1), state


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_chunks_are_the_definition(rng, assert_close, name):
    operation = OPERATIONS[name][0]
    arrays, masks, state = problem(rng, name)
    cotangents = rng.normal(size=(B, T, N, V)), rng.normal(size=(B, K, H, V))
    cotangents = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), cotangents)

    @quick.jit
    def both(arrays, matrix):
        def run(function):
            def of(arrays, matrix):
                start = MatrixState(matrix, state.segment)
                out, end = function(**arrays, **masks, initial_state=start)
                return (out, end.matrix), end.segment

            results, pull_back, segment = jax.vjp(of, arrays, matrix, has_aux=True)
            return results, segment, pull_back(cotangents)

        return run(functools.partial(operation, return_state=True)), run(token_by_token)

    with jax.default_matmul_precision("highest"):
        (out, segment, gradients), (want, want_segment, want_gradients) = both(arrays, state.matrix)
    assert_close("output and matrix", out, want, kind="outputs")
    np.testing.assert_array_equal(segment, want_segment)
    assert_close("gradients", gradients, want_gradients, kind="gradients")


@pytest.mark.parametrize("name", ["gated linear", "gated delta"])
def test_strong_gates_and_junk_in_padded_slots_do_no_harm(rng, assert_close, name):
    operation = OPERATIONS[name][0]
    arrays, masks, _ = problem(rng, name)
    mask = masks["key_value_mask"]
    arrays["log_decay"] = arrays["log_decay"].at[:, ::3].set(-1e4)
    pads = ~np.asarray(mask)

    @jax.jit
    def run(arrays):
        def loss(arrays):
            out = operation(**arrays, **masks)
            return (out**2).sum(), out

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    junk = {
        part: jnp.where(pads.reshape(B, T, *(1,) * (x.ndim - 2)), jnp.nan, x)
        for part, x in arrays.items()
    }
    got, want = run(junk), run(arrays)
    assert_close("outputs and gradients", got, want, kind="rerun")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query": (B, T, 3, H)}, "N must be a multiple of K"),
        ({"query": (B, T, N, 4)}, "query and key must have one width"),
        ({"value": (B, T, 1, V)}, "key and value in K"),
        ({"log_decay": (B, T, K, 2)}, r"log_decay must be \(B, T, K, H\)"),
        ({"log_decay": (B, 1, K, H)}, r"log_decay must start with \(B, T, K\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, words):
    shapes = {"query": (B, T, N, H), "key": (B, T, K, H), "value": (B, T, K, V)}
    shapes |= {"log_decay": (B, T, K, H)} | changes
    with pytest.raises(ValueError, match=words):
        gated_linear_attention(**{name: jnp.zeros(shape) for name, shape in shapes.items()})
