"""A card can run the blocks that are chosen by shape."""

import itertools

import pytest

from pallas_kernels.blocks import Block, choose_blocks, fits_warpgroups
from tests.kernels.block_sizes import BLOCKS, PIPELINES

SIZES = list(itertools.product((64, 128, 256), (16, 32, 64, 128, 256), (2, 4), (False, True)))


@pytest.mark.parametrize(("features", "value_dim", "itemsize", "gate"), SIZES)
def test_every_shape_gets_blocks_that_fit_it(features, value_dim, itemsize, gate):
    fed = fits_warpgroups(features, 16, value_dim, itemsize)
    for warpgroups in (False, True)[: 1 + fed]:
        blocks = choose_blocks(features, value_dim, itemsize, warpgroups=warpgroups, gate=gate)
        for field in ("sums", "outputs", "query", "reverse", "key", "value"):
            block = getattr(blocks, field)
            if warpgroups and field in PIPELINES:
                assert block in PIPELINES[field], field
                continue
            assert isinstance(block, Block), field
            assert value_dim % block.value == 0, field
            # With a gate, every kernel must round the features of the keys in the same way.
            assert not block.packed or (field == "key" and itemsize == 2 and not gate), field


def test_the_blocks_of_the_usual_shape_are_tested_on_a_card():
    blocks = choose_blocks(64, 128, 2)
    for field in ("sums", "outputs", "query", "reverse", "key", "value"):
        assert getattr(blocks, field) in BLOCKS, field


def test_pipelines_use_no_more_registers_than_there_are():
    for kernel, pipelines in PIPELINES.items():
        shares = 4 if kernel == "key" else 3
        for pipeline in pipelines:
            registers = pipeline.registers
            assert len(registers) == shares
            assert all(x % 8 == 0 and 24 <= x <= 240 for x in registers)
            # If there are three numbers, two warpgroups have the last one each.
            assert sum(registers) + registers[-1] * (shares == 3) <= 512
