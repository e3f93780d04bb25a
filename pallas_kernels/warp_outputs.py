"""The outputs of causal RACE attention, by four warpgroups that pass tiles to one another.

The inputs are z of queries and keys, values, and the state at the start of each split:

    [N | z] = ((φq φkᵀ)∘D)[v | 1] + in∘(φq [S | Z]),   o = N / z
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from pallas_kernels import warp_forward as forward
from pallas_kernels import warp_tiles as tiles
from pallas_kernels import warpgroup as wg
from pallas_kernels.blocks import Pipeline
from pallas_kernels.tiles import Problem, Shared
from pallas_kernels.warp_forward import READERS, Item, inverse_of

MASS_COLUMNS = 8  # equal columns that hold a row sum; a product has at least this number


def _attend(features: tiles.TileFeatures, at: Item, ones: jax.Array) -> jax.Array:
    """Returns o (64, V) of one chunk of one query head."""
    phi = features.hash(at.zq)
    wg.arrive(at.free)
    attention = wg.product((phi.astype(jnp.bfloat16), at.keys.transpose((1, 0))))
    attention = tiles.visible(attention, at.decay).astype(jnp.bfloat16)
    entering = at.weights.times("enter", phi).astype(jnp.bfloat16)

    def body(numerator, crowd):
        wg.multiply(numerator, attention, at.values)
        wg.multiply(numerator, entering, at.states)
        # The mass uses the same rounded operands as the numerator, so that v = 1 gives o = 1.
        wg.multiply(crowd, attention, ones)
        wg.multiply(crowd, entering, at.mass.transpose((1, 0)))

    numerator, crowd = wg.together(body, at.values.shape[1], MASS_COLUMNS)
    inverse = at.weights.keep_rows(inverse_of(jnp.max(crowd, axis=1)))
    return numerator * wg.by_rows(inverse, numerator.shape[1])


def _read(place: tiles.Place, pipeline: Pipeline, refs: SimpleNamespace) -> None:
    features, reader = tiles.TileFeatures(place, refs), forward.reader_number()
    wg.wait(refs.constants_full)

    def chunk(turn, carry):
        def query_head(member, carry):
            at = forward.take(place, pipeline, refs, turn, member)
            out = _attend(features, at, refs.ones_columns.transpose((1, 0)))
            wg.sent()
            refs.out_tiles[reader] = out.astype(jnp.bfloat16)
            where = place.batch, place.tokens(turn), place.query_head(member)
            wg.send((refs.out_tiles.at[reader], refs.out.at[where]))
            return carry

        return place.for_group(query_head, carry)

    forward.for_chunks(place, pipeline, refs, chunk, jnp.int32(0))
    wg.sent(read_only=False)


def outputs(problem: Problem, pipeline: Pipeline, shared: Shared, zq, zk, value, states):
    """Returns the same as causal_outputs.outputs.

    The problem must fit `blocks.fits_warpgroups`.
    """
    shape = problem.batch, problem.length, zq.shape[2], problem.value_dim
    return forward.launch(
        problem,
        pipeline,
        shared,
        {"zq": zq, "zk": zk, "value": value},
        states,
        name="causal_outputs",
        read=_read,
        outputs={"out": jax.ShapeDtypeStruct(shape, value.dtype)},
        memory={"out_tiles": wg.operand(READERS, wg.CHUNK, problem.value_dim)},
    ).out
