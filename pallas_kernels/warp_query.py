"""The gradient of the queries of causal RACE attention, by four warpgroups that pass tiles.

The inputs are those of the forward pass, the state at the start of each split, the reference m of
centre.py, and do. The outputs are dz of the queries, ρ, δ, the terms of dβ, and the row sums if
there is a gate. With
Y = ((do vᵀ)∘D) φk + in∘(do Sᵀ) and G = D φk + in∘Z, every row gives

    1/ρ = φq·G,   δ = do·o = ρ φq·Y,   dφq = ρ (Y - δ G)

In the code, m is subtracted from v and S, and δ is then smaller by do·m. The δ that is written has
do·m added back.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import warp_forward as forward
from pallas_kernels import warp_tiles as tiles
from pallas_kernels import warpgroup as wg
from pallas_kernels.blocks import Pipeline
from pallas_kernels.tiles import Problem, Shared
from pallas_kernels.warp_forward import READERS, Item, inverse_of


def _differentiate(features: tiles.TileFeatures, at: Item) -> tuple[jax.Array, ...]:
    """Returns u, φq, dφq, ρ and δ, by the equations above.

    The products run one after the other, because this takes fewer registers.
    """
    by_state, offset = _from_state(at)
    by_state = at.weights.times("enter", by_state)
    by_key = wg.product((at.d_out, at.values.transpose((1, 0))), start=-wg.by_rows(offset))
    scores = tiles.visible(by_key, at.decay).astype(jnp.bfloat16)
    flow = wg.product((scores, at.keys), start=by_state)
    # The ones are held in registers, because this product was slower from shared memory.
    seen = tiles.visible(wg.filled(1.0, wg.CHUNK), at.decay).astype(jnp.bfloat16)
    crowd = wg.product((seen, at.keys), start=at.weights.times("enter", at.masses()))
    squashed = features.squash(at.zq)
    phi = features.expand(squashed)
    inverse = at.weights.keep_rows(inverse_of(jnp.sum(phi * crowd, axis=1)))
    delta = inverse * jnp.sum(phi * flow, axis=1)
    d_phi = wg.by_rows(inverse) * (flow - wg.by_rows(delta) * crowd)
    return squashed, phi, d_phi, inverse, delta + offset


def _from_state(at: Item) -> tuple[jax.Array, jax.Array]:
    """Returns do S'ᵀ (64, F) and μ = do·m (64,).

    m is stored in the rows below S'. If the part of S' that is lost by rounding is given, it is
    multiplied too. One product with both S' and m made ptxas serialize all products of
    `_differentiate`.
    """
    state, mean = pl.ds(0, tiles.FEATURES), pl.ds(tiles.FEATURES, 8)

    def begin(by_state, offset):
        wg.multiply(by_state, at.d_out, at.states.at[state].transpose((1, 0)))
        if at.fine is not None:
            wg.multiply(by_state, at.d_out, at.fine.transpose((1, 0)))
        wg.multiply(offset, at.d_out, at.states.at[mean].transpose((1, 0)))

    by_state, offset = wg.together(begin, tiles.FEATURES, 8)
    return by_state, jnp.max(offset, axis=1)


def _differentiate_with_row(features: tiles.TileFeatures, at: Item) -> tuple[jax.Array, ...]:
    """Returns the same as `_differentiate`, and the row sums, from T as in the keys' gradients.

    The row sums would be 0 without rounding. If they have the same rounding as the column sums, it
    cancels in dg. Therefore δ is computed first here, from A = (φq φkᵀ)∘D. Then T = (do vᵀ - δ)∘D
    gives dφq = ρ (T φk + in∘(do Sᵀ - δ Z)).
    """
    squashed = features.squash(at.zq)

    def begin(by_key, exponent):
        wg.multiply(by_key, at.d_out, at.values.transpose((1, 0)))
        features.start(exponent, squashed)

    by_key, exponent = wg.together(begin, wg.CHUNK, tiles.FEATURES)
    phi = jnp.exp2(exponent)
    attention = wg.product((phi.astype(jnp.bfloat16), at.keys.transpose((1, 0))))
    attention = tiles.visible(attention, at.decay)
    from_state = at.weights.times_rows("enter", jnp.sum(phi * at.masses(), axis=1))
    within = jnp.sum(attention, axis=1)
    inverse = at.weights.keep_rows(inverse_of(from_state + within))
    delta = jnp.sum(attention * by_key, axis=1)
    by_state, offset = _from_state(at)
    read = at.weights.times_rows("enter", jnp.sum(phi * by_state, axis=1))
    delta = inverse * (delta - offset * within + read)
    whole = delta + offset
    scores = tiles.visible(by_key - wg.by_rows(whole), at.decay).astype(jnp.bfloat16)
    by_state -= wg.by_rows(delta) * at.masses()
    scaled = wg.rounded(phi * wg.by_rows(inverse))
    entering = at.weights.times("enter", scaled)
    row = jnp.sum((wg.rounded(entering) - entering) * by_state, axis=1)
    d_phi = wg.product((scores, at.keys), start=at.weights.times("enter", by_state))
    row += jnp.sum(scaled * d_phi, axis=1)
    return squashed, phi, d_phi * wg.by_rows(inverse), inverse, whole, row


def _read(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    features = tiles.TileFeatures(place, refs)
    form = _differentiate if refs.row is None else _differentiate_with_row
    wg.wait(refs.constants_full)

    def chunk(turn, d_sharpness):
        def query_head(member, carry):
            at = forward.take(place, pipeline, refs, turn, member)
            squashed, phi, d_phi, inverse, delta, *row = form(features, at)
            wg.arrive(at.free)
            d_z, d_beta = features.gradient(squashed, phi, d_phi)
            d_sharpness, row_sums = carry
            row_sums = [x + y for x, y in zip(row_sums, row, strict=True)]
            _send(place, refs, turn, member, (d_z, inverse, delta, *row_sums))
            return d_sharpness + d_beta, row_sums

        row_sums = [] if refs.row is None else [jnp.sum(wg.filled(0.0, 8), axis=1)]
        return place.for_group(query_head, (d_sharpness, row_sums))[0]

    zeros = wg.filled(0.0, place.problem.projections)
    d_sharpness = forward.for_chunks(place, pipeline, refs, chunk, zeros)
    reader = forward.reader_number()
    refs.d_sharpness[place.batch, place.head, place.split, reader] = d_sharpness
    wg.sent(read_only=False)


def _send(place: tiles.Place, refs: SimpleNamespace, turn, member, results: tuple) -> None:
    """Starts the copies of dz, ρ, δ and the row sums to device memory.

    The row sums are those of the group's heads so far.
    """
    reader = forward.reader_number()
    head, tokens = place.query_head(member), place.tokens(turn)
    rows, group_rows = (place.batch, head, tokens), (place.batch, place.head, tokens)
    targets = [
        (refs.d_zq_tiles, refs.d_zq.at[place.batch, tokens, head]),
        (refs.inverse_rows, refs.inverse.at[rows]),
        (refs.delta_rows, refs.delta.at[rows]),
    ]
    if refs.row is not None:
        targets.append((refs.row_rows, refs.row.at[group_rows]))
    # All heads of a group write their row sums to the same place, so that each copy must have
    # arrived before the next one starts.
    wg.sent(read_only=refs.row is None or place.problem.group == 1)
    for (source, _), result in zip(targets, results, strict=True):
        wg.store(source.at[reader], result.astype(source.dtype))
    wg.send(*((source.at[reader], target) for source, target in targets))


def query_gradients(
    problem: Problem, pipeline: Pipeline, shared: Shared, zq, zk, value, d_out, states, mean
):
    """Returns the same as causal_gradients.query_gradients.

    The problem must fit `blocks.fits_warpgroups`.
    """
    batch, heads, kv_heads = problem.batch, zq.shape[2], problem.kv_heads
    padded, gate = problem.chunks * wg.CHUNK, shared.gamma is not None
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    terms = batch, kv_heads, problem.splits, READERS, wg.CHUNK, problem.projections
    result = forward.launch(
        problem,
        pipeline,
        shared,
        {"zq": zq, "zk": zk, "value": value, "d_out": d_out}
        | {"mean": mean, "mean_rows": wg.equal_rows(8, mean)},
        states,
        name="causal_query_gradients",
        read=_read,
        outputs={
            "d_zq": jax.ShapeDtypeStruct(zq.shape, zq.dtype),
            "inverse": array(batch, heads, padded),
            "delta": array(batch, heads, padded),
            "d_sharpness": array(*terms),
            "row": array(batch, kv_heads, padded) if gate else None,
        },
        memory={
            "d_zq_tiles": wg.plain(READERS, wg.CHUNK, problem.projections, dtype=jnp.bfloat16),
            "inverse_rows": wg.plain(READERS, wg.CHUNK),
            "delta_rows": wg.plain(READERS, wg.CHUNK),
            "row_rows": wg.plain(READERS, wg.CHUNK) if gate else None,
            "fine_tiles": wg.operand(READERS, wg.CHUNK, problem.value_dim) if gate else None,
        },
    )
    result.delta = result.delta[None]
    result.d_sharpness = result.d_sharpness.sum(axis=(0, 2, 3, 4, 5))
    return result
