"""Selection of the tokens that a query reads: the forced ones, and the best of the others.

Scores (B, T, M, C) give lists of `budget` positions, one for each query and selecting head. A
forced token has the score +inf and an invisible one -inf, so that one ranking gives each list.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = float(jnp.finfo(jnp.float32).max)


class Selection(NamedTuple):
    """The tokens that each query reads.

    Attributes:
      indices: ``(B, T, M, budget)`` int32, the positions in ascending order, and 0 after ``count``.
      count: ``(B, T, M)`` int32, how many of them there are: the budget, or all visible tokens.
    """

    indices: jax.Array
    count: jax.Array


def select(scores: jax.Array, *, forced: jax.Array, visible: jax.Array, budget: int) -> Selection:
    """Returns the forced tokens and the best others, `budget` in all.

    Args:
      scores: ``(B, T, M, C)`` float32. Larger is better, NaN is worst, and of equal scores the
        earlier token is the better one.
      forced: ``(B, T, C)`` bool, the visible tokens that every list holds, at most ``budget``.
      visible: ``(B, T, C)`` bool.
      budget: the length of a list.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.sparse import select
      >>> scores = jnp.array([[[[0.0, 3.0, 1.0, 1.0, 9.0]]]])
      >>> visible = jnp.array([[[True, True, True, True, False]]])
      >>> forced = jnp.array([[[True, False, False, False, False]]])
      >>> select(scores, forced=forced, visible=visible, budget=3).indices[0, 0, 0].tolist()
      [0, 1, 2]

    Source: beyond the paper, whose lists are joined afterwards.
    """
    finite = jnp.where(jnp.isnan(scores), -HIGHEST, jnp.clip(scores, -HIGHEST, HIGHEST))
    finite = jnp.where(finite == 0, 0.0, finite)  # of -0 and 0 neither is the better one
    ranked = jnp.where(forced[:, :, None], jnp.inf, finite)
    ranked = jnp.where(visible[:, :, None], ranked, -jnp.inf)
    most = min(budget, scores.shape[-1])
    _, indices = jax.lax.top_k(ranked, most)  # of equal values the first comes first
    count = jnp.minimum(visible.sum(axis=-1, dtype=jnp.int32), budget)
    count = jnp.broadcast_to(count[:, :, None], scores.shape[:3])
    kept = jnp.arange(most) < count[..., None]
    indices = jnp.sort(jnp.where(kept, indices, scores.shape[-1]), axis=-1)
    indices = jnp.where(kept, indices, 0).astype(jnp.int32)
    widths = [(0, 0)] * 3 + [(0, budget - most)]
    return Selection(jnp.pad(indices, widths), count)
