"""The tables of barriers and of shared memory in docs/kernels.md agree with the code."""

import functools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import ROOT
from tests.kernels import dense
from tests.kernels.dense import Case

KERNELS = "causal_outputs", "causal_query_gradients", "causal_key_value_gradients"
TIMES = " \N{MULTIPLICATION SIGN} "
# The first column of a kernel's figures: after the columns "array", "holds", "when" and "type",
# and after the columns "barrier", "producer" and "consumers".
MEMORY_COLUMNS = dict(zip(KERNELS, (4, 6, 4), strict=True))
BARRIER_COLUMNS = dict(zip(KERNELS, (3, 5, 3), strict=True))


def tables(first: str) -> list[list[list[str]]]:
    """Returns the tables of the page whose first column has this name, as rows of cells."""
    found = re.findall(
        rf"^\| {first} \|.*\n\|[- |]+\n((?:\|.*\n)+)",
        (ROOT / "docs" / "kernels.md").read_text("utf-8"),
        re.MULTILINE,
    )
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
        for table in found
    ]


def of_kernel(kernel: str, first: str) -> list[list[str]]:
    """Returns the table that contains this kernel."""
    forward, keys = tables(first)
    return keys if kernel == "causal_key_value_gradients" else forward


@pytest.fixture(scope="module", params=[False], ids=["no gate"])
def memory(request):
    """The shared memory of every warpgroup kernel at L = P = 4 and V = 128. Nothing is compiled."""
    from pallas_kernels import warpgroup

    found = {}

    def launch(body, *, name, outputs, shared, **_):
        found[name] = {key: item for key, item in shared.items() if item is not None}
        zeros = {k: x and jnp.zeros(x.shape, x.dtype) for k, x in outputs.items()}
        return SimpleNamespace(**zeros)

    case = Case(
        length=1024, tables=4, planes=4, value_dim=128, gate=request.param, dtype="bfloat16"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warpgroup, "launch", launch)
        jax.eval_shape(functools.partial(dense.causal_kernels, interpret=False), *dense.draw(case))
    return SimpleNamespace(gate=request.param, found=found, barrier=warpgroup.barrier)


def arrays_of(memory, kernel: str) -> dict[str, tuple[str, str]]:
    """Returns the shape and bytes of every array in shared memory, in the page's notation."""
    arrays = {
        name: item
        for name, item in memory.found[kernel].items()
        if not isinstance(item, memory.barrier)
    }
    return {
        name: (TIMES.join(map(str, item.shape)), f"{size_of(item):,}")
        for name, item in arrays.items()
    }


def size_of(array) -> int:
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


@pytest.mark.parametrize("kernel", KERNELS)
def test_table_of_shared_memory(kernel, memory):
    column, when = MEMORY_COLUMNS[kernel], "gate" if memory.gate else "no gate"
    rows = [row for row in of_kernel(kernel, "array") if row[2] in ("always", when)]
    page = {row[0].strip("`"): tuple(row[column : column + 2]) for row in rows if row[column]}
    assert page == arrays_of(memory, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_totals_of_shared_memory(kernel, memory):
    from pallas_kernels import warpgroup

    column, when = MEMORY_COLUMNS[kernel] + 1, "gate" if memory.gate else "no gate"
    rows = [row for row in of_kernel(kernel, "array") if row[0].startswith("**")]
    page = [int(row[column].replace(",", "")) for row in rows if row[2] == when]
    sizes = [
        size_of(item)
        for item in memory.found[kernel].values()
        if not isinstance(item, memory.barrier)
    ]
    rounded = sum(-(-size // warpgroup.ALIGNMENT) * warpgroup.ALIGNMENT for size in sizes)
    assert page == [sum(sizes), rounded, rounded + warpgroup.RESERVED]
    assert warpgroup.fits(memory.found[kernel])
    assert page[-1] <= warpgroup.MOST_SHARED


@pytest.mark.parametrize("kernel", KERNELS)
def test_table_of_barriers(kernel, memory):
    column = BARRIER_COLUMNS[kernel]
    numbers = lambda cell: [int(word) for word in re.findall(r"\d+", cell)]  # noqa: E731
    page = {
        # A pair of slots and arrivals. Of two figures the last is with a gate.
        row[0].strip("`"): (numbers(row[column])[0], numbers(row[column + 1])[-memory.gate])
        for row in of_kernel(kernel, "barrier")
    }
    code = {
        name: (math.prod(item.num_barriers or (1,)), item.num_arrivals)
        for name, item in memory.found[kernel].items()
        if isinstance(item, memory.barrier)
    }
    assert page == code
