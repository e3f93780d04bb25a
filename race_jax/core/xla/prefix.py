"""The sums at the start of every block of a sequence, by an exclusive scan over the blocks.

Each block has a decay a, and sums X that it adds. The scan gives the sums at every block's start
or, in reverse, the cotangents at every block's end. Its associative operation is

    (a1, X1) then (a2, X2)  =  (a1 a2, a2 X1 + X2)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core.shapes import Size
from race_jax.core.xla.chunk import Sums


def combine(earlier: tuple[jax.Array, Sums], later: tuple[jax.Array, Sums]):
    """Returns the factor and the sums of two adjoining spans. Factors are ``(..., B, K)``."""
    (factor_1, sums_1), (factor_2, sums_2) = earlier, later
    return factor_1 * factor_2, Sums(
        factor_2[..., None, None] * sums_1.numerator + sums_2.numerator,
        factor_2[..., None] * sums_1.mass + sums_2.mass,
    )


def exclusive(factors: jax.Array, sums: Sums, first: Sums) -> tuple[Sums, Sums]:
    """Scans from the first block to the last.

    Args:
      factors: ``(blocks, B, K)``, the decay across every block.
      sums: ``(blocks, B, ...)``, the sums that every block adds by itself.
      first: ``(B, ...)``, the sums that enter the first block.

    Returns:
      The sums that enter every block ``(blocks, B, ...)``, and those that leave the last
      ``(B, ...)``.
    """
    elements = (
        jnp.concatenate([jnp.ones_like(factors[:1]), factors]),
        jax.tree.map(lambda one, all_: jnp.concatenate([one[None], all_]), first, sums),
    )
    _, scanned = jax.lax.associative_scan(combine, elements)
    return jax.tree.map(lambda x: x[:-1], scanned), jax.tree.map(lambda x: x[-1], scanned)


def exclusive_reverse(factors: jax.Array, sums: Sums, last: Sums) -> tuple[Sums, Sums]:
    """Scans from the last block to the first, for cotangents.

    Returns:
      What enters every block from later ones, and what leaves the first block.
    """
    flip = lambda tree: jax.tree.map(lambda x: x[::-1], tree)  # noqa: E731
    entering, leaving = exclusive(flip(factors), flip(sums), last)
    return flip(entering), leaving


def fold(sums: Sums) -> Sums:
    """Reshapes ``(blocks, B, ...)`` to ``(B * blocks, ...)``, like ``sweep.split_blocks``."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), sums)


def unfold(sums: Any, blocks: Size) -> Any:
    """Undoes ``fold``."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, blocks, *x.shape[1:]), 1, 0), sums)
