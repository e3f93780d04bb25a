"""What one sequence over several devices costs: time by the number of devices.

    .venv/bin/python scripts/bench_sharding.py --length 8M                  # on a host with GPUs
    JAX_NUM_CPU_DEVICES=4 .venv/bin/python scripts/bench_sharding.py --length 16k --heads 2

Prints one table. Its lines are one causal operation with a gate, forward and backward, on 1, 2, 4,
... devices: "strong" divides the length over the devices, "weak" gives every device the whole
length. Efficiency compares with one device: time of one over devices times their time where the
length is divided, and time of one over their time where it grows. The last column is the size of
the results of all collectives of a run, from the compiled program. On one host, CPU devices share
the cores, so that their times say nothing.
"""

import argparse
import functools
import re
import statistics
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import race_jax
from bench_kernels import one_length, positive
from benchmarks.text import header, length_name, markdown, progress_bar
from benchmarks.timing import wall_clock
from command_line import main_of

AXIS = "seq"
WIDTHS = {"bfloat16": 2, "bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\("
)
COLUMNS = {
    "scaling": 7,
    "devices": 7,
    "tokens": 8,
    "ms": 10,
    "million tokens/s": 16,
    "efficiency, %": 13,
    "kB gathered": 11,
}


def operation(sharpness: float, query, key, value, log_decay):
    """RACE attention over the device's own stretch, from hash projections."""
    return race_jax.race_attention_from_projections(
        query, key, value, sharpness=sharpness, is_causal=True, log_decay=log_decay, axis_name=AXIS
    )


def make_run(mesh: Mesh):
    """Returns a function from the arrays of whole sequences to their gradients."""
    split = PartitionSpec(None, AXIS)
    # With the check, JAX would refuse the kernels of several warpgroups (docs/sharding.md).
    attend = jax.shard_map(
        functools.partial(operation, 2.0),
        mesh=mesh,
        in_specs=(split,) * 4,
        out_specs=split,
        check_vma=False,
    )

    def run(arrays, d_out):
        _, pull = jax.vjp(attend, *arrays)
        return pull(d_out)

    return run


def draw(mesh: Mesh, length: int, options: argparse.Namespace):
    """Draws z of queries and keys, values, the gate and a cotangent, each on its device."""
    heads, dtype = options.heads, jnp.dtype(options.dtype)
    z = (1, length, heads, options.tables, options.planes)
    shapes = (z, z, (1, length, heads, options.width), (1, length, heads), (*z[:3], options.width))
    spread = NamedSharding(mesh, PartitionSpec(None, AXIS))

    def make(key):
        keys = jax.random.split(key, len(shapes))
        found = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]
        found[3] = -0.01 * jnp.abs(found[3].astype(jnp.float32))
        return tuple(found[:4]), found[4]

    return jax.jit(make, out_shardings=spread)(jax.random.key(0))


def bytes_gathered(program: str) -> int:
    """Counts the bytes of the results of all collectives of a compiled program.

    Example:
        >>> bytes_gathered("%x = f32[2,3]{1,0} all-gather(f32[1,3]{1,0} %y), dimensions={0}")
        24
    """
    total = 0
    for results, _ in COLLECTIVE.findall(program):
        for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", results):
            total += WIDTHS.get(kind, 4) * int(np.prod([int(n) for n in sizes.split(",") if n]))
    return total


def measure(devices: int, length: int, options: argparse.Namespace) -> tuple[float, int]:
    """Returns the median of the milliseconds of a run, and the bytes of its collectives."""
    mesh = jax.make_mesh(
        (devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    arguments = draw(mesh, length, options)
    compiled = jax.jit(make_run(mesh)).lower(*arguments).compile()
    call = lambda arguments: compiled(*arguments)  # noqa: E731
    wall_clock(call, arguments)
    times = [wall_clock(call, arguments) for _ in range(options.repeats)]
    return statistics.median(times), bytes_gathered(compiled.as_text())


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, positive(int)
    add("--length", type=one_length, default="8M", help="tokens of one device, or of all")
    add("--heads", type=count, default=4, help="heads")
    add("--width", type=count, default=128, help="width of a value")
    add("--tables", type=count, default=4, help="L, hash tables")
    add("--planes", type=count, default=4, help="P, planes a table")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of z and values")
    add("--repeats", type=count, default=10, help="runs, of which the median counts")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Prints the table."""
    options = parse(words)
    available = jax.device_count()
    numbers = [1 << n for n in range(available.bit_length()) if 1 << n <= available]
    print(f"{available} x {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    print(*header(COLUMNS), sep="\n", flush=True)
    bar = progress_bar(2 * len(numbers) - 1)
    alone = None
    for devices in numbers:
        for scaling in ("strong", "weak") if devices > 1 else ("one",):
            length = options.length * (devices if scaling == "weak" else 1)
            ms, gathered = measure(devices, length, options)
            alone = ms if alone is None else alone
            ideal = alone if scaling == "weak" else alone / devices
            figures = f"{ms:.3f}", f"{length / ms / 1e3:.1f}", f"{100 * ideal / ms:.1f}"
            cells = scaling, str(devices), length_name(length), *figures, f"{gathered / 1e3:.1f}"
            bar.write(markdown(cells, COLUMNS), file=sys.stdout)
            bar.update()
    bar.close()


if __name__ == "__main__":
    main_of(main)
