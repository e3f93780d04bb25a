"""GPU kernels for decoding from a cache: attention to all keys or to a list, and selection."""

from typing import Any

from pallas_kernels.sparse import attend
from pallas_kernels.sparse.attend import dense, listed
from pallas_kernels.sparse.select import select

__all__ = ["dense", "listed", "select", "supports"]


def supports(query: Any, key: Any, value: Any, *, queries: int) -> str | None:
    """Returns why the kernels cannot run this call, or None if they can.

    Args:
      query: the shape and dtype of the queries, (B, T, N, H).
      key: the shape and dtype of the cached keys, (B, C, K, H).
      value: the shape and dtype of the cached values, (B, C, K, V).
      queries: how many queries read the same keys: G·T if all tokens are read, G if the heads of a
        group share a list, else 1.

    Returns:
      None, or one sentence that names the limit, what is supported and what was given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((1, 8, 1, 48), jnp.bfloat16)
      >>> supports(x, x, x, queries=1).split(";")[1]
      ' key has 48'
    """
    return attend.limit(query, key, value, queries)
