"""Chooses between plain XLA and the GPU kernels for the two calls of decoding.

The choice depends on shapes and dtypes, and is made when a function is called. Where it depends on
the platform, it is completed when the call is lowered (`by_platform`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from race_jax.core import dispatch
from race_jax.core.dispatch import BY_PLATFORM, IMPLEMENTATIONS, PALLAS_ASKED, XLA_ASKED, Choice
from race_jax.sparse.cache import KVCache


def choose(implementation: str | None, query: Any, cache: KVCache, sharing: int) -> Choice:
    """Returns which implementation runs, and why.

    Args:
      implementation: what the caller asks for.
      query: ``(B, T, N, H)``.
      cache: the keys and values.
      sharing: how many queries read the same keys.

    Raises:
      ValueError: if the implementation is unknown.
      NotImplementedError: if it is ``"pallas"`` and the kernels do not support the call.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "xla":
        return XLA_ASKED
    reason = _limit(query, cache, sharing)
    if implementation == "pallas" and reason:
        raise NotImplementedError(f"{reason}; pass implementation='xla' or None")
    if reason:
        return Choice("xla", reason)
    return PALLAS_ASKED if implementation == "pallas" else BY_PLATFORM


def _limit(query: Any, cache: KVCache, sharing: int) -> str | None:
    if not all(isinstance(size, int) for size in (*query.shape, *cache.key.shape)):
        return "the decoding kernels need known sizes, but this call has symbolic ones (jax.export)"
    if not dispatch.has_cuda():  # the kernels are not imported on such a host
        return "the decoding kernels run on CUDA devices, and this host has none"
    return dispatch.sparse_kernels().supports(query, cache.key, cache.value, queries=sharing)


def by_platform(choice: Choice, xla: Callable, pallas: Callable) -> Callable:
    """Returns f(*arrays) that runs what was chosen, on the platform that it is lowered for."""
    if choice is PALLAS_ASKED:
        return pallas
    if choice is BY_PLATFORM:
        return lambda *arrays: jax.lax.platform_dependent(*arrays, cuda=pallas, default=xla)
    return xla
