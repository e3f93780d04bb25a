"""RACE attention for JAX: softmax-like attention at a cost linear in the length.

The operation and its parts; the Flax layers are loaded when they are first used, so that the
operation works without Flax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from race_jax.attention import race_attention, race_attention_from_projections
from race_jax.attention_fn import attention_fn
from race_jax.hashing import hash_projections, init_planes, soft_hash
from race_jax.state import RACEState, merge

if TYPE_CHECKING:
    from race_jax import linen, nnx
    from race_jax.nnx import RACEAttention

__version__ = "0.1.0"

__all__ = [
    "RACEAttention",
    "RACEState",
    "attention_fn",
    "hash_projections",
    "init_planes",
    "linen",
    "merge",
    "nnx",
    "race_attention",
    "race_attention_from_projections",
    "soft_hash",
]


def __getattr__(name: str) -> Any:
    """Loads what needs Flax on first use (PEP 562)."""
    if name in ("nnx", "linen"):
        return importlib.import_module(f"race_jax.{name}")
    if name == "RACEAttention":
        return importlib.import_module("race_jax.nnx").RACEAttention
    raise AttributeError(f"module 'race_jax' has no attribute {name!r}")
