"""The forget gate (half-lives, biases and decays) and the output gate."""

import jax
import numpy as np
import pytest

from race_jax.layers import gates


def test_half_lives_spread_geometrically_and_one_head_gets_the_longest():
    np.testing.assert_allclose(gates.half_lives(3, 512.0), [2.0, 32.0, 512.0])
    np.testing.assert_allclose(gates.half_lives(1, 512.0), [512.0])


def test_biases_spread_from_one_to_six_or_by_half_lives():
    np.testing.assert_allclose(gates.initial_bias(6, None), [1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(gates.initial_bias(1, None), [6])
    bias = gates.initial_bias(3, 512.0)
    halved = (1 / (1 + np.exp(-bias))) ** gates.half_lives(3, 512.0)
    np.testing.assert_allclose(halved, 0.5)


@pytest.mark.parametrize("forget_gate", ["fixed", "learned", "data"])
def test_log_decay_is_its_definition(rng, assert_close, forget_gate):
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 4)).astype(np.float32)
    bias = gates.initial_bias(4, 64.0).astype(np.float32)
    params = {"gate_bias": bias, "gate_kernel": kernel}
    settings = {"forget_gate": forget_gate, "half_life": 64.0, "num_kv_heads": 4}
    got = jax.jit(lambda x, params: gates.log_decay(x, params, **settings))(x, params)
    logits = bias + x @ kernel if forget_gate == "data" else np.broadcast_to(bias, (2, 5, 4))
    want = -np.log1p(np.exp(-logits.astype(np.float64)))
    assert_close("log_decay", got, want, kind="outputs")
    assert got.dtype == np.float32


def test_no_gate_is_none():
    x = jax.numpy.zeros((1, 2, 3))
    assert gates.log_decay(x, {}, forget_gate=None, half_life=None, num_kv_heads=1) is None


def test_output_norm_and_gate_are_their_definitions(rng, assert_close):
    heads = 1e-2 * rng.normal(size=(2, 5, 3, 4)).astype(np.float32)
    x = rng.normal(size=(2, 5, 6)).astype(np.float32)
    kernel = rng.normal(size=(6, 3, 4)).astype(np.float32)
    gate = np.einsum("btd,dnv->btnv", x, kernel)
    scale = rng.normal(size=4).astype(np.float32)
    rms = np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + 1e-6)
    wants = {"silu": gate / (1 + np.exp(-gate)), "sigmoid": 1 / (1 + np.exp(-gate))}

    @jax.jit
    def run(heads, x, kernel, scale):
        return {kind: gates.output_gate(heads, x, kernel, kind) for kind in gates.OUTPUT_GATES} | {
            "rms": gates.rms_norm(heads, scale)
        }

    wants = {kind: heads * want for kind, want in wants.items()} | {"rms": heads / rms * scale}
    assert_close("heads", run(heads, x, kernel, scale), wants, kind="outputs")
    assert not any(np.asarray(out).any() for out in run(0 * heads, x, kernel, scale).values())
