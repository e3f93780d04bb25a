"""The definition of sparse decoding, slow and plain, for tests.

One query after another, and one token after another, in NumPy and float64:

    kept(t) = sink, window and the best of the other tokens s <= t
    out_t = sum_{s in kept(t)} softmax_s(q_t . k_s / sqrt(H)) v_s
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from race_jax.sparse.config import SparseConfig

STEPS = {1: 1.0, 2: 0.9957, 4: 0.3352}


def attend(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scores: np.ndarray, config: SparseConfig
) -> tuple[np.ndarray, list[int]]:
    """Attends from one query ``(H,)`` at the end of tokens ``(S, H)``, ``(S, V)`` and ``(S,)``.

    Returns:
      The output ``(V,)``, and the positions that were read.
    """
    last = len(key) - 1
    forced = [s for s in range(last + 1) if s < config.sink or s > last - config.window]
    others = [s for s in range(last + 1) if s not in forced]
    others.sort(key=lambda s: (-scores[s], s))
    kept = sorted(forced + others[: config.budget - len(forced)])
    logits = np.array([query @ key[s] for s in kept]) / np.sqrt(len(query))
    weights = np.exp(logits - logits.max())
    return weights @ value[kept] / weights.sum(), kept


def levels(z: np.ndarray, norm: float, width: int, bits: int) -> np.ndarray:
    """Returns the level of each coordinate of a rotated key ``(M,)`` with this norm."""
    if norm == 0:
        return np.ones_like(z)
    steps = np.floor(z * np.sqrt(width) / (norm * STEPS[bits]))
    return 2 * np.clip(steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 1


def linear_scores(rounded: np.ndarray, key: np.ndarray, planes: np.ndarray, bits: int) -> Any:
    """Returns factors times integers for one rounded query ``(M,)`` and keys ``(S, H)``."""
    scores = []
    for k in key:
        z = planes @ k
        level = levels(z, np.linalg.norm(k), len(k), bits)
        factor = np.float16(k @ k / (level @ z)) if np.any(k) else np.float16(0)
        scores.append(np.float32(factor) * np.float32(rounded @ level))
    return np.array(scores)


def socket_scores(
    query: np.ndarray, key: np.ndarray, planes: np.ndarray, sharpness: float
) -> np.ndarray:
    """Returns sum_l phi_{l, b_l(k)}(q) with the softmax over all 2^P corners written out.

    Args:
      query: ``(H,)``.
      key: ``(S, H)``.
      planes: ``(L, P, H)``.
      sharpness: a.
    """
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=planes.shape[1])))
    total = np.zeros(len(key))
    for table in planes:
        weights = np.exp(sharpness * corners @ np.tanh(table @ query))
        phi = weights / weights.sum()
        for s, k in enumerate(key):
            signs = np.where(table @ k >= 0, 1.0, -1.0)
            total[s] += phi[np.flatnonzero((corners == signs).all(axis=1))[0]]
    return total


def quest_scores(query: np.ndarray, key: np.ndarray, page_size: int) -> np.ndarray:
    """Returns the upper bound of q . k over the page of every key ``(S, H)``."""
    pages = [key[s : s + page_size] for s in range(0, len(key), page_size)]
    bounds = [np.maximum(query * p.min(axis=0), query * p.max(axis=0)).sum() for p in pages]
    return np.repeat(bounds, page_size)[: len(key)]
