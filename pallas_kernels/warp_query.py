"""Causal RACE attention, backward of the queries, by four warpgroups that pass tiles on.

In: the forward's inputs, the state where each split starts, and do. Out: dz of the queries, ρ, δ,
the terms of dβ, and with a gate the row sums and the final state.
Equation: with Y = ((do vᵀ)∘D) φk + in∘(do Sᵀ) and G = D φk + in∘Z, every row gives
    1/ρ = φq·G,   δ = do·o = ρ φq·Y,   dφq = ρ (Y - δ G).

One warpgroup fetches, one keeps the state [S | Z] and hashes keys, and two take the queries of
every other chunk each.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import warp_tiles as tiles
from pallas_kernels import warpgroup as wg
from pallas_kernels.blocks import Pipeline
from pallas_kernels.tiles import TINY, Problem, Shared

READERS = 2  # warpgroups that take queries: chunk i goes to reader i % 2, with slots of its own


def _fetch(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    tiles.fetch_constants(refs)
    query_slots = pipeline.query_slots

    def chunk(turn, carry):
        tiles.fetch_keys(place, pipeline, refs, turn)
        reader, own_turn = lax.rem(turn, READERS), lax.div(turn, READERS)

        def query_head(member, carry):
            item = place.items_before(own_turn, member)
            slot = reader * query_slots + lax.rem(item, query_slots)

            @pl.when(item >= query_slots)
            def _():
                wg.wait(refs.queries_free.at[slot])

            where = place.batch, place.tokens(turn), place.query_head(member)
            full = refs.queries_full.at[slot]
            wg.fetch(refs.zq.at[where], refs.zq_tiles.at[slot], full)
            wg.fetch(refs.d_out.at[where], refs.d_out_tiles.at[slot], full)
            return carry

        return place.for_group(query_head, carry)

    lax.fori_loop(0, place.count, chunk, jnp.int32(0))


def _keep_state(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    """Hashes keys and keeps the state: for each chunk passes on φk, S, Z and D, then absorbs it."""
    where = place.batch, place.head, place.split
    features = tiles.TileFeatures(refs, place.head)
    mass = wg.load(refs.split_mass.at[where], wg.ROWS)
    state = wg.load(refs.split_numerator.at[where]), wg.by_rows(mass, 8)
    wg.wait(refs.constants_full)

    def chunk(turn, state):
        slot, reader = lax.rem(turn, pipeline.key_slots), lax.rem(turn, READERS)
        weights = tiles.Weights(refs, slot)
        wg.wait(refs.keys_full.at[slot])
        phi = weights.keep(features.hash(refs.zk_tiles.at[slot]))

        @pl.when(turn >= READERS)
        def _():
            wg.wait(refs.state_free.at[reader])

        numerator, mass = state
        refs.phi_tiles[reader] = phi.astype(jnp.bfloat16)
        refs.state_tiles[reader] = numerator.astype(jnp.bfloat16)
        refs.mass_numbers[reader] = jnp.max(mass, axis=1)
        leaving = refs.phi_tiles.at[reader]
        if refs.leaving_tiles is not None:
            refs.leaving_tiles[...] = weights.times("leave", phi).astype(jnp.bfloat16)
            refs.decay_tiles[reader] = weights.decay().astype(jnp.bfloat16)
            leaving = refs.leaving_tiles
        wg.commit()
        wg.arrive(refs.state_full.at[reader])
        leaving = leaving.transpose((1, 0))

        def absorb(numerator, mass):
            wg.multiply(numerator, leaving, refs.value_tiles.at[slot])
            wg.multiply(mass, leaving, refs.ones_columns.transpose((1, 0)))

        state = wg.onto(absorb, *weights.carry(numerator, mass))
        wg.arrive(refs.keys_free.at[slot])
        return state

    numerator, mass = lax.fori_loop(0, place.count, chunk, state)
    if refs.final_numerator is not None:

        @pl.when(place.split == place.problem.splits - 1)
        def _():
            refs.final_numerator[place.batch, place.head, 0] = numerator
            refs.final_mass[place.batch, place.head, 0] = jnp.max(mass, axis=1)


class _Read(NamedTuple):
    """One chunk of one query head as a reader finds it."""

    weights: tiles.Weights
    features: tiles.TileFeatures
    zq: Any
    d_out: Any
    keys: Any  # φk
    values: Any  # vᵀ
    states: Any  # Sᵀ
    mass: Any
    decay: Any

    def masses(self) -> jax.Array:
        """Z as the columns of a tile; loaded where it is used, for the sake of registers."""
        return wg.by_columns(wg.load(self.mass, wg.COLUMNS))


def _differentiate(at: _Read) -> tuple[jax.Array, ...]:
    """u, φq, dφq, ρ and δ, by the equations above; products one by one hold fewer registers."""
    scores = tiles.visible(wg.product((at.d_out, at.values)), at.decay).astype(jnp.bfloat16)
    by_state = at.weights.times("enter", wg.product((at.d_out, at.states)))
    flow = wg.product((scores, at.keys), start=by_state)
    # Ones in registers: from shared memory this product was slower.
    seen = tiles.visible(wg.filled(1.0, wg.CHUNK), at.decay).astype(jnp.bfloat16)
    crowd = wg.product((seen, at.keys), start=at.weights.times("enter", at.masses()))
    squashed = at.features.squash(at.zq)
    phi = at.features.expand(squashed)
    inverse = at.weights.keep_rows(_inverse(jnp.sum(phi * crowd, axis=1)))
    delta = inverse * jnp.sum(phi * flow, axis=1)
    d_phi = wg.by_rows(inverse) * (flow - wg.by_rows(delta) * crowd)
    return squashed, phi, d_phi, inverse, delta


def _differentiate_with_row(at: _Read) -> tuple[jax.Array, ...]:
    """The same and the row sums, from the T that the keys' gradients take.

    Row sums are 0 but for rounding; where they carry the same rounding as the column sums, it
    cancels in dg. So δ comes first here, from A = (φq φkᵀ)∘D, and then with T = (do vᵀ - δ)∘D
    dφq = ρ (T φk + in∘(do Sᵀ - δ Z)).
    """
    squashed = at.features.squash(at.zq)

    def begin(by_key, exponent):
        wg.multiply(by_key, at.d_out, at.values)
        at.features.start(exponent, squashed)

    by_key, exponent = wg.together(begin, wg.CHUNK, tiles.FEATURES)
    phi = jnp.exp2(exponent)
    attention = wg.product((phi.astype(jnp.bfloat16), at.keys.transpose((1, 0))))
    attention = tiles.visible(attention, at.decay)
    from_state = at.weights.enter(jnp.sum(phi * at.masses(), axis=1))
    inverse = at.weights.keep_rows(_inverse(from_state + jnp.sum(attention, axis=1)))
    delta = jnp.sum(attention * by_key, axis=1)
    by_state = wg.product((at.d_out, at.states))
    delta = inverse * (delta + at.weights.enter(jnp.sum(phi * by_state, axis=1)))
    scores = tiles.visible(by_key - wg.by_rows(delta), at.decay).astype(jnp.bfloat16)
    start = at.weights.times("enter", by_state - wg.by_rows(delta) * at.masses())
    d_phi = wg.product((scores, at.keys), start=start)
    scaled = (phi * wg.by_rows(inverse)).astype(jnp.bfloat16).astype(jnp.float32)
    row = jnp.sum(scaled * d_phi, axis=1)
    return squashed, phi, d_phi * wg.by_rows(inverse), inverse, delta, row


def _read(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    reader = wg.warpgroup() - 2
    features = tiles.TileFeatures(refs, place.head)
    wg.wait(refs.constants_full)

    def chunk(own_turn, d_sharpness):
        turn = own_turn * READERS + reader
        slot = lax.rem(turn, pipeline.key_slots)
        wg.wait(refs.state_full.at[reader])  # and with it for what the keeper waited for

        def query_head(member, carry):
            item = place.items_before(own_turn, member)
            query_slot = reader * pipeline.query_slots + lax.rem(item, pipeline.query_slots)
            wg.wait(refs.queries_full.at[query_slot])
            at = _Read(
                tiles.Weights(refs, slot),
                features,
                refs.zq_tiles.at[query_slot],
                refs.d_out_tiles.at[query_slot],
                refs.phi_tiles.at[reader],
                refs.value_tiles.at[slot].transpose((1, 0)),
                refs.state_tiles.at[reader].transpose((1, 0)),
                refs.mass_numbers.at[reader],
                None if refs.decay_tiles is None else refs.decay_tiles.at[reader],
            )
            form = _differentiate if refs.row is None else _differentiate_with_row
            squashed, phi, d_phi, inverse, delta, *row = form(at)
            wg.arrive(refs.queries_free.at[query_slot])
            d_z, d_beta = features.gradient(squashed, phi, d_phi)
            d_sharpness, row_sums = carry
            row_sums = [x + y for x, y in zip(row_sums, row, strict=True)]
            _send(place, refs, reader, turn, member, (d_z, inverse, delta, *row_sums))
            return d_sharpness + d_beta, row_sums

        row_sums = [] if refs.row is None else [jnp.sum(wg.filled(0.0, 8), axis=1)]
        d_sharpness, _ = place.for_group(query_head, (d_sharpness, row_sums))
        wg.arrive(refs.state_free.at[reader])
        wg.arrive(refs.keys_free.at[slot])
        return d_sharpness

    rounds = lax.div(place.count + (READERS - 1 - reader), READERS)
    zeros = wg.filled(0.0, place.problem.projections)
    d_sharpness = lax.fori_loop(0, rounds, chunk, zeros)
    refs.d_sharpness[place.batch, place.head, place.split, reader] = d_sharpness
    wg.sent(read_only=False)


def _send(place: tiles.Place, refs: SimpleNamespace, reader, turn, member, results: tuple) -> None:
    """Sends off dz, ρ, δ and, at each query head, the row sums of the group's heads so far."""
    head, tokens = place.query_head(member), place.tokens(turn)
    rows, group_rows = (place.batch, head, tokens), (place.batch, place.head, tokens)
    targets = [
        (refs.d_zq_tiles, refs.d_zq.at[place.batch, tokens, head]),
        (refs.inverse_rows, refs.inverse.at[rows]),
        (refs.delta_rows, refs.delta.at[rows]),
    ]
    if refs.row is not None:
        targets.append((refs.row_rows, refs.row.at[group_rows]))
    wg.sent()
    for (source, _), result in zip(targets, results, strict=True):
        source[reader] = result.astype(source.dtype)
    wg.send(*((source.at[reader], target) for source, target in targets))


