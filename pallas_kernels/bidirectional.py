"""Bidirectional RACE attention on the GPU: padding and kernels, in order.

In: z of queries and keys, values, sharpness, key mask, a state; backward also the totals and the
cotangents. Out: outputs and the total state; or every gradient by name.
Equation: o_t = φ(zq_t) X / φ(zq_t)·Z with [X | Z] = initial + Σ_s φ(zk_s)ᵀ [v_s | 1].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import bidirectional_kernels as kernels
from pallas_kernels.blocks import Blocks
from pallas_kernels.causal_gradients import shares, total
from pallas_kernels.causal_outputs import split_sums
from pallas_kernels.centre import centred, common_adjoint, mean_value
from pallas_kernels.plan import flat_projections, pad_to, padded_state, plan, traced_alike, unflat
from pallas_kernels.tiles import Shared


class BidirectionalForward(NamedTuple):
    """Outputs and total state of a bidirectional call."""

    out: jax.Array  # (B, T, N, V), value's dtype
    total_numerator: jax.Array  # (B, K, F, V) float32
    total_mass: jax.Array  # (B, K, F) float32


class BidirectionalGradients(NamedTuple):
    """Cotangents of the inputs of a bidirectional call."""

    zq: jax.Array
    zk: jax.Array
    value: jax.Array
    sharpness: jax.Array
    initial_numerator: jax.Array
    initial_mass: jax.Array


@traced_alike
def bidirectional_forward(
    zq: jax.Array,
    zk: jax.Array,
    value: jax.Array,
    sharpness: jax.Array,
    key_value_mask: jax.Array | None,
    initial_numerator: jax.Array,
    initial_mass: jax.Array,
    *,
    hash_shape: tuple[int, int] | None = None,
    exact: bool = True,
    interpret: bool = False,
    config: Blocks | None = None,
) -> BidirectionalForward:
    """Outputs of queries that see every key, and the total state.

    Args:
      zq: hash projections of the queries, (B, T, N, L, P), float32 or bfloat16.
      zk: hash projections of the keys, (B, S, K, L, P), N a multiple of K; S may differ from T.
      value: (B, S, K, V), float32 or bfloat16; products take its precision.
      sharpness: (K,) float32, > 0.
      key_value_mask: (B, S) bool, False at padded tokens, whose zk and value must be finite.
      initial_numerator: (B, K, F, V) float32, added to the sums over the keys.
      initial_mass: (B, K, F) float32, likewise.
      hash_shape: (L, P), where z is flat, (..., 1, X): plane p of table l in column l·P + p, zeros
        after the last. With X = projection_columns(L, P) no copy is made.
      exact: whether products of float32 operands are exact, or TF32 products.
      interpret: run the kernels in Pallas' interpreter, on any platform (tests).
      config: block sizes; None chooses them by shape.

    Returns:
      A BidirectionalForward. Sums are kept in float32.
    """
    queries, keys, blocks = plan(
        zq, zk, value, interpret, config, hash_shape=hash_shape, is_causal=False, exact=exact
    )
    shared = Shared(sharpness, mask=key_value_mask)
    flat_k, wide = flat_projections(keys, zk), pad_to(value, keys.value_dim)
    sums = split_sums(keys, blocks.sums, shared, flat_k, wide)
    initial = padded_state(keys, initial_numerator, initial_mass)
    totals = tuple(x + y.sum(axis=2) for x, y in zip(initial, sums, strict=True))
    shared = Shared(sharpness)
    out = kernels.read(queries, blocks.outputs, shared, flat_projections(queries, zq), totals)
    features, value_dim = initial_numerator.shape[-2:]
    return BidirectionalForward(
        out[..., :value_dim], totals[0][..., :features, :value_dim], totals[1][..., :features]
    )


@traced_alike
def bidirectional_backward(
    zq: jax.Array,
    zk: jax.Array,
    value: jax.Array,
    sharpness: jax.Array,
    key_value_mask: jax.Array | None,
    initial_numerator: jax.Array,
    initial_mass: jax.Array,
    total_numerator: jax.Array,
    total_mass: jax.Array,
    d_out: jax.Array,
    d_total_numerator: jax.Array,
    d_total_mass: jax.Array,
    *,
    hash_shape: tuple[int, int] | None = None,
    exact: bool = True,
    interpret: bool = False,
    config: Blocks | None = None,
) -> BidirectionalGradients:
    """Gradients of `bidirectional_forward`, from its inputs, the totals and the cotangents.

    Args:
      zq: as given to `bidirectional_forward`, like all up to initial_mass.
      zk: likewise.
      value: likewise.
      sharpness: likewise.
      key_value_mask: likewise.
      initial_numerator: likewise.
      initial_mass: likewise.
      total_numerator: (B, K, F, V), as `bidirectional_forward` returned it.
      total_mass: (B, K, F), likewise.
      d_out: cotangent of the outputs, (B, T, N, V).
      d_total_numerator: cotangent of the total numerator, (B, K, F, V) float32.
      d_total_mass: cotangent of the total mass, (B, K, F) float32.
      hash_shape: as for `bidirectional_forward`.
      exact: likewise.
      interpret: likewise.
      config: likewise.

    Returns:
      A BidirectionalGradients, each leaf in the dtype of what it is the gradient of.
    """
    queries, keys, blocks = plan(
        zq, zk, value, interpret, config, hash_shape=hash_shape, is_causal=False, exact=exact
    )
    totals = padded_state(queries, total_numerator, total_mass)
    d_totals = padded_state(queries, d_total_numerator, d_total_mass)
    wide_d_out = pad_to(d_out.astype(value.dtype), queries.value_dim)
    flat_q, flat_k = flat_projections(queries, zq), flat_projections(keys, zk)
    mean = mean_value(*totals)
    totals = centred(*totals, mean), totals[1]
    d_zq, d_sharpness_q, (numerator, mass) = kernels.query_gradients(
        queries, blocks.query, Shared(sharpness), flat_q, totals, wide_d_out
    )
    # δ of the kernel is do·(o - m), and Λ m = Σ q̂ μ what its -Σ q̂ δ has too much, in each of its
    # value blocks; the total mass's cotangent counts in the first.
    offset = (numerator * mean[..., None, :]).reshape(*numerator.shape[:3], mass.shape[0], -1)
    mass += shares(d_totals[1][None], mass.shape[0]) - jnp.moveaxis(offset.sum(axis=-1), 3, 0)
    adjoint = d_totals[0] + numerator, mass
    shared = Shared(sharpness, mask=key_value_mask)
    wide = pad_to(value, keys.value_dim)
    d_zk, d_value, d_sharpness_k = kernels.key_value_gradients(
        keys, blocks.key, shared, flat_k, wide, adjoint, common_adjoint(*adjoint, keys.buckets)
    )
    features, value_dim = initial_numerator.shape[-2:]
    return BidirectionalGradients(
        unflat(d_zq, zq),
        unflat(d_zk, zk),
        d_value[..., :value_dim],
        (d_sharpness_q + d_sharpness_k).astype(sharpness.dtype),
        adjoint[0][..., :features, :value_dim],
        total(mass)[..., :features],
    )
