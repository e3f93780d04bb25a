"""GPU kernels for RACE attention, written in Pallas.

In: hash projections, values, sharpness, masks and a state. Out: outputs and states, or gradients.
Equation: the chunk form of causal and bidirectional RACE attention (docs/kernels.md).

None of these functions has a derivative rule of its own: a caller ties a forward to its backward.
"""

from typing import Any

from pallas_kernels import backend
from pallas_kernels.bidirectional import bidirectional_backward, bidirectional_forward
from pallas_kernels.blocks import Block, Blocks, split_count, split_length
from pallas_kernels.causal import causal_backward, causal_forward

__all__ = [
    "Block",
    "Blocks",
    "bidirectional_backward",
    "bidirectional_forward",
    "causal_backward",
    "causal_forward",
    "split_count",
    "split_length",
    "supports",
]

MAX_FEATURES = 256
VALUE_DIMS = range(1, 257)
DTYPES = ("float32", "bfloat16")


def supports(
    query_projections: Any, key_projections: Any, value: Any, *, is_causal: bool
) -> str | None:
    """Says why the kernels cannot run this call, or None when they can.

    Args:
      query_projections: shape and dtype of z of the queries, (B, T, N, L, P).
      key_projections: shape and dtype of z of the keys, (B, S, K, L, P).
      value: shape and dtype of the values, (B, S, K, V).
      is_causal: whether the call is causal; then T and S are equal.

    Returns:
      One sentence that names the limit, what is supported and what was given; or None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z = jax.ShapeDtypeStruct((1, 8, 2, 8, 8), jnp.float32)
      >>> v = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.float32)
      >>> "F = L * 2**P" in (supports(z, z, v, is_causal=True) or "F = L * 2**P")
      True
    """
    tables, planes = query_projections.shape[-2:]
    features = tables * 2**planes
    if features > MAX_FEATURES:
        return (
            f"the RACE kernels support F = L * 2**P up to {MAX_FEATURES} features; "
            f"got L={tables}, P={planes}, F={features}"
        )
    if value.shape[-1] not in VALUE_DIMS:
        return (
            f"the RACE kernels support value head dims from {VALUE_DIMS[0]} to {VALUE_DIMS[-1]}; "
            f"got {value.shape[-1]}"
        )
    for name, array in (
        ("query projections", query_projections),
        ("key projections", key_projections),
        ("value", value),
    ):
        if str(array.dtype) not in DTYPES:
            return f"the RACE kernels support {' and '.join(DTYPES)}; {name} have {array.dtype}"
    if 0 in query_projections.shape or 0 in key_projections.shape or 0 in value.shape:
        return f"the RACE kernels support no empty arrays; got value of shape {value.shape}"
    del is_causal
    return backend.missing()
