"""Causal RACE attention on the GPU: padding, kernels and the prefix over splits, in order.

In: z of queries and keys, values, sharpness, log decay, masks, a state; backward also the states
of the splits and the cotangents. Out: outputs and final state; or every gradient by name.
Equation: o_t = Σ_s w_ts v_s / Σ_s w_ts, w_ts = exp(G_t - G_s) φ(zq_t)·φ(zk_s) over visible s <= t.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import causal_gradients, causal_outputs
from pallas_kernels.blocks import Blocks
from pallas_kernels.prefix import (
    later_flow,
    leaving_adjoints,
    running_decay,
    split_weights,
    starting_states,
)
from pallas_kernels.plan import flat_projections, pad_to, padded_state, plan, unflat
from pallas_kernels.tiles import Problem, Shared


class CausalForward(NamedTuple):
    """Outputs and final state of a causal call, and the state where each split starts."""

    out: jax.Array  # (B, T, N, V), value's dtype
    final_numerator: jax.Array  # (B, K, F, V) float32
    final_mass: jax.Array  # (B, K, F) float32
    split_numerator: jax.Array  # (B, K, splits, F, V) float32
    split_mass: jax.Array  # (B, K, splits, F) float32


class CausalGradients(NamedTuple):
    """Cotangents of the inputs of a causal call."""

    zq: jax.Array
    zk: jax.Array
    value: jax.Array
    sharpness: jax.Array
    log_decay: jax.Array | None
    initial_numerator: jax.Array
    initial_mass: jax.Array


def causal_forward(
    zq: jax.Array,
    zk: jax.Array,
    value: jax.Array,
    sharpness: jax.Array,
    log_decay: jax.Array | None,
    key_value_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_numerator: jax.Array,
    initial_mass: jax.Array,
    initial_segment: jax.Array,
    *,
    interpret: bool = False,
    config: Blocks | None = None,
) -> CausalForward:
    """Causal outputs, the final state, and the state where each split of the sequence starts.

    Args:
      zq: hash projections of the queries, (B, T, N, L, P), float32 or bfloat16.
      zk: hash projections of the keys, (B, T, K, L, P), N a multiple of K.
      value: (B, T, K, V), float32 or bfloat16; products take its precision.
      sharpness: (K,) float32, > 0.
      log_decay: (B, T, K) float32 in [-80, 0], 0 at padded tokens; or None.
      key_value_mask: (B, T) bool, False at padded tokens, whose zq, zk, value must be finite.
      segment_ids: (B, T) int32, contiguous runs, filled forward over padded tokens; or None.
      initial_numerator: (B, K, F, V) float32.
      initial_mass: (B, K, F) float32.
      initial_segment: (B,) int32, the segment that the initial state belongs to.
      interpret: run the kernels in Pallas' interpreter, on any platform (tests).
      config: block sizes; None chooses them by shape.

    Returns:
      A CausalForward. Sums are kept in float32.
    """
    problem, _, blocks = plan(zq, zk, value, interpret, config)
    flat_q, flat_k = flat_projections(problem, zq), flat_projections(problem, zk)
    wide = pad_to(value, problem.value_dim)
    shared = Shared(
        sharpness,
        gamma=None if log_decay is None else running_decay(log_decay, problem.chunk),
        mask=key_value_mask,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
    )
    sums = causal_outputs.split_sums(problem, blocks.sums, shared, flat_k, wide)
    weights = _weights(problem, log_decay, segment_ids, initial_segment)
    initial = padded_state(problem, initial_numerator, initial_mass)
    split_numerator, final_numerator = starting_states(weights, sums[0], initial[0])
    split_mass, final_mass = starting_states(weights, sums[1], initial[1])
    states = split_numerator, split_mass
    out = causal_outputs.outputs(
        problem, blocks.outputs, shared, flat_q, flat_k, wide, states
    )
    features, value_dim = initial_numerator.shape[-2:]
    return CausalForward(
        out[..., :value_dim],
        final_numerator[..., :features, :value_dim],
        final_mass[..., :features],
        split_numerator[..., :features, :value_dim],
        split_mass[..., :features],
    )


def causal_backward(
    zq: jax.Array,
    zk: jax.Array,
    value: jax.Array,
    sharpness: jax.Array,
    log_decay: jax.Array | None,
    key_value_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_numerator: jax.Array,
    initial_mass: jax.Array,
    initial_segment: jax.Array,
    split_numerator: jax.Array,
    split_mass: jax.Array,
    d_out: jax.Array,
    d_final_numerator: jax.Array,
    d_final_mass: jax.Array,
    *,
    interpret: bool = False,
    config: Blocks | None = None,
) -> CausalGradients:
    """Gradients of `causal_forward`, from its inputs, the states of its splits and cotangents.

    Args:
      zq, zk, value, sharpness, log_decay, key_value_mask, segment_ids, initial_numerator,
        initial_mass, initial_segment, interpret, config: as given to `causal_forward`.
      split_numerator: (B, K, splits, F, V), as `causal_forward` returned it.
      split_mass: (B, K, splits, F), likewise.
      d_out: cotangent of the outputs, (B, T, N, V).
      d_final_numerator: cotangent of the final numerator, (B, K, F, V) float32.
      d_final_mass: cotangent of the final mass, (B, K, F) float32.

    Returns:
      A CausalGradients, each leaf in the dtype of what it is the gradient of.
    """
    problem, _, blocks = plan(zq, zk, value, interpret, config)
    flat_q, flat_k = flat_projections(problem, zq), flat_projections(problem, zk)
    wide = pad_to(value, problem.value_dim)
    wide_d_out = pad_to(d_out.astype(value.dtype), problem.value_dim)
    shared = Shared(
        sharpness,
        gamma=None if log_decay is None else running_decay(log_decay, problem.chunk),
        mask=key_value_mask,
        segment_ids=segment_ids,
        initial_segment=initial_segment,
    )
    states = padded_state(problem, split_numerator, split_mass)
    d_final = padded_state(problem, d_final_numerator, d_final_mass)
    query = causal_gradients.query_gradients(
        problem, blocks.query, shared, flat_q, flat_k, wide, states, wide_d_out
    )
    adjoints = causal_gradients.reverse_sums(
        problem, blocks.reverse, shared, flat_q, wide_d_out, query.inverse, query.delta
    )
    weights = _weights(problem, log_decay, segment_ids, initial_segment)
    d_numerator, d_initial_numerator = leaving_adjoints(weights, adjoints[0], d_final[0])
    d_mass, d_initial_mass = leaving_adjoints(weights, adjoints[1], d_final[1])
    arrays = {"zq": flat_q, "zk": flat_k, "value": wide, "d_out": wide_d_out}
    run = functools.partial(
        causal_gradients.key_value_gradients, problem,
        shared=shared, arrays=arrays, rows=query, adjoints=(d_numerator, d_mass),
    )  # fmt: skip
    if blocks.value is None:
        keys = values = run(blocks.key)
    else:
        keys, values = run(blocks.key, values=False), run(blocks.value, keys=False)
    d_sharpness = query.d_sharpness + keys.d_sharpness.sum(axis=(0, 1, 3))
    d_log_decay = None
    if log_decay is not None:
        later = _crossing(d_numerator, states[0], query.final_numerator)
        later += _crossing(d_mass, states[1], query.final_mass)
        flow = query.row - causal_gradients.total(keys.column)
        d_log_decay = later_flow(flow, later, problem.chunk, problem.split)
        d_log_decay = d_log_decay[..., : problem.length].swapaxes(1, 2).astype(log_decay.dtype)
    features, value_dim = initial_numerator.shape[-2:]
    return CausalGradients(
        unflat(query.d_zq, zq),
        unflat(causal_gradients.total(keys.d_zk), zk),
        values.d_value[..., :value_dim],
        d_sharpness.astype(sharpness.dtype),
        d_log_decay,
        d_initial_numerator[..., :features, :value_dim],
        d_initial_mass[..., :features],
    )


def _weights(problem: Problem, log_decay, segment_ids, initial_segment) -> jax.Array:
    shape = problem.batch, problem.kv_heads, problem.splits
    return split_weights(log_decay, segment_ids, initial_segment, shape, problem.split)


def _crossing(adjoint: jax.Array, states: jax.Array, final: jax.Array) -> jax.Array:
    """⟨Λ_e, X_e⟩ (B, K, splits) at the end e of each split: what later tokens add to dg there."""
    leaving = jnp.concatenate([states[:, :, 1:], final], axis=2)
    return (adjoint * leaving).reshape(*leaving.shape[:3], -1).sum(axis=3)

