"""Every cell of the support table of docs/operation.md is true."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import race_jax
from race_jax.core import dispatch

TABLE = pathlib.Path(__file__).parent.parent / "docs" / "operation.md"
STATE = race_jax.RACEState.init(1, 2, 8, 4)
SEGMENTS = jnp.array([[0, 0, 1]])
ARGUMENTS = {
    "log_decay": {"log_decay": jnp.full((1, 3, 2), -0.1)},
    "key_value_mask": {"key_value_mask": jnp.array([[True, True, False]])},
    "segment_ids": {"segment_ids": SEGMENTS},
    "initial_state, return_state": {"initial_state": STATE, "return_state": True},
    "segment_ids with initial_state or return_state": {
        "segment_ids": SEGMENTS,
        "initial_state": STATE,
    },
    'normalization="bucket"': {"normalization": "bucket"},
    "planes (K, L, P, H)": {"planes": jnp.ones((2, 2, 2, 4))},
    "T != S": {"query": jnp.ones((1, 2, 2, 4))},
}


def cells():
    page = TABLE.read_text(encoding="utf-8")
    section = page.split("## What works with what")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    rows = [re.split(r" \| ", line.strip("| ")) for line in lines]
    assert {name.strip("`") for name, *_ in rows} == set(ARGUMENTS)
    for name, causal, bidirectional, kernels in rows:
        yield name.strip("`"), True, causal, kernels
        yield name.strip("`"), False, bidirectional, kernels


def arguments(name):
    x = jnp.ones((1, 3, 2, 4))
    given = {"query": x, "key": x, "value": x, "planes": jnp.ones((2, 2, 4))}
    return given | ARGUMENTS[name]


@pytest.mark.parametrize(("name", "is_causal", "works", "kernels"), [*cells()])
def test_each_cell_of_the_support_table_is_true(name, is_causal, works, kernels):
    del kernels

    def call():
        return jax.eval_shape(
            lambda a: race_jax.race_attention(**a, is_causal=is_causal, **static), arrays
        )

    given = arguments(name)
    static = {n: given.pop(n) for n in ("normalization", "return_state") if n in given}
    arrays = given
    if works == "yes":
        call()
    else:
        with pytest.raises(ValueError, match=r"needs"):
            call()


@pytest.mark.parametrize(("name", "is_causal", "works", "kernels"), [*cells()])
def test_the_kernels_refuse_what_the_table_says(name, is_causal, works, kernels, monkeypatch):
    """This is about `dispatch` only. Calls that the operation refuses by itself are left out."""
    if works == "no":
        return
    monkeypatch.setattr(dispatch, "has_cuda", lambda: True)
    monkeypatch.setattr(dispatch, "kernels", lambda: _Kernels)
    choice = dispatch.explain(**arguments(name), is_causal=is_causal)
    refused = "RACE kernels" in choice.reason
    mode = "causal only" if is_causal else "bidirectional only"
    assert refused == (kernels not in ("yes", mode)), choice


class _Kernels:
    """Kernels that support every call."""

    @staticmethod
    def supports(*arrays, **options):
        del arrays, options
