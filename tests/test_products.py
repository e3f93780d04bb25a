"""Products with wide results are those of the matrices, and so are their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.layers import products

SHAPES = (4, 3), (5,)  # of the outputs of two maps


@pytest.fixture
def maps(rng):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    biased, plain = SHAPES
    return [{"kernel": draw(16, *biased), "bias": draw(*biased)}, {"kernel": draw(16, *plain)}]


def one_by_one(x, maps):
    """Every map by a product of its own, in float32 from the rounded operands."""

    def apply(weights):
        kernel = weights["kernel"].astype(x.dtype).astype(jnp.float32)
        return jnp.tensordot(x.astype(jnp.float32), kernel, axes=1) + weights.get("bias", 0.0)

    return tuple(map(apply, maps))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_maps_side_by_side_are_the_maps(rng, maps, dtype, assert_close):
    x = jnp.asarray(rng.normal(size=(2, 7, 16)), dtype)
    cotangents = [jnp.asarray(rng.normal(size=(2, 7, *shape)), jnp.float32) for shape in SHAPES]

    def run(apply):
        out, pull = jax.vjp(apply, x, maps)
        return out, pull(tuple(cotangents))

    (got, d_got), (want, d_want) = run(products.side_by_side), run(one_by_one)
    assert [y.dtype for y in got] == ["float32", "float32"]
    assert_close("outputs", got, want, kind="outputs")
    assert_close("gradients", d_got, d_want, kind="gradients", dtype=dtype)


def test_the_backward_pass_has_operands_of_one_dtype():
    """With a cotangent in float32, XLA would widen the other operand for it."""
    x, kernel = jnp.ones((1, 8, 16), jnp.bfloat16), jnp.ones((16, 32))
    run = jax.make_jaxpr(jax.grad(lambda x, kernel: products.wide(x, kernel).sum(), (0, 1)))
    found = [
        [operand.aval.dtype.name for operand in equation.invars]
        for equation in run(x, kernel).eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(found) >= 2
    assert np.all(np.array(found) == "bfloat16")


def test_wide_products_have_a_hessian(rng, assert_close):
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, 2, 3), (3, 4)))
    got, want = (
        jax.hessian(lambda x, product=product: (product(x, kernel) ** 3).sum())(x)
        for product in (products.wide, lambda x, kernel: jnp.tensordot(x, kernel, axes=1))
    )
    assert_close("hessian", got, want, kind="gradients")
