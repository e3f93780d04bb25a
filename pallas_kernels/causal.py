"""Causal RACE attention on the GPU: padding, kernels and the prefix over splits, in order.

In: z of queries and keys, values, sharpness, log decay, masks, a state; backward also the states
of the splits and the cotangents. Out: outputs and final state; or every gradient by name.
Equation: o_t = Σ_s w_ts v_s / Σ_s w_ts, w_ts = exp(G_t - G_s) φ(zq_t)·φ(zk_s) over visible s <= t.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import causal_gradients, causal_outputs
from pallas_kernels.blocks import Blocks, Pipeline
from pallas_kernels.centre import common_adjoint, less_common, mean_value
from pallas_kernels.plan import (
    flat_projections,
    pad_to,
    padded_state,
    plan,
    traced_alike,
    unflat,
    whole_chunks,
)
from pallas_kernels.prefix import (
    later_flow,
    leaving_adjoints,
    running_decay,
    split_weights,
    starting_states,
)
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


@traced_alike
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
    hash_shape: tuple[int, int] | None = None,
    exact: bool = True,
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
      hash_shape: (L, P), where z is flat, (..., 1, X): plane p of table l in column l·P + p, zeros
        after the last. With X = projection_columns(L, P) no copy is made.
      exact: whether products of float32 operands are exact, or TF32 products.
      interpret: run the kernels in Pallas' interpreter, on any platform (tests).
      config: block sizes; None chooses them by shape.

    Returns:
      A CausalForward. Sums are kept in float32.
    """
    call = _prepare(
        plan(
            zq, zk, value, interpret, config,
            hash_shape=hash_shape, is_causal=True, gate=log_decay is not None,
            exact=exact,
        ),
        zq, zk, value,
        sharpness, log_decay, key_value_mask, segment_ids, initial_segment,
    )  # fmt: skip
    problem, blocks, arrays = call.problem, call.blocks, call.arrays
    sums = causal_outputs.split_sums(problem, blocks.sums, call.shared, arrays.zk, arrays.value)
    initial = padded_state(problem, initial_numerator, initial_mass)
    split_numerator, final_numerator = starting_states(call.weights, sums[0], initial[0])
    split_mass, final_mass = starting_states(call.weights, sums[1], initial[1])
    out = _outputs(call, (split_numerator, split_mass))
    features, value_dim = initial_numerator.shape[-2:]
    return CausalForward(
        out[..., :value_dim],
        final_numerator[..., :features, :value_dim],
        final_mass[..., :features],
        split_numerator[..., :features, :value_dim],
        split_mass[..., :features],
    )


@traced_alike
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
    final_numerator: jax.Array,
    final_mass: jax.Array,
    split_numerator: jax.Array,
    split_mass: jax.Array,
    d_out: jax.Array,
    d_final_numerator: jax.Array,
    d_final_mass: jax.Array,
    *,
    hash_shape: tuple[int, int] | None = None,
    exact: bool = True,
    interpret: bool = False,
    config: Blocks | None = None,
) -> CausalGradients:
    """Gradients of `causal_forward`, from its inputs, its states and cotangents.

    Args:
      zq: as given to `causal_forward`, like all up to initial_segment.
      zk: likewise.
      value: likewise.
      sharpness: likewise.
      log_decay: likewise.
      key_value_mask: likewise.
      segment_ids: likewise.
      initial_numerator: likewise.
      initial_mass: likewise.
      initial_segment: likewise.
      final_numerator: (B, K, F, V), as `causal_forward` returned it.
      final_mass: (B, K, F), likewise.
      split_numerator: (B, K, splits, F, V), likewise.
      split_mass: (B, K, splits, F), likewise.
      d_out: cotangent of the outputs, (B, T, N, V).
      d_final_numerator: cotangent of the final numerator, (B, K, F, V) float32.
      d_final_mass: cotangent of the final mass, (B, K, F) float32.
      hash_shape: as for `causal_forward`.
      exact: likewise.
      interpret: likewise.
      config: likewise.

    Returns:
      A CausalGradients, each leaf in the dtype of what it is the gradient of.
    """
    call = _prepare(
        plan(
            zq, zk, value, interpret, config,
            hash_shape=hash_shape, is_causal=True, gate=log_decay is not None,
            exact=exact,
        ),
        zq, zk, value,
        sharpness, log_decay, key_value_mask, segment_ids, initial_segment,
    )  # fmt: skip
    wide = pad_to(d_out.astype(value.dtype), call.problem.value_dim)
    states = padded_state(call.problem, split_numerator, split_mass)
    final = padded_state(call.problem, final_numerator, final_mass)
    d_final = padded_state(call.problem, d_final_numerator, d_final_mass)
    found = _gradients(call, _States(states, _ends(states, final)), wide, d_final)
    features, value_dim = initial_numerator.shape[-2:]
    return CausalGradients(
        unflat(found.zq, zq),
        unflat(found.zk, zk),
        found.value[..., :value_dim],
        found.sharpness.astype(sharpness.dtype),
        found.log_decay,
        found.initial_numerator[..., :features, :value_dim],
        found.initial_mass[..., :features],
    )


class _Arrays(NamedTuple):
    """z and values at the sizes that products take."""

    zq: jax.Array  # (B, T, N, LP)
    zk: jax.Array  # (B, T, K, LP)
    value: jax.Array  # (B, T, K, V)


class _States(NamedTuple):
    """Numerators and masses (B, K, splits, ...) where each split starts and where it ends."""

    starts: tuple[jax.Array, jax.Array]
    ends: tuple[jax.Array, jax.Array]