def _inverse(denominator: jax.Array) -> jax.Array:
    """1 / z, and 0 for a query that sees no key."""
    seen = denominator >= TINY
    return jnp.where(seen, 1.0 / jnp.where(seen, denominator, 1.0), 0.0)


def _shared(problem: Problem, pipeline: Pipeline, numbers: dict) -> dict[str, Any]:
    """Shared memory of a program, by name."""
    gate, leaves = numbers["gamma"] is not None, numbers["leave"] is not None
    slots, z = READERS * pipeline.query_slots, (wg.CHUNK, problem.projections)
    return tiles.key_memory(problem, pipeline, numbers) | {
        "zq_tiles": wg.plain(slots, *z, dtype=jnp.bfloat16),
        "d_out_tiles": wg.operand(slots, wg.CHUNK, problem.value_dim),
        "queries_full": wg.barrier(num_arrivals=2, num_barriers=slots),
        "queries_free": wg.barrier(num_arrivals=1, num_barriers=slots),
        "phi_tiles": wg.operand(READERS, wg.CHUNK, tiles.FEATURES),
        "leaving_tiles": wg.operand(wg.CHUNK, tiles.FEATURES) if leaves else None,
        "decay_tiles": wg.operand(READERS, wg.CHUNK, wg.CHUNK) if leaves else None,
        "state_tiles": wg.operand(READERS, tiles.FEATURES, problem.value_dim),
        "mass_numbers": wg.plain(READERS, tiles.FEATURES),
        "state_full": wg.barrier(num_arrivals=1, num_barriers=READERS),
        "state_free": wg.barrier(num_arrivals=1, num_barriers=READERS),
        "d_zq_tiles": wg.plain(READERS, *z, dtype=jnp.bfloat16),
        "inverse_rows": wg.plain(READERS, wg.CHUNK),
        "delta_rows": wg.plain(READERS, wg.CHUNK),
        "row_rows": wg.plain(READERS, wg.CHUNK) if gate else None,
    }


