"""Every kernel lowers for CUDA on a machine without a GPU."""

import functools

import jax
import pytest

from tests.kernels import dense
from tests.kernels.dense import Case

PROGRAMS = {
    "plain": Case(length=1024, tables=4, planes=4, value_dim=128, dtype="bfloat16"),
    "everything": Case(
        batch=2, length=1000, heads=4, tables=3, planes=3, value_dim=80,
        gate=True, mask=True, packed=True, dtype="bfloat16",
    ),
    "float32": Case(length=65, tables=8, planes=3, value_dim=256, gate=True),
}  # fmt: skip
WARPGROUPS = {
    "plain": PROGRAMS["plain"],
    "everything": PROGRAMS["everything"],
    # This case needs the most shared memory, so that it gets fewer slots than it asks for.
    "widest": PROGRAMS["everything"]._replace(tables=8, value_dim=128),
    "segments": Case(
        length=304, heads=4, tables=2, planes=2, value_dim=64, packed=True, dtype="bfloat16"
    ),
    "ragged": Case(
        length=136, kv_heads=1, heads=1, tables=3, planes=3, value_dim=128, dtype="bfloat16"
    ),
}
SHARED = "causal_sums", "causal_reverse_sums"
BY_WARPGROUPS = "causal_outputs", "causal_query_gradients", "causal_key_value_gradients"
KERNELS = {
    dense.causal_kernels: (
        *SHARED, "causal_outputs", "causal_query_gradients", "causal_key_gradients",
        "causal_value_gradients",
    ),
    dense.bidirectional_kernels: (
        "causal_sums", "bidirectional_read", "bidirectional_query_gradients",
        "bidirectional_key_value_gradients",
    ),
}  # fmt: skip


@pytest.fixture
def lower(on_h200):
    """A function that lowers another one for an H200 and returns the program as text."""

    def text(function, *arguments) -> str:
        with on_h200():
            traced = jax.jit(function).trace(*arguments)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    return text


@pytest.mark.parametrize("case", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda f: f.__name__)
def test_every_kernel_of_programs_lowers_for_cuda(kernels, case, lower):
    given, cotangents = dense.draw(case)
    kernels_by_name = functools.partial(kernels, interpret=False, config=dense.programs(case))
    program = lower(kernels_by_name, given, cotangents)
    for name in KERNELS[kernels]:
        assert program.count(f'name = "{name}"') == 1, name


@pytest.mark.parametrize("case", WARPGROUPS.values(), ids=WARPGROUPS)
def test_every_kernel_of_warpgroups_lowers_for_cuda(case, lower):
    given, cotangents = dense.draw(case)
    kernels = functools.partial(dense.causal_kernels, interpret=False)
    program = lower(kernels, given, cotangents)
    calls = [line for line in program.splitlines() if "@mosaic_gpu" in line]
    for name, call in zip(BY_WARPGROUPS, calls, strict=True):
        assert name in call
    for name in SHARED:
        assert program.count(f'name = "{name}"') == 1, name


@pytest.mark.parametrize("length", [65, 136], ids=["programs", "warpgroups"])
def test_kernels_lower_where_jax_has_64_bits(length, lower):
    case = PROGRAMS["everything"]._replace(length=length, value_dim=64)
    given, cotangents = dense.draw(case)
    with jax.enable_x64(True):
        program = lower(functools.partial(dense.causal_kernels, interpret=False), given, cotangents)
    assert program.count("@mosaic_gpu") == (len(BY_WARPGROUPS) if length % 8 == 0 else 0)


@pytest.mark.parametrize("exact", [False, True], ids=["TF32", "exact"])
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda f: f.__name__)
def test_float32_products_follow_the_argument_exact(kernels, exact, lower):
    """JAX's own setting does not count, because it may have changed when a gradient is traced."""
    given, cotangents = dense.draw(PROGRAMS["float32"]._replace(length=130, value_dim=16))
    with jax.default_matmul_precision("highest"):
        program = lower(functools.partial(kernels, interpret=False, exact=exact), given, cotangents)
    # The text contains the kernels as bytecode, with the names of instructions. This instruction
    # rounds tiles to TF32.
    assert ("cvt.rna.tf32" in program) == (not exact)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda f: f.__name__)
def test_kernels_lower_inside_shard_map_with_its_defaults(kernels):
    """They lower in the form of programs. Outputs vary over the mesh axes that any input has."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((2,), ("rows",), abstract_device=device, axis_types=axes)
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    case = PROGRAMS["everything"]._replace(length=136, value_dim=64)
    given, cotangents = dense.draw(case)
    specs = {name: whole if name == "sharpness" else rows for name in given}
    for name in [name for name, x in given.items() if x is None]:
        specs[name] = None

    def run(given, cotangents):
        results, gradients = kernels(given, cotangents, interpret=False)
        varying = {str(jax.typeof(x).manual_axis_type.varying) for x in jax.tree.leaves(gradients)}
        assert varying == {"frozenset({'rows'})"}
        return tuple(results), tuple(jax.tree.leaves(gradients))

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, rows), out_specs=rows)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.jit(mapped).trace(given, cotangents)
        text = program.lower(lowering_platforms=("cuda",)).as_text()
    for name in KERNELS[kernels]:
        assert text.count(f'name = "{name}"') == 1, name
