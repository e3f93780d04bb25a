"""Softmax attention of a layer whose state is a cache of keys and values.

New queries, keys and values of a layer go in, and the cache with these keys and values comes out.
The type of the cache decides whether attention is dense or sparse.
"""

import jax
import jax.numpy as jnp

from race_jax.layers.rotary import alibi_slopes, rotate
from race_jax.sparse.attention import dense_decode_attention, query_positions
from race_jax.sparse.cache import KVCache
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.sparse_attention import sparse_decode_attention

Cache = KVCache | SparseCache


def attend_and_keep(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: Cache,
    *,
    scheme: str,
    positions: jax.Array | None,
    mask: jax.Array | None,
    segment_ids: jax.Array | None,
    is_causal: bool,
) -> tuple[jax.Array, Cache]:
    """Appends tokens to the cache, and attends from them to the tokens that it holds.

    Args:
        query: shape (B, T, N, H), without positions.
        key: shape (B, T, K, H), without positions.
        value: shape (B, T, K, V).
        cache: the tokens before these.
        scheme: "rope", "alibi", or another scheme, which changes nothing here.
        positions: shape (B, T) int32, needed for "rope" and "alibi".
        mask: shape (B, T) bool, or None.
        segment_ids: must be None.
        is_causal: must be True.

    Returns:
        Shape (B, T, N, V), and the cache with the tokens.

    Raises:
        ValueError: if attention is not causal.
        TypeError: if the cache is none.
        NotImplementedError: if there are segments, or ALiBi with a sparse cache.
    """
    _check(cache, scheme, segment_ids, is_causal)
    if scheme == "rope":
        query, key = rotate(query, positions), rotate(key, positions)
    cache = cache.append(key, value, key_value_mask=mask)
    if isinstance(cache, SparseCache):
        return sparse_decode_attention(query, cache, query_mask=mask), cache
    if scheme != "alibi":
        return dense_decode_attention(query, cache, query_mask=mask), cache
    slopes = alibi_slopes(query.shape[2])
    out = dense_decode_attention(query, cache, query_mask=mask, slopes=slopes)
    # Distances are those between slots. Positions that were counted in another way give NaN.
    counted, _ = query_positions(query.shape[1], cache, mask)
    wrong = (counted != positions) & (counted >= 0)
    return jnp.where(wrong[:, :, None, None], jnp.nan, out), cache


def _check(cache: object, scheme: str, segment_ids: object, is_causal: bool) -> None:
    if not isinstance(cache, Cache):
        raise TypeError(
            "state must be a KVCache or a SparseCache, from init_cache or an earlier call; got "
            f"{type(cache)}."
        )
    if not is_causal:
        raise ValueError("a state needs is_causal=True; without it, pass the whole sequence.")
    if segment_ids is not None:
        raise NotImplementedError(
            "a cache of keys and values holds one sequence a row; leave out segment_ids, and start "
            "every document with an empty cache."
        )
    if scheme == "alibi" and isinstance(cache, SparseCache):
        raise NotImplementedError(
            "sparse scores know nothing of a distance bias; use decode_attention='dense'."
        )
