"""Matrix products of hidden states whose results are wider than the hidden states.

    y = x A + b          [y_1 | y_2 | ...] = x [A_1 | A_2 | ...] + [b_1 | b_2 | ...]

x and A are rounded to the dtype of x, and y is in float32 or wider. Hash projections and the logits
of gates are computed in this way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.core.shards import TOKENS, vary_alike


def side_by_side(
    x: jax.Array,
    maps: Sequence[Mapping[str, jax.Array]],
    precision: jax.lax.PrecisionLike = None,
) -> tuple[jax.Array, ...]:
    """Applies several linear maps to one input by one product, so that the input is read once.

    Args:
      x: ``(B, T, D)``.
      maps: ``kernel`` ``(D, ...)`` of each map, and perhaps ``bias`` ``(...)``.
      precision: the precision of the product.

    Returns:
      ``(B, T, ...)`` of each map, in float32 or wider.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.layers import products
      >>> one, other = {"kernel": jnp.ones((3, 2, 4))}, {"kernel": jnp.ones((3, 5))}
      >>> [y.shape for y in products.side_by_side(jnp.ones((1, 7, 3)), [one, other])]
      [(1, 7, 2, 4), (1, 7, 5)]

    Source: beyond the paper.
    """
    kernels = [weights["kernel"] for weights in maps]
    if len(kernels) == 1 or any(any(jax.typeof(x).sharding.spec) for x in kernels):
        results = [wide(x, kernel, precision) for kernel in kernels]
    else:
        joined = jnp.concatenate([x.reshape(x.shape[0], -1) for x in kernels], axis=1)
        ends = np.cumsum([math.prod(kernel.shape[1:]) for kernel in kernels])[:-1]
        parts = jnp.split(wide(x, joined, precision), ends.tolist(), axis=2)
        shapes = [(*x.shape[:2], *kernel.shape[1:]) for kernel in kernels]
        results = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return tuple(_add_bias(y, weights) for y, weights in zip(results, maps, strict=True))


def _add_bias(y: jax.Array, weights: Mapping[str, jax.Array]) -> jax.Array:
    if "bias" not in weights:
        return y
    return y + jnp.expand_dims(weights["bias"].astype(y.dtype), (0, 1))


def wide(x: jax.Array, kernel: jax.Array, precision: jax.lax.PrecisionLike = None) -> jax.Array:
    """Returns ``x kernel`` in float32 or wider, from operands in the dtype of x.

    The cotangent is rounded to the dtype of x, as that of every projection is. Otherwise the two
    products of the backward pass would have one operand in float32 and one in bfloat16, and XLA
    would widen the other one for it.

    Args:
      x: ``(B, T, D)``.
      kernel: ``(D, ...)``.
      precision: the precision of the products.

    Returns:
      ``(B, T, ...)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.layers import products
      >>> products.wide(jnp.ones((1, 2, 3), jnp.bfloat16), jnp.ones((3, 4))).dtype
      dtype('float32')

    Source: beyond the paper.
    """
    return _wide(*vary_alike((x, kernel), (TOKENS, TOKENS)), precision)


def _plain(x, kernel, precision) -> jax.Array:
    return _product(x, kernel, precision, jnp.promote_types(x.dtype, jnp.float32))


def _product(x, kernel, precision, dtype) -> jax.Array:
    return jnp.tensordot(
        x, kernel.astype(x.dtype), axes=1, precision=precision, preferred_element_type=dtype
    )


_wide = jax.custom_vjp(_plain, nondiff_argnums=(2,))


def _wide_forward(x, kernel, precision) -> tuple[jax.Array, tuple]:
    return _plain(x, kernel, precision), (x, kernel)


def _wide_backward(precision, residuals, d_y) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    narrow = functools.partial(_product, precision=precision, dtype=x.dtype)
    return jax.vjp(narrow, x, kernel)[1](d_y.astype(x.dtype))


_wide.defvjp(_wide_forward, _wide_backward)
