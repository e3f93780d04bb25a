"""The library works under JAX's strict settings, with empty batches and with wide gates."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, serialization
from jax import export

import race_jax
from race_jax.core import masking, reference
from tests.problems import call_and_differentiate, make_problem, to_device

EVERYTHING = {"gate": 0.2, "padding": True, "segments": 2, "state": True}
MODES = {
    "causal": {"is_causal": True} | EVERYTHING,
    "causal, bucket": {"is_causal": True, "normalization": "bucket"} | EVERYTHING,
    "bidirectional": {"padding": True, "state": True},
    "bidirectional, packed": {"segments": 2},
    "bidirectional, bucket": {"normalization": "bucket"},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_operation_never_promotes_ranks(mode):
    problem = to_device(make_problem(queries=6, kv_heads=2, planes_per_head=True, **mode))
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(lambda p: call_and_differentiate(race_jax.race_attention, p), problem)


def test_the_layer_never_promotes_ranks():
    options = {
        "forget_gate": "data",
        "short_conv": "before",
        "output_norm": "rms",
        "output_gate": "silu",
    }
    layer = race_jax.RACEAttention(2, 16, rngs=nnx.Rngs(0), **options)
    with jax.numpy_rank_promotion("raise"):
        gradient = nnx.grad(lambda layer, x: layer(x, is_causal=True).sum())
        nnx.eval_shape(gradient, layer, jnp.ones((2, 6, 16)))


@pytest.mark.parametrize("is_causal", [True, False])
def test_an_empty_batch_gives_an_empty_result_and_no_gradient(is_causal):
    x, planes = jnp.zeros((0, 5, 2, 8)), jnp.ones((2, 2, 8))

    def total(x, planes):
        return race_jax.race_attention(x, x, x, planes, is_causal=is_causal).sum()

    d_x, d_planes = jax.jit(jax.grad(total, (0, 1)))(x, planes)
    assert d_x.shape == x.shape
    assert not d_planes.any()


@pytest.mark.parametrize("is_causal", [True, False])
def test_export_for_any_batch_and_length(is_causal, rng, assert_close):
    planes = race_jax.init_planes(jax.random.key(0), num_tables=2, num_planes=2, head_dim=8)

    def attend(x):
        return race_jax.race_attention(x, x, x, planes, is_causal=is_causal)

    like = export.symbolic_args_specs(jnp.zeros((2, 40, 2, 8)), "b, t, 2, 8")
    compiled = jax.jit(attend)
    exported = export.export(compiled)(like)
    for length in (1, 300):
        x = jnp.asarray(rng.normal(size=(1, length, 2, 8)), jnp.float32)
        assert_close(f"{length}", exported.call(x), compiled(x), kind="resumed")


def test_a_gate_out_of_range_is_clamped_under_a_trace():
    gate = jnp.array([[[2.0], [0.0], [-3.0], [-80.0], [-1e9]]])
    got, pull = jax.vjp(jax.jit(lambda g: masking.bound_log_decay(g, None)), gate)
    assert got.ravel().tolist() == [0.0, 0.0, -3.0, -80.0, -80.0]
    assert pull(jnp.ones_like(gate))[0].ravel().tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("wide", ["log_decay", "sharpness", "planes", "state.mass", "value"])
def test_one_float64_argument_widens_the_others(wide):
    with jax.enable_x64(True):
        problem = to_device(make_problem(queries=6, is_causal=True, gate=0.2, state=True))
        problem = problem.replace(**{wide: problem.arrays[wide].astype(jnp.float64)})
        outs, gradients = jax.eval_shape(
            lambda p: call_and_differentiate(race_jax.race_attention, p), problem
        )
        assert outs["state.mass"].dtype == jnp.float64
        assert outs["out"].dtype == problem.arrays["value"].dtype
        assert {n: x.dtype for n, x in gradients.items()} == {
            f"d_{n}": x.dtype for n, x in problem.arrays.items()
        }


def test_numpy_float64_gives_no_warning():
    x = np.ones((1, 3, 1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = race_jax.race_attention(x, x, x, np.ones((1, 2, 4)), is_causal=True)
    assert out.dtype == jnp.float32


def test_flax_serializes_a_state():
    layer = race_jax.RACEAttention(2, 16, rngs=nnx.Rngs(0))
    _, state = layer(jnp.ones((1, 3, 16)), is_causal=True, state=layer.init_state(1))
    stored = serialization.to_bytes(state)
    restored = serialization.from_bytes(layer.init_state(1), stored)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_hessian_is_that_of_the_reference(rng, assert_close):
    """It differentiates the gradient in forward mode, which the operations of XLA allow."""
    x, planes = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 4), (1, 2, 4)))

    def total(op):
        def of(x):
            x = x[None, :, None]
            return (op(x, x, x, planes, sharpness=1.0, is_causal=True) ** 2).sum()

        return of

    got = jax.jit(jax.hessian(total(race_jax.race_attention)))(x)
    want = jax.jit(jax.hessian(total(reference.all_pairs)))(x)
    assert_close("hessian", got, want, kind="gradients")


def test_both_packages_are_typed():
    import importlib.resources

    for name in ("race_jax", "pallas_kernels"):
        assert importlib.resources.files(name).joinpath("py.typed").is_file()
