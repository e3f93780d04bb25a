"""Block sizes of the kernels: frozen records, a heuristic by shape, and a table of better ones.

In: the sizes of a call. Out: chunk, value block, warps and stages of each kernel, and how the
sequence is split. No equation: every choice gives the same result, up to rounding.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

# What `python -m pallas_kernels.tune --write` found to beat the heuristic.
TABLE = pathlib.Path(__file__).with_name("tuned.json")


@dataclasses.dataclass(frozen=True)
class Block:
    """How one kernel is cut: `value` columns a program, and Triton's two knobs.

    `packed` makes bfloat16 features two at a time, from a logarithm already rounded to bfloat16:
    half the special-function instructions and fewer registers, for 1.4 times the rounding error.
    With a gate nothing is packed: dg cancels only where all kernels round φk alike.
    """

    value: int
    num_warps: int = 4
    num_stages: int = 2
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a kernel of several warpgroups is fed, and what each of them may take."""

    key_slots: int  # chunks of keys and values that are fetched ahead, at most
    query_slots: int  # the same of single query heads; fewer where memory is short
    registers: tuple[int, ...]  # a thread of each kind of warpgroup; at most 504 for all four


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of every kernel of a pass, and the chunk that they share."""

    chunk: int
    sums: Block
    outputs: Block | Pipeline
    query: Block | Pipeline
    reverse: Block
    key: Block | Pipeline
    value: Block | None = None  # None: the kernel of the keys makes the values' gradients too


@dataclasses.dataclass(frozen=True)
class ProblemClass:
    """What the choice of blocks looks at; sizes are padded."""

    features: int
    value_dim: int
    itemsize: int
    is_causal: bool = True
    gate: bool = False
    warpgroups: bool = False  # whether the kernels of warpgroups take it
    exact: bool = True  # of float32: whether products are exact, not TF32

    @property
    def name(self) -> str:
        """Its key in the table."""
        dtype = DTYPES[self.itemsize] if self.exact or self.itemsize == 2 else "tf32"
        sizes = f"F={self.features} V={self.value_dim} {dtype}"
        form = "causal" if self.is_causal else "bidirectional"
        return f"{form} {sizes}" + " gate" * self.gate + " warpgroups" * self.warpgroups


DTYPES = {2: "bfloat16", 4: "float32"}  # of the values, by itemsize

# Two full waves of an H200 (132 multiprocessors, two programs each), and never so many splits that
# combining them, quadratic in their number, costs more than it hides.
PROGRAMS = 528
MAX_SPLITS = 512
MIN_SPLIT = 256


def fits_warpgroups(features: int, projections: int, value_dim: int, itemsize: int) -> bool:
    """Whether a causal problem of these padded sizes suits the kernels of warpgroups.

    They hold φ of a chunk in one tile of Hopper's matrix product, z in half of one at most, and
    values in one or two, all in bfloat16.
    """
    sizes = features == 64 and projections in (16, 32) and value_dim in (64, 128)
    return sizes and itemsize == 2


def choose_blocks(
    features: int,
    value_dim: int,
    itemsize: int,
    *,
    warpgroups: bool = False,
    is_causal: bool = True,
    gate: bool = False,
    exact: bool = True,
) -> Blocks:
    """Blocks for padded sizes F and V: the heuristic's, but where the table has better ones."""
    problem = ProblemClass(features, value_dim, itemsize, is_causal, gate, warpgroups, exact)
    tuned = tuned_blocks().get(device_kind(), {}).get(problem.name, {})
    return dataclasses.replace(heuristic_blocks(problem), **tuned)


