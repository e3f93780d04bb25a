"""Every kernel lowers for CUDA on a machine without a GPU."""

import functools

import jax
import pytest

from tests.kernels import dense
from tests.kernels.dense import Case

AUTO = (jax.sharding.AxisType.Auto,)
CASES = {
    "plain": Case(length=1024, tables=4, planes=4, value_dim=128, dtype="bfloat16"),
    "everything": Case(
        batch=2, length=1000, heads=4, tables=3, planes=3, value_dim=80,
        gate=True, mask=True, packed=True, dtype="bfloat16",
    ),
    "float32": Case(length=65, tables=8, planes=3, value_dim=256, gate=True),
}  # fmt: skip
KERNELS = {
    dense.causal_kernels: (
        "causal_sums", "causal_outputs", "causal_query_gradients", "causal_reverse_sums",
        "causal_key_gradients", "causal_value_gradients",
    ),
    dense.bidirectional_kernels: (
        "causal_sums", "bidirectional_read", "bidirectional_query_gradients",
        "bidirectional_key_value_gradients",
    ),
}  # fmt: skip


def lower_for_h200(function, *arguments) -> str:
    """The program for an H200, as text."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device, axis_types=AUTO)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda f: f.__name__)
def test_every_kernel_lowers_for_cuda(kernels, case):
    given, cotangents = dense.draw(case)
    program = lower_for_h200(functools.partial(kernels, interpret=False), given, cotangents)
    for name in KERNELS[kernels]:
        assert program.count(f'name = "{name}"') == 1, name
