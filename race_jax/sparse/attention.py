"""Attention of new tokens to a cache: the calls that decoding makes after `append`.

Queries (B, T, N, H) of the last T tokens of every row, and a cache that holds their keys and
values, give outputs (B, T, N, V). Query i of row b stands at length[b] - T + i and sees the tokens
up to itself.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.core import dispatch, masking, shards
from race_jax.core.dispatch import Choice
from race_jax.sparse import exact
from race_jax.sparse.cache import KVCache, kinds_of

LOST = -2  # the position of a query whose row has passed its capacity, or lacks tokens


def dense_decode_attention(
    query: jax.Array,
    cache: KVCache,
    *,
    query_mask: jax.Array | None = None,
    slopes: jax.Array | None = None,
    rule: exact.Rule = exact.SOFTMAX,
    implementation: str | None = None,
) -> jax.Array:
    r"""Computes the softmax attention of the last tokens of every row to all tokens before them.

    .. math::
        out_t = \sum_{s \le t} \mathrm{softmax}_s(
            q_t \cdot k_s / \sqrt{H} - m \, (t - s) + G_t - G_s) \, v_s

    G is the decay that the cache holds, and zero if it holds none. Another ``rule`` gives other
    weights than softmax. The cost of a query grows with the number of tokens in the cache, and not
    with its capacity. One program serves every length. Logits and sums are float32.

    Args:
        query: shape (B, T, N, H), floating: the queries of the last T tokens appended. Query head
            n uses key/value head n // (N // K). The dtype may be another one than the cache's;
            logits are float32 in any case. The kernels then leave the call to XLA.
        cache: the keys and values of all tokens, also of these.
        query_mask: shape (B, T) bool, the mask of the `append`, or None. Padded queries return
            zeros.
        slopes: shape (N,), by how much the logits of a head fall per token of distance (the m of
            ALiBi), or None.
        rule: how logits become weights (`race_jax.sparse.Rule`).
        implementation: "xla", "pallas" for the GPU kernels, or None for the best one there is.

    Returns:
        Shape (B, T, N, V), with the dtype of the values. A row that has passed its capacity, or
        holds fewer tokens than there are queries, returns NaN.

    Raises:
        ValueError: if shapes do not fit, or a row is known to hold fewer tokens than its queries.
        TypeError: if the query is not floating, the mask is not bool, or the cache is of another
            kind.
        NotImplementedError: if the implementation is "pallas" and the kernels do not support the
            call, or a gradient is taken.

    Example:
        >>> import jax.numpy as jnp, race_jax
        >>> cache = race_jax.KVCache.init(1, 8, kv_heads=1, head_dim=2, dtype=jnp.float32)
        >>> cache = cache.append(jnp.ones((1, 3, 1, 2)), jnp.arange(6.0).reshape(1, 3, 1, 2))
        >>> race_jax.dense_decode_attention(jnp.ones((1, 1, 1, 2)), cache)[0, 0, 0].tolist()
        [2.0, 3.0]

    Source: Vaswani et al. 2017, section 3.2.1, with the keys and values kept.
    """
    if not isinstance(cache, KVCache):
        hint = " with codes; pass cache.kv" if hasattr(cache, "kv") else ""
        raise TypeError(f"cache must be a KVCache; got a {type(cache).__name__}{hint}.")
    check_query(query, cache, query_mask)
    kv_heads = cache.key.shape[2]
    choice = choose_dense(implementation, query, cache, rule)
    query, cache, slopes = inference_only((query, cache, slopes))
    arrays = {"query": query, "cache": cache, "mask": query_mask, "slopes": None}
    kinds = {"query": shards.TOKENS, "cache": kinds_of(cache), "mask": shards.SLOTS}
    if slopes is not None:
        slopes = jnp.asarray(slopes)
        if slopes.shape != query.shape[2:3]:
            raise ValueError(f"slopes must be (N,) = {query.shape[2:3]}; got {slopes.shape}.")
        kinds["slopes"] = shards.HEADS
        arrays["slopes"] = slopes.astype(jnp.float32).reshape(kv_heads, -1)
    arrays = {name: x for name, x in arrays.items() if x is not None}
    with jax.named_scope("dense_decode_attention"):
        return shards.over_shards(
            lambda arrays, _: _dense(choice, rule, **arrays),
            arrays,
            {name: kinds[name] for name in arrays},
            shards.TOKENS,
            kv_heads=kv_heads,
            splits_sequence=False,
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _dense(choice: Choice, rule: exact.Rule, query, cache, mask=None, slopes=None) -> jax.Array:
    positions = query_positions(query.shape[1], cache, mask)
    return over_all(choice, query, cache, positions, slopes, rule)


def choose_dense(
    implementation: str | None, query: jax.Array, cache: KVCache, rule: exact.Rule = exact.SOFTMAX
) -> Choice:
    """Returns which implementation attends to all tokens, and why."""

    def limit() -> str | None:
        if cache.decay is not None or rule is not exact.SOFTMAX:
            return "the kernels of decoding have the weights of softmax without a forget gate only"
        together = query.shape[1] * (query.shape[2] // cache.key.shape[2])
        return attention_limit(query, cache, together)

    if implementation is None and query.shape[1] > 1 and (reason := limit()):
        return Choice("xla", reason)  # prompts are read in XLA, which is no news to the user
    return dispatch.decide(implementation, limit)


def attention_limit(query: jax.Array, cache: KVCache, queries: int) -> str | None:
    """Returns why the kernels cannot attend to keys that so many queries read, or None."""
    if reason := dispatch.without_cuda("sparse"):
        return reason
    kernels = dispatch.kernels().sparse
    return kernels.supports_attention(query, cache.key, cache.value, queries=queries)


def over_all(
    choice: Choice, query, cache: KVCache, positions, slopes=None, rule: exact.Rule = exact.SOFTMAX
) -> jax.Array:
    """Attends to every slot up to the position of each query, and gives NaN for LOST ones."""

    def pallas(query, cache, positions, slopes):
        kernels = dispatch.kernels().sparse
        return kernels.dense_attention(query, cache.key, cache.value, positions, slopes)

    def xla(query, cache, positions, slopes):
        return guarded(exact.dense(query, cache, positions, slopes, rule=rule), positions)

    return dispatch.by_platform(choice, xla, pallas)(query, cache, positions, slopes)


def query_positions(count: int, cache: KVCache, mask: jax.Array | None) -> jax.Array:
    """Returns the position of each query.

    Args:
      count: T, the number of queries of a row.
      cache: the cache, whose last tokens they are.
      mask: ``(B, T)`` bool, or None.

    Returns:
      ``(B, T)`` int32, with -1 for padded queries, and LOST in a row that the cache cannot answer.
    """
    length = cache.length[:, None]
    if mask is None:
        positions = length - count + jnp.arange(count, dtype=jnp.int32)
        real = positions
    else:
        seen = jnp.cumsum(mask, axis=1, dtype=jnp.int32)
        real = length - seen[:, -1:] + seen - 1
        positions = jnp.where(mask, real, -1)
        real = jnp.where(mask, real, 0)
    wrong = (cache.length > cache.capacity) | (real < 0).any(axis=1)
    return jnp.where(wrong[:, None], LOST, positions)


def guarded(out: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns the outputs ``(B, T, N, V)``, and NaN for queries whose position is LOST."""
    return jnp.where((positions == LOST)[:, :, None, None], jnp.nan, out)


