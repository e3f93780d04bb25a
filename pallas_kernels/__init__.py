"""GPU kernels for RACE attention, written in Pallas.

They take hash projections, values, sharpness, masks and states, and compute the steps of causal and
bidirectional RACE attention, forward and backward (docs/kernels.md). The caller combines states
between the steps, and gives the derivative rule.
"""

from typing import Any

from pallas_kernels import backend, sparse
from pallas_kernels.bidirectional import BidirectionalOperands, BidirectionalSteps
from pallas_kernels.blocks import Block, Blocks, split_length
from pallas_kernels.causal import CausalOperands, CausalSteps
from pallas_kernels.plan import projection_columns

__all__ = [
    "BidirectionalOperands",
    "BidirectionalSteps",
    "Block",
    "Blocks",
    "CausalOperands",
    "CausalSteps",
    "projection_columns",
    "sparse",
    "split_length",
    "supports",
]

# The largest F for each kind of product. Float32 tiles take twice the memory of bfloat16 ones, and
# an exact product takes six bfloat16 products.
MAX_FEATURES = {"bfloat16": 128, "float32 in TF32": 128, "float32": 64}
DTYPES = ("float32", "bfloat16")
VALUE_DIMS = range(1, 257)


def supports(
    query_projections: Any,
    key_projections: Any,
    value: Any,
    *,
    is_causal: bool,
    exact: bool = True,
) -> str | None:
    """Returns why the kernels cannot run this call, or None if they can.

    Args:
      query_projections: the shape and dtype of z of the queries, (B, T, N, L, P).
      key_projections: the shape and dtype of z of the keys, (B, S, K, L, P).
      value: the shape and dtype of the values, (B, S, K, V).
      is_causal: whether the call is causal. T and S are then equal.
      exact: whether products of float32 operands are exact, rather than TF32.

    Returns:
      None, or one sentence that names the limit, what is supported and what was given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z = jax.ShapeDtypeStruct((1, 8, 2, 4, 8), jnp.bfloat16)
      >>> v = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.bfloat16)
      >>> supports(z, z, v, is_causal=True).split(";")[1]
      ' got L=4, P=8, F=1024'
    """
    for name, array in (
        ("query projections", query_projections),
        ("key projections", key_projections),
        ("value", value),
    ):
        if str(array.dtype) not in DTYPES:
            known = " and ".join(DTYPES)
            return f"the RACE kernels support {known}; {name} have {array.dtype}"
    tables, planes = query_projections.shape[-2:]
    features, dtype = tables * 2**planes, str(value.dtype)
    in_tf32 = dtype == "float32" and not exact
    most = MAX_FEATURES["float32 in TF32" if in_tf32 else dtype]
    if features > most:
        products = {"bfloat16": "", "float32": " and exact products"}[dtype]
        products = " and TF32 products" if in_tf32 else products
        return (
            f"the RACE kernels support F = L * 2**P up to {most} features with {dtype} "
            f"values{products}; got L={tables}, P={planes}, F={features}"
        )
    if value.shape[-1] not in VALUE_DIMS:
        return (
            f"the RACE kernels support value head dims from {VALUE_DIMS[0]} to {VALUE_DIMS[-1]}; "
            f"got {value.shape[-1]}"
        )
    if 0 in query_projections.shape or 0 in key_projections.shape or 0 in value.shape:
        return f"the RACE kernels support no empty arrays; got value of shape {value.shape}"
    del is_causal
    return backend.missing()
