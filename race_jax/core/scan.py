"""How table sums of adjoining spans combine: the one scan of the project.

A span of tokens has a factor a in [0, 1], its total decay, and sums X that it adds. Two adjoining
spans make one:

    (a1, X1) then (a2, X2)  =  (a1 a2, a2 X1 + X2)

The operation is associative. Blocks of a sequence, splits of a GPU kernel and the stretches of
several devices are all combined here. X is any pytree: the sums of keys and values, or, backwards
in time, the adjoints of those sums.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core.shapes import Axis, Size

SPANS = 2  # the axis of the spans: factors are (B, K, spans), and leaves of X (B, K, spans, ...)


def combine(earlier: tuple[jax.Array, Any], later: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    """Returns the factor and the sums of two adjoining spans.

    Args:
      earlier: the factor ``(B, K, ...)`` of the first span, and its sums, whose leaves start with
        the axes of the factor.
      later: the same of the span that follows.
    """
    (factor_1, sums_1), (factor_2, sums_2) = earlier, later
    add = lambda one, two: _scale(factor_2, one) + two  # noqa: E731
    return factor_1 * factor_2, jax.tree.map(add, sums_1, sums_2)


def span_factors(
    log_decay: jax.Array | None,
    segment: jax.Array | None,
    initial_segment: jax.Array,
    *,
    count: Size,
    size: Size,
    like: jax.Array,
) -> jax.Array:
    """Returns the factors ``(B, K, count)`` of spans of ``size`` tokens.

        a = exp(sum of log_decay in the span), or 0 if the segment changes in the span

    Args:
      log_decay: ``(B, T, K)``, zero in padded slots, or None.
      segment: ``(B, T)``, with the ids of padded slots filled in, or None.
      initial_segment: ``(B,)``, the segment of the token before the first one.
      count: the number of spans. The last one may reach past T.
      size: the number of tokens in a span.
      like: ``(B, K, ...)``, an array with the dtype and the mesh axes of the factors.
    """
    factors = jnp.ones_like(like, shape=(*like.shape[:2], count))
    if log_decay is not None:
        batch, length, kv_heads = log_decay.shape
        padded = jnp.pad(log_decay, ((0, 0), (0, count * size - length), (0, 0)))
        total = padded.reshape(batch, count, size, kv_heads).sum(axis=2)
        factors = factors * jnp.exp(jnp.moveaxis(total, 1, 2))
    if segment is not None:
        last = jnp.minimum(jnp.arange(1, count + 1) * size, segment.shape[1]) - 1
        leaving = segment[:, last]
        entering = jnp.concatenate([initial_segment[:, None], leaving[:, :-1]], axis=1)
        factors = jnp.where((entering == leaving)[:, None], factors, 0.0)
    return factors


def exclusive(
    factors: jax.Array,
    sums: Any,
    first: Any,
    *,
    reverse: bool = False,
    by: str = "scan",
    axis_name: Axis | None = None,
) -> tuple[Any, Any]:
    """Returns the sums that enter every span, and those that leave the last one.

        X_0 = first,   X_{j+1} = a_j X_j + sums_j

    Args:
      factors: ``(B, K, spans)``.
      sums: leaves ``(B, K, spans, ...)``, what every span adds by itself.
      first: leaves ``(B, K, ...)``, what enters the first span.
      reverse: whether time runs backwards, as for adjoints. ``first`` then enters the last span,
        and what leaves the first span is returned.
      by: ``"scan"``, an associative scan, or ``"product"``, one product with the matrix of the
        decay between any two spans, as the GPU kernels use it.
      axis_name: the mesh axis over whose devices the sequence is split, inside ``jax.shard_map``.
        Every device gives the spans of its own stretch, and what its own ``first`` adds to what
        the stretches before it send. The stretches' totals are gathered, and nothing else.

    Returns:
      Leaves ``(B, K, spans, ...)`` and leaves ``(B, K, ...)``.
    """
    run = {"scan": _by_scan, "product": _by_product}[by]
    if axis_name is not None:
        own = factors.prod(axis=SPANS), run(factors, sums, first, reverse)[1]
        sent = _from_other_devices(*own, first, reverse, axis_name)
        first = jax.tree.map(jnp.add, first, sent)
    return run(factors, sums, first, reverse)


def total(sums: Any, first: Any, *, axis_name: Axis | None = None) -> Any:
    """Returns ``first + sums``, added over the devices of a mesh axis if it is given."""
    whole = jax.tree.map(jnp.add, first, sums)
    if axis_name is None:
        return whole
    # The result is marked as varying over the axis, as all arrays of the pass are.
    summed = jax.lax.psum(whole, axis_name)
    return jax.tree.map(lambda x: jax.lax.pcast(x, axis_name, to="varying"), summed)


def _from_other_devices(
    factor: jax.Array, total: Any, first: Any, reverse: bool, axis_name: Axis
) -> Any:
    """Returns the sums that the other devices' stretches send to this one.

    The stretch of this device has the ``factor``, and ``total`` leaves it.
    """
    gather = lambda x: jax.lax.all_gather(x, axis_name, axis=SPANS)  # noqa: E731
    factors, sums = jax.tree.map(gather, (factor, total))
    entering, _ = _by_scan(factors, sums, jax.tree.map(jnp.zeros_like, first), reverse)
    index = jax.lax.axis_index(axis_name)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, SPANS, False), entering)


def _by_scan(factors: jax.Array, sums: Any, first: Any, reverse: bool) -> tuple[Any, Any]:
    flip = lambda tree: jax.tree.map(lambda x: jnp.flip(x, SPANS), tree)  # noqa: E731
    if reverse:
        factors, sums = flip((factors, sums))
    elements = (
        jnp.concatenate([jnp.ones_like(factors[:, :, :1]), factors], axis=SPANS),
        jax.tree.map(
            lambda one, all_: jnp.concatenate([one[:, :, None], all_], axis=SPANS), first, sums
        ),
    )
    _, scanned = jax.lax.associative_scan(combine, elements, axis=SPANS)
    entering = jax.tree.map(lambda x: x[:, :, :-1], scanned)
    leaving = jax.tree.map(lambda x: x[:, :, -1], scanned)
    return (flip(entering) if reverse else entering), leaving


def _by_product(factors: jax.Array, sums: Any, first: Any, reverse: bool) -> tuple[Any, Any]:
    weights = _between(factors)
    if reverse:
        # Adjoints take the transposed matrix, and `first` stands at the end of time.
        weights = weights.swapaxes(2, 3)
        enter, leave, own, given = slice(1, None), slice(0, 1), slice(0, -1), slice(-1, None)
    else:
        enter, leave, own, given = slice(0, -1), slice(-1, None), slice(1, None), slice(0, 1)

    def rows(row: slice) -> Any:
        def mixed(x: jax.Array, one: jax.Array) -> jax.Array:
            given_rows = _scale(weights[:, :, row, given][..., 0], one[:, :, None])
            return _mix(weights[:, :, row, own], x) + given_rows

        return jax.tree.map(mixed, sums, first)

    return rows(enter), jax.tree.map(lambda x: x[:, :, 0], rows(leave))


def _between(factors: jax.Array) -> jax.Array:
    """Returns ``(B, K, spans + 1, spans + 1)``: the decay from state j to state s, 0 if s < j.

    State j stands before span j. Every entry is a product of the factors between the two states
    only, so that it keeps its digits however long the sequence is.
    """
    states = jnp.arange(factors.shape[SPANS] + 1)
    steps = jnp.pad(factors, ((0, 0), (0, 0), (1, 0)), constant_values=1.0)
    later = states[:, None] > states
    products = jnp.cumprod(jnp.where(later, steps[..., None], 1.0), axis=2)
    return jnp.where(states[:, None] >= states, products, 0.0)


def _mix(weights: jax.Array, x: jax.Array) -> jax.Array:
    flat = x.reshape(*x.shape[:3], -1)
    mixed = jnp.matmul(weights, flat, precision=jax.lax.Precision.HIGHEST)
    return mixed.reshape(*mixed.shape[:3], *x.shape[3:])


def _scale(factor: jax.Array, x: jax.Array) -> jax.Array:
    return factor.reshape(*factor.shape, *(1,) * (x.ndim - factor.ndim)) * x
