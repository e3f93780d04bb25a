"""Attention while decoding, from a cache of keys and values: to all of them, or to the best few."""

from race_jax.sparse.attention import dense_decode_attention
from race_jax.sparse.cache import KVCache

__all__ = ["KVCache", "dense_decode_attention"]
