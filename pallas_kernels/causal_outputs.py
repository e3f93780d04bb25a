"""The forward pass of causal RACE attention: the sums of each split, then the outputs.

    [N | z] = ((φq φkᵀ)∘D)[v | 1] + in∘(φq X),   X' = a X + (out∘φk)ᵀ[v | 1],   o = N / z

The states at the start of each split are the residuals of the backward pass.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Output, launch, load, store
from pallas_kernels.blocks import Block
from pallas_kernels.features import FeatureMap
from pallas_kernels.tiles import MASS, TINY, Chunk, Problem, Shared


def empty_state(problem: Problem) -> tuple[jax.Array, jax.Array]:
    """Returns a zero numerator (F, V) and mass (F, MASS). Every column of a mass is the same."""
    shape = (problem.features, problem.value_block)
    return jnp.zeros(shape, jnp.float32), jnp.zeros((problem.features, MASS), jnp.float32)


def load_state(problem: Problem, refs: SimpleNamespace) -> tuple[jax.Array, jax.Array]:
    """Returns the state at the start of this program's split."""
    mass = jnp.broadcast_to(refs.split_mass[...][:, None], (problem.features, MASS))
    return refs.split_numerator[...], mass


def hashed_keys(chunk: Chunk, feature_map: FeatureMap, zk) -> jax.Array:
    """Returns φk (C, F) in float32, zero at padded tokens."""
    z = load(zk, (chunk.span, slice(None)), chunk.rows)
    return chunk.masked(feature_map.expand(feature_map.squash(z)))


def hashed_queries(chunk: Chunk, feature_map: FeatureMap, zq, head) -> jax.Array:
    """Returns φq (C, F) of one query head in float32."""
    z = load(zq, (chunk.span, head, slice(None)), chunk.rows)
    return feature_map.expand(feature_map.squash(z))


def absorb(problem: Problem, chunk: Chunk, phi_k: jax.Array, value: jax.Array, state: tuple):
    """Returns the state after a chunk: X' = a X + (out∘φk)ᵀ[v | 1]."""
    math, (numerator, mass) = problem.arithmetic, state
    # The keys are rounded twice, because the gradient of the gate assumes the same two roundings
    # (causal_gradients.py).
    keys = math.cast(chunk.leave(math.rounded(phi_k)))
    ones = jnp.ones((problem.chunk, MASS), problem.dtype)
    numerator = chunk.carry(numerator) + math.dot(keys, value, "tn")
    return numerator, chunk.carry(mass) + math.dot(keys, ones, "tn")


def denominators(problem: Problem, chunk: Chunk, attention, queries, mass) -> jax.Array:
    """Returns z (C,).

    z uses the same rounded operands as the numerator, so that v = 1 gives o = 1.
    """
    math = problem.arithmetic
    ones = jnp.ones((problem.chunk, MASS), problem.dtype)
    columns = math.dot(attention, ones) + chunk.enter(math.dot(queries, mass))
    return jnp.max(columns, axis=1)


def reciprocals(problem: Problem, chunk: Chunk, denominator: jax.Array) -> jax.Array:
    """Returns 1 / z (C,), and 0 for a query that sees no key or is padded."""
    seen = denominator >= TINY
    inverse = problem.arithmetic.reciprocal(jnp.where(seen, denominator, 1.0))
    seen = seen if chunk.valid is None else seen & chunk.valid
    return jnp.where(seen, inverse, 0.0)


def _sums_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    feature_map = problem.feature_map(refs)

    def body(start, state):
        chunk = Chunk(problem, refs, start)
        rows = chunk.span, slice(None)
        phi_k = hashed_keys(chunk, feature_map, refs.zk)
        return absorb(problem, chunk, phi_k, load(refs.value, rows, chunk.rows), state)

    numerator, mass = problem.for_chunks(body, empty_state(problem))
    refs.numerator[...] = numerator
    refs.mass[...] = jnp.max(mass, axis=1)


def _outputs_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    feature_map, math = problem.feature_map(refs), problem.arithmetic

    def body(start, state):
        chunk = Chunk(problem, refs, start)
        rows = chunk.span, slice(None)
        phi_k = hashed_keys(chunk, feature_map, refs.zk)
        keys = math.cast(phi_k)
        value = load(refs.value, rows, chunk.rows)
        numerator, mass = (math.cast(x) for x in state)

        def query_head(head, _):
            rows = chunk.span, head, slice(None)
            queries = math.cast(hashed_queries(chunk, feature_map, refs.zq, head))
            attention = math.cast(chunk.visible(math.dot(queries, keys, "nt")))
            out = math.dot(attention, value) + chunk.enter(math.dot(queries, numerator))
            denominator = denominators(problem, chunk, attention, queries, mass)
            out = out * reciprocals(problem, chunk, denominator)[:, None]
            store(refs.out, rows, out, chunk.rows)

        problem.for_group(query_head, None)
        return absorb(problem, chunk, phi_k, value, state)

    problem.for_chunks(body, load_state(problem, refs))


def split_sums(problem: Problem, block: Block, shared: Shared, zk, value):
    """Returns the sums of each split by itself.

    They are the numerator (B, K, splits, F, V) and the mass (B, K, splits, F).
    """
    problem = problem.cut(block)
    batch, kv_heads, splits, features = (
        problem.batch,
        problem.kv_heads,
        problem.splits,
        problem.features,
    )
    states = (batch, kv_heads, splits, features, problem.value_dim)
    result = launch(
        lambda refs: _sums_kernel(problem, refs),
        name="causal_sums",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {"zk": (zk, problem.key_projections()), "value": (value, problem.values())},
        outputs={
            "numerator": Output(states, jnp.float32, problem.numerators()),
            "mass": problem.partial(states[:-1], jnp.float32, problem.masses()),
        },
        block=block,
        interpret=problem.interpret,
    )
    return result.numerator, result.mass[0]


def outputs(problem: Problem, block: Block, shared: Shared, zq, zk, value, states):
    """Returns outputs (B, T, N, V), from the state at the start of each split."""
    problem = problem.cut(block)
    shape = (problem.batch, problem.length, zq.shape[2], problem.value_dim)
    result = launch(
        lambda refs: _outputs_kernel(problem, refs),
        name="causal_outputs",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {
            "zq": (zq, problem.query_projections()),
            "zk": (zk, problem.key_projections()),
            "value": (value, problem.values()),
            "split_numerator": (states[0], problem.numerators()),
            "split_mass": (states[1], problem.masses()),
        },
        outputs={"out": Output(shape, value.dtype, problem.outputs())},
        block=block,
        interpret=problem.interpret,
    )
    return result.out
