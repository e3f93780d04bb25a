"""The kernels of bidirectional RACE attention, in which every query reads the same total state.

The inputs are z, values or cotangents, and the total state or its adjoint. The outputs are the
outputs of attention, or gradients. The forward pass is o = φq S / z with z = φq·Z. With ρ = 1/z and
δ = do·o, the gradients are

    dφq = ρ (do Sᵀ - δ Z),   Λ = Σ (ρ φq)ᵀ do,   Λ_Z = -Σ ρ δ φq
    dφk = v Λᵀ + Λ_Z,   dv = φk Λ

In the code of dφk, λ is subtracted from Λ, and λ_Z from Λ_Z (centre.py). dz of the keys stays the
same, and L λ is added to dv.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from pallas_kernels.backend import Output, launch, load, store
from pallas_kernels.blocks import Block
from pallas_kernels.causal_gradients import gather, mass_total, partial_dtype, shares, total
from pallas_kernels.causal_outputs import empty_state, hashed_queries, reciprocals
from pallas_kernels.centre import Common, less_common
from pallas_kernels.tiles import MASS, Chunk, Problem, Shared


def _total_state(problem: Problem, refs: SimpleNamespace) -> tuple[jax.Array, jax.Array]:
    """Returns the total as operands of products: the numerator (F, V) and the mass (F, MASS)."""
    mass = jnp.broadcast_to(refs.total_mass[...][:, None], (problem.features, MASS))
    return tuple(problem.arithmetic.cast(x) for x in (refs.total_numerator[...], mass))


def _inverses(problem: Problem, chunk: Chunk, queries: jax.Array, mass: jax.Array) -> jax.Array:
    """Returns ρ (C,), from the same rounded operands as the numerator."""
    denominator = jnp.max(problem.arithmetic.dot(queries, mass), axis=1)
    return reciprocals(problem, chunk, denominator)


def _read_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    feature_map, math = problem.feature_map(refs), problem.arithmetic
    numerator, mass = _total_state(problem, refs)

    def body(start, carry):
        chunk = Chunk(problem, refs, start)

        def query_head(head, carry):
            queries = math.cast(hashed_queries(chunk, feature_map, refs.zq, head))
            out = math.dot(queries, numerator)
            out = out * _inverses(problem, chunk, queries, mass)[:, None]
            store(refs.out, (chunk.span, head, slice(None)), out, chunk.rows)
            return carry

        return problem.for_group(query_head, carry)

    problem.for_chunks(body, jnp.int32(0))


def _query_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    feature_map, math = problem.feature_map(refs), problem.arithmetic
    numerator, mass = _total_state(problem, refs)
    mass_row = math.cast(refs.total_mass[...]).astype(jnp.float32)[None, :]

    def body(start, carry):
        chunk = Chunk(problem, refs, start)

        def query_head(head, carry):
            state, d_sharpness = carry
            rows = chunk.span, head, slice(None)
            squashed = feature_map.squash(load(refs.zq, rows, chunk.rows))
            queries = math.cast(feature_map.expand(squashed))
            d_out = load(refs.d_out, rows, chunk.rows)
            inverse = _inverses(problem, chunk, queries, mass)
            by_state = math.dot(d_out, numerator, "nt")
            phi_q = queries.astype(jnp.float32)
            delta = inverse * jnp.sum(phi_q * by_state, axis=1)
            d_phi = (by_state - delta[:, None] * mass_row) * inverse[:, None]
            d_z, d_beta = feature_map.gradient(squashed, queries, d_phi)
            store(refs.d_zq, rows, d_z, chunk.rows)
            state = gather(problem, chunk, phi_q * inverse[:, None], d_out, delta, state)
            return state, d_sharpness + d_beta

        return problem.for_group(query_head, carry)

    zeros = jnp.zeros((problem.chunk, problem.projections), jnp.float32)
    state, d_sharpness = problem.for_chunks(body, (empty_state(problem), zeros))
    refs.numerator[...] = state[0]
    refs.mass[...] = mass_total(state[1])
    refs.d_sharpness[...] = jnp.sum(d_sharpness)


def _key_value_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    feature_map, math = problem.feature_map(refs), problem.arithmetic
    numerator = math.cast(refs.total_numerator[...])
    mass_row = refs.block_mass[...][None, :]
    common = problem.tables * refs.common[...][None, :]

    def body(start, d_sharpness):
        chunk = Chunk(problem, refs, start)
        rows = chunk.span, slice(None)
        squashed = feature_map.squash(load(refs.zk, rows, chunk.rows))
        keys = math.cast(chunk.masked(feature_map.expand(squashed)))
        d_phi = math.dot(load(refs.value, rows, chunk.rows), numerator, "nt") + mass_row
        d_phi = chunk.masked(d_phi)
        d_z, d_beta = feature_map.gradient(squashed, keys, d_phi, halves=True)
        store(refs.d_zk, rows, d_z, chunk.rows)
        d_value = chunk.masked(math.dot(keys, numerator) + common)
        store(refs.d_value, rows, d_value, chunk.rows)
        return d_sharpness + d_beta

    zeros = jnp.zeros((problem.chunk, problem.projections), jnp.float32)
    refs.d_sharpness[...] = jnp.sum(problem.for_chunks(body, zeros))


def _total_inputs(problem: Problem, numerator: jax.Array, mass: jax.Array) -> dict:
    return {
        "total_numerator": (numerator[:, :, None], problem.single(problem.numerators())),
        "total_mass": (mass[:, :, None], problem.single(problem.masses())),
    }


def read(problem: Problem, block: Block, shared: Shared, zq, totals: tuple) -> jax.Array:
    """Returns outputs (B, T, N, V) from the total state."""
    problem = problem.cut(block)
    shape = (problem.batch, problem.length, zq.shape[2], problem.value_dim)
    result = launch(
        lambda refs: _read_kernel(problem, refs),
        name="bidirectional_read",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {"zq": (zq, problem.query_projections())}
        | _total_inputs(problem, *totals),
        outputs={"out": Output(shape, problem.dtype, problem.outputs())},
        block=block,
        interpret=problem.interpret,
    )
    return result.out


def query_gradients(problem: Problem, block: Block, shared: Shared, zq, totals: tuple, d_out):
    """Returns dz of the queries, dβ (K,), and the adjoint of the total state.

    The adjoint is Λ (B, K, F, V), and Λ_Z (value blocks, B, K, F) of each value block by itself.
    """
    problem = problem.cut(block)
    state = (problem.batch, problem.kv_heads, problem.splits, problem.features, problem.value_dim)
    result = launch(
        lambda refs: _query_kernel(problem, refs),
        name="bidirectional_query_gradients",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {
            "zq": (zq, problem.query_projections()),
            "d_out": (d_out, problem.outputs()),
        }
        | _total_inputs(problem, *totals),
        outputs={
            "d_zq": problem.partial(
                zq.shape, partial_dtype(problem, zq.dtype), problem.query_projections()
            ),
            "numerator": Output(state, jnp.float32, problem.numerators()),
            "mass": problem.partial(state[:-1], jnp.float32, problem.masses()),
            "d_sharpness": problem.program_scalar(),
        },
        block=block,
        interpret=problem.interpret,
    )
    adjoint = result.numerator.sum(axis=2), result.mass.sum(axis=3)
    return total(result.d_zq), result.d_sharpness.sum(axis=(0, 1, 3)), adjoint


def key_value_gradients(
    problem: Problem, block: Block, shared: Shared, zk, value, adjoint: tuple, common: Common
):
    """Returns dz of the keys, dv, and dβ (K,), from the adjoint of the total state.

    Λ_Z of the adjoint and λ_Z of `common` have a leading axis of value blocks.
    """
    problem = problem.cut(block)
    numerator, mass = less_common(*adjoint, common)
    mass = shares(mass, problem.value_blocks)[:, :, :, None]
    result = launch(
        lambda refs: _key_value_kernel(problem, refs),
        name="bidirectional_key_value_gradients",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {
            "zk": (zk, problem.key_projections()),
            "value": (value, problem.values()),
            "common": (common.numerator[:, :, None], problem.single(problem.means())),
            "total_numerator": (numerator[:, :, None], problem.single(problem.numerators())),
            "block_mass": (mass, problem.share(problem.single(problem.masses()))),
        },
        outputs={
            "d_zk": problem.partial(
                zk.shape, partial_dtype(problem, zk.dtype), problem.key_projections()
            ),
            "d_value": Output(value.shape, value.dtype, problem.values()),
            "d_sharpness": problem.program_scalar(),
        },
        block=block,
        interpret=problem.interpret,
    )
    return total(result.d_zk), result.d_value, result.d_sharpness.sum(axis=(0, 1, 3))
