"""Causal RACE attention on the GPU, as steps: sums, outputs, adjoints and gradients of splits.

    o_t = Σ_s w_ts v_s / Σ_s w_ts,   w_ts = exp(G_t - G_s) φ(zq_t)·φ(zk_s) over visible s <= t

Each step runs its kernels over all splits of the sequence at once. The caller combines the states
of the splits between the steps, by a scan in time between `sums` and `outputs`, and by one back in
time between `adjoints` and `gradients`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import causal_gradients, causal_outputs
from pallas_kernels.blocks import CHUNK, Blocks, Pipeline, split_length
from pallas_kernels.centre import common_adjoint, less_common, mean_value
from pallas_kernels.decay import later_flow, running_decay
from pallas_kernels.plan import (
    flat_projections,
    like_pair,
    pad_to,
    padded_state,
    plan,
    traced_alike,
    unflat,
    whole_chunks,
)
from pallas_kernels.tiles import Problem, Shared


class CausalOperands(NamedTuple):
    """The arrays of a causal call. The steps also take any other tuple with these fields.

    Attributes:
      z_q: hash projections of the queries, (B, T, N, L, P), float32 or bfloat16. They may be flat,
        (B, T, N, 1, X), with plane p of table l in column l·P + p and zeros after the last. With
        X = projection_columns(L, P) no copy is made. They are cast to the dtype of the values.
      z_k: hash projections of the keys, (B, T, K, L, P), in the same form. N is a multiple of K.
      value: (B, T, K, V), float32 or bfloat16. Products take its precision.
      sharpness: (K,) float32, > 0.
      log_decay: (B, T, K) float32 in [-80, 0], 0 at padded tokens; or None.
      mask: (B, T) bool, False at padded tokens, whose z and values must be finite; or None.
      segment: (B, T) int32, contiguous runs, filled forward over padded tokens; or None.
      sums: the numerator (B, K, F, V) and the mass (B, K, F) of the initial state, in float32.
      initial_segment: (B,) int32, the segment that the initial state belongs to.
    """

    z_q: jax.Array
    z_k: jax.Array
    value: jax.Array
    sharpness: jax.Array
    log_decay: jax.Array | None
    mask: jax.Array | None
    segment: jax.Array | None
    sums: Any
    initial_segment: jax.Array


class QueryRows(NamedTuple):
    """What the gradients of the queries leave for those of the keys.

    Attributes:
      d_zq: (B, T, N, X), the gradient of the padded z of the queries.
      inverse: ρ = 1/z of every query.
      delta: δ = do·o of every query, in the parts that the value blocks contribute.
      d_sharpness: (K,), the queries' part of dβ.
      row: the row sums of dg, or None without a gate.
    """

    d_zq: jax.Array
    inverse: jax.Array
    delta: jax.Array
    d_sharpness: jax.Array
    row: jax.Array | None


@dataclasses.dataclass(frozen=True)
class CausalSteps:
    """The steps of a causal call on the GPU. The caller puts a scan over the splits between them.

    The steps take states without padding, and pad them to the sizes that the products take.

    Attributes:
      count: the number of splits.
      size: the number of tokens in a split.
      hash_shape: (L, P), which a flat z does not tell.
      exact: whether products of float32 operands are exact, or TF32 products.
      use_tanh: whether hash projections go through tanh.
      interpret: whether to run the kernels in Pallas' interpreter, on any platform (for tests).
      config: block sizes; None chooses them by shape.
    """

    count: int
    size: int
    hash_shape: tuple[int, int]
    exact: bool = True
    use_tanh: bool = True
    interpret: bool = False
    config: Blocks | None = None
    scan_by = "product"

    @classmethod
    def of(cls, operands: Any, hash_shape: tuple[int, int], **options: Any) -> "CausalSteps":
        """Returns the steps for these operands.

        Args:
          operands: the `CausalOperands`, or shapes in their place.
          hash_shape: (L, P).
          **options: `exact`, `use_tanh`, `interpret` and `config`.
        """
        batch, length, kv_heads = operands.value.shape[:3]
        config = options.get("config")
        chunk = CHUNK if config is None else config.chunk
        size = split_length(length, batch * kv_heads, chunk=chunk)
        return cls(-(-length // size), size, hash_shape, **options)

    def sums(self, operands: Any) -> Any:
        """Returns what every split adds to the state.

        Returns:
          The numerators (B, K, splits, F, V) and the masses (B, K, splits, F), in float32.
        """
        return _sums(operands, steps=self)

    def outputs(self, operands: Any, starts: Any) -> jax.Array:
        """Returns the outputs (B, T, N, V), from the state where every split starts."""
        return _outputs(operands, starts, steps=self)

    def adjoints(
        self, operands: Any, starts: Any, final: Any, d_out: jax.Array, d_final: Any
    ) -> tuple[tuple, tuple, QueryRows]:
        """Returns the adjoints of the states where the splits start, each from its own outputs.

        Args:
          operands: as given to `outputs`.
          starts: likewise.
          final: the state after the last split.
          d_out: the cotangent of the outputs, (B, T, N, V).
          d_final: the cotangent of the final state.

        Returns:
          The adjoints, with sizes padded and a mass for every value block; `d_final` in the same
          form; and what the queries leave for `gradients`.
        """
        return _adjoints(operands, starts, final, d_out, d_final, steps=self)

    def gradients(
        self,
        operands: Any,
        starts: Any,
        final: Any,
        d_out: jax.Array,
        d_ends: tuple,
        d_initial: tuple,
        kept: QueryRows,
    ) -> Any:
        """Returns the gradients of the operands, in a tuple of the same kind.

        Args:
          operands: as given to `adjoints`.
          starts: likewise.
          final: likewise.
          d_out: likewise.
          d_ends: the adjoints of the states where the splits end, in the form of `adjoints`.
          d_initial: the adjoint of the initial state, in the same form.
          kept: the rows that `adjoints` returned.
        """
        return _gradients(operands, starts, final, d_out, d_ends, d_initial, kept, steps=self)


class _Arrays(NamedTuple):
    """z and values at the sizes that products take."""

    zq: jax.Array  # (B, T, N, LP)
    zk: jax.Array  # (B, T, K, LP)
    value: jax.Array  # (B, T, K, V)


class _Call(NamedTuple):
    """What every step needs: sizes, blocks and arrays."""

    problem: Problem
    blocks: Blocks
    arrays: _Arrays
    shared: Shared


@traced_alike
def _sums(operands: Any, *, steps: CausalSteps) -> Any:
    problem, blocks, arrays, shared = _prepare(steps, operands)
    numerator, mass = causal_outputs.split_sums(
        problem, blocks.sums, shared, arrays.zk, arrays.value
    )
    features, value_dim = operands.sums[0].shape[-2:]
    numerator = numerator[..., :features, :value_dim]
    return like_pair(operands.sums, numerator, mass[..., :features])


@traced_alike
def _outputs(operands: Any, starts: Any, *, steps: CausalSteps) -> jax.Array:
    call = _prepare(steps, operands)
    form, block, arrays = causal_outputs, call.blocks.outputs, call.arrays
    if isinstance(block, Pipeline):
        from pallas_kernels import warp_outputs as form

        arrays = _in_whole_chunks(call)
    states = padded_state(call.problem, *starts)
    out = form.outputs(call.problem, block, call.shared, *arrays, states)
    return out[..., : operands.value.shape[-1]]


@traced_alike
def _adjoints(
    operands: Any, starts: Any, final: Any, d_out: jax.Array, d_final: Any, *, steps: CausalSteps
) -> tuple[tuple, tuple, QueryRows]:
    call = _prepare(steps, operands)
    problem, blocks, arrays, shared = call
    d_out = _padded_d_out(call, d_out)
    starts = padded_state(problem, *starts)
    # Of both ends of a split: the first starts with nothing, and a segment may just have begun.
    ends = _ends(starts, padded_state(problem, *final))
    both = (start + end for start, end in zip(starts, ends, strict=True))
    rows = _query_gradients(call, d_out)(starts, mean_value(*both))
    rows = QueryRows(rows.d_zq, rows.inverse, rows.delta, rows.d_sharpness, rows.row)
    numerators, masses = causal_gradients.reverse_sums(
        problem, blocks.reverse, shared, arrays.zq, d_out, rows.inverse, rows.delta
    )
    numerator, mass = padded_state(problem, *d_final)
    # Λ_Z has a part for each value block. The cotangent of the final mass is in the first.
    mass = causal_gradients.shares(mass[None], masses.shape[0])
    last = numerator, jnp.moveaxis(mass, 0, 2)
    return (numerators, jnp.moveaxis(masses, 0, 3)), last, rows


@traced_alike
def _gradients(
    operands: Any,
    starts: Any,
    final: Any,
    d_out: jax.Array,
    d_ends: tuple,
    d_initial: tuple,
    rows: QueryRows,
    *,
    steps: CausalSteps,
) -> Any:
    call = _prepare(steps, operands)
    problem, _, _, shared = call
    numerators, masses = d_ends[0], jnp.moveaxis(d_ends[1], 3, 0)
    # Of the end of a split, where adjoints are smallest: λ may be small against them, not large.
    common = common_adjoint(numerators, masses, problem.buckets)
    found = _key_value_gradients(call, _padded_d_out(call, d_out))(
        rows, less_common(numerators, masses, common), common
    )
    d_log_decay = None
    if shared.gamma is not None:
        ends = _ends(padded_state(problem, *starts), padded_state(problem, *final))
        leaving = numerators, causal_gradients.total(masses)
        later = sum(_crossing(*pair) for pair in zip(leaving, ends, strict=True))
        d_log_decay = later_flow(rows.row + found.flow, later, problem.chunk, problem.split)
        d_log_decay = d_log_decay[..., : problem.length].swapaxes(1, 2)
    features, value_dim = operands.sums[0].shape[-2:]
    d_sums = d_initial[0][..., :features, :value_dim], d_initial[1].sum(axis=2)[..., :features]
    return operands._replace(
        z_q=unflat(rows.d_zq, operands.z_q),
        z_k=unflat(found.d_zk, operands.z_k),
        value=found.d_value[..., : operands.value.shape[-1]],
        sharpness=(rows.d_sharpness + found.d_sharpness).astype(operands.sharpness.dtype),
        log_decay=d_log_decay,
        mask=None,
        segment=None,
        sums=like_pair(operands.sums, *d_sums),
        initial_segment=None,
    )


def _prepare(steps: CausalSteps, operands: Any) -> _Call:
    value, log_decay = operands.value, operands.log_decay
    z_q, z_k = (z.astype(value.dtype) for z in (operands.z_q, operands.z_k))
    problem, _, blocks = plan(
        z_q,
        z_k,
        value,
        steps.interpret,
        steps.config,
        hash_shape=steps.hash_shape,
        is_causal=True,
        gate=log_decay is not None,
        exact=steps.exact,
        use_tanh=steps.use_tanh,
    )
    gamma = None if log_decay is None else running_decay(log_decay, problem.chunk)
    return _Call(
        problem,
        blocks,
        _Arrays(
            flat_projections(problem, z_q),
            flat_projections(problem, z_k),
            pad_to(value, problem.value_dim),
        ),
        Shared(
            operands.sharpness, gamma, operands.mask, operands.segment, operands.initial_segment
        ),
    )


def _padded_d_out(call: _Call, d_out: jax.Array) -> jax.Array:
    return pad_to(d_out.astype(call.problem.dtype), call.problem.value_dim)


def _in_whole_chunks(call: _Call) -> _Arrays:
    """The arrays as the kernels of warpgroups take them."""
    zq, zk = (whole_chunks(call.problem, z) for z in call.arrays[:2])
    return call.arrays._replace(zq=zq, zk=zk)


def _query_gradients(call: _Call, d_out: jax.Array) -> Callable:
    """Returns the step as programs, or as warpgroups, which are loaded only where they run."""
    problem, blocks, arrays, shared = call
    form = causal_gradients
    if isinstance(blocks.query, Pipeline):
        from pallas_kernels import warp_query as form

        return functools.partial(
            form.query_gradients, problem, blocks.query, shared, *_in_whole_chunks(call), d_out
        )

    def by_programs(states, mean):
        return form.query_gradients(problem, blocks.query, shared, *arrays, states, mean, d_out)

    return by_programs


def _key_value_gradients(call: _Call, d_out: jax.Array) -> Callable:
    """The same for the keys and the values."""
    problem, blocks, arrays, shared = call
    if isinstance(blocks.query, Pipeline):
        from pallas_kernels import warp_key_value

        return functools.partial(
            warp_key_value.key_value_gradients,
            problem,
            blocks.key,
            shared,
            *_in_whole_chunks(call),
            d_out,
        )

    def by_programs(rows, adjoints, common):
        run = functools.partial(
            causal_gradients.key_value_gradients,
            problem,
            shared=shared,
            arrays=arrays,
            d_out=d_out,
            rows=rows,
            adjoints=adjoints,
            common=common,
        )
        if blocks.value is None:
            return run(blocks.key)
        keys, values = run(blocks.key, values=False), run(blocks.value, keys=False)
        keys.d_value = values.d_value
        return keys

    return by_programs


def _ends(starts: tuple, final: tuple) -> tuple:
    """The state where each split ends, from that where each starts, and the last."""
    pairs = zip(starts, final, strict=True)
    return tuple(jnp.concatenate([x[:, :, 1:], last[:, :, None]], axis=2) for x, last in pairs)


def _crossing(adjoint: jax.Array, leaving: jax.Array) -> jax.Array:
    """⟨Λ_e, X_e⟩ (B, K, splits) at the end e of each split: what later tokens add to dg there."""
    return (adjoint * leaving).reshape(*leaving.shape[:3], -1).sum(axis=3)
