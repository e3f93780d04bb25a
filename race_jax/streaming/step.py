"""One segment, forward and backward, and the accumulators that carry over segments.

    state, sums = f(params, state, segment)
    d_params, d_state = the gradient of (first sum, state after) with respect to (params, state)

Sums and gradients are accumulated with compensation: the rounding error of every addition is found
exactly (Knuth's two-sum) and added up beside the total. A float32 total over 10^9 tokens then has
the error of a few roundings, where a plain one would stop growing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[[Any, Any, Any], tuple[Any, Any]]  # f(params, state, segment) -> (state, sums)


class ValueAndGrad(NamedTuple):
    """What `value_and_grad` and `host_value_and_grad` return.

    Attributes:
      sums: the totals over all segments of the sums that ``f`` returned.
      state: the state after the last segment.
      d_params: the gradient with respect to the parameters, in their dtypes.
      d_state: the gradient with respect to the initial state. It has dtype float0 where the state
        does not hold floating-point numbers, as in ``jax.vjp``.
    """

    sums: Any
    state: Any
    d_params: Any
    d_state: Any


class Running(NamedTuple):
    """A running total and what was lost to rounding, two pytrees of one structure."""

    total: Any
    lost: Any


def advance(f: Step, params: Any, state: Any, segment: Any) -> tuple[Any, Any]:
    """Returns ``f(params, state, segment)``, checked: the state after it, and its sums."""
    returned = f(params, state, segment)
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(
            "f must return the state after the segment and its sums, as (state, sums); got "
            f"{jax.tree.structure(returned)}"
        )
    after, sums = returned
    _check_state(state, after)
    for path, x in jax.tree_util.tree_leaves_with_path(sums):
        if jnp.shape(x):
            raise TypeError(
                f"f must return sums that are scalars; sums{jax.tree_util.keystr(path)} has shape "
                f"{jnp.shape(x)}, so add it up inside f"
            )
    return after, jax.tree.map(jnp.asarray, sums)


def next_state(f: Step, params: Any, state: Any, segment: Any) -> tuple[Any, jax.Array]:
    """Returns the state after a segment, and whether it is finite.

    Its sums are not asked for, so the compiler leaves out what only they need.
    """
    after, _ = advance(f, params, state, segment)
    return after, is_finite(after)


def is_finite(state: Any) -> jax.Array:
    """Returns whether all floating-point numbers of a state are finite."""
    return jax.tree.reduce(jnp.logical_and, [jnp.isfinite(x).all() for x in floats(state)], True)


def pull_back(
    f: Step, params: Any, state: Any, segment: Any, d_floats: list[jax.Array] | None, grads: Running
) -> tuple[Any, Any, list[jax.Array], Running]:
    """Runs one segment forward and backward.

    Args:
      f: the step.
      params: its parameters.
      state: the state before the segment.
      segment: the segment.
      d_floats: the gradient with respect to the floating-point leaves of the state after the
        segment; None stands for zeros.
      grads: the gradient with respect to the parameters, of all segments so far.

    Returns:
      The state after the segment, its sums, the gradient with respect to the floating-point leaves
      of the state before it, and ``grads`` with this segment's part added.
    """

    def run(params: Any, before: list[jax.Array]) -> Any:
        after, sums = advance(f, params, with_floats(state, before), segment)
        return (_first(sums), floats(after)), (after, sums)

    (value, end), pull, (after, sums) = jax.vjp(run, params, floats(state), has_aux=True)
    if d_floats is None:
        d_floats = [jnp.zeros_like(x) for x in end]
    d_params, d_before = pull((jnp.ones_like(value), d_floats))
    return after, sums, d_before, add(grads, d_params)


def zeros(like: Any) -> Running:
    """Returns empty totals for arrays like these: float32, int32 or wider."""

    def zero(x: Any) -> jax.Array:
        is_integer = jnp.issubdtype(x.dtype, jnp.integer)
        wider = jnp.zeros(0, x.dtype).sum().dtype  # of integers: 32 bits or more
        dtype = wider if is_integer else jnp.promote_types(x.dtype, "float32")
        axes = jax.typeof(x).manual_axis_type.varying  # over which it differs in jax.shard_map
        return jax.lax.pcast(jnp.zeros(x.shape, dtype), tuple(axes), to="varying")

    return Running(jax.tree.map(zero, like), jax.tree.map(zero, like))


def add(running: Running, new: Any) -> Running:
    """Returns the totals with ``new`` added."""

    def error(before: jax.Array, x: jax.Array, after: jax.Array) -> jax.Array:
        added = after - before
        return (before - (after - added)) + (x - added)

    new = jax.tree.map(lambda total, x: x.astype(total.dtype), running.total, new)
    total = jax.tree.map(jnp.add, running.total, new)
    errors = jax.tree.map(error, running.total, new, total)
    return Running(total, jax.tree.map(jnp.add, running.lost, errors))


def rounded(running: Running) -> Any:
    """Returns the totals as numbers; one that is infinite stays so."""

    def number(total: jax.Array, lost: jax.Array) -> jax.Array:
        return jnp.where(jnp.isfinite(lost), total + lost, total)

    return jax.tree.map(number, running.total, running.lost)


def collect(
    sums: Any, state: Any, params: Any, grads: Running, d_floats: list[jax.Array]
) -> ValueAndGrad:
    """Returns the result, with gradients shaped like the parameters and the state."""
    d_params = jax.tree.map(lambda p, grad: grad.astype(p.dtype), params, rounded(grads))
    d_state = with_floats(state, d_floats, lambda x: np.zeros(x.shape, jax.dtypes.float0))
    return ValueAndGrad(sums, state, d_params, d_state)


def floats(tree: Any) -> list[Any]:
    """Returns the floating-point leaves, which are those that have a gradient."""
    return [x for x in jax.tree.leaves(tree) if _is_float(x)]


def with_floats(
    tree: Any, replacements: list[Any], other: Callable[[Any], Any] = lambda x: x
) -> Any:
    """Returns the tree with new floating-point leaves, and ``other`` applied to the others."""
    remaining = iter(replacements)
    return jax.tree.map(lambda x: next(remaining) if _is_float(x) else other(x), tree)


def no_gradient(state: Any) -> list[jax.Array]:
    """Returns a gradient of zeros with respect to a state."""
    return [jnp.zeros_like(x) for x in floats(state)]


def final_gradient(state: Any, d_state: Any) -> list[jax.Array]:
    """Returns the gradient that arrives at the final state, checked; None stands for zeros."""
    if d_state is None:
        return no_gradient(state)
    want, given = floats(state), floats(d_state)
    if [x.shape for x in want] != [np.shape(x) for x in given]:
        raise ValueError(
            "d_state must be like the state, with floating-point leaves of shapes "
            f"{[x.shape for x in want]}; got {[np.shape(x) for x in given]}"
        )
    return [jnp.array(x, like.dtype) for x, like in zip(given, want, strict=True)]


def groups(count: int, group_size: int | None) -> list[range]:
    """Returns the segments of each group; None stands for groups of about sqrt(count)."""
    size = group_size or max(1, math.isqrt(max(0, count - 1)) + 1)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def check_arguments(params: Any, d_state: Any, truncated: bool) -> None:
    """Raises if the parameters have no gradient, or a truncated one should start at the end."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not _is_float(x):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {x.dtype}, which has no gradient; "
                "let f take it from outside, or carry it in the state"
            )
    if truncated and d_state is not None:
        raise ValueError(
            "d_state has no meaning with truncated=True, where no gradient crosses a border; leave "
            "it out"
        )


