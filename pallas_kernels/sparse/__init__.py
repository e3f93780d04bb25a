"""GPU kernels for decoding from a cache: codes, scores, selection and attention.

Each is one function of arrays with static shapes. They are independent of each other.
"""

from typing import Any

from pallas_kernels import backend
from pallas_kernels.sparse import attend
from pallas_kernels.sparse.attend import dense_attention, listed_attention
from pallas_kernels.sparse.codes import level_codes
from pallas_kernels.sparse.queries import rounded_queries
from pallas_kernels.sparse.scores import MOST_QUERIES, Forced, linear_scores
from pallas_kernels.sparse.select import select

__all__ = [
    "Forced",
    "dense_attention",
    "level_codes",
    "linear_scores",
    "listed_attention",
    "rounded_queries",
    "select",
    "supports",
    "supports_attention",
    "supports_codes",
    "supports_queries",
    "supports_selection",
]

SCORERS = ("sign_linear", "quantized", "hamming")
CODE_LIMIT = 2**31  # bytes, which are counted in int32
MOST_BITS = 1024  # of a code
HEAD_DIMS = range(1, 257)


def supports(query: Any, codes: Any, *, scorer: str) -> str | None:
    """Returns why the kernels cannot compute scores, or None if they can.

    Args:
      query: the shape of the queries, (B, T, N, H).
      codes: the shape of the codes, (B, K, C, W) uint32, or None.
      scorer: the name of the scorer.

    Returns:
      None, or one sentence that names the limit, what is supported and what was given.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> query = jax.ShapeDtypeStruct((1, 1, 64, 128), jnp.bfloat16)
      >>> codes = jax.ShapeDtypeStruct((1, 2, 1024, 8), jnp.uint32)
      >>> supports(query, codes, scorer="sign_linear").split(";")[1]
      ' got 64 query heads and 2 key/value heads'
    """
    if scorer not in SCORERS:
        return f"the sparse kernels support the scorers {', '.join(SCORERS)}; got {scorer!r}"
    if not all(isinstance(size, int) for size in (*query.shape, *codes.shape)):
        return "the sparse kernels need known sizes, but this call has symbolic ones (jax.export)"
    _, kv_heads, _, words = codes.shape
    if query.shape[2] > MOST_QUERIES * kv_heads:
        return (
            f"the sparse kernels support at most {MOST_QUERIES} query heads of a key/value head; "
            f"got {query.shape[2]} query heads and {kv_heads} key/value heads"
        )
    if 32 * words > MOST_BITS:
        return f"the sparse kernels support codes up to {MOST_BITS} bits; got {32 * words}"
    total = 4 * codes.size
    if total >= CODE_LIMIT:
        return (
            f"the sparse kernels support codes below {CODE_LIMIT / 2**30:.0f} GiB; got "
            f"{total / 2**30:.1f} GiB of shape {codes.shape}, so split the batch"
        )
    if 0 in query.shape or 0 in codes.shape:
        return f"the sparse kernels support no empty arrays; got codes of shape {codes.shape}"
    return backend.missing("sparse")


def supports_queries(query: Any) -> str | None:
    """Returns why the kernels cannot round these queries, or None if they can.

    Args:
      query: the shape and dtype of the queries, (B, T, N, H), whose scores are supported.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> supports_queries(jax.ShapeDtypeStruct((1, 1, 2, 512), jnp.bfloat16))
      'the sparse kernels round queries of up to 256; got 512'
    """
    if str(query.dtype) != "bfloat16":
        return f"the sparse kernels round bfloat16 queries; got {query.dtype}"
    if query.shape[-1] not in HEAD_DIMS:
        return f"the sparse kernels round queries of up to {HEAD_DIMS[-1]}; got {query.shape[-1]}"
    return backend.missing("sparse")


def supports_codes(key: Any, planes: Any, *, bits: int) -> str | None:
    """Returns why the kernels cannot code these keys, or None if they can.

    Args:
      key: the shape and dtype of the keys, (B, T, K, H).
      planes: the shape of the rotations, (M, H).
      bits: b, the bits of a coordinate.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> key = jax.ShapeDtypeStruct((1, 8, 2, 64), jnp.float32)
      >>> supports_codes(key, jax.ShapeDtypeStruct((128, 64), jnp.bfloat16), bits=1)
      'the sparse kernels code bfloat16 keys; got float32'
    """
    if str(key.dtype) != "bfloat16":
        return f"the sparse kernels code bfloat16 keys; got {key.dtype}"
    if not all(isinstance(size, int) for size in key.shape):
        return "the sparse kernels need known sizes, but this call has symbolic ones (jax.export)"
    if key.shape[-1] not in HEAD_DIMS:
        return f"the sparse kernels code heads of up to {HEAD_DIMS[-1]}; got {key.shape[-1]}"
    if bits * planes.shape[0] > MOST_BITS:
        return (
            f"the sparse kernels support codes up to {MOST_BITS} bits; got {bits * planes.shape[0]}"
        )
    if 0 in key.shape:
        return f"the sparse kernels support no empty arrays; got keys of shape {key.shape}"
    return backend.missing("sparse")


def supports_selection(query: Any, key: Any) -> str | None:
    """Returns why the kernels cannot select among the scores of these queries, or None.

    Args:
      query: the shape of the queries, (B, T, N, H).
      key: the shape of the cached keys, (B, C, K, H).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((0, 8, 1, 64), jnp.bfloat16)
      >>> supports_selection(x, x)
      'the sparse kernels support no empty arrays; got query of shape (0, 8, 1, 64)'
    """
    if not all(isinstance(size, int) for size in (*query.shape, *key.shape)):
        return "the sparse kernels need known sizes, but this call has symbolic ones (jax.export)"
    if 0 in (*query.shape, *key.shape):
        return f"the sparse kernels support no empty arrays; got query of shape {query.shape}"
    return backend.missing("sparse")


def supports_attention(query: Any, key: Any, value: Any, *, queries: int) -> str | None:
    """Returns why the kernels cannot attend to cached keys, or None if they can.

    Args:
      query: the shape and dtype of the queries, (B, T, N, H).
      key: the shape and dtype of the cached keys, (B, C, K, H).
      value: the shape and dtype of the cached values, (B, C, K, V).
      queries: how many queries read the same keys: G·T if all tokens are read, G if the heads of a
        group share a list, else 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.ShapeDtypeStruct((1, 8, 1, 48), jnp.bfloat16)
      >>> supports_attention(x, x, x, queries=1).split(";")[1]
      ' key has 48'
    """
    return attend.limit(query, key, value, queries) or supports_selection(query, key)
