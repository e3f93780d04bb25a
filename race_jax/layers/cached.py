"""Softmax attention of a layer whose state is a cache of keys and values.

New queries, keys and values of a layer go in, and the cache with these keys and values comes out.
The type of the cache decides whether attention is dense or sparse.
"""

import jax
import jax.numpy as jnp

from race_jax.layers.positions import alibi_slopes, rotate
from race_jax.layers.self_attention import Call
from race_jax.sparse.attention import dense_decode_attention, query_positions
from race_jax.sparse.cache import KVCache
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.sparse_attention import sparse_decode_attention

Cache = KVCache | SparseCache


def attend_and_keep(
    query: jax.Array, key: jax.Array, value: jax.Array, call: Call, scheme: str
) -> tuple[jax.Array, Cache]:
    """Appends tokens to the cache, and attends from them to the tokens that it holds.

    Args:
        query: shape (B, T, N, H), without positions.
        key: shape (B, T, K, H), without positions.
        value: shape (B, T, K, V).
        call: the other arguments of the layer's call, with the cache as its memory.
        scheme: "rope", "alibi", or another scheme, which changes nothing here.

    Returns:
        Shape (B, T, N, V), and the cache with the tokens.

    Raises:
        ValueError: if attention is not causal.
        NotImplementedError: if there are segments, or ALiBi with a sparse cache.
    """
    _check(call, scheme)
    if scheme == "rope":
        query, key = rotate(query, call.positions), rotate(key, call.positions)
    cache = call.memory.append(key, value, key_value_mask=call.mask)
    if isinstance(cache, SparseCache):
        return sparse_decode_attention(query, cache, query_mask=call.mask), cache
    if scheme != "alibi":
        return dense_decode_attention(query, cache, query_mask=call.mask), cache
    slopes = alibi_slopes(query.shape[2])
    out = dense_decode_attention(query, cache, query_mask=call.mask, slopes=slopes)
    # Distances are those between slots. Positions that were counted in another way give NaN.
    counted, _ = query_positions(query.shape[1], cache, call.mask)
    wrong = (counted != call.positions) & (counted >= 0)
    return jnp.where(wrong[:, :, None, None], jnp.nan, out), cache


def _check(call: Call, scheme: str) -> None:
    if not call.is_causal:
        raise ValueError("a state needs is_causal=True; without it, pass the whole sequence.")
    if call.segment_ids is not None:
        raise NotImplementedError(
            "a cache of keys and values holds one sequence a row; leave out segment_ids, and start "
            "every document with an empty cache."
        )
    if scheme == "alibi" and isinstance(call.memory, SparseCache):
        raise NotImplementedError(
            "sparse scores know nothing of a distance bias; use decode_attention='dense'."
        )
