"""Block sizes of the kernels: frozen records, and a heuristic that chooses them by shape.

They set the chunk, value block, warps and stages of each kernel, and how the sequence is split.
Every choice gives the same result, up to rounding.
"""

import dataclasses

CHUNK = 64  # the tokens of a chunk, unless a Blocks says otherwise


@dataclasses.dataclass(frozen=True)
class Block:
    """How one kernel is cut: the columns of `value` per program, and Triton's warps and stages.

    `packed` computes bfloat16 features two at a time, from a logarithm already rounded to bfloat16.
    This takes half the special-function instructions and fewer registers, for 1.4 times the
    rounding error. With a gate nothing is packed, because the terms of dg cancel only if all
    kernels round φk alike.
    """

    value: int
    num_warps: int = 4
    num_stages: int = 2
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a kernel of several warpgroups fetches data, and the registers of each warpgroup."""

    key_slots: int  # the most chunks of keys and values that are fetched ahead
    query_slots: int  # the same for chunks of single query heads; fewer if memory is short
    registers: tuple[int, ...]  # per thread, for each kind of warpgroup; at most 504 for all four


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of every kernel of a pass, and the chunk that they share."""

    chunk: int
    sums: Block
    outputs: Block | Pipeline
    query: Block | Pipeline
    reverse: Block
    key: Block | Pipeline
    value: Block | None = None  # None if the kernel of the keys also computes dv


# The number of programs to aim for is two full waves of an H200, which has 132 multiprocessors and
# runs two programs on each. The number of splits is limited, because the cost of combining them is
# quadratic in their number.
PROGRAMS = 528
MAX_SPLITS = 512
MIN_SPLIT = 256


def fits_warpgroups(features: int, projections: int, value_dim: int, itemsize: int) -> bool:
    """Returns whether a causal problem of these padded sizes suits the warpgroup kernels.

    These kernels hold φ of a chunk in one tile of Hopper's matrix product, z in at most half a
    tile, and values in one or two tiles, all in bfloat16.
    """
    sizes = features == 64 and projections in (16, 32) and value_dim in (64, 128)
    return sizes and itemsize == 2


def choose_blocks(
    features: int,
    value_dim: int,
    itemsize: int,
    *,
    warpgroups: bool = False,
    gate: bool = False,
    exact: bool = True,
) -> Blocks:
    """Returns blocks for the padded sizes F and V.

    A program keeps its state, F x value, in registers.
    """
    if itemsize == 4:
        elements = 2048 if exact else 4096
        block = Block(max(16, min(value_dim, elements // features)), 4, 1)
        return Blocks(64, block, block, block, block, block, block)
    wide = max(16, min(value_dim, 8192 // features))
    blocks = Blocks(
        chunk=CHUNK,
        sums=Block(wide, 4, 3),
        outputs=Block(wide, 4, 3),
        query=Block(wide, 4, 2),
        reverse=Block(wide, 4, 3),
        key=Block(wide, 4, 2, packed=not gate),
        value=Block(wide, 4, 3),
    )
    if not warpgroups:
        return blocks
    return dataclasses.replace(
        blocks,
        outputs=Pipeline(key_slots=5, query_slots=2, registers=(24, 144, 168)),
        query=Pipeline(key_slots=4, query_slots=1, registers=(24, 136, 176)),
        key=Pipeline(key_slots=2, query_slots=3, registers=(24, 168, 160, 152)),
    )


def split_length(length: int, rows: int, *, chunk: int = CHUNK) -> int:
    """Returns the tokens per split of a sequence, if `rows` = B·K sequences run side by side."""
    splits = max(1, min(MAX_SPLITS, PROGRAMS // max(rows, 1)))
    tokens = max(MIN_SPLIT, -(-length // splits))
    return -(-tokens // chunk) * chunk