def query_gradients(
    problem: Problem, pipeline: Pipeline, shared: Shared, zq, zk, value, d_out, states
):
    """As causal_gradients.query_gradients, for problems of `blocks.fits_warpgroups`."""
    place, numbers = tiles.Place(problem), tiles.token_numbers(problem, shared)
    batch, heads, kv_heads = problem.batch, zq.shape[2], problem.kv_heads
    padded, gate = problem.chunks * wg.CHUNK, shared.gamma is not None
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    final = batch, kv_heads, 1, tiles.FEATURES
    fetcher, keeper, reader = pipeline.registers
    result = wg.launch(
        lambda refs: wg.roles(
            2 + READERS,
            (fetcher, lambda: _fetch(place, pipeline, refs)),
            (keeper, lambda: _keep_state(place, pipeline, refs)),
            (reader, lambda: _read(place, pipeline, refs)),
        ),
        name="causal_query_gradients",
        grid=place.grid,
        warpgroups=2 + READERS,
        inputs=tiles.constants(problem, shared.sharpness)
        | numbers
        | {"zq": zq, "zk": zk, "value": value, "d_out": d_out}
        | {"split_numerator": states[0], "split_mass": states[1]},
        outputs={
            "d_zq": jax.ShapeDtypeStruct(zq.shape, zq.dtype),
            "inverse": array(batch, heads, padded),
            "delta": array(batch, heads, padded),
            "d_sharpness": array(
                batch, kv_heads, problem.splits, READERS, wg.CHUNK, problem.projections
            ),
            "row": array(batch, kv_heads, padded) if gate else None,
            "final_numerator": array(*final, problem.value_dim) if gate else None,
            "final_mass": array(*final) if gate else None,
        },
        shared=_shared(problem, pipeline, numbers),
    )
    result.d_sharpness = result.d_sharpness.sum(axis=(0, 2, 3, 4, 5))
    return result
