"""Streaming over segments that are read from the host, by a loop in Python.

Two programs are compiled, one for a segment forward and one for a segment backward. The loop waits
for a step when the next one is on its way, so the device always has work, and never a long queue.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.streaming import step
from race_jax.streaming.segments import read_ahead
from race_jax.streaming.step import Step, ValueAndGrad

Progress = Callable[[int, int], object]
_is_finite = jax.jit(step.is_finite)


def host_fold(
    f: Step,
    *,
    place: Callable[[Any], Any] = jax.device_put,
    progress: Progress | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """Returns a function that reads a sequence from the host, segment by segment.

    ``state_i, sums_i = f(params, state_{i-1}, segment_i)``, and the sums are added.

    Args:
      f: as in `fold`. It is compiled once for each shape of segment.
      place: as in `host_value_and_grad`.
      progress: as in `host_value_and_grad`.

    Returns:
      A function ``(params, state, segments) -> (state, sums)``, as that of `fold`. The sums are
      NumPy numbers in float64, or int64 for integers.

    Raises:
      ValueError: there are no segments.
      TypeError: as `fold`.
      FloatingPointError: the sums of a segment are not finite; the message names the segment.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from race_jax import streaming
      >>> f = lambda scale, last, x: (x[:, -1], (scale * x).sum())
      >>> segments = streaming.Segments(np.arange(10.0)[None], segment_length=4)
      >>> state, total = streaming.host_fold(f)(2.0, jnp.zeros(1), segments)
      >>> float(state[0]), float(total)
      (9.0, 90.0)

    Source: beyond the paper.
    """
    forward = jax.jit(functools.partial(step.advance, f))

    def run(params: Any, state: Any, segments: Any) -> tuple[Any, Any]:
        params, state = jax.tree.map(jnp.asarray, (params, state))
        return fold_by(forward, params, state, segments, place, progress)

    return run


def fold_by(
    program: Callable[..., tuple[Any, Any]],
    params: Any,
    state: Any,
    segments: Any,
    place: Callable[[Any], Any] = jax.device_put,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Reads a sequence as `host_fold` does, by the program of one segment, as `step.advance`."""
    walk = _Walk(segments, [*range(len(segments))], place, progress)
    for segment in walk:
        state, sums = program(params, state, segment)
        walk.computed(sums)
    return state, walk.totals()


def host_value_and_grad(
    f: Step,
    *,
    truncated: bool = False,
    group_size: int | None = None,
    states_on_host: bool = False,
    place: Callable[[Any], Any] = jax.device_put,
    progress: Progress | None = None,
) -> Callable[..., ValueAndGrad]:
    """Returns a function for the sums over segments that are read from the host, and the gradient.

    It computes what `value_and_grad` does, in the same order, by a loop in Python. A thread reads
    the next segment while the present one is computed. Segments are read up to three times, and
    must be the same each time.

    Args:
      f: as in `value_and_grad`. Its forward and its backward pass are compiled once for each shape
        of segment.
      truncated: as in `value_and_grad`.
      group_size: as in `value_and_grad`.
      states_on_host: whether the states at the borders of groups are kept in the memory of the
        host.
      place: puts a segment of NumPy arrays on devices, before the step that needs it is started.
      progress: called with the number of segments that have been computed and with their number in
        all passes together.

    Returns:
      A function ``(params, state, segments, d_state=None) -> ValueAndGrad``. ``segments`` has a
      length and is indexed from 0; `Segments` and lists are examples. The sums are NumPy numbers in
      float64, or int64 for integers.

    Raises:
      ValueError: as `value_and_grad`; or there are no segments; or a segment differs from what was
        read before.
      TypeError: as `value_and_grad`.
      FloatingPointError: the state after a segment, or its sums, are not finite; the message names
        the segment.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from race_jax import streaming
      >>> f = lambda scale, last, x: (x[:, -1], jnp.sum(scale * x * last[:, None]))
      >>> segments = streaming.Segments(np.arange(4.0)[None], segment_length=2)
      >>> got = streaming.host_value_and_grad(f)(2.0, jnp.ones(1), segments)
      >>> float(got.sums), float(got.d_params), float(got.d_state[0])
      (12.0, 6.0, 2.0)

    Source: as `value_and_grad`.
    """
    if group_size is not None:
        step.check_at_least_one("group_size", group_size)
    programs = Programs(
        jax.jit(functools.partial(step.next_state, f)),
        jax.jit(functools.partial(step.pull_back, f), donate_argnums=(3, 4)),
    )

    def run(params: Any, state: Any, segments: Any, d_state: Any = None) -> ValueAndGrad:
        params, state = jax.tree.map(jnp.asarray, (params, state))
        step.check_arguments(params, d_state, truncated)
        there_and_back = ThereAndBack(programs, segments, group_size, place, progress)
        grads = step.zeros(params)
        if truncated:
            sums, state, grads = there_and_back.truncated(params, state, grads)
            return step.collect(sums, state, params, grads, step.no_gradient(state))
        state = there_and_back.forward(params, state, states_on_host)
        d_floats = step.final_gradient(state, d_state)
        sums, d_floats, grads = there_and_back.backward(params, d_floats, grads)
        return step.collect(sums, state, params, grads, d_floats)

    return run


class Programs(NamedTuple):
    """The two programs of one segment.

    Attributes:
      forward: ``(params, state, segment) -> (state, finite)``, as `step.next_state`.
      backward: ``(params, state, segment, d_floats, grads) -> (state, sums, d_floats, grads)``, as
        `step.pull_back`. It may take the memory of its last two arguments.
    """

    forward: Callable[..., tuple[Any, jax.Array]]
    backward: Callable[..., tuple[Any, Any, Any, Any]]


