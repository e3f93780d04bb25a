"""The only module that uses Mosaic GPU: it launches warpgroups that share tiles in shared memory.

It also has the arithmetic of tiles of 64 rows. A warpgroup holds such a tile in registers, in the
layout of Hopper's matrix product. Nothing here is specific to RACE.
"""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Bytes of shared memory: the most that a program may have on compute capability 9.0 (CUDA
# programming guide), the alignment of each array, and what the compiler needs itself, which is
# 2 KiB for sums along an axis, and the barriers.
MOST_SHARED = 227 * 1024
ALIGNMENT = 1024
RESERVED = 3 * 1024

CHUNK = 64  # rows of a tile: one warpgroup's matrix product
TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)  # one number for each row of a tile
COLUMNS = TILE.reduce(0)  # one for each column

barrier, arrive, wait = plgpu.Barrier, plgpu.barrier_arrive, plgpu.barrier_wait
commit = plgpu.commit_smem
fetch = plgpu.copy_gmem_to_smem


def operand(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Returns shared memory for 16-bit tiles (..., rows, 64 n) that a matrix product reads."""
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def narrow_operand(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Returns the same for a product that sums over 16 rows. Its tiles are 16 wide."""
    transforms = plgpu.TilingTransform((8, 16)), plgpu.SwizzleTransform(32)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def plain(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Returns shared memory that is loaded and stored by rows."""
    return plgpu.SMEM(shape, dtype)


def fits(shared: Mapping[str, Any]) -> bool:
    """Returns whether one program can have this shared memory."""
    arrays = [x for x in shared.values() if not isinstance(x, plgpu.Barrier | None)]
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes) + RESERVED <= MOST_SHARED


def launch(
    body: Callable[[SimpleNamespace], None],
    *,
    name: str,
    grid: Mapping[str, int],
    warpgroups: int,
    inputs: Mapping[str, jax.Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    shared: Mapping[str, Any],
) -> SimpleNamespace:
    """Runs `body` over the grid. An absent input or output is None, in the kernel and outside."""
    absent = dict.fromkeys([*inputs, *outputs, *shared])
    given, wanted, scratch = (
        {key: item for key, item in items.items() if item is not None}
        for items in (inputs, outputs, shared)
    )

    def named_body(*refs):
        names = [*given, *wanted, *scratch]
        body(SimpleNamespace(**(absent | dict(zip(names, refs, strict=True)))))

    call = plgpu.kernel(
        named_body,
        out_type=list(wanted.values()),
        scratch_types=list(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # The automatic barriers make every store wait for the whole warpgroup, before and
            # after, which costs 5 % of a kernel's time. Without them a body must call `commit`
            # after it stores what another warp or a product reads, and before it overwrites that.
            unsafe_no_auto_barriers=True,
        ),
    )
    with jax.named_scope(f"race_attention/{name}"):
        results = call(*given.values())
    return SimpleNamespace(**(dict.fromkeys(outputs) | dict(zip(wanted, results, strict=True))))


def warpgroup() -> jax.Array:
    """Returns the index of this warpgroup in its program."""
    return lax.axis_index("warpgroup")


def roles(warpgroups: int, *bodies: tuple[int, Callable[[], None]]) -> None:
    """Gives each warpgroup its body and its registers per thread.

    The last body runs on all warpgroups that are left.
    """
    fair = 512 // warpgroups
    for turn, (registers, role) in enumerate(bodies):
        mine = warpgroup() == turn if turn < len(bodies) - 1 else warpgroup() >= turn

        @pl.when(mine)
        def _(registers=registers, role=role):
            action = "increase" if registers > fair else "decrease"
            plgpu.set_max_registers(registers, action=action)
            role()


def load(ref: Any, layout: Any = TILE) -> jax.Array:
    """Loads a tile, or a vector of 64, from shared or device memory. Floats become float32."""
    x = plgpu.load(ref, layout=layout, optimized=False)
    return x if x.dtype == jnp.int32 else x.astype(jnp.float32)


def store(ref: Any, x: jax.Array) -> None:
    """Stores a tile of any width in plain shared memory."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, x, optimized=False)
    else:  # jax 0.11, where an assignment takes every width
        ref[...] = x


def multiply(accumulator: Any, a: Any, b: Any) -> None:
    """Starts accumulator += a b. a may be in registers; b is in shared memory."""
    plgpu.wgmma(accumulator, a, b)


def together(body: Callable[..., None], *columns: int) -> list[jax.Array]:
    """Runs `body(*accumulators)`, which starts products into (64, columns), and waits once."""

    def run(*accumulators):
        body(*accumulators)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(run, *(plgpu.ACC((CHUNK, n), jnp.float32) for n in columns))


def onto(body: Callable[..., None], *starts: jax.Array) -> tuple[jax.Array, ...]:
    """Runs `body(*accumulators)`, which adds products to the given tiles, and waits once."""

    def run(accumulators):
        body(*accumulators)

    return pl.run_state(run)(tuple(plgpu.ACC.init(start) for start in starts))


def product(*pairs: tuple[Any, Any], start: jax.Array | None = None, columns: int = 64):
    """Returns start + Σ a b over pairs (a, b): (64, columns) in float32."""

    def run(accumulator):
        for a, b in pairs:
            multiply(accumulator, a, b)

    (result,) = together(run, columns) if start is None else onto(run, start)
    return result


def rounded(x: jax.Array) -> jax.Array:
    """Returns a float32 tile with the values that it would have as an operand."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def equal_rows(rows: int, x: jax.Array) -> jax.Array:
    """Repeats (..., n) to (..., rows, n) in bfloat16.

    An operand needs at least 8 rows, or 16 if the product sums over them.
    """
    rows = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], rows, x.shape[-1]))
    return rows.astype(jnp.bfloat16)


def by_rows(x: jax.Array, columns: int = 64) -> jax.Array:
    """Repeats (64,) to (64, columns); each row is constant."""
    return lax.broadcast_in_dim(x, (CHUNK, columns), [0])


def by_columns(x: jax.Array) -> jax.Array:
    """Repeats (columns,) to (64, columns); each column is constant."""
    return lax.broadcast_in_dim(x, (CHUNK, x.shape[0]), [1])


def filled(value: float, columns: int) -> jax.Array:
    """Returns a tile of one number."""
    return plgpu.layout_cast(jnp.full((CHUNK, columns), value, jnp.float32), TILE)


def index(axis: int, columns: int = 64) -> jax.Array:
    """Returns the row (0) or the column (1) of every element of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, columns), axis, layout=TILE)


def send(*pairs: tuple[Any, Any]) -> None:
    """Starts copies from shared to device memory, of tiles stored before."""
    commit()
    for source, target in pairs:
        plgpu.copy_smem_to_gmem(source, target)


def sent(*, read_only: bool = True) -> None:
    """Waits until the copies that this warpgroup started have left shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=read_only)
