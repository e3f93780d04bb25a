"""The layers of both Flax flavours under vmap, scan with remat, and export with symbolic sizes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

from race_jax import linen
from race_jax.layers.race import RACEAttention
from tests import quick

BATCH, LENGTH, WIDTH, HEADS, LAYERS = 2, 6, 8, 2, 2
OPTIONS = {"num_tables": 2, "num_planes": 2, "is_causal": True, "forget_gate": "data"}
OPTIONS |= {"short_conv": "before"}
X = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
STREAMS = {"params": jax.random.key(1), "planes": jax.random.key(2)}


class Stack(NamedTuple):
    """Layers that were made together, as functions of their variables.

    `one` applies a single layer to the variables of that layer. `scanned` applies all layers, each
    added to its input, by the scan of Flax with rematerialisation.
    """

    variables: Any
    one: Callable[..., jax.Array]
    scanned: Callable[[Any, jax.Array], jax.Array]


def nnx_stack() -> Stack:
    """Made by nnx.vmap, run by nnx.scan and nnx.remat."""

    @nnx.jit
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap
    def make(rngs):
        return RACEAttention(HEADS, WIDTH, **OPTIONS, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return x + nnx.remat(RACEAttention.__call__)(layer, x)

    graph, variables = nnx.split(make(nnx.Rngs(0)))
    return Stack(
        variables,
        lambda variables, x, **options: nnx.merge(graph, variables)(x, **options),
        lambda variables, x: forward(nnx.merge(graph, variables), x),
    )


class Layers(nn.Module):
    """Layers that nn.scan and nn.remat run."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Hidden states to hidden states."""
        scan = nn.scan(
            lambda layer, x, _: (x + layer(x), None),
            variable_axes={"params": 0, "hash_planes": 0},
            split_rngs={"params": True, "planes": True},
            length=LAYERS,
        )
        layer = nn.remat(linen.RACEAttention)(HEADS, **OPTIONS, name="layer")
        return scan(layer, x, None)[0]


def linen_stack() -> Stack:
    """Made and run by nn.scan and nn.remat."""
    variables = jax.jit(Layers().init)(STREAMS, X)
    one = linen.RACEAttention(HEADS, **OPTIONS)

    def wrapped(variables):
        return {name: {"layer": values} for name, values in variables.items()}

    return Stack(
        {name: values["layer"] for name, values in variables.items()},
        one.apply,
        lambda variables, x: Layers().apply(wrapped(variables), x),
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(nnx_stack, id="NNX"),
        pytest.param(linen_stack, marks=pytest.mark.once, id="Linen"),
    ],
)
def stack(request) -> Stack:
    """The layers of one flavour."""
    return request.param()


# What is under test is the tracing; the optimiser of XLA would take most of the time.
jit = quick.jit


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def with_gradients(apply):
    """Outputs, and gradients of their squares by variables and inputs."""

    def loss(variables, x):
        out = apply(variables, x)
        return jnp.sum(out**2), out

    return jax.grad(loss, (0, 1), has_aux=True)


def test_vmap_over_layers_and_inputs_equals_a_loop(stack, assert_close):
    inputs = jnp.stack([X, X + 1])
    mapped = jit(jax.vmap(with_gradients(stack.one)))(stack.variables, inputs)
    alone = jit(with_gradients(stack.one))
    for index in range(LAYERS):
        (gradients, out), (want_gradients, want) = (
            at(mapped, index),
            alone(at(stack.variables, index), inputs[index]),
        )
        assert_close("out", out, want, kind="resumed")
        assert_close("gradients", gradients, want_gradients, kind="gradients")


def test_scan_over_layers_with_remat_equals_a_loop(stack, assert_close):
    def loop(variables, x):
        for index in range(LAYERS):
            x = x + stack.one(at(variables, index), x)
        return x

    kernels = [leaf for leaf in jax.tree.leaves(stack.variables) if leaf.ndim > 3]
    assert kernels
    assert all(not np.array_equal(leaf[0], leaf[1]) for leaf in kernels)  # planes among them
    gradients, out = jit(with_gradients(stack.scanned))(stack.variables, X)
    want_gradients, want = jit(with_gradients(loop))(stack.variables, X)
    assert_close("out", out, want, kind="resumed")
    assert_close("gradients", gradients, want_gradients, kind="gradients")


def test_export_for_any_batch_and_length(stack, assert_close):
    variables = at(stack.variables, 0)

    @jax.jit
    def packed(x, mask, segment_ids):
        return stack.one(variables, x, mask=mask, segment_ids=segment_ids)

    def arguments(batch, length):
        x = jax.random.normal(jax.random.key(3), (batch, length, WIDTH))
        slots = jnp.broadcast_to(jnp.arange(length), (batch, length))
        return x, slots % 3 < 2, slots // 4

    like = export.symbolic_args_specs(arguments(2, 8), (f"b, t, {WIDTH}", "b, t", "b, t"))
    given = arguments(3, 70)
    got = export.export(packed)(*like).call(*given)
    assert_close("output", got, packed(*given), kind="resumed")
