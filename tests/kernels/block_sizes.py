"""Block sizes that the kernels are tested with, besides those that `choose_blocks` picks."""

import itertools

from pallas_kernels.blocks import Block, Pipeline

BLOCKS = tuple(
    Block(value, 4, stages, packed)
    for value, stages, packed in itertools.product((128, 64, 32), (1, 2, 3), (False, True))
)
_FORWARD_REGISTERS = (24, 136, 176), (24, 144, 168), (24, 160, 160)
_KEY_REGISTERS = (24, 168, 160, 152), (24, 160, 160, 160), (24, 168, 168, 144)
# The keys are the fields of Blocks.
PIPELINES = {
    kernel: tuple(Pipeline(*depth, shares) for depth in slots for shares in registers)
    for kernel, slots, registers in (
        ("outputs", ((4, 2), (5, 2)), _FORWARD_REGISTERS),
        ("query", ((3, 2), (4, 1)), _FORWARD_REGISTERS),
        ("key", ((2, 3), (3, 2)), _KEY_REGISTERS),
    )
}