def heuristic_blocks(problem: ProblemClass) -> Blocks:
    """Blocks by shape alone; a program's state F x value has to stay in registers."""
    features, value_dim = problem.features, problem.value_dim
    if problem.itemsize == 4:
        elements = 2048 if problem.exact else 4096
        block = Block(max(16, min(value_dim, elements // features)), 4, 1)
        return Blocks(64, block, block, block, block, block, block)
    wide = max(16, min(value_dim, 8192 // features))
    blocks = Blocks(
        chunk=64,
        sums=Block(wide, 4, 3),
        outputs=Block(wide, 4, 3),
        query=Block(wide, 4, 2),
        reverse=Block(wide, 4, 3),
        key=Block(wide, 4, 2, packed=not problem.gate),
        value=Block(wide, 4, 3),
    )
    if not problem.warpgroups:
        return blocks
    return dataclasses.replace(
        blocks,
        outputs=Pipeline(key_slots=5, query_slots=2, registers=(24, 144, 168)),
        query=Pipeline(key_slots=4, query_slots=1, registers=(24, 136, 176)),
        key=Pipeline(key_slots=2, query_slots=3, registers=(24, 168, 160, 152)),
    )


# All that tuning tries and the table may hold; a problem class takes the part that suits it.
TRITON_SPACE = tuple(
    Block(value, 4, stages, packed)
    for value, stages, packed in itertools.product((128, 64, 32), (1, 2, 3), (False, True))
)
_FORWARD_REGISTERS = (24, 136, 176), (24, 144, 168), (24, 160, 160)
_KEY_REGISTERS = (24, 168, 160, 152), (24, 160, 160, 160), (24, 168, 168, 144)
PIPELINES = {
    kernel: tuple(Pipeline(*depth, shares) for depth in slots for shares in registers)
    for kernel, slots, registers in (
        ("outputs", ((4, 2), (5, 2)), _FORWARD_REGISTERS),
        ("query", ((3, 2), (4, 1)), _FORWARD_REGISTERS),
        ("key", ((2, 3), (3, 2)), _KEY_REGISTERS),
    )
}


def candidates(problem: ProblemClass, field: str) -> list[Block | Pipeline]:
    """What one kernel of a class may take: the heuristic's block first, and none twice.

    Widths stay within a factor of two of the heuristic's; only the kernel of the keys is packed.
    """
    chosen = getattr(heuristic_blocks(problem), field)
    if isinstance(chosen, Pipeline):
        space = PIPELINES[field]
    else:
        packable = field == "key" and problem.itemsize == 2 and not problem.gate
        space = tuple(
            block
            for block in TRITON_SPACE
            if chosen.value // 2 <= block.value <= min(2 * chosen.value, problem.value_dim)
            and (packable or not block.packed)
        )
    return [chosen, *(block for block in space if block != chosen)]


def device_kind() -> str:
    """The device that a program is made for: of the mesh, where that names one, or the first."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    return (named or jax.devices()[0]).device_kind


@functools.cache
def tuned_blocks() -> dict[str, dict[str, dict[str, Block | Pipeline]]]:
    """The table: device kind, name of the problem class, field of Blocks."""
    return read_table(json.loads(TABLE.read_text("utf-8")))


def read_table(table: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Block | Pipeline]]]:
    """The table with its JSON objects as records."""
    return {
        kind: {
            name: {field: read_record(item) for field, item in fields.items()}
            for name, fields in classes.items()
        }
        for kind, classes in table.items()
    }


def read_record(item: Mapping[str, Any]) -> Block | Pipeline:
    """The record that a JSON object stands for: `kind` is its class, the rest its fields."""
    fields = {key: tuple(x) if isinstance(x, list) else x for key, x in item.items()}
    return {"Block": Block, "Pipeline": Pipeline}[fields.pop("kind")](**fields)


def record_item(record: Block | Pipeline) -> dict[str, Any]:
    """The JSON object that `read_record` reads."""
    return {"kind": type(record).__name__, **dataclasses.asdict(record)}


def split_length(length: int, rows: int, *, chunk: int = 64) -> int:
    """Tokens of one split of a sequence, where `rows` = B·K sequences run side by side."""
    splits = max(1, min(MAX_SPLITS, PROGRAMS // max(rows, 1)))
    tokens = max(MIN_SPLIT, -(-length // splits))
    return -(-tokens // chunk) * chunk


def split_count(length: int, rows: int, *, chunk: int = 64) -> int:
    """How many splits a sequence has: the third axis of the residual states."""
    return -(-length // split_length(length, rows, chunk=chunk))
