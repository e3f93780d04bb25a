"""The gradients of keys and values of causal RACE attention, by four warpgroups.

The kernel goes backward in time. Its inputs are z and values as in the forward pass, do, ρ, δ, the
adjoint [Λ' | Λ_Z'] of the state that leaves each split, and its reference [λ | λ_Z] (centre.py).
The outputs are dz of the keys, dv, the terms of dβ, and the column sums if there is a gate. With
q̂ = ρ φq, T = (do vᵀ - δ)∘D, Λ = Λ' + 1 λᵀ and Λ_Z = Λ_Z' + λ_Z,

    dφk = Tᵀ q̂ + out∘(v Λᵀ + Λ_Z)
    dv = ((q̂ φkᵀ)∘D)ᵀ do + out∘(φk Λ)
    [Λ | Λ_Z]' = a [Λ | Λ_Z] + (in∘q̂)ᵀ [do | -δ]

λ decays in the same way as Λ'. The first warpgroup fetches. The second, the keeper, hashes queries
and keeps the adjoint. The third computes dz, and the fourth dv.
"""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import warp_tiles as tiles
from pallas_kernels import warpgroup as wg
from pallas_kernels.blocks import Pipeline
from pallas_kernels.causal_gradients import total
from pallas_kernels.centre import Common
from pallas_kernels.tiles import Problem, Shared

# λ is stored as this number of equal rows, which is the least that a product sums over.
COMMON_ROWS = 16
# The slots for tiles that one warpgroup makes for others. The maker multiplies by them as well.
PASSED_SLOTS = 2


