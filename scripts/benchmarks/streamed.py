"""One causal RACE operation over a sequence whose queries, keys and values would not fit.

A token is a byte, and three tables hold its query, key and value for each head. The planes are
applied to the tables, so a token looks up its hash projections and its value:

    z_q[t] = W query[token_t]    z_k[t] = W key[token_t]    v[t] = value[token_t]
    loss   = sum_t |out_t|^2

`race_jax.streaming` computes the loss and its exact gradient with respect to the three tables, in
one compiled program. The sequence is read in segments from the first to the last, and then
differentiated from the last to the first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import race_jax
from benchmarks.arrays import Random
from benchmarks.attention import Problem
from benchmarks.programs import Inputs, Program
from race_jax import streaming

VOCABULARY = 256
BY_HEADS = PartitionSpec(None, "heads")
TABLES = ("query", "key", "value")


def bytes_of(normal: jax.Array) -> jax.Array:
    """Tokens that are frequent near 128 and rare near 0 and 255, from normal numbers."""
    return jnp.clip(128 + 40 * normal, 0, VOCABULARY - 1)


def segment_loss(
    planes: jax.Array, tables: Inputs, state: race_jax.RACEState, tokens: jax.Array
) -> tuple[race_jax.RACEState, jax.Array]:
    """The state after a segment of tokens ``(1, T)``, and the sum of its squared outputs."""
    hashed = (race_jax.hash_projections(tables[name][None], planes)[0] for name in TABLES[:2])
    query, key = (table[tokens] for table in hashed)
    output, state = race_jax.race_attention_from_projections(
        query,
        key,
        tables["value"][tokens],
        is_causal=True,
        initial_state=state,
        return_state=True,
    )
    return state, jnp.square(output.astype(jnp.float32)).sum()


def streamed(problem: Problem, segment_length: int) -> Program:
    """A program for the loss and the gradient of the tables.

    Args:
      problem: a causal problem of one sequence without a gate.
      segment_length: the tokens of a segment. The state before every segment is kept.
    """

    def call(inputs: Inputs) -> dict[str, object]:
        tables = {name: inputs[name] for name in TABLES}
        heads, features = tables["value"].shape[1], problem.tables * 2**problem.planes
        state = race_jax.RACEState.init(1, heads, features, problem.value_dim)
        step = functools.partial(segment_loss, inputs["planes"])
        gradient = streaming.value_and_grad(step, segment_length=segment_length, group_size=1)
        found = gradient(tables, state, inputs["tokens"])
        return {"loss": found.sums[None], "gradients": found.d_params}

    rows = {"query": problem.head_dim, "key": problem.head_dim, "value": problem.value_dim}
    inputs = {
        name: Random((VOCABULARY, problem.heads, width), problem.dtype, split=BY_HEADS)
        for name, width in rows.items()
    }
    shape = (problem.tables, problem.planes, problem.head_dim)
    inputs["planes"] = Random(shape, deviation=problem.head_dim**-0.5)
    inputs["tokens"] = Random((1, problem.length), "uint8", finish=bytes_of)
    # The loss is a number for the heads of each device.
    split = {"loss": PartitionSpec("heads"), "gradients": BY_HEADS}
    return Program("race streamed", call, inputs, split=split)
