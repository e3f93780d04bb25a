"""The compiled kernels on a card, against the dense form in float64: `pytest -m gpu`."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import pallas_kernels
from pallas_kernels import Block, Blocks, backend
from pallas_kernels.backend import Output
from pallas_kernels.plan import plan
from race_jax.core import passes
from race_jax.core.xla.chunk import Sums
from tests.kernels import dense
from tests.kernels.block_sizes import BLOCKS, PIPELINES
from tests.kernels.dense import Case

pytestmark = pytest.mark.gpu

FULL = {"heads": 4, "gate": True, "mask": True, "packed": True}
CAUSAL = [
    # dβ is one number per head, and its terms may cancel. With few tokens there are many heads.
    Case(length=1, heads=8, kv_heads=8, tables=4, planes=4, value_dim=128, gate=True),
    Case(length=63, tables=2, planes=2, value_dim=64, **FULL),
    Case(length=64, tables=3, planes=3, value_dim=16, heads=8, sharpness=8.0),
    Case(length=65, tables=4, planes=4, value_dim=256, mask=True),
    Case(batch=3, length=1000, tables=4, planes=4, value_dim=128, **FULL),
    Case(length=1000, tables=8, planes=3, value_dim=80, gate=True, sharpness=8.0),
    Case(length=4160, tables=3, planes=3, value_dim=64, packed=True),
    Case(length=136, tables=8, planes=3, value_dim=64, heads=8, gate=True),
    # A sequence with one head must not read or write into the next sequence.
    Case(batch=2, length=136, heads=1, kv_heads=1, tables=4, planes=4, value_dim=64, gate=True),
    # One head. In this draw the terms of dβ do not cancel.
    Case(batch=4, length=40, heads=2, kv_heads=1, tables=3, planes=3, value_dim=64),
    # The differences between buckets are a hundredth of their mean.
    Case(length=264, tables=4, planes=4, value_dim=128, around=10_000),
    Case(length=136, heads=4, tables=3, planes=3, value_dim=64, gate=True, around=10_000),
    # The most shared memory that the kernels of warpgroups ask for.
    Case(batch=2, length=1000, tables=8, planes=3, value_dim=128, **FULL),
    Case(length=1000, tables=16, planes=2, value_dim=64, use_tanh=False, sharpness=1.0, **FULL),
]
BIDIRECTIONAL = [
    Case(length=1, tables=4, planes=4, value_dim=128),
    Case(length=1000, queries=65, tables=3, planes=3, value_dim=80, heads=4, mask=True),
    Case(batch=2, length=4160, tables=4, planes=4, value_dim=128, sharpness=8.0),
    Case(length=136, tables=3, planes=3, value_dim=128, around=10_000),
    Case(length=1000, tables=16, planes=2, value_dim=64, use_tanh=False, sharpness=1.0),
]
BOTH = [dense.causal_kernels, dense.bidirectional_kernels]
DTYPES = ["float32", "bfloat16"]


def check(kernels, case, assert_close, config=None):
    """Compares the kernels with float64, and a second run with the first, bit for bit."""
    given, cotangents = dense.draw(case)
    exact = dense.causal if kernels is dense.causal_kernels else dense.bidirectional
    exact = functools.partial(exact, use_tanh=case.use_tanh)
    want = dense.oracle(exact, given, cotangents)
    run = dense.runner(kernels, interpret=False, config=config, use_tanh=case.use_tanh)
    got = run(given, cotangents)
    assert_close("outputs", got[0], want[0], kind="outputs", dtype=case.dtype)
    assert_close("gradients", got[1], want[1], kind="gradients", dtype=case.dtype)
    assert_close("rerun", run(given, cotangents), got, kind="rerun")


def chosen(case: Case) -> Blocks:
    """Returns the blocks that the heuristic picks."""
    given, _ = dense.draw(case)
    return plan(given["zq"], given["zk"], given["value"], False, None, is_causal=True)[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CAUSAL, ids=str)
def test_causal(case, dtype, assert_close):
    check(dense.causal_kernels, case._replace(dtype=dtype), assert_close)


def test_the_most_features(assert_close):
    case = Case(length=1000, tables=8, planes=4, value_dim=80, gate=True, sharpness=8.0)
    check(dense.causal_kernels, case._replace(dtype="bfloat16"), assert_close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BIDIRECTIONAL, ids=str)
def test_bidirectional(case, dtype, assert_close):
    check(dense.bidirectional_kernels, case._replace(dtype=dtype), assert_close)


@pytest.mark.parametrize("case", CAUSAL[3:], ids=str)
def test_causal_by_programs(case, assert_close):
    """`test_causal` takes the kernels of warpgroups where they fit. This test never does."""
    case = case._replace(dtype="bfloat16")
    check(dense.causal_kernels, case, assert_close, dense.programs(case))


TRIED = Case(length=600, tables=4, planes=4, value_dim=128, gate=True, dtype="bfloat16")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["fused", "apart"])
def test_every_block_size(block, apart, assert_close):
    config = Blocks(64, *[block] * (6 if apart else 5))
    check(dense.causal_kernels, TRIED, assert_close, config)


@pytest.mark.parametrize(
    ("kernel", "pipeline"),
    [(kernel, x) for kernel, pipelines in PIPELINES.items() for x in pipelines],
    ids=str,
)
def test_every_pipeline(kernel, pipeline, assert_close):
    case = TRIED._replace(value_dim=64)  # at 128 some pipelines get fewer slots than they ask for
    config = dataclasses.replace(chosen(case), **{kernel: pipeline})
    check(dense.causal_kernels, case, assert_close, config)


def run_on_nan(function, *arguments):
    """Runs a function in memory that is filled with NaN, for temporary arrays and for outputs.

    JAX's allocator does not clear memory that was freed, and takes the smallest piece that is large
    enough.
    """
    run = jax.jit(function).lower(*arguments).compile()
    sizes = {run.memory_analysis().temp_size_in_bytes}
    sizes |= {x.size * x.dtype.itemsize for x in jax.tree.leaves(run.out_info)}
    words = [-(-size // 4) for size in sizes if size]
    # All bits are set, which is NaN in float32 and in bfloat16. There are so many arrays that the
    # allocator has no other piece to take.
    filled = [jnp.full((n,), 2**32 - 1, jnp.uint32) for n in words for _ in range(16)]
    jax.block_until_ready(filled)
    for array in filled:
        array.delete()
    return run(*arguments)


@pytest.mark.skipif(
    os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR") == "platform",
    reason="fresh memory of the platform's allocator is not what was freed before",
)
def test_run_on_nan_shows_an_output_that_is_not_written():
    def write_half(refs):
        refs.out[:64] = jnp.zeros((64, 128), jnp.bfloat16)

    def launch():
        out = Output((128, 128), jnp.bfloat16, pl.BlockSpec((128, 128), lambda i: (0, 0)))
        return backend.launch(
            write_half, name="half", grid=(1,), inputs={}, outputs={"out": out},
            block=Block(128), interpret=False,
        ).out  # fmt: skip

    out = np.asarray(run_on_nan(launch))
    assert (out[:64] == 0).all()
    assert np.isnan(out[64:]).all()


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_is_written(kernels, dtype, assert_close):
    sizes = {"heads": 8, "kv_heads": 4, "tables": 4, "planes": 4, "value_dim": 64}
    case = Case(batch=2, length=304, **sizes, dtype=dtype)
    given, cotangents = dense.draw(case)
    run = functools.partial(kernels, interpret=False)
    got = dense.named(given, *run_on_nan(run, given, cotangents))
    exact = dense.causal if kernels is dense.causal_kernels else dense.bidirectional
    want = dense.oracle(exact, given, cotangents)
    assert_close("outputs", got[0], want[0], kind="outputs", dtype=dtype)
    assert_close("gradients", got[1], want[1], kind="gradients", dtype=dtype)


@pytest.mark.parametrize("kernels", BOTH)
def test_large_sharpness_stays_finite(kernels):
    case = Case(length=300, tables=4, planes=4, value_dim=64, sharpness=60.0)
    results = dense.run(kernels, *dense.draw(case), interpret=False)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))


def _random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@pytest.mark.parametrize(
    "length", [(1 << 22) + 4096, (1 << 23) + 4096], ids=["past 2**31", "past 2**32"]
)
def test_a_long_sequence_equals_its_halves(length, assert_close):
    """The outputs have more than 2**31 or 2**32 elements. The state is carried at an odd token."""
    zq, zk = (_random(i, 1, length, 4, 3, 3) for i in range(2))
    value, sharpness = _random(2, 1, length, 4, 128), jnp.full((4,), 2.0)
    fresh = jnp.zeros((1, 4, 24, 128)), jnp.zeros((1, 4, 24)), jnp.zeros((1,), jnp.int32)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(start, stop, zq, zk, value, state):
        cut = slice(start, stop)
        arrays = zq[:, cut], zk[:, cut], value[:, cut], sharpness
        operands = pallas_kernels.CausalOperands(
            *arrays, None, None, None, Sums(*state[:2]), state[2]
        )
        steps = pallas_kernels.CausalSteps.of(operands, (3, 3))
        out, final, _ = passes.causal_forward(steps, operands)
        return out, (*final, state[2])

    middle = length // 2 + 77
    arrays = zq, zk, value
    whole, final = run(0, length, *arrays, fresh)
    head, state = run(0, middle, *arrays, fresh)
    tail, last = run(middle, length, *arrays, state)
    ends = [slice(0, 256), slice(middle - 256, middle), slice(length - 256, length)]
    parts = head[:, ends[0]], head[:, ends[1]], tail[:, -256:]
    for where, part in zip(ends, parts, strict=True):
        assert_close(f"out {where}", part, whole[:, where], kind="resumed", dtype="bfloat16")
    assert_close("state", last[:2], final[:2], kind="resumed", dtype="bfloat16")


def test_gradients_past_2_31_elements_equal_those_of_the_halves(assert_close):
    """The adjoint of the carried state goes from the second half into the first."""
    length = (1 << 22) + 4096
    middle = length // 2 + 80  # within a chunk
    zq, zk = (_random(i, 1, length, 4, 3, 3) for i in range(2))
    value, d_out = (_random(i, 1, length, 4, 128) for i in (2, 3))
    zeros = Sums(jnp.zeros((1, 4, 24, 128)), jnp.zeros((1, 4, 24)))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(start, stop, zq, zk, value, d_out, state, d_final):
        cut = slice(start, stop)
        segment = jnp.zeros((1,), jnp.int32)
        arrays = zq[:, cut], zk[:, cut], value[:, cut], jnp.full((4,), 2.0)
        operands = pallas_kernels.CausalOperands(*arrays, None, None, None, state, segment)
        steps = pallas_kernels.CausalSteps.of(operands, (3, 3))
        _, final, starts = passes.causal_forward(steps, operands)
        gradients = passes.causal_backward(steps, operands, final, starts, d_out[:, cut], d_final)
        return gradients, final

    arrays = zq, zk, value, d_out
    whole, _ = run(0, length, *arrays, zeros, zeros)
    _, state = run(0, middle, *arrays, zeros, zeros)
    tail, _ = run(middle, length, *arrays, state, zeros)
    adjoint = tail.sums
    head, _ = run(0, middle, *arrays, zeros, adjoint)
    for name in ("z_q", "z_k", "value"):
        got, want = (getattr(x, name) for x in (head, whole))
        for where in (slice(0, 256), slice(middle - 256, middle)):
            assert_close(name, got[:, where], want[:, where], kind="streamed", dtype="bfloat16")
        got, want = getattr(tail, name)[:, -256:], getattr(whole, name)[:, -256:]
        assert_close(name, got, want, kind="streamed", dtype="bfloat16")
