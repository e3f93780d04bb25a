"""Attention while decoding, from a cache of keys and values: to all of them, or to the best few."""

from race_jax.sparse.attention import dense_decode_attention
from race_jax.sparse.cache import KVCache
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.config import SCORERS, SparseConfig, budget_for, socket_sharpness
from race_jax.sparse.exact import Rule
from race_jax.sparse.exact import listed as attend
from race_jax.sparse.selection import Selection, select
from race_jax.sparse.sparse_attention import (
    Report,
    explain,
    kept,
    score,
    sparse_decode_attention,
)

__all__ = [
    "SCORERS",
    "KVCache",
    "Report",
    "Rule",
    "Selection",
    "SparseCache",
    "SparseConfig",
    "attend",
    "budget_for",
    "dense_decode_attention",
    "explain",
    "kept",
    "score",
    "select",
    "socket_sharpness",
    "sparse_decode_attention",
]