def _fetch(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    tiles.fetch_constants(refs)
    where = place.batch, place.head, place.split
    wg.fetch(refs.common.at[where], refs.common_tiles, refs.constants_full)
    if refs.column is not None:
        for passed in range(PASSED_SLOTS):
            below = refs.state_tiles.at[passed, pl.ds(tiles.FEATURES, 8)]
            wg.fetch(refs.common.at[(*where, pl.ds(0, 8))], below, refs.constants_full)

    def chunk(turn, carry):
        tiles.fetch_keys(place, pipeline, refs, turn)

        def query_head(member, carry):
            item, tokens = place.items_before(turn, member), place.tokens(turn)
            slot, head = lax.rem(item, pipeline.query_slots), place.query_head(member)

            @pl.when(item >= pipeline.query_slots)
            def _():
                wg.wait(refs.queries_free.at[slot])

            full = refs.queries_full.at[slot]
            where, rows = (place.batch, tokens, head), (place.batch, head, tokens)
            halves = refs.delta_halves.at[place.batch, head, place.chunk(turn)]
            wg.fetch(refs.zq.at[where], refs.zq_tiles.at[slot], full)
            wg.fetch(refs.d_out.at[where], refs.d_out_tiles.at[slot], full)
            wg.fetch(refs.inverse.at[rows], refs.inverse_numbers.at[slot], full)
            wg.fetch(refs.delta.at[rows], refs.delta_numbers.at[slot], full)
            wg.fetch(halves, refs.delta_columns.at[slot], full)
            return carry

        return place.for_group(query_head, carry)

    lax.fori_loop(0, place.count, chunk, jnp.int32(0))


def _pass_adjoint(refs: SimpleNamespace, turn: jax.Array, numerator, mass) -> None:
    """Stores Λ' and Λ_Z' for the other warpgroups.

    With a gate, the part of Λ' that is lost by rounding is stored as well.
    """
    passed = lax.rem(turn, PASSED_SLOTS)
    refs.state_tiles[passed, pl.ds(0, tiles.FEATURES)] = numerator.astype(jnp.bfloat16)
    if refs.fine_tiles is not None:

        @pl.when(turn > 0)
        def _():
            wg.wait(refs.fine_free)

        refs.fine_tiles[...] = (numerator - wg.rounded(numerator)).astype(jnp.bfloat16)
    refs.mass_numbers[passed] = -jnp.sum(jnp.where(wg.index(1, 8) < 2, mass, 0.0), axis=1)


def _keep_adjoint(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    where = place.batch, place.head, place.split
    features = tiles.TileFeatures(place, refs)
    # Columns 0 and 1 hold the halves of -Λ_Z. The other columns are never read.
    mass = wg.by_rows(wg.load(refs.leaving_mass.at[where], wg.ROWS), 8)
    mass = jnp.where(wg.index(1, 8) == 0, -mass, 0.0)
    state = wg.load(refs.leaving_numerator.at[where]), mass
    wg.wait(refs.constants_full)

    def chunk(turn, state):
        weights = tiles.Weights(refs, lax.rem(turn, pipeline.key_slots))
        passed = lax.rem(turn, PASSED_SLOTS)

        @pl.when(turn >= PASSED_SLOTS)
        def _():
            wg.wait(refs.state_free.at[passed])

        _pass_adjoint(refs, turn, *state)
        if refs.entering_tiles is not None:
            wg.wait(refs.keys_full.at[lax.rem(turn, pipeline.key_slots)])
            refs.decay_tiles[passed] = weights.decay(transposed=True).astype(jnp.float16)
        wg.commit()
        wg.arrive(refs.state_full.at[passed])

        def query_head(member, state):
            item = place.items_before(turn, member)
            slot, passed = lax.rem(item, pipeline.query_slots), lax.rem(item, PASSED_SLOTS)
            wg.wait(refs.queries_full.at[slot])
            phi = features.hash(refs.zq_tiles.at[slot])
            phi *= wg.by_rows(wg.load(refs.inverse_numbers.at[slot], wg.ROWS))

            @pl.when(item >= PASSED_SLOTS)
            def _():
                wg.wait(refs.hashed_free.at[passed])

            refs.hashed_tiles[passed] = phi.astype(jnp.bfloat16)
            entering = refs.hashed_tiles.at[passed]
            if refs.entering_tiles is not None:
                wg.commit()  # all warps have finished the last product that reads this tile
                # The queries are rounded twice, because the row sums assume the same roundings.
                phi = weights.times("enter", wg.rounded(phi))
                refs.entering_tiles[...] = phi.astype(jnp.bfloat16)
                entering = refs.entering_tiles
            wg.commit()
            wg.arrive(refs.hashed_full.at[passed])
            entering, halves = entering.transpose((1, 0)), refs.delta_columns.at[slot]

            def absorb(numerator, mass):
                wg.multiply(numerator, entering, refs.d_out_tiles.at[slot])
                wg.multiply(mass, entering, halves.transpose((1, 0)))

            state = wg.onto(absorb, *state)
            wg.arrive(refs.queries_free.at[slot])
            return state

        state = place.for_group(query_head, weights.carry(*state))
        if refs.entering_tiles is not None:
            wg.arrive(refs.keys_free.at[lax.rem(turn, pipeline.key_slots)])
        return state

    lax.fori_loop(0, place.count, chunk, state)


def _differentiate_keys(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    features, gate = tiles.TileFeatures(place, refs), refs.column is not None
    common_mass = refs.common_mass[place.batch, place.head, place.split]
    wg.wait(refs.constants_full)

    def chunk(turn, carry):
        d_sharpness, decayed = carry
        slot, passed = lax.rem(turn, pipeline.key_slots), lax.rem(turn, PASSED_SLOTS)
        weights, values = tiles.Weights(refs, slot), refs.value_tiles.at[slot]
        decay = None if refs.decay_tiles is None else refs.decay_tiles.at[passed]
        wg.wait(refs.keys_full.at[slot])
        by_state, in_common = _from_adjoint(refs, values, passed)
        by_state += wg.by_columns(wg.load(refs.mass_numbers.at[passed], wg.COLUMNS))
        if gate:
            wg.arrive(refs.fine_free)
            in_common = decayed * (in_common + common_mass)
            wg.wait(refs.phi_full.at[passed])
            # The states take out∘φk rounded twice. The sum below takes it without the second
            # rounding. `lost` is the difference that this makes to the column sums.
            lost = weights.times("leave", wg.load(refs.phi_tiles.at[passed]))
            lost = (wg.rounded(lost) - lost) * (by_state + wg.by_rows(in_common))
            lost, in_common = jnp.sum(lost, axis=1), weights.times_rows("leave", in_common)
        d_phi = weights.times("leave", by_state)

        def query_head(member, d_phi):
            item = place.items_before(turn, member)
            slot, passed = lax.rem(item, pipeline.query_slots), lax.rem(item, PASSED_SLOTS)
            wg.wait(refs.queries_full.at[slot])
            d_out = refs.d_out_tiles.at[slot].transpose((1, 0))
            delta = wg.by_columns(wg.load(refs.delta_numbers.at[slot], wg.COLUMNS))
            scores = wg.product((values, d_out)) - delta
            wg.arrive(refs.queries_free.at[slot])
            scores = tiles.visible(scores, decay, transposed=True).astype(jnp.bfloat16)
            wg.wait(refs.hashed_full.at[passed])
            hashed = refs.hashed_tiles.at[passed]
            d_phi = wg.product((scores, hashed), start=d_phi)
            wg.arrive(refs.hashed_free.at[passed])
            return d_phi

        d_phi = weights.keep(place.for_group(query_head, d_phi))
        (decayed,) = weights.carry(decayed)
        squashed = features.squash(refs.zk_tiles.at[slot])
        wg.arrive(refs.state_free.at[passed])
        wg.arrive(refs.keys_free.at[slot])
        phi = _shared_features(refs, passed, waited=gate)
        d_z, d_beta = features.gradient(squashed, phi, d_phi, halves=True)
        tokens = place.tokens(turn)
        wg.sent()
        wg.store(refs.d_zk_tiles, d_z.astype(jnp.bfloat16))
        copies = [(refs.d_zk_tiles, refs.d_zk.at[place.batch, tokens, place.head])]
        if gate:
            column = jnp.sum(phi * (d_phi + wg.by_rows(in_common)), axis=1)
            refs.column_numbers[...] = column + lost
            copies.append((refs.column_numbers, refs.column.at[place.batch, place.head, tokens]))
        wg.send(*copies)
        return d_sharpness + d_beta, decayed

    zeros = wg.filled(0.0, place.problem.projections)
    d_sharpness, _ = lax.fori_loop(0, place.count, chunk, (zeros, jnp.float32(1.0)))
    refs.d_sharpness[place.batch, place.head, place.split] = d_sharpness
    wg.sent(read_only=False)


def _shared_features(refs: SimpleNamespace, passed: jax.Array, *, waited: bool) -> jax.Array:
    """Returns φk (64, F), which the values' warpgroup has made, and frees its slot."""
    if not waited:
        wg.wait(refs.phi_full.at[passed])
    phi = wg.load(refs.phi_tiles.at[passed])
    wg.arrive(refs.phi_free.at[passed])
    return phi


def _from_adjoint(refs: SimpleNamespace, values: Any, passed: jax.Array):
    """Returns v Λ'ᵀ (64, F), and with a gate also v·λ (64,).

    λ is stored in the rows below Λ'. With a gate, Λ' is multiplied with twice the bits of an
    operand, because the gradient of the decay adds up the rounding errors along the sequence.
    """
    wg.wait(refs.state_full.at[passed])
    adjoint = refs.state_tiles.at[passed, pl.ds(0, tiles.FEATURES)].transpose((1, 0))
    if refs.fine_tiles is None:
        return wg.product((values, adjoint)), None
    common = refs.state_tiles.at[passed, pl.ds(tiles.FEATURES, 8)].transpose((1, 0))

    def begin(by_state, in_common):
        wg.multiply(by_state, values, adjoint)
        wg.multiply(by_state, values, refs.fine_tiles.transpose((1, 0)))
        wg.multiply(in_common, values, common)

    by_state, in_common = wg.together(begin, tiles.FEATURES, 8)
    return by_state, jnp.max(in_common, axis=1)


def _differentiate_values(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    features = tiles.TileFeatures(place, refs)
    tables, value_dim = place.problem.tables, place.problem.value_dim
    wg.wait(refs.constants_full)

    def chunk(turn, decayed):
        slot, passed = lax.rem(turn, pipeline.key_slots), lax.rem(turn, PASSED_SLOTS)
        weights = tiles.Weights(refs, slot)
        wg.wait(refs.keys_full.at[slot])
        decay = None if refs.decay_tiles is None else refs.decay_tiles.at[passed]
        phi = weights.keep(features.hash(refs.zk_tiles.at[slot]))
        keys = phi.astype(jnp.bfloat16)
        leaving = weights.times("leave", keys.astype(jnp.float32)).astype(jnp.bfloat16)

        @pl.when(turn >= PASSED_SLOTS)
        def _():
            wg.wait(refs.phi_free.at[passed])

        refs.phi_tiles[passed] = keys
        wg.arrive(refs.phi_full.at[passed])
        # L λ is added by a product with COMMON_ROWS equal rows of λ. Adding it as a tile would take
        # a tenth of the kernel's time.
        share = wg.filled(1.0, COMMON_ROWS) * (tables / COMMON_ROWS * decayed)
        share = weights.keep(weights.times("leave", share)).astype(jnp.bfloat16)
        (decayed,) = weights.carry(decayed)
        wg.wait(refs.state_full.at[passed])
        states = refs.state_tiles.at[passed, pl.ds(0, tiles.FEATURES)]
        d_value = wg.product((leaving, states), (share, refs.common_tiles), columns=value_dim)

        def query_head(member, d_value):
            item = place.items_before(turn, member)
            slot, passed = lax.rem(item, pipeline.query_slots), lax.rem(item, PASSED_SLOTS)
            wg.wait(refs.hashed_full.at[passed])
            hashed = refs.hashed_tiles.at[passed].transpose((1, 0))
            attention = wg.product((keys, hashed))
            wg.arrive(refs.hashed_free.at[passed])
            attention = tiles.visible(attention, decay, transposed=True).astype(jnp.bfloat16)
            wg.wait(refs.queries_full.at[slot])
            d_value = wg.product((attention, refs.d_out_tiles.at[slot]), start=d_value)
            wg.arrive(refs.queries_free.at[slot])
            return d_value

        d_value = place.for_group(query_head, d_value)
        wg.arrive(refs.state_free.at[passed])
        wg.arrive(refs.keys_free.at[slot])
        wg.sent()
        refs.d_value_tiles[...] = d_value.astype(jnp.bfloat16)
        where = place.batch, place.tokens(turn), place.head
        wg.send((refs.d_value_tiles, refs.d_value.at[where]))
        return decayed

    lax.fori_loop(0, place.count, chunk, jnp.float32(1.0))
    wg.sent(read_only=False)


def _halves(problem: Problem, delta: jax.Array) -> jax.Array:
    """Returns δ (B, N, T) as operands (B, N, chunks, 8, 64) in bfloat16.

    The first two rows are halves whose sum is δ, so that its rounding error does not outgrow that
    of do. The other rows are zero.
    """
    delta = delta.reshape(*delta.shape[:2], problem.chunks, 1, wg.CHUNK)
    # XLA may remove a cast to bfloat16 and back, as excess precision.
    coarse = lax.reduce_precision(delta, exponent_bits=8, mantissa_bits=7)
    row = jnp.arange(8)[:, None]
    halves = jnp.where(row == 0, coarse, jnp.where(row == 1, delta - coarse, 0.0))
    return halves.astype(jnp.bfloat16)


def _memory(problem: Problem, numbers: dict, pipeline: Pipeline) -> dict[str, Any]:
    """Returns the shared memory of a program, by name."""
    gate, enters = numbers["gamma"] is not None, numbers["enter"] is not None
    slots, z = pipeline.query_slots, (wg.CHUNK, problem.projections)
    passed = lambda readers: wg.barrier(num_arrivals=readers, num_barriers=PASSED_SLOTS)  # noqa: E731
    common, readers = 1 + PASSED_SLOTS * gate, 2 + enters
    keys = tiles.key_memory(problem, pipeline, numbers, readers=readers, more_constants=common)
    return keys | {
        "common_tiles": wg.narrow_operand(COMMON_ROWS, problem.value_dim),
        "zq_tiles": wg.plain(slots, *z, dtype=jnp.bfloat16),
        "d_out_tiles": wg.operand(slots, wg.CHUNK, problem.value_dim),
        "inverse_numbers": wg.plain(slots, wg.CHUNK),
        "delta_numbers": wg.plain(slots, wg.CHUNK),
        "delta_columns": wg.operand(slots, 8, wg.CHUNK),
        "queries_full": wg.barrier(num_arrivals=5, num_barriers=slots),
        "queries_free": wg.barrier(num_arrivals=3, num_barriers=slots),
        # With a gate, rows of λ lie below those of Λ'.
        "state_tiles": wg.operand(PASSED_SLOTS, tiles.FEATURES + 8 * gate, problem.value_dim),
        "mass_numbers": wg.plain(PASSED_SLOTS, tiles.FEATURES),
        "decay_tiles": wg.operand(PASSED_SLOTS, wg.CHUNK, wg.CHUNK, dtype=jnp.float16)
        if enters
        else None,
        # One slot is enough, because the keys' warpgroup begins with the product that reads it.
        "fine_tiles": wg.operand(wg.CHUNK, problem.value_dim) if gate else None,
        "fine_free": wg.barrier(num_arrivals=1) if gate else None,
        "state_full": passed(1),
        "state_free": passed(2),
        "hashed_tiles": wg.operand(PASSED_SLOTS, wg.CHUNK, tiles.FEATURES),
        "entering_tiles": wg.operand(wg.CHUNK, tiles.FEATURES) if enters else None,
        "hashed_full": passed(1),
        "hashed_free": passed(2),
        "phi_tiles": wg.operand(PASSED_SLOTS, wg.CHUNK, tiles.FEATURES),
        "phi_full": passed(1),
        "phi_free": passed(1),
        "d_zk_tiles": wg.plain(*z, dtype=jnp.bfloat16),
        "d_value_tiles": wg.operand(wg.CHUNK, problem.value_dim),
        "column_numbers": wg.plain(wg.CHUNK) if gate else None,
    }


def key_value_gradients(
    problem: Problem,
    pipeline: Pipeline,
    shared: Shared,
    zq,
    zk,
    value,
    d_out,
    rows,
    adjoints: tuple,
    common: Common,
):
    """Returns the same as causal_gradients.key_value_gradients.

    The problem must fit `blocks.fits_warpgroups`.
    """
    place, gate = tiles.Place(problem, reverse=True), shared.gamma is not None
    delta, adjoint_mass, common_mass = map(total, (rows.delta, adjoints[1], common.mass))
    numbers = tiles.token_numbers(problem, shared)
    memory = functools.partial(_memory, problem, numbers)
    pipeline = tiles.fitting(pipeline, memory)
    array = lambda *shape: jax.ShapeDtypeStruct(  # noqa: E731
        (problem.batch, problem.kv_heads, *shape), jnp.float32
    )
    works = _fetch, _keep_adjoint, _differentiate_keys, _differentiate_values
    result = wg.launch(
        lambda refs: wg.roles(
            len(works),
            *(
                (registers, functools.partial(work, place, pipeline, refs))
                for registers, work in zip(pipeline.registers, works, strict=True)
            ),
        ),
        name="causal_key_value_gradients",
        grid=place.grid,
        warpgroups=len(works),
        inputs=tiles.constants(problem, shared.sharpness)
        | numbers
        | {"zq": zq, "zk": zk, "value": value, "d_out": d_out}
        | {"inverse": rows.inverse, "delta": delta}
        | {"delta_halves": _halves(problem, delta)}
        | {"leaving_numerator": adjoints[0], "leaving_mass": adjoint_mass}
        | {"common": wg.equal_rows(COMMON_ROWS, common.numerator), "common_mass": common_mass},
        outputs={
            "d_zk": jax.ShapeDtypeStruct(zk.shape, zk.dtype),
            "d_value": jax.ShapeDtypeStruct(value.shape, value.dtype),
            "d_sharpness": array(problem.splits, wg.CHUNK, problem.projections),
            "column": array(problem.chunks * wg.CHUNK) if gate else None,
        },
        shared=memory(pipeline),
    )
    result.d_sharpness = result.d_sharpness.sum(axis=(0, 2, 3, 4))
    result.flow = -result.column if gate else None
    return result
