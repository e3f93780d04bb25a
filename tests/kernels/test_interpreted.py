"""The kernels in Pallas's interpreter on the CPU, against the dense form in float64."""

import functools

import numpy as np
import pytest

from pallas_kernels import Block, Blocks
from tests.kernels import dense
from tests.kernels.dense import Case

# The blocks of small sizes have one value block, and one kernel for keys and values. BLOCKED has
# several value blocks, and a kernel for each.
BLOCKED = Blocks(64, *[Block(16)] * 6)
FUSED = Blocks(64, *[Block(32)] * 5)

CAUSAL = {
    "everything": (
        Case(
            batch=2, length=300, heads=4, tables=3, value_dim=24, gate=True, mask=True, packed=True
        ),
        BLOCKED,
    ),
    "many other tokens, bfloat16": (
        Case(length=128, tables=4, planes=4, around=10_000, dtype="bfloat16"),
        None,
    ),
    "one token, gate": (Case(length=1, gate=True), FUSED),
    "no tanh": (Case(length=65, gate=True, use_tanh=False), FUSED),
}
BIDIRECTIONAL = {
    "everything": (
        Case(batch=2, length=300, queries=70, heads=4, tables=3, value_dim=24, mask=True),
        BLOCKED,
    ),
    "many other tokens, bfloat16": (Case(length=64, around=10_000, dtype="bfloat16"), None),
    "no tanh": (Case(length=65, use_tanh=False), None),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_outputs_and_gradients(name, assert_close):
    check(dense.causal_kernels, dense.causal, *CAUSAL[name], assert_close)


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional_outputs_and_gradients(name, assert_close):
    check(dense.bidirectional_kernels, dense.bidirectional, *BIDIRECTIONAL[name], assert_close)


def check(kernels, definition, case, config, assert_close):
    """Compares interpreted kernels with the dense form."""
    given, cotangents = dense.draw(case)
    options = {"interpret": True, "config": config, "use_tanh": case.use_tanh}
    out, gradients = dense.run(kernels, given, cotangents, **options)
    exact = functools.partial(definition, use_tanh=case.use_tanh)
    want_out, want_gradients = dense.oracle(exact, given, cotangents)
    assert_close("outputs", out, want_out, kind="outputs", dtype=case.dtype)
    assert_close("gradients", gradients, want_gradients, kind="gradients", dtype=case.dtype)


def test_products_in_tf32_have_the_error_of_tf32():
    """With `exact=False` operands are rounded to ten bits, on the CPU as well."""
    case = Case(length=130, heads=4, tables=3, planes=3, gate=True, mask=True, packed=True)
    given, cotangents = dense.draw(case)
    want = dense.oracle(dense.causal, given, cotangents)
    got = dense.run(dense.causal_kernels, given, cotangents, interpret=True, exact=False)
    for found, exact in zip(got, want, strict=True):
        for name, array in exact.items():
            error = np.sqrt(np.mean((found[name] - array) ** 2) / np.mean(array**2))
            assert 1e-5 < error < 5e-3, (name, error)
