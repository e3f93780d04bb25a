"""Attention over all pairs of tokens whose state is a cache of keys and values.

New queries, keys and values of a layer go in, and the cache with these keys and values comes out.
The type of the cache decides whether attention is dense or sparse.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core.rotary import rotate
from race_jax.layers.positions import PairsConfig, alibi_slopes
from race_jax.layers.self_attention import AttentionState, Call, SelfAttention, check_fits
from race_jax.sparse.attention import dense_decode_attention, query_positions
from race_jax.sparse.cache import KVCache
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.exact import SOFTMAX, Rule
from race_jax.sparse.sparse_attention import sparse_decode_attention

Cache = KVCache | SparseCache


class CachedAttention(SelfAttention):
    """Self-attention that carries a cache of keys and values. Its ``attend`` adds to it.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.
    """

    def init_cache(self, batch: int, capacity: int) -> AttentionState:
        """Returns the state before any token, with room for the keys and values of `capacity`."""
        settings = self.config
        cache = KVCache.init(
            batch,
            capacity,
            settings.num_kv_heads,
            settings.head_dim,
            dtype=settings.dtype or jnp.float32,
            has_decay=settings.forget_gate is not None,
        )
        return self._state(cache, batch)

    def _checked(self, state: Any, batch: int) -> AttentionState:
        """Returns a state with a cache, or raises an error."""
        if not isinstance(state, AttentionState) or not isinstance(state.memory, Cache):
            raise TypeError(
                "state must be an AttentionState with a cache of keys and values, from init_cache "
                f"or an earlier call; got {type(state)}."
            )
        capacity, memory = state.memory.capacity, state.memory
        dense = memory.kv if isinstance(memory, SparseCache) else memory
        wanted = jax.eval_shape(lambda: self.init_cache(batch, capacity))
        layer, maker = f"this {self.config.NAME} layer", f"init_cache({batch}, {capacity})"
        check_fits(state._replace(memory=dense), wanted, layer, maker)
        return state


def attend_and_keep(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    call: Call,
    settings: PairsConfig,
    rule: Rule = SOFTMAX,
) -> tuple[jax.Array, Cache]:
    """Appends tokens to the cache, and attends from them to the tokens that it holds.

    Args:
        query: shape (B, T, N, H), without positions.
        key: shape (B, T, K, H), without positions.
        value: shape (B, T, K, V).
        call: the other arguments of the layer's call, with the cache as its memory.
        settings: the layer's sizes and options. Its positions are "rope", "alibi", or another
            scheme, which changes nothing here.
        rule: how logits become weights.

    Returns:
        Shape (B, T, N, V), and the cache with the tokens.

    Raises:
        ValueError: if attention is not causal.
        NotImplementedError: if there are segments, or a sparse cache does not go with the method.
    """
    scheme = settings.positions
    _check(call, scheme, rule)
    if not query.shape[1]:
        return jnp.zeros((*query.shape[:3], value.shape[3]), value.dtype), call.memory
    if scheme == "rope":
        query, key = (rotate(x, call.positions, settings.rope_base) for x in (query, key))
    tokens = {"key": key, "value": value, "key_value_mask": call.mask}
    if isinstance(call.memory, SparseCache):
        cache = call.memory.append(**tokens)
        return sparse_decode_attention(query, cache, query_mask=call.mask), cache
    cache = call.memory.append(**tokens, log_decay=call.log_decay)
    slopes = alibi_slopes(query.shape[2]) if scheme == "alibi" else None
    out = dense_decode_attention(query, cache, query_mask=call.mask, slopes=slopes, rule=rule)
    if slopes is None:
        return out, cache
    # Distances are those between slots. Positions that were counted in another way give NaN.
    counted = query_positions(query.shape[1], cache, call.mask)
    wrong = (counted != call.positions) & (counted >= 0)
    return jnp.where(wrong[:, :, None, None], jnp.nan, out), cache


def _check(call: Call, scheme: str, rule: Rule) -> None:
    if not call.is_causal:
        raise ValueError("a state needs is_causal=True; without it, pass the whole sequence.")
    if call.segment_ids is not None:
        raise NotImplementedError(
            "a cache of keys and values holds one sequence a row; leave out segment_ids, and start "
            "every document with an empty cache."
        )
    if isinstance(call.memory, KVCache):
        return
    for is_there, what in (
        (scheme == "alibi", "a distance bias"),
        (call.log_decay is not None, "a forget gate"),
        (rule is not SOFTMAX, "weights other than those of softmax"),
    ):
        if is_there:
            raise NotImplementedError(
                f"sparse scores know nothing of {what}; decode without a SparseConfig."
            )