class ThereAndBack:
    """The passes over segments that an exact, or a truncated, gradient takes.

    Args:
      programs: the programs of one segment.
      segments: something with a length that is indexed from 0.
      group_size: as in `value_and_grad`.
      place: as in `host_value_and_grad`.
      progress: as in `host_value_and_grad`.

    Raises:
      ValueError: there are no segments.
    """

    def __init__(
        self,
        programs: Programs,
        segments: Any,
        group_size: int | None = None,
        place: Callable[[Any], Any] = jax.device_put,
        progress: Progress | None = None,
    ):
        self._programs, self._segments = programs, segments
        self._groups = step.groups(len(segments), group_size)
        self._walk = lambda order: _Walk(segments, order, place, progress)
        self._kept: list[Any] = []

    def truncated(self, params: Any, state: Any, grads: Any) -> tuple[Any, Any, Any]:
        """Returns the sums, the last state and the gradient that stops at borders."""
        walk = self._walk([*range(len(self._segments))])
        for segment in walk:
            state, sums, _, grads = self._programs.backward(params, state, segment, None, grads)
            walk.computed(sums, _is_finite(state))
        return walk.totals(), state, grads

    def forward(self, params: Any, state: Any, states_on_host: bool = False) -> Any:
        """Returns the last state, and keeps those before groups."""
        order = [*range(len(self._segments))]
        for group in reversed(self._groups):
            order += [*group[:-1], *reversed(group)]
        self._steps = self._walk(order)
        for group in self._groups:
            self._kept.append(_to_host(state) if states_on_host else state)
            for _ in group:
                state = self._next_state(params, state)
        self._like = state
        return state

    def backward(self, params: Any, d_floats: Any, grads: Any) -> tuple[Any, Any, Any]:
        """Returns the sums, and the gradients of the initial state and of the parameters.

        It follows `forward`.
        """
        for group in reversed(self._groups):
            states = [jax.tree.map(_placed_like, self._kept.pop(), self._like)]
            for _ in group[:-1]:
                states.append(self._next_state(params, states[-1]))
            for _ in group:
                before = states.pop()
                _, sums, d_floats, grads = self._programs.backward(
                    params, before, next(self._steps), d_floats, grads
                )
                self._steps.computed(sums)
        return self._steps.totals(), d_floats, grads

    def _next_state(self, params: Any, state: Any) -> Any:
        state, finite = self._programs.forward(params, state, next(self._steps))
        self._steps.computed(None, finite)
        return state


class _Walk:
    """The segments of all passes, in order, and what is done after each.

    Args:
      segments: something with a length that is indexed from 0.
      order: the index of each segment to compute.
      place: puts a segment on devices.
      progress: what is told how far the walk is, or None.

    Raises:
      ValueError: there are no segments.
      TypeError: they are indexed by names.
    """

    def __init__(
        self,
        segments: Any,
        order: list[int],
        place: Callable[[Any], Any],
        progress: Progress | None,
    ):
        if isinstance(segments, Mapping):
            raise TypeError(
                "segments are indexed from 0, as those of streaming.Segments(sequence, "
                "segment_length) are, and not by names; streaming.fold and value_and_grad take a "
                "dict of arrays"
            )
        if not order:
            raise ValueError("there are no segments; a sequence must have at least one token")
        self._order, self._progress = order, progress
        self._segments = map(place, read_ahead(segments, order))
        self._sums: list[Any] = []
        self._done, self._running = 0, None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._segments)

    def computed(self, sums: Any, finite: jax.Array | None = None) -> None:
        """Takes what the segment that was just started returns, and waits for the one before it.

        Args:
          sums: the sums of the segment, or None in a pass that computes states only.
          finite: whether the state after the segment is finite, or None.
        """
        before, self._running = self._running, (sums, finite)
        if before is not None:
            self._finish(*before)

    def totals(self) -> Any:
        """Waits for the last segment, and returns the sums over all segments."""
        self._finish(*self._running)

        def total(*parts: np.ndarray) -> Any:
            return np.sum(parts, dtype=np.int64 if parts[0].dtype.kind in "iu" else np.float64)

        return jax.tree.map(total, *self._sums)

    def _finish(self, sums: Any, finite: jax.Array | None) -> None:
        index = self._order[self._done]
        if finite is not None and not np.all(np.asarray(finite)):
            raise FloatingPointError(_not_finite("numbers of the state after", index))
        if sums is not None:
            sums = jax.tree.map(np.asarray, jax.device_get(sums))
            if not all(np.isfinite(x.astype(np.float64)) for x in jax.tree.leaves(sums)):
                raise FloatingPointError(_not_finite("sums of", index, f": {sums}"))
            self._sums.append(sums)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self._order))


def _not_finite(what: str, index: int, found: str = "") -> str:
    return (
        f"the {what} segment {index} (counted from 0) are not finite{found}; look at the "
        "parameters, or at the data of that segment"
    )


def _to_host(state: Any) -> Any:
    """Copies a state to the memory of the host; keys of random numbers stay where they are."""

    def copy(x: jax.Array) -> Any:
        return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.array(x)

    return jax.tree.map(copy, state)


def _placed_like(x: Any, like: jax.Array) -> jax.Array:
    return jax.device_put(x, like.sharding if like.committed else None)