@jax.custom_jvp
def inference_only(arrays: Any) -> Any:
    """Returns the arrays. They have no derivative here, and say so."""
    return arrays


@inference_only.defjvp
def _inference_only_jvp(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "decode attention has no gradient; train with softmax_attention, which reads whole "
        "sequences."
    )


def check_query(query: jax.Array, cache: KVCache, mask: jax.Array | None) -> None:
    """Checks a query against the cache and, if the lengths are known, that its keys are there."""
    rows, _, heads, width = cache.key.shape
    shape = getattr(query, "shape", ())
    fits = len(shape) == 4 and shape[0] == rows and shape[3] == width
    if not fits or shape[2] == 0 or shape[2] % heads:
        raise ValueError(
            f"query (B, T, N, H) = {shape} does not meet a cache of {rows} rows and {heads} "
            f"key/value heads of {width}; N must be a multiple of {heads}."
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query must be floating; got {query.dtype}.")
    if shape[1] == 0:
        raise ValueError("query has no token; append the keys of at least one first.")
    masking.check_key_value_mask(mask, shape[:2], name="query_mask")
    held, kept = masking.concrete(cache.length), masking.concrete(mask)
    if held is None or (mask is not None and kept is None):
        return
    asked = np.full(held.shape, shape[1]) if kept is None else kept.sum(axis=1)
    for row in np.flatnonzero(asked > held):
        raise ValueError(
            f"query has {asked[row]} tokens, but row {row} of the cache holds {held[row]}; append "
            "their keys first."
        )