def check_at_least_one(name: str, value: Any) -> None:
    """Raises unless an option is an integer of at least 1."""
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def common_length(sequence: Any, axis: int) -> int:
    """Returns the length of all arrays of a sequence along the axis of time."""
    leaves = jax.tree_util.tree_leaves_with_path(sequence)
    names = [f"sequence{jax.tree_util.keystr(path)}" for path, _ in leaves]
    for name, (_, x) in zip(names, leaves, strict=True):
        if not 0 <= axis < x.ndim:
            raise ValueError(
                f"{name} has shape {x.shape} and no axis {axis}; axis= says which one is time"
            )
    lengths = {name: x.shape[axis] for name, (_, x) in zip(names, leaves, strict=True)}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items()) or "no arrays"
        raise ValueError(
            f"the arrays of a sequence must have one length along axis {axis}; got {found}"
        )
    return next(iter(lengths.values()))


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _first(sums: Any) -> jax.Array:
    """Returns the sum that is differentiated."""
    value = sums[0] if isinstance(sums, tuple) else sums
    if not isinstance(value, jax.Array) or not _is_float(value):
        raise TypeError(
            "f must return, as its sums, the floating-point scalar to differentiate, or a tuple "
            f"that starts with it, such as (nats, weight); got {sums}"
        )
    return value


def _check_state(before: Any, after: Any) -> None:
    """Raises unless the state is one that can be carried."""
    kinds = [jax.tree.structure(before), jax.tree.structure(after)]
    if kinds[0] != kinds[1]:
        raise TypeError(
            f"f must return a state like the one it is given, {kinds[0]}; got {kinds[1]}"
        )
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(before)]
    pairs = zip(paths, jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    for path, x, y in pairs:
        old, new = (f"{z.dtype}{list(z.shape)}" for z in map(jnp.asarray, (x, y)))
        if old != new:
            raise TypeError(
                f"f must return a state like the one it is given; state{path} was {old} and became "
                f"{new}"
            )
