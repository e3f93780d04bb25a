"""RACE attention for JAX: softmax-like attention at a cost linear in the length.

The operation and its parts; the Flax layers are loaded when they are first used, so that the
operation works without Flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from race_jax import sparse
from race_jax.core.attention import race_attention, race_attention_from_projections
from race_jax.core.dispatch import explain
from race_jax.core.hashing import hash_projections, init_planes, soft_hash
from race_jax.core.state import RACEState, merge
from race_jax.layers.attention_fn import attention_fn
from race_jax.sparse.attention import dense_decode_attention
from race_jax.sparse.cache import KVCache
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.config import SparseConfig
from race_jax.sparse.sparse_attention import sparse_decode_attention

if TYPE_CHECKING:
    from race_jax import linen
    from race_jax.layers.planes import HashPlanes
    from race_jax.layers.race import RACEAttention

__version__ = "0.1.0"

__all__ = [
    "HashPlanes",
    "KVCache",
    "RACEAttention",
    "RACEState",
    "SparseCache",
    "SparseConfig",
    "attention_fn",
    "dense_decode_attention",
    "explain",
    "hash_projections",
    "init_planes",
    "linen",
    "merge",
    "race_attention",
    "race_attention_from_projections",
    "soft_hash",
    "sparse",
    "sparse_decode_attention",
]


def __getattr__(name: str) -> Any:
    """Loads what needs Flax on first use (PEP 562)."""
    if name == "linen":
        return importlib.import_module("race_jax.linen")
    if name in ("HashPlanes", "RACEAttention"):
        file = "planes" if name == "HashPlanes" else "race"
        return getattr(importlib.import_module(f"race_jax.layers.{file}"), name)
    if name in ("data", "diagnostics", "layers", "models", "streaming", "tasks", "train"):
        raise AttributeError(f"race_jax does not load {name!r} by itself: import race_jax.{name}")
    raise AttributeError(f"module 'race_jax' has no attribute {name!r}")