class _Call(NamedTuple):
    """What both directions need: sizes, blocks, arrays and the prefix over splits."""

    problem: Problem
    blocks: Blocks
    arrays: _Arrays
    shared: Shared
    weights: jax.Array


def _prepare(
    planned: tuple, zq, zk, value, sharpness, log_decay, mask, segment_ids, initial_segment
) -> _Call:
    problem, _, blocks = planned
    gamma = None if log_decay is None else running_decay(log_decay, problem.chunk)
    sizes = problem.batch, problem.kv_heads, problem.splits
    return _Call(
        problem,
        blocks,
        _Arrays(
            flat_projections(problem, zq),
            flat_projections(problem, zk),
            pad_to(value, problem.value_dim),
        ),
        Shared(sharpness, gamma, mask, segment_ids, initial_segment),
        split_weights(log_decay, segment_ids, initial_segment, sizes, problem.split),
    )


def _outputs(call: _Call, states: tuple) -> jax.Array:
    """Outputs by one program a block, or by several warpgroups, loaded only where they run."""
    form, block, arrays = causal_outputs, call.blocks.outputs, call.arrays
    if isinstance(block, Pipeline):
        from pallas_kernels import warp_outputs as form

        arrays = _in_whole_chunks(call)
    return form.outputs(call.problem, block, call.shared, *arrays, states)


def _in_whole_chunks(call: _Call) -> _Arrays:
    """The arrays as the kernels of warpgroups take them."""
    zq, zk = (whole_chunks(call.problem, z) for z in call.arrays[:2])
    return call.arrays._replace(zq=zq, zk=zk)


def _gradients(call: _Call, states: _States, d_out: jax.Array, d_final: tuple) -> CausalGradients:
    """Queries forward in time, the adjoint of the states back over the splits, then the keys."""
    problem, blocks, arrays, shared, weights = call
    form = _by_warpgroups if isinstance(blocks.query, Pipeline) else _by_programs
    query_gradients, key_value_gradients = form(call, d_out)
    # Of both ends of a split: the first starts with nothing, and a segment may just have begun.
    both = (start + end for start, end in zip(*states, strict=True))
    query = query_gradients(states.starts, mean_value(*both))
    adjoints = causal_gradients.reverse_sums(
        problem, blocks.reverse, shared, arrays.zq, d_out, query.inverse, query.delta
    )
    numerators, initial_numerator = leaving_adjoints(weights, adjoints[0], d_final[0])
    # Λ_Z of each value block by itself; the final mass's cotangent counts in the first.
    masses, initial_mass = jax.vmap(leaving_adjoints, in_axes=(None, 0, 0))(
        weights, adjoints[1], causal_gradients.shares(d_final[1][None], adjoints[1].shape[0])
    )
    # Of the end of a split, where adjoints are smallest: λ may be small against them, not large.
    common = common_adjoint(numerators, masses, problem.buckets)
    found = key_value_gradients(query, less_common(numerators, masses, common), common)
    d_log_decay = None
    if shared.gamma is not None:
        leaving = numerators, causal_gradients.total(masses)
        later = sum(_crossing(*pair) for pair in zip(leaving, states.ends, strict=True))
        d_log_decay = later_flow(query.row + found.flow, later, problem.chunk, problem.split)
        d_log_decay = d_log_decay[..., : problem.length].swapaxes(1, 2)
    return CausalGradients(
        query.d_zq,
        found.d_zk,
        found.d_value,
        query.d_sharpness + found.d_sharpness,
        d_log_decay,
        initial_numerator,
        causal_gradients.total(initial_mass),
    )


def _by_programs(call: _Call, d_out: jax.Array) -> tuple[Callable, Callable]:
    """The two steps of the gradients as kernels of one program each."""
    problem, blocks, arrays, shared, _ = call

    def query_gradients(states, mean):
        return causal_gradients.query_gradients(
            problem, blocks.query, shared, *arrays, states, mean, d_out
        )

    def key_value_gradients(rows, adjoints, common):
        run = functools.partial(
            causal_gradients.key_value_gradients, problem,
            shared=shared, arrays=arrays, d_out=d_out, rows=rows, adjoints=adjoints, common=common,
        )  # fmt: skip
        if blocks.value is None:
            return run(blocks.key)
        keys, values = run(blocks.key, values=False), run(blocks.value, keys=False)
        keys.d_value = values.d_value
        return keys

    return query_gradients, key_value_gradients


def _by_warpgroups(call: _Call, d_out: jax.Array) -> tuple[Callable, Callable]:
    """The same as kernels of several warpgroups, loaded only where they run."""
    from pallas_kernels import warp_key_value, warp_query

    problem, blocks, _, shared, _ = call
    given = shared, *_in_whole_chunks(call), d_out
    return (
        functools.partial(warp_query.query_gradients, problem, blocks.query, *given),
        functools.partial(warp_key_value.key_value_gradients, problem, blocks.key, *given),
    )


def _ends(starts: tuple, final: tuple) -> tuple:
    """The state where each split ends, from that where each starts, and the last."""
    pairs = zip(starts, final, strict=True)
    return tuple(jnp.concatenate([x[:, :, 1:], last[:, :, None]], axis=2) for x, last in pairs)


def _crossing(adjoint: jax.Array, leaving: jax.Array) -> jax.Array:
    """⟨Λ_e, X_e⟩ (B, K, splits) at the end e of each split: what later tokens add to dg there."""
    return (adjoint * leaving).reshape(*leaving.shape[:3], -1).sum(axis=3)
