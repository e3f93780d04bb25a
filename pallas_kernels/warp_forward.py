"""What the warpgroup kernels that go forward in time share: fetching, and keeping the state.

The fetcher copies zq, zk, values, per-token numbers, the state at the start of each split and, for
the gradient, do. The keeper updates the state,

    [S | Z]' = a [S | Z] + (out∘φk)ᵀ [v | 1],

and passes φk, S and Z of every chunk to one of two readers in shared memory. For the gradient it
passes S - Z mᵀ in place of S (centre.py).
"""

import functools
from collections.abc import Callable, Mapping
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

# The number of warpgroups that take queries. Chunk i goes to reader i % 2, which has its own slots.
# With a single reader, fast warps of the keeper could overwrite a φk that its slow warps still
# multiply.
READERS = 2


def launch(
    problem: Problem,
    pipeline: Pipeline,
    shared: Shared,
    arrays: Mapping[str, jax.Array],
    states: tuple[jax.Array, jax.Array],
    *,
    name: str,
    read: Callable[[tiles.Place, Pipeline, SimpleNamespace], None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    memory: Mapping[str, Any],
) -> SimpleNamespace:
    """Runs a kernel whose readers run `read`.

    `arrays` are zq, zk and value, and for the gradient also d_out and m. m is given both as numbers
    and as rows. `memory` is the readers' own shared memory, by name.
    """
    numbers, place = tiles.token_numbers(problem, shared), tiles.Place(problem)
    given = "d_out" in arrays
    room = lambda pipeline: _memory(problem, pipeline, numbers, d_out=given) | memory  # noqa: E731
    pipeline = tiles.fitting(pipeline, room, key_slots=READERS)
    fetcher, keeper, reader = pipeline.registers
    return wg.launch(
        lambda refs: wg.roles(
            2 + READERS,
            (fetcher, functools.partial(_fetch, place, pipeline, refs)),
            (keeper, functools.partial(_keep_state, place, pipeline, refs)),
            (reader, functools.partial(read, place, pipeline, refs)),
        ),
        name=name,
        grid=place.grid,
        warpgroups=2 + READERS,
        inputs=tiles.constants(problem, shared.sharpness)
        | numbers
        | {"split_numerator": states[0], "split_mass": states[1]}
        | dict.fromkeys(("d_out", "mean", "mean_rows"))
        | arrays,
        outputs=outputs,
        shared=room(pipeline),
    )


def _memory(
    problem: Problem, pipeline: Pipeline, numbers: dict, *, d_out: bool = False
) -> dict[str, Any]:
    """Returns shared memory for what is fetched, and for what the keeper passes to the readers."""
    slots, leaves = READERS * pipeline.query_slots, numbers["leave"] is not None
    wide = wg.operand(slots, wg.CHUNK, problem.value_dim) if d_out else None
    return tiles.key_memory(problem, pipeline, numbers, more_constants=3 * d_out) | {
        "zq_tiles": wg.plain(slots, wg.CHUNK, problem.projections, dtype=jnp.bfloat16),
        "d_out_tiles": wide,
        "mean_numbers": wg.plain(problem.value_dim) if d_out else None,
        "queries_full": wg.barrier(num_arrivals=1 + d_out, num_barriers=slots),
        "queries_free": wg.barrier(num_arrivals=1, num_barriers=slots),
        "phi_tiles": wg.operand(READERS, wg.CHUNK, tiles.FEATURES),
        "leaving_tiles": wg.operand(wg.CHUNK, tiles.FEATURES) if leaves else None,
        "decay_tiles": wg.operand(READERS, wg.CHUNK, wg.CHUNK, dtype=jnp.float16)
        if leaves
        else None,
        # m, where it is given, lies below S: one product with both.
        "state_tiles": wg.operand(READERS, tiles.FEATURES + 8 * d_out, problem.value_dim),
        "fine_tiles": None,
        "mass_numbers": wg.plain(READERS, tiles.FEATURES) if d_out else None,
        "mass_tiles": None if d_out else wg.operand(READERS, 8, tiles.FEATURES),
        "state_full": wg.barrier(num_arrivals=1, num_barriers=READERS),
        "state_free": wg.barrier(num_arrivals=1, num_barriers=READERS),
    }


def _fetch(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    """Starts the copies of keys per chunk and of queries per query head, as slots become free."""
    tiles.fetch_constants(refs)
    if refs.mean is not None:
        where, below = (place.batch, place.head, place.split), pl.ds(tiles.FEATURES, 8)
        wg.fetch(refs.mean.at[where], refs.mean_numbers, refs.constants_full)
        for reader in range(READERS):
            rows = refs.state_tiles.at[reader, below]
            wg.fetch(refs.mean_rows.at[where], rows, refs.constants_full)

    def fetch_queries(turn, reader, item, member):
        slot = reader * pipeline.query_slots + lax.rem(item, pipeline.query_slots)

        @pl.when(item >= pipeline.query_slots)
        def _():
            wg.wait(refs.queries_free.at[slot])

        where = place.batch, place.tokens(turn), place.query_head(member)
        full = refs.queries_full.at[slot]
        wg.fetch(refs.zq.at[where], refs.zq_tiles.at[slot], full)
        if refs.d_out is not None:
            wg.fetch(refs.d_out.at[where], refs.d_out_tiles.at[slot], full)

    def chunks(own_turn, carry):
        # The heads are in the outer loop and the readers in the inner one. In the opposite order,
        # a wait for a slot of one reader would delay the others.
        def query_head(member, carry):
            for reader in range(READERS):
                turn = own_turn * READERS + reader

                @pl.when(turn < place.count)
                def _(turn=turn, reader=reader):
                    @pl.when(member == 0)
                    def _():
                        tiles.fetch_keys(place, pipeline, refs, turn)

                    fetch_queries(turn, reader, place.items_before(own_turn, member), member)

            return carry

        return place.for_group(query_head, carry)

    rounds = lax.div(place.count + (READERS - 1), READERS)
    lax.fori_loop(0, rounds, chunks, jnp.int32(0))


def _keep_state(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    """Hashes keys and keeps the state.

    For each chunk it passes φk, S and Z to a reader, and then adds the chunk to the state.
    """
    where = place.batch, place.head, place.split
    features = tiles.TileFeatures(place, refs)
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

        refs.phi_tiles[reader] = phi.astype(jnp.bfloat16)
        _pass_state(refs, reader, *state)
        leaving = refs.phi_tiles.at[reader]
        if refs.leaving_tiles is not None:
            wg.commit()  # all warps are through with the last product of this tile
            # Rounded twice, as the column sums of the gate's gradient take them in account.
            leaving = weights.times("leave", wg.rounded(phi))
            refs.leaving_tiles[...] = leaving.astype(jnp.bfloat16)
            leaving = refs.leaving_tiles
        wg.commit()
        wg.arrive(refs.state_full.at[reader])
        leaving = leaving.transpose((1, 0))

        def absorb(numerator, mass):
            wg.multiply(numerator, leaving, refs.value_tiles.at[slot])
            wg.multiply(mass, leaving, refs.ones_columns.transpose((1, 0)))

        state = wg.onto(absorb, *weights.carry(*state))
        wg.arrive(refs.keys_free.at[slot])
        return state

    lax.fori_loop(0, place.count, chunk, state)


def _pass_state(refs: SimpleNamespace, reader: jax.Array, numerator, mass) -> None:
    """Stores S and Z for a reader. If m is given, S' = S - Z mᵀ is stored in place of S."""
    if refs.mean is None:
        refs.state_tiles[reader] = numerator.astype(jnp.bfloat16)
        refs.mass_tiles.at[reader].transpose((1, 0))[...] = mass.astype(jnp.bfloat16)
        return
    masses, features = jnp.max(mass, axis=1), pl.ds(0, tiles.FEATURES)
    refs.mass_numbers[reader] = masses
    for start in range(0, numerator.shape[1], 64):  # in parts, to save registers
        columns = pl.ds(start, 64)
        mean = wg.by_columns(wg.load(refs.mean_numbers.at[columns], wg.COLUMNS))
        centred = numerator[:, start : start + 64] - wg.by_rows(masses) * mean
        coarse = centred.astype(jnp.bfloat16)
        refs.state_tiles[reader, features, columns] = coarse
        if refs.fine_tiles is not None:
            fine = centred - coarse.astype(jnp.float32)
            refs.fine_tiles[reader, :, columns] = fine.astype(jnp.bfloat16)


class Item(NamedTuple):
    """One chunk of one query head, as a reader finds it in shared memory."""

    weights: tiles.Weights
    zq: Any
    d_out: Any
    keys: Any  # φk
    values: Any
    states: Any  # S; with do, S' of centre.py
    fine: Any  # what S' loses there to rounding, or None
    mass: Any  # Z: with do as numbers, else as 8 equal columns
    decay: Any  # D, or None
    free: Any  # the barrier to arrive at after the last use of zq and d_out

    def masses(self) -> jax.Array:
        """Returns Z as the columns of a tile. It is loaded at each use, to save registers."""
        return wg.by_columns(wg.load(self.mass, wg.COLUMNS))


def reader_number() -> jax.Array:
    """Returns the number of this warpgroup among the readers."""
    return wg.warpgroup() - 2


def for_chunks(
    place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace, body: Callable, carry: Any
) -> Any:
    """Folds `body(turn, carry)` over this reader's chunks.

    Each chunk is awaited from the keeper, and D is computed before `body` runs.
    """
    reader = reader_number()

    def chunk(own_turn, carry):
        turn = own_turn * READERS + reader
        slot = lax.rem(turn, pipeline.key_slots)
        # This also implies keys_full, for which the keeper has waited. A reader takes only every
        # other chunk, so that it would miss a phase of that barrier.
        wg.wait(refs.state_full.at[reader])
        if refs.decay_tiles is not None:  # the keeper has enough to do
            refs.decay_tiles[reader] = tiles.Weights(refs, slot).decay().astype(jnp.float16)
            wg.commit()
        carry = body(turn, carry)
        wg.arrive(refs.state_free.at[reader])
        wg.arrive(refs.keys_free.at[slot])
        return carry

    rounds = lax.div(place.count + (READERS - 1 - reader), READERS)
    return lax.fori_loop(0, rounds, chunk, carry)


def take(
    place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace, turn: jax.Array, member: Any
) -> Item:
    """Waits for the queries of one head of the group in the current chunk."""
    reader, slots = reader_number(), pipeline.query_slots
    item = place.items_before(lax.div(turn, READERS), member)
    query, key = reader * slots + lax.rem(item, slots), lax.rem(turn, pipeline.key_slots)
    wg.wait(refs.queries_full.at[query])
    at = lambda ref, slot: None if ref is None else ref.at[slot]  # noqa: E731
    return Item(
        tiles.Weights(refs, key),
        refs.zq_tiles.at[query],
        at(refs.d_out_tiles, query),
        refs.phi_tiles.at[reader],
        refs.value_tiles.at[key],
        refs.state_tiles.at[reader],
        at(refs.fine_tiles, reader),
        (refs.mass_tiles if refs.mass_numbers is None else refs.mass_numbers).at[reader],
        at(refs.decay_tiles, reader),
        refs.queries_free.at[query],
    )


def inverse_of(denominator: jax.Array) -> jax.Array:
    """Returns 1 / z, and 0 for a query that sees no key."""
    seen = denominator >= TINY
    return jnp.where(seen, 1.0 / jnp.where(seen, denominator, 1.0), 0.0)
