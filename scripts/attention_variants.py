"""What scripts/bench_kernels.py measures: attention by name, its inputs and its compiled runs.

In: sizes. Out: random inputs spread over the devices by heads, programs that run on them, and the
fewest operations that the mathematics needs, forward, per token and head: 4 F (V + 1) + 4 L P H for
RACE, 2 T (H + V) for softmax and half of that if causal. The backward pass counts twice.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import race_jax

Inputs = dict[str, jax.Array]
BY_HEADS = PartitionSpec(None, None, "heads")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One attention problem but for its length: B, N, H, V, L, P, dtype and whether it forgets."""

    batch: int = 1
    heads: int = 4
    head_dim: int = 128
    value_dim: int = 128
    tables: int = 3
    planes: int = 3
    dtype: str = "float32"
    decay: bool = False


@dataclasses.dataclass(frozen=True)
class Variant:
    """What to call, its fewest operations, the power of T its time grows with, and its rival."""

    call: Callable[[Inputs], jax.Array]
    operations: Callable[[Sizes, int], float]
    growth: int
    rival: str


def race(inputs: Inputs, *, causal: bool) -> jax.Array:
    """RACE as the library chooses to compute it; only the causal form can forget."""
    return race_jax.race_attention(
        *(inputs[name] for name in ("query", "key", "value", "planes")),
        is_causal=causal,
        log_decay=inputs.get("log_decay") if causal else None,
    )


def softmax(inputs: Inputs, *, causal: bool) -> jax.Array:
    """JAX's own softmax attention."""
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)


def race_operations(sizes: Sizes, length: int) -> float:
    """4 F (V + 1) + 4 L P H, at any length."""
    features = sizes.tables * 2**sizes.planes
    return 4 * features * (sizes.value_dim + 1) + 4 * sizes.tables * sizes.planes * sizes.head_dim


def softmax_operations(sizes: Sizes, length: int, *, causal: bool) -> float:
    """2 T (H + V), or half of it."""
    return (1 if causal else 2) * length * (sizes.head_dim + sizes.value_dim)


def _pair(direction: str, causal: bool) -> dict[str, Variant]:
    operations = functools.partial(softmax_operations, causal=causal)
    race_call, softmax_call = (functools.partial(f, causal=causal) for f in (race, softmax))
    rival = f"softmax {direction}"
    return {
        f"race {direction}": Variant(race_call, race_operations, growth=1, rival=rival),
        rival: Variant(softmax_call, operations, growth=2, rival=rival),
    }


VARIANTS = _pair("causal", True) | _pair("bidirectional", False)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if number % n == 0)


def use_all_cores(heads: int) -> None:
    """One XLA host device a usable core, as many as divide the heads; before JAX's first use."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", largest_divisor(heads, cores))


def head_mesh(heads: int) -> Mesh:
    """The devices of this process that the heads are spread over."""
    devices = jax.local_devices()[: largest_divisor(heads, jax.local_device_count())]
    return jax.make_mesh((len(devices),), ("heads",), devices=devices, axis_types=(AxisType.Auto,))


def partition(name: str) -> PartitionSpec:
    """How an input is spread: the planes are the same everywhere."""
    return PartitionSpec() if name == "planes" else BY_HEADS


def input_shapes(sizes: Sizes, length: int) -> dict[str, tuple[int, ...]]:
    """The shape of every input, the cotangent of the output among them."""
    lead = (sizes.batch, length, sizes.heads)
    shapes = dict.fromkeys(("query", "key"), (*lead, sizes.head_dim))
    shapes |= dict.fromkeys(("value", "cotangent"), (*lead, sizes.value_dim))
    shapes["planes"] = (sizes.tables, sizes.planes, sizes.head_dim)
    return shapes | ({"log_decay": lead} if sizes.decay else {})


def draw(sizes: Sizes, length: int, mesh: Mesh) -> Inputs:
    """Random inputs, each made on the devices that read it."""
    shapes = input_shapes(sizes, length)

    def make(key: jax.Array) -> Inputs:
        keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
        inputs = {
            name: jax.random.normal(keys[name], shape, sizes.dtype)
            for name, shape in shapes.items()
        }
        inputs["planes"] *= sizes.head_dim**-0.5
        if sizes.decay:
            inputs["log_decay"] = jax.nn.log_sigmoid(3 + inputs["log_decay"])
        return inputs

    shardings = {name: NamedSharding(mesh, partition(name)) for name in shapes}
    return jax.jit(make, out_shardings=shardings)(jax.random.key(0))


def compile_run(
    variant: Variant, inputs: Inputs, mesh: Mesh, *, backward: bool
) -> jax.stages.Compiled:
    """The program that gives the output and, with `backward`, every gradient but the planes'."""

    def run(inputs: Inputs) -> tuple[jax.Array, Inputs]:
        moving = {name: inputs[name] for name in inputs if name not in ("planes", "cotangent")}
        fixed = {"planes": inputs["planes"]}
        if not backward:
            return variant.call(moving | fixed), {}
        output, pull_back = jax.vjp(lambda moving: variant.call(moving | fixed), moving)
        return output, pull_back(inputs["cotangent"])[0]

    if mesh.size > 1:
        specs = ({name: partition(name) for name in inputs},)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=BY_HEADS, check_vma=False)
    return jax.jit(run).lower(inputs).compile()
