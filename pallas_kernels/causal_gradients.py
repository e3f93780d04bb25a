"""The backward pass of causal RACE attention: the queries forward in time, then the keys backward.

The inputs are those of the forward pass, the state at the start of each split, the cotangents, and
the references m and [λ | λ_Z] of centre.py. The outputs are dz of the queries and keys, dv, dβ, the
terms of dg, and each split's part of the adjoint of the state at its start. Features are computed
again from z. With ρ = 1/z, δ = do·o, q̂ = ρ φq and T = (do vᵀ - δ)∘D,

    dφq = ρ (T φk + in∘(do Sᵀ - δ Z))
    dφk = Tᵀ q̂ + out∘(v Λᵀ + Λ_Z)
    dv = ((q̂ φkᵀ)∘D)ᵀ do + out∘(φk Λ)
    [Λ | Λ_Z]' = a [Λ | Λ_Z] + (in∘q̂)ᵀ [do | -δ]

In the code of dφq, the reference m is subtracted from v, S and δ. In the code of dφk, λ is
subtracted from Λ, and λ_Z from Λ_Z.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Output, launch, load, store
from pallas_kernels.blocks import Block
from pallas_kernels.causal_outputs import (
    absorb,
    denominators,
    empty_state,
    hashed_keys,
    hashed_queries,
    load_state,
    reciprocals,
)
from pallas_kernels.centre import Common, centred
from pallas_kernels.features import FeatureMap
from pallas_kernels.tiles import MASS, Chunk, Problem, Shared


def _query_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    feature_map, math = problem.feature_map(refs), problem.arithmetic
    gate = refs.row is not None

    def body(start, carry):
        state, d_sharpness = carry
        chunk = Chunk(problem, refs, start)
        rows = chunk.span, slice(None)
        phi_k = hashed_keys(chunk, feature_map, refs.zk)
        keys = math.cast(phi_k)
        value = load(refs.value, rows, chunk.rows)
        mean, mass = refs.mean[...], math.cast(state[1])
        numerators = centred(state[0], jnp.max(state[1], axis=1), mean)
        numerators = math.halves(numerators) if gate else (math.cast(numerators),)
        mass_row = jnp.max(state[1] if gate else mass.astype(jnp.float32), axis=1)[None, :]
        mean_rows = math.cast(jnp.broadcast_to(mean[None, :], (MASS, problem.value_block)))

        def query_head(head, carry):
            d_sharpness, row = carry
            rows = chunk.span, head, slice(None)
            squashed = feature_map.squash(load(refs.zq, rows, chunk.rows))
            phi_q = feature_map.expand(squashed)
            queries, rounded_q = math.cast(phi_q), math.rounded(phi_q)
            d_out = load(refs.d_out, rows, chunk.rows)
            attention = chunk.visible(math.dot(queries, keys, "nt"))
            if gate:  # an error of δ would add up along the sequence in dg, so δ is more exact here
                denominator = _exact_denominators(chunk, attention, rounded_q, mass_row)
            else:
                denominator = denominators(problem, chunk, math.cast(attention), queries, mass)
                attention = math.rounded(attention)
            inverse = reciprocals(problem, chunk, denominator)
            offset = jnp.max(math.dot(d_out, mean_rows, "nt"), axis=1)
            along = math.dot(d_out, value, "nt")
            by_state = sum(math.dot(d_out, x, "nt") for x in numerators)
            delta = inverse * (
                jnp.sum(attention * (along - offset[:, None]), axis=1)
                + jnp.sum(rounded_q * chunk.enter(by_state), axis=1)
            )
            whole = delta + offset
            scores = chunk.visible(along - whole[:, None])
            by_state, within = by_state - delta[:, None] * mass_row, math.dot(scores, keys)
            d_phi = (within + chunk.enter(by_state)) * inverse[:, None]
            d_z, d_beta = feature_map.gradient(squashed, queries, d_phi)
            store(refs.d_zq, rows, d_z, chunk.rows)
            refs.inverse[head, chunk.span] = inverse
            refs.delta[head, chunk.span] = whole
            if gate:
                scaled = math.rounded(phi_q * inverse[:, None])
                row_terms = scaled * within + math.rounded(chunk.enter(scaled)) * by_state
                row = row + jnp.sum(row_terms, axis=1)
            return d_sharpness + d_beta, row

        zeros = jnp.zeros((problem.chunk,), jnp.float32)
        d_sharpness, row = problem.for_group(query_head, (d_sharpness, zeros))
        if refs.row is not None:
            refs.row[0, chunk.span] = row
        return absorb(problem, chunk, phi_k, value, state), d_sharpness

    zeros = jnp.zeros((problem.chunk, problem.projections), jnp.float32)
    _, d_sharpness = problem.for_chunks(body, (load_state(problem, refs), zeros))
    refs.d_sharpness[...] = jnp.sum(d_sharpness)


def _exact_denominators(chunk: Chunk, attention, queries, mass_row) -> jax.Array:
    """Returns z (C,). Nothing but φ is rounded."""
    read = chunk.enter(jnp.sum(queries * mass_row, axis=1)[:, None])
    return jnp.sum(attention, axis=1) + jnp.max(read, axis=1)


def _scaled_queries(chunk: Chunk, feature_map: FeatureMap, refs: SimpleNamespace, head):
    """Returns q̂ = ρ φq (C, F) in float32."""
    phi_q = hashed_queries(chunk, feature_map, refs.zq, head)
    return phi_q * refs.inverse[head, chunk.span][:, None]


def gather(problem: Problem, chunk: Chunk, scaled_q, d_out, delta, state: tuple):
    """Returns [Λ | Λ_Z] + (in∘q̂)ᵀ [do | -δ]."""
    math, (numerator, mass) = problem.arithmetic, state
    # The queries are rounded twice, because the row sums of dg assume the same two roundings.
    queries = math.cast(chunk.enter(math.rounded(scaled_q)))
    # δ goes in as two halves, so that its rounding error does not outgrow that of do.
    coarse = math.rounded(delta)
    halves = lax.broadcasted_iota(jnp.int32, (problem.chunk, MASS), 1) < MASS // 2
    parts = math.cast(jnp.where(halves, coarse[:, None], (delta - coarse)[:, None]))
    return numerator + math.dot(queries, d_out, "tn"), mass - math.dot(queries, parts, "tn")


def mass_total(mass: jax.Array) -> jax.Array:
    """Returns Λ_Z (F,), the sum of the two halves that the columns of `mass` hold."""
    return jnp.sum(mass, axis=1) * (2.0 / MASS)


def _reverse_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    feature_map = problem.feature_map(refs)

    def body(start, state):
        chunk = Chunk(problem, refs, start)
        state = tuple(chunk.carry(x) for x in state)

        def query_head(head, state):
            scaled_q = _scaled_queries(chunk, feature_map, refs, head)
            d_out = load(refs.d_out, (chunk.span, head, slice(None)), chunk.rows)
            delta = refs.delta[head, chunk.span]
            return gather(problem, chunk, scaled_q, d_out, delta, state)

        return problem.for_group(query_head, state)

    numerator, mass = problem.for_chunks(body, empty_state(problem), reverse=True)
    refs.numerator[...] = numerator
    refs.mass[...] = mass_total(mass)


def _key_value_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    """Computes the gradients of keys, of values, or of both: those that have an output."""
    feature_map, math = problem.feature_map(refs), problem.arithmetic
    # [λ | λ_Z] has been subtracted from the adjoints. It decays towards the start of the split.
    common_mass = None if refs.common_mass is None else refs.common_mass[...]

    def body(start, carry):
        state, decayed, d_sharpness = carry
        chunk = Chunk(problem, refs, start)

        def query_tiles(head):
            d_out = load(refs.d_out, (chunk.span, head, slice(None)), chunk.rows)
            delta = refs.delta[head, chunk.span]
            return _scaled_queries(chunk, feature_map, refs, head), d_out, delta

        heads = problem.shared_heads(query_tiles)
        z = load(refs.zk, (chunk.span, slice(None)), chunk.rows)
        squashed = feature_map.squash(z)
        phi_k = chunk.masked(feature_map.expand(squashed))
        if refs.d_zk is not None:
            value = load(refs.value, (chunk.span, slice(None)), chunk.rows)
            by_state, within = _d_phi_k(problem, chunk, value, heads, state, refs)
            d_phi = chunk.masked(within + chunk.leave(by_state))
            d_z, d_beta = feature_map.gradient(squashed, math.cast(phi_k), d_phi, halves=True)
            d_sharpness = d_sharpness + d_beta
            store(refs.d_zk, (chunk.span, slice(None)), d_z, chunk.rows)
        if refs.column is not None:
            keys = math.cast(phi_k).astype(jnp.float32)
            in_common = _in_common(problem, value, (refs.common_numerator[...], common_mass))
            leaving = math.rounded(chunk.leave(keys))
            flow = keys * within + leaving * (by_state + decayed * in_common)
            refs.column[0, chunk.span] = jnp.sum(flow, axis=1)
        state = _earlier_state(problem, chunk, refs, phi_k, heads, state, decayed)
        return state, chunk.carry(decayed), d_sharpness

    zeros = jnp.zeros((problem.chunk, problem.projections), jnp.float32)
    mass = refs.split_mass[...] * 0.5
    mass = jnp.broadcast_to(mass[:, None], (problem.features, MASS))
    carry = (refs.split_numerator[...], mass), jnp.float32(1.0), zeros
    *_, d_sharpness = problem.for_chunks(body, carry, reverse=True)
    if refs.d_sharpness is not None:
        refs.d_sharpness[...] = jnp.sum(d_sharpness)


def _d_phi_k(problem: Problem, chunk: Chunk, value, heads, state: tuple, refs: SimpleNamespace):
    """Returns v Λ'ᵀ + Λ_Z' (C, F), and the sum of Tᵀ q̂ (C, F) over the query heads.

    dφk is the first times `out`, plus the second. With a gate, Λ' goes into its product as two
    halves, because errors of the column sums would add up along the sequence.
    """
    math = problem.arithmetic
    adjoints = (math.cast(state[0]),) if refs.column is None else math.halves(state[0])

    def add_head(head, d_phi):
        scaled_q, d_out, delta = heads(head)
        scores = math.dot(value, d_out, "nt") - delta[None, :]
        return d_phi + math.dot(chunk.visible(scores, transposed=True), scaled_q)

    by_state = sum(math.dot(value, x, "nt") for x in adjoints) + mass_total(state[1])[None, :]
    return by_state, problem.for_group(add_head, jnp.zeros_like(by_state))


def _in_common(problem: Problem, value: jax.Array, common: tuple) -> jax.Array:
    """Returns v·λ + λ_Z (C, 1), the part of dφk that the gradient of the decay has to add back."""
    rows = jnp.broadcast_to(common[0][None, :], (MASS, problem.value_block))
    by_value = problem.arithmetic.dot(value, rows, "nt")
    return (jnp.max(by_value, axis=1) + common[1])[:, None]


def _earlier_state(
    problem: Problem, chunk: Chunk, refs: SimpleNamespace, phi_k, heads, state: tuple, decayed
):
    """Returns the adjoint of the state that enters the chunk.

    If dv is wanted, dv = Σ Aᵀ do + out∘(φk Λ' + L λ) is stored, with A = (q̂ φkᵀ)∘D.
    """
    math, d_value = problem.arithmetic, None
    if refs.d_value is not None:
        common = problem.tables * decayed * refs.common_numerator[...][None, :]
        d_value = chunk.leave(math.dot(phi_k, state[0]) + common)

    def add_head(head, carry):
        d_value, state = carry
        scaled_q, d_out, delta = heads(head)
        if d_value is not None:
            attention = math.dot(phi_k, scaled_q, "nt")
            attention = chunk.visible(attention, transposed=True)
            d_value += math.dot(attention, d_out)
        return d_value, gather(problem, chunk, scaled_q, d_out, delta, state)

    state = tuple(chunk.carry(x) for x in state)
    d_value, state = problem.for_group(add_head, (d_value, state))
    if d_value is not None:
        rows = chunk.span, slice(None)
        store(refs.d_value, rows, chunk.masked(d_value), chunk.rows)
    return state


def query_gradients(
    problem: Problem, block: Block, shared: Shared, zq, zk, value, states, mean, d_out
):
    """Returns dz of the queries, ρ, δ, dβ, and the row sums of dg if there is a gate."""
    problem = problem.cut(block)
    gate = shared.gamma is not None
    heads, d_zq_dtype = zq.shape[2], partial_dtype(problem, zq.dtype)
    result = launch(
        lambda refs: _query_kernel(problem, refs),
        name="causal_query_gradients",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {
            "zq": (zq, problem.query_projections()),
            "zk": (zk, problem.key_projections()),
            "value": (value, problem.values()),
            "d_out": (d_out, problem.outputs()),
            "split_numerator": (states[0], problem.numerators()),
            "split_mass": (states[1], problem.masses()),
            "mean": (mean, problem.means()),
        },
        outputs={
            "d_zq": problem.partial(zq.shape, d_zq_dtype, problem.query_projections()),
            "inverse": problem.row_statistic(heads),
            "delta": problem.row_statistic(heads),
            "d_sharpness": problem.program_scalar(),
            "row": problem.row_statistic(problem.kv_heads) if gate else None,
        },
        block=block,
        interpret=problem.interpret,
    )
    return SimpleNamespace(
        d_zq=total(result.d_zq),
        inverse=result.inverse[0],
        delta=result.delta,
        d_sharpness=result.d_sharpness.sum(axis=(0, 1, 3)),
        row=total(result.row) if gate else None,
    )


def partial_dtype(problem: Problem, dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """Returns float32 for an output that is summed over value blocks afterwards, else `dtype`."""
    return dtype if problem.value_blocks == 1 else jnp.float32


def reverse_sums(problem: Problem, block: Block, shared: Shared, zq, d_out, inverse, delta):
    """Returns each split's own part of the adjoint of the state at its start.

    The parts are the numerator (B, K, splits, F, V) and the mass (value blocks, B, K, splits, F).
    """
    problem = problem.cut(block)
    shape = (problem.batch, problem.kv_heads, problem.splits, problem.features, problem.value_dim)
    result = launch(
        lambda refs: _reverse_kernel(problem, refs),
        name="causal_reverse_sums",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {
            "zq": (zq, problem.query_projections()),
            "d_out": (d_out, problem.outputs()),
            "inverse": (inverse, problem.row_spec()),
            "delta": (shares(delta, problem.value_blocks), problem.share(problem.row_spec())),
        },
        outputs={
            "numerator": Output(shape, jnp.float32, problem.numerators()),
            "mass": problem.partial(shape[:-1], jnp.float32, problem.masses()),
        },
        block=block,
        interpret=problem.interpret,
    )
    return result.numerator, result.mass


def key_value_gradients(
    problem: Problem,
    block: Block,
    shared: Shared,
    arrays: tuple,
    d_out: jax.Array,
    rows: SimpleNamespace,
    adjoints: tuple,
    common: Common,
    *,
    keys: bool = True,
    values: bool = True,
):
    """Returns dz of the keys with dβ and the column sums of dg, or dv, or all of these.

    `rows` holds ρ and δ. `keys` and `values` say which gradients are wanted.
    """
    problem = problem.cut(block)
    gate = keys and shared.gamma is not None
    zq, zk, value = arrays
    share = functools.partial(shares, blocks=problem.value_blocks)
    result = launch(
        lambda refs: _key_value_kernel(problem, refs),
        name="causal_" + "_".join(["key"] * keys + ["value"] * values) + "_gradients",
        grid=problem.grid,
        inputs=problem.shared_inputs(shared)
        | {
            "zq": (zq, problem.query_projections()),
            "zk": (zk, problem.key_projections()),
            "value": (value if keys else None, problem.values()),
            "d_out": (d_out, problem.outputs()),
            "inverse": (rows.inverse, problem.row_spec()),
            "delta": (share(rows.delta), problem.share(problem.row_spec())),
            "split_numerator": (adjoints[0], problem.numerators()),
            "split_mass": (share(adjoints[1]), problem.share(problem.masses())),
            "common_numerator": (common.numerator if gate or values else None, problem.means()),
            "common_mass": (
                share(common.mass) if gate else None,
                problem.share(problem.scalar_spec()),
            ),
        },
        outputs={
            "d_zk": problem.partial(
                zk.shape, partial_dtype(problem, zk.dtype), problem.key_projections()
            )
            if keys
            else None,
            "d_value": Output(value.shape, value.dtype, problem.values()) if values else None,
            "d_sharpness": problem.program_scalar() if keys else None,
            "column": problem.row_statistic(problem.kv_heads) if gate else None,
        },
        block=block,
        interpret=problem.interpret,
    )
    return SimpleNamespace(
        d_zk=total(result.d_zk) if keys else None,
        d_value=result.d_value,
        d_sharpness=result.d_sharpness.sum(axis=(0, 1, 3)) if keys else None,
        flow=-total(result.column) if gate else None,
    )


def shares(partial: jax.Array, blocks: int) -> jax.Array:
    """Divides a sum among `blocks` value blocks, from its parts in another number of blocks.

    δ and Λ_Z of a block belong to the block's own columns, so that the mean of its values cancels
    within the block. If one part is divided among several finer blocks, the first of them takes all
    of it.
    """
    parts = partial.shape[0]
    if parts > blocks:
        return partial.reshape(blocks, parts // blocks, *partial.shape[1:]).sum(axis=1)
    finer = [(0, 0), (0, blocks // parts - 1), *[(0, 0)] * (partial.ndim - 1)]
    return jnp.pad(partial[:, None], finer).reshape(blocks, *partial.shape[1:])


def total(partial: jax.Array) -> jax.Array:
    """Returns the sum over value blocks. If there is one block, nothing is copied."""
    return partial[0] if partial.shape[0] == 1 else partial.sum(axis=0)
