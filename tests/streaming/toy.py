"""A small recurrence to stream over, its closed form, and the two forms of streaming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from race_jax import streaming
from tests import quick

LENGTH = 23  # of the toy's sequence


def toy(params, state, segment):
    """A recurrence h_t = a h_{t-1} + x_t + cos(position), read by a nonlinear loss."""

    def token(carry, now):
        h, position = carry
        x, weight = now
        h = params["decay"] * h + x + jnp.cos(position.astype(h.dtype))[:, None]
        return (h, position + 1), weight @ jnp.tanh(h) @ params["read"]

    time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (segment["x"], segment["weight"]))
    state, losses = jax.lax.scan(token, (state["h"], state["position"]), time_first)
    return dict(zip(("h", "position"), state, strict=True)), (
        losses.sum(),
        {"weight": segment["weight"].sum(), "tokens": segment["weight"].size},
    )


def toy_arguments(dtype=np.float64, batch=2):
    """Parameters, state, sequence, and the gradient that arrives at the final state."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    params = {"decay": dtype([0.9, 0.5, 1.0]), "read": normal(3)}
    state = {"h": normal(batch, 3), "position": np.arange(batch, dtype=np.int32)}
    weight = rng.random((batch, LENGTH)).astype(dtype)
    sequence = {"x": normal(batch, LENGTH, 3), "weight": weight}
    return params, state, sequence, {"h": normal(batch, 3), "position": None}


def toy_by_hand(params, state, sequence):
    """The toy's first sum and final state, as the closed form h_t = sum_s a^(t-s) x_s."""
    time = np.arange(LENGTH)
    position = state["position"][:, None] + time
    x = sequence["x"] + np.cos(position)[..., None]
    power = jnp.tril(params["decay"][:, None, None] ** jnp.abs(time[:, None] - time))
    h = jnp.einsum("dts,bsd->btd", power, x)
    h += params["decay"] ** (time[:, None] + 1) * state["h"][:, None]
    return jnp.einsum("bt,btd,d->", sequence["weight"], jnp.tanh(h), params["read"]), h[:, -1]


@functools.cache
def toy_whole():
    """The result that all forms must give, in float64."""
    with jax.enable_x64(True):
        params, state, sequence, d_state = toy_arguments()

        def value(params, h):
            return toy_by_hand(params, state | {"h": h}, sequence)

        (total, h), pull = jax.vjp(value, params, state["h"])
        d_params, d_h = pull((jnp.ones(()), d_state["h"]))
        weight = sequence["weight"]
        sums = total, {"weight": weight.sum(), "tokens": np.int64(weight.size)}
        state = {"h": h, "position": state["position"] + np.int32(LENGTH)}
        return jax.device_get((sums, state, d_params, d_h))


def in_memory(f, segment_length, **options):
    return quick.jit(streaming.value_and_grad(f, segment_length=segment_length, **options))


def on_host(f, segment_length, axis=1, **options):
    run = streaming.host_value_and_grad(f, **options)

    def cut_and_run(params, state, sequence, d_state=None):
        segments = streaming.Segments(sequence, segment_length, axis=axis)
        return run(params, state, segments, d_state)

    return cut_and_run


FORMS = {"in memory": in_memory, "on the host": on_host}


def scaled(scale, state, x):
    """A step without a state: the scaled sum of a segment."""
    return state, scale * x.sum()


def scaled_state(scale, state, x):
    """A step whose state (B, D) is a decaying sum of each row."""
    state = scale * state + x.sum(axis=1, keepdims=True)
    return state, jnp.sum(state**2)
