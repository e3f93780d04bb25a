"""Bidirectional RACE attention on the GPU: the padding of arrays and the kernels, in order.

The forward pass takes z of queries and keys, values, sharpness, a key mask and a state, and returns
outputs and the total state. The backward pass also takes the totals and the cotangents, and returns
every gradient by name. The equation is

    o_t = φ(zq_t) S / φ(zq_t)·Z   with   [S | Z] = initial + Σ_s φ(zk_s)ᵀ [v_s | 1]
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
    """Returns the outputs of queries that see every key, and the total state.

    Args:
      zq: hash projections of the queries, (B, T, N, L, P), float32 or bfloat16.
      zk: hash projections of the keys, (B, S, K, L, P). N is a multiple of K. S may differ from T.
      value: (B, S, K, V), float32 or bfloat16. Products have its precision.
      sharpness: (K,) float32, positive.
      key_value_mask: (B, S) bool, False at padded tokens. zk and value must be finite there.
      initial_numerator: (B, K, F, V) float32, added to the sums over the keys.
      initial_mass: (B, K, F) float32, added to the sums over the keys.
      hash_shape: (L, P) if z is flat, of shape (..., 1, X), or None. Column l·P + p of a flat z is
        plane p of table l, and the columns after the last plane are zero. With
        X = projection_columns(L, P) no copy is made.
      exact: whether products of float32 operands are exact, rather than TF32.
      interpret: whether to run the kernels in Pallas's interpreter, which works on any platform.
      config: block sizes, or None to choose them by shape.

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
    """Returns the gradients of `bidirectional_forward`.

    Args:
      zq: as given to `bidirectional_forward`.
      zk: as given to `bidirectional_forward`.
      value: as given to `bidirectional_forward`.
      sharpness: as given to `bidirectional_forward`.
      key_value_mask: as given to `bidirectional_forward`.
      initial_numerator: as given to `bidirectional_forward`.
      initial_mass: as given to `bidirectional_forward`.
      total_numerator: (B, K, F, V), as `bidirectional_forward` returned it.
      total_mass: (B, K, F), as `bidirectional_forward` returned it.
      d_out: the cotangent of the outputs, (B, T, N, V).
      d_total_numerator: the cotangent of the total numerator, (B, K, F, V) float32.
      d_total_mass: the cotangent of the total mass, (B, K, F) float32.
      hash_shape: as for `bidirectional_forward`.
      exact: as for `bidirectional_forward`.
      interpret: as for `bidirectional_forward`.
      config: as for `bidirectional_forward`.

    Returns:
      A BidirectionalGradients. Each gradient has the dtype of its input.
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
    # The kernel computes δ as do·(o - m). In each of its value blocks, its Λ_Z = -Σ q̂ δ is
    # therefore too large by Σ q̂ μ = Λ m, which is subtracted here. The cotangent of the total mass
    # is added in the first block.
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
