"""`supports` names the limit that a call meets, and splits cover a sequence."""

import re

import jax
import pytest

import pallas_kernels
from pallas_kernels import backend
from pallas_kernels.plan import whole_tiles


def shapes(*, tables=4, planes=4, value_dim=64, dtype="bfloat16", length=8):
    z = jax.ShapeDtypeStruct((1, length, 2, tables, planes), dtype)
    return z, z, jax.ShapeDtypeStruct((1, length, 2, value_dim), dtype)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tables": 16, "planes": 5}, r"up to 256 features .*; got L=16, P=5, F=512"),
        ({"planes": 5, "dtype": "float32"}, r"up to 64 features with float32 .*; got L=4, P=5"),
        ({"value_dim": 300}, r"value head dims from 1 to 256; got 300"),
        ({"dtype": "float16"}, r"float32 and bfloat16; query projections have float16"),
        ({"length": 0}, r"no empty arrays; got value of shape \(1, 0, 2, 64\)"),
    ],
)
def test_a_limit_is_named_with_what_was_given(changed, sentence):
    reason = pallas_kernels.supports(*shapes(**changed), is_causal=True)
    assert re.search(sentence, reason), reason


def test_what_the_installation_lacks_is_the_last_word():
    reason = pallas_kernels.supports(*shapes(), is_causal=False)
    assert reason == backend.missing()
    if jax.__version_info__ < (0, 11):
        assert reason == f"the RACE kernels need jax >= 0.11; found {jax.__version__}"


@pytest.mark.parametrize(
    ("batch", "length", "kv_heads", "whole"),
    [
        (1, 136, 1, True),
        (2, 136, 2, True),
        (2, 128, 1, True),
        (2, 136, 1, False),
        (1, 12, 4, False),
    ],
)
def test_warpgroups_take_sequences_of_whole_tiles(batch, length, kv_heads, whole):
    assert whole_tiles(batch, length, kv_heads) == whole


@pytest.mark.parametrize("length", [1, 63, 64, 4096, 1_000_001, 1 << 27])
@pytest.mark.parametrize("rows", [1, 4, 512])
def test_splits_cover_the_sequence_in_whole_chunks(length, rows):
    split = pallas_kernels.split_length(length, rows)
    count = pallas_kernels.split_count(length, rows)
    assert split % 64 == 0
    assert (count - 1) * split < length <= count * split
    assert count <= 512
