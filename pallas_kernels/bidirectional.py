"""Bidirectional RACE attention on the GPU, as steps: sums, outputs, adjoints and gradients.

    o_t = φ(zq_t) S / φ(zq_t)·Z   with   [S | Z] = initial + Σ_s φ(zk_s)ᵀ [v_s | 1]

Between the steps, the caller adds the initial state to the sums, and the cotangent of the total
state to the adjoints.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import bidirectional_kernels as kernels
from pallas_kernels.blocks import Blocks
from pallas_kernels.causal_gradients import shares, total
from pallas_kernels.causal_outputs import split_sums
from pallas_kernels.centre import centred, common_adjoint, mean_value
from pallas_kernels.plan import (
    flat_projections,
    like_pair,
    pad_to,
    padded_state,
    plan,
    traced_alike,
    unflat,
)
from pallas_kernels.tiles import Problem, Shared


class BidirectionalOperands(NamedTuple):
    """The arrays of a bidirectional call. The steps take any other tuple with these fields too.

    Attributes:
      z_q: hash projections of the queries, (B, T, N, L, P), or flat, as in `CausalOperands`.
      z_k: hash projections of the keys, (B, S, K, L, P), in the same form. N is a multiple of K.
      value: (B, S, K, V), float32 or bfloat16. Products have its precision.
      sharpness: (K,) float32, positive.
      mask: (B, S) bool, False at padded tokens, or None. z and values must be finite there.
      sums: the numerator (B, K, F, V) and the mass (B, K, F) of the initial state, in float32.
    """

    z_q: jax.Array
    z_k: jax.Array
    value: jax.Array
    sharpness: jax.Array
    mask: jax.Array | None
    sums: Any


@dataclasses.dataclass(frozen=True)
class BidirectionalSteps:
    """The steps of a bidirectional call on the GPU.

    The steps take states without padding, and pad them to the sizes that the products take.

    Attributes:
      hash_shape: (L, P), which the shape of a flat z does not show.
      exact: whether products of float32 operands are exact, rather than TF32.
      use_tanh: whether hash projections go through tanh.
      interpret: whether to run the kernels in Pallas's interpreter, which works on any platform.
      config: block sizes, or None to choose them by shape.
    """

    hash_shape: tuple[int, int]
    exact: bool = True
    use_tanh: bool = True
    interpret: bool = False
    config: Blocks | None = None

    def sums(self, operands: Any) -> Any:
        """Returns the sums of all keys: (B, K, F, V) and (B, K, F), in float32."""
        return _sums(operands, steps=self)

    def outputs(self, operands: Any, totals: Any) -> jax.Array:
        """Returns the outputs (B, T, N, V), from the total state."""
        return _outputs(operands, totals, steps=self)

    def adjoints(
        self, operands: Any, totals: Any, d_out: jax.Array, d_totals: Any
    ) -> tuple[tuple, tuple, tuple]:
        """Returns the adjoint of the total state from the outputs.

        Args:
          operands: as given to `outputs`.
          totals: as given to `outputs`.
          d_out: the cotangent of the outputs, (B, T, N, V).
          d_totals: the cotangent of the total state.

        Returns:
          The adjoint, with padded sizes and a mass for every value block, then `d_totals` in the
          same form, and then the gradients of the queries, which `gradients` takes as `kept`.
        """
        return _adjoints(operands, totals, d_out, d_totals, steps=self)

    def gradients(
        self, operands: Any, totals: Any, d_out: jax.Array, d_sums: tuple, kept: tuple
    ) -> Any:
        """Returns the gradients of the operands, in a tuple of the same kind.

        Args:
          operands: as given to `adjoints`.
          totals: as given to `adjoints`.
          d_out: as given to `adjoints`.
          d_sums: the whole adjoint of the total state, in the form of `adjoints`.
          kept: what `adjoints` returned for this step.
        """
        del totals, d_out
        return _gradients(operands, d_sums, kept, steps=self)


class _Call(NamedTuple):
    """What every step needs: the sizes of queries and keys, blocks and padded arrays."""

    queries: Problem
    keys: Problem
    blocks: Blocks
    zq: jax.Array
    zk: jax.Array
    value: jax.Array


def _prepare(steps: BidirectionalSteps, operands: Any) -> _Call:
    value = operands.value
    z_q, z_k = (z.astype(value.dtype) for z in (operands.z_q, operands.z_k))
    queries, keys, blocks = plan(
        z_q,
        z_k,
        value,
        steps.interpret,
        steps.config,
        hash_shape=steps.hash_shape,
        is_causal=False,
        exact=steps.exact,
        use_tanh=steps.use_tanh,
    )
    return _Call(
        queries,
        keys,
        blocks,
        flat_projections(queries, z_q),
        flat_projections(keys, z_k),
        pad_to(value, keys.value_dim),
    )


@traced_alike
def _sums(operands: Any, *, steps: BidirectionalSteps) -> Any:
    call = _prepare(steps, operands)
    shared = Shared(operands.sharpness, mask=operands.mask)
    sums = split_sums(call.keys, call.blocks.sums, shared, call.zk, call.value)
    numerator, mass = (x.sum(axis=2) for x in sums)
    features, value_dim = operands.sums[0].shape[-2:]
    return like_pair(operands.sums, numerator[..., :features, :value_dim], mass[..., :features])


@traced_alike
def _outputs(operands: Any, totals: Any, *, steps: BidirectionalSteps) -> jax.Array:
    call = _prepare(steps, operands)
    totals = padded_state(call.queries, *totals)
    shared = Shared(operands.sharpness)
    out = kernels.read(call.queries, call.blocks.outputs, shared, call.zq, totals)
    return out[..., : operands.value.shape[-1]]


@traced_alike
def _adjoints(
    operands: Any, totals: Any, d_out: jax.Array, d_totals: Any, *, steps: BidirectionalSteps
) -> tuple[tuple, tuple, tuple]:
    call = _prepare(steps, operands)
    totals = padded_state(call.queries, *totals)
    mean = mean_value(*totals)
    d_zq, d_sharpness, (numerator, mass) = kernels.query_gradients(
        call.queries,
        call.blocks.query,
        Shared(operands.sharpness),
        call.zq,
        (centred(*totals, mean), totals[1]),
        pad_to(d_out.astype(operands.value.dtype), call.queries.value_dim),
    )
    # The kernel computes δ as do·(o - m). In each of its value blocks, its Λ_Z = -Σ q̂ δ is
    # therefore too large by Σ q̂ μ = Λ m, which is subtracted here.
    offset = (numerator * mean[..., None, :]).reshape(*numerator.shape[:3], mass.shape[0], -1)
    mass -= jnp.moveaxis(offset.sum(axis=-1), 3, 0)
    # The cotangent of the total mass is in the first value block.
    d_numerator, d_mass = padded_state(call.queries, *d_totals)
    last = d_numerator, shares(d_mass[None], mass.shape[0])
    return (numerator, mass), last, (d_zq, d_sharpness)


@traced_alike
def _gradients(operands: Any, adjoint: tuple, kept: tuple, *, steps: BidirectionalSteps) -> Any:
    call, (d_zq, d_sharpness) = _prepare(steps, operands), kept
    d_zk, d_value, more = kernels.key_value_gradients(
        call.keys,
        call.blocks.key,
        Shared(operands.sharpness, mask=operands.mask),
        call.zk,
        call.value,
        adjoint,
        common_adjoint(*adjoint, call.keys.buckets),
    )
    features, value_dim = operands.sums[0].shape[-2:]
    d_numerator, d_mass = adjoint[0][..., :features, :value_dim], total(adjoint[1])[..., :features]
    return operands._replace(
        z_q=unflat(d_zq, operands.z_q),
        z_k=unflat(d_zk, operands.z_k),
        value=d_value[..., : operands.value.shape[-1]],
        sharpness=(d_sharpness + more).astype(operands.sharpness.dtype),
        mask=None,
        sums=like_pair(operands.sums, d_numerator, d_mass),
    )
