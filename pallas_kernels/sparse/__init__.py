"""GPU kernels for decoding from a cache: codes of keys, and scores of cached keys.

Each is one function of arrays with static shapes. They are independent of each other.
"""

from typing import Any

from pallas_kernels import backend
from pallas_kernels.sparse.codes import level_codes
from pallas_kernels.sparse.scores import MOST_QUERIES, Forced, linear_scores

__all__ = ["Forced", "level_codes", "linear_scores", "supports", "supports_codes"]

SCORERS = ("sign_linear", "quantized", "hamming")
CODE_LIMIT = 2**31  # bytes, which are counted in int32
MOST_BITS = 1024  # of a code
HEAD_DIMS = range(1, 257)


def supports(query: Any, codes: Any, *, scorer: str) -> str | None:
    """Returns why the kernels cannot run sparse decoding, or None if they can.

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
