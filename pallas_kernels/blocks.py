"""Block sizes of the kernels: frozen records, and the heuristic that picks them by shape.

In: the sizes of a call. Out: chunk, value block, warps and stages of each kernel, and how the
sequence is split. No equation: every choice gives the same result, up to rounding.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Block:
    """How one kernel is cut: `value` columns a program, and Triton's two knobs.

    `packed` makes bfloat16 features two at a time, from a logarithm already rounded to bfloat16:
    half the special-function instructions and fewer registers, for 1.4 times the rounding error.
    """

    value: int
    num_warps: int = 4
    num_stages: int = 2
    packed: bool = False


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of every kernel of a pass, and the chunk that they share."""

    chunk: int
    sums: Block
    outputs: Block
    query: Block
    reverse: Block
    key: Block
    value: Block | None = None  # None: the kernel of the keys makes the values' gradients too
    poison: bool = False  # outputs start as NaN, so that unwritten ones show: for tests


# Two full waves of an H200 (132 multiprocessors, two programs each), and never so many splits that
# combining them, quadratic in their number, costs more than it hides.
PROGRAMS = 528
MAX_SPLITS = 512
MIN_SPLIT = 256


def choose_blocks(features: int, value_dim: int, itemsize: int) -> Blocks:
    """Blocks for padded sizes F and V; a program's state F x value has to stay in registers."""
    if itemsize == 4:
        block = Block(max(16, min(value_dim, 2048 // features)), 4, 1)
        return Blocks(64, block, block, block, block, block, block)
    wide = max(16, min(value_dim, 8192 // features))
    return Blocks(
        chunk=64,
        sums=Block(wide, 4, 3),
        outputs=Block(wide, 4, 3),
        query=Block(wide, 4, 2),
        reverse=Block(wide, 4, 3),
        key=Block(wide, 4, 2, packed=True),
        value=Block(wide, 4, 3),
    )


def split_length(length: int, rows: int, *, chunk: int = 64) -> int:
    """Tokens of one split of a sequence, where `rows` = B·K sequences run side by side."""
    splits = max(1, min(MAX_SPLITS, PROGRAMS // max(rows, 1)))
    tokens = max(MIN_SPLIT, -(-length // splits))
    return -(-tokens // chunk) * chunk


def split_count(length: int, rows: int, *, chunk: int = 64) -> int:
    """How many splits a sequence has: the third axis of the residual states."""
    return -(-length // split_length(length, rows, chunk=chunk))
