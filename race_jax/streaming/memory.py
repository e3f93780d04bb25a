"""Streaming over a sequence in memory, as one compiled program.

forward: a loop over groups of segments, which computes states only, and keeps those before groups
backward: a loop over groups from the last; inside one, the states before its segments are
computed again, then each segment is run once more, summed and differentiated, from the last
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.streaming import step
from race_jax.streaming.step import Running, Step, ValueAndGrad

LONGEST = 2**31 - 1  # tokens; compiled loops count in int32


def fold(f: Step, *, segment_length: int, axis: int = 1) -> Callable[..., tuple[Any, Any]]:
    """Returns a function that reads a sequence in memory, segment by segment.

    ``state_i, sums_i = f(params, state_{i-1}, segment_i)``, and the sums are added.

    It evaluates a long sequence as one context, or reads a prompt of any length, in the memory of
    one segment. For gradients use `value_and_grad`: differentiating this function would keep what
    every segment computes.

    Args:
      f: a function ``(params, state, segment) -> (state, sums)``. ``segment`` has the structure of
        the sequence. The new state has the structure, shapes and dtypes of the old one, and
        ``sums`` is a pytree of scalars.
      segment_length: the tokens of a segment, at least 1. If it does not divide the length, the
        last segment is shorter. If it is longer than the sequence, there is one segment.
      axis: the axis of time in every array of the sequence.

    Returns:
      A function ``(params, state, sequence) -> (state, sums)``. ``sequence`` is a pytree of arrays
      of equal length along ``axis``. Sums are accumulated with compensation, in float32 or, if they
      are float64, in float64. Integers stay integers, of 32 bits or more.

    Raises:
      ValueError: ``segment_length`` is below 1. In the call: the arrays have no axis of time, or
        differ in length, or are longer than 2**31 - 1.
      TypeError: in the call: ``f`` returns another kind of state, or sums that are not scalars.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from race_jax import streaming
      >>> def f(decay, state, x):  # a decaying sum of each row, (B,), over tokens (B, T)
      ...     weights = decay ** jnp.arange(x.shape[1] - 1, -1, -1)
      ...     return decay ** x.shape[1] * state + x @ weights, x.size
      >>> read = jax.jit(streaming.fold(f, segment_length=4))
      >>> state, tokens = read(0.5, jnp.zeros(1), jnp.ones((1, 10)))
      >>> print(f"{state[0]:.6f} after {tokens} tokens")
      1.998047 after 10 tokens

    Source: beyond the paper.
    """
    step.check_at_least_one("segment_length", segment_length)

    def run(params: Any, state: Any, sequence: Any) -> tuple[Any, Any]:
        params, state, sequence = jax.tree.map(jnp.asarray, (params, state, sequence))
        cut = _Cut(sequence, segment_length, axis)
        read = functools.partial(_read, f, params)
        carry = state, _no_sums(f, params, state, cut)
        if cut.full:
            carry = jax.lax.fori_loop(0, cut.full, lambda i, carry: read(cut[i], carry), carry)
        if cut.rest:
            carry = read(cut.last(), carry)
        state, sums = carry
        return state, step.rounded(sums)

    return run


def value_and_grad(
    f: Step,
    *,
    segment_length: int,
    axis: int = 1,
    truncated: bool = False,
    group_size: int | None = None,
) -> Callable[..., ValueAndGrad]:
    """Returns a function for the sums over a sequence in memory, and the gradient of the first sum.

    ``value = sum_i sums_i[0]``, with ``state_i, sums_i = f(params, state_{i-1}, segment_i)``.

    The gradient is exact: it is that of the whole sequence, through all states. Segments form
    groups. The states at the borders of groups are kept. In the backward pass the states inside one
    group are computed again, then every segment of the group is run once more and differentiated.
    So ``f`` runs three times forward and once backward, and 2 sqrt(n) states are kept. All but the
    last run are for the states: the compiler leaves out what only the sums need.

    Args:
      f: as in `fold`. ``sums`` is a scalar, or a tuple that starts with the scalar to
        differentiate, such as ``(nats, weight)``.
      segment_length: as in `fold`.
      axis: as in `fold`.
      truncated: whether the gradient stops at the borders of segments. Every segment then takes the
        state before it as a constant. ``f`` runs once forward and once backward, and no state is
        kept, but the gradient is not that of the sequence.
      group_size: the number of segments in a group; None takes about sqrt(n). With 1 the state at
        every border is kept, and ``f`` runs twice forward instead of three times.

    Returns:
      A function ``(params, state, sequence, d_state=None) -> ValueAndGrad``. ``d_state`` is the
      gradient that arrives at the final state, with its structure; None stands for zeros. No
      gradient with respect to the sequence is computed. Gradients are accumulated with compensation
      in float32, or in float64 if they are, and rounded to the dtypes of the parameters at the end.

    Raises:
      ValueError: as `fold`; or ``group_size`` is below 1; or ``d_state`` is given with
        ``truncated=True``.
      TypeError: as `fold`; or some parameters, or the first sum, are not floating-point numbers.

    Example:
      The tokens of a text are both inputs and targets. They are shifted once, for the whole text,
      and then cut alike. The last target of a segment is then the first input of the next.

      >>> import jax, jax.numpy as jnp
      >>> from race_jax import streaming
      >>> tokens = jnp.arange(10)[None] % 3
      >>> sequence = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
      >>> def f(table, count, segment):  # logits (B, T, 3) from a table (3, 3)
      ...     log_p = jax.nn.log_softmax(table[segment["inputs"]])
      ...     nats = -jnp.take_along_axis(log_p, segment["targets"][..., None], axis=-1).sum()
      ...     weight = segment["targets"].size
      ...     return count + weight, (nats, weight)
      >>> run = jax.jit(streaming.value_and_grad(f, segment_length=4))
      >>> got = run(jnp.zeros((3, 3)), 0, sequence)
      >>> nats, weight = got.sums
      >>> print(f"{nats / weight:.4f} nats a token, {jnp.log(3):.4f} expected")
      1.0986 nats a token, 1.0986 expected
      >>> (got.d_params / weight).shape
      (3, 3)

    Source: beyond the paper. Exact gradients over segments of linear attention are in Sequence
    Accumulation (Sun et al., AAAI 2025); keeping states in two levels is Chen et al. 2016.
    """
    step.check_at_least_one("segment_length", segment_length)
    if group_size is not None:
        step.check_at_least_one("group_size", group_size)

    def run(params: Any, state: Any, sequence: Any, d_state: Any = None) -> ValueAndGrad:
        params, state, sequence = jax.tree.map(jnp.asarray, (params, state, sequence))
        step.check_arguments(params, d_state, truncated)
        cut = _Cut(sequence, segment_length, axis)
        sums, grads = _no_sums(f, params, state, cut), step.zeros(params)
        if truncated:
            state, sums, grads = _in_one_pass(f, params, cut, state, sums, grads)
            d_floats = step.no_gradient(state)
        else:
            groups = step.groups(cut.full, group_size)
            d_floats = step.final_gradient(state, d_state)
            state, sums, d_floats, grads = _there_and_back(
                f, params, cut, groups, state, sums, d_floats, grads
            )
        return step.collect(step.rounded(sums), state, params, grads, d_floats)

    return run


class _Cut:
    """A sequence in memory, cut into `full` segments of one length and one that has the rest."""

    def __init__(self, sequence: Any, segment_length: int, axis: int):
        length = step.common_length(sequence, axis)
        if length > LONGEST:
            raise ValueError(
                f"a sequence in memory may have {LONGEST} tokens, got {length}; keep it on the "
                "host and take host_fold or host_value_and_grad"
            )
        self._sequence, self._segment_length, self._axis = sequence, segment_length, axis
        self.full, self.rest = divmod(length, segment_length)

    def __getitem__(self, index: jax.Array) -> Any:
        length, axis = self._segment_length, self._axis
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, index * length, length, axis),
            self._sequence,
        )

    def last(self) -> Any:
        """Returns the segment that has the rest."""
        first, axis = self.full * self._segment_length, self._axis
        return jax.tree.map(
            lambda x: jax.lax.slice_in_dim(x, first, None, axis=axis), self._sequence
        )

    def first(self) -> Any:
        """Returns a segment of the usual length, or the whole sequence if it is shorter."""
        stop = self._segment_length if self.full else self.rest
        return jax.tree.map(
            lambda x: jax.lax.slice_in_dim(x, 0, stop, axis=self._axis), self._sequence
        )


def _no_sums(f: Step, params: Any, state: Any, cut: _Cut) -> Running:
    """Returns totals of zero for the sums of ``f``."""
    return step.zeros(jax.eval_shape(lambda: step.advance(f, params, state, cut.first()))[1])


def _read(f: Step, params: Any, segment: Any, carry: tuple) -> tuple:
    """Carries a state and totals over one segment."""
    state, sums = carry
    state, new = step.advance(f, params, state, segment)
    return state, step.add(sums, new)


def _in_one_pass(f: Step, params: Any, cut: _Cut, state: Any, sums: Running, grads: Running):
    """Differentiates every segment by itself: the truncated gradient."""

    def read(segment: Any, carry: tuple) -> tuple:
        state, sums, grads = carry
        state, new, _, grads = step.pull_back(f, params, state, segment, None, grads)
        return state, step.add(sums, new), grads

    carry = state, sums, grads
    if cut.full:
        carry = jax.lax.fori_loop(0, cut.full, lambda i, carry: read(cut[i], carry), carry)
    return read(cut.last(), carry) if cut.rest else carry


def _there_and_back(
    f: Step,
    params: Any,
    cut: _Cut,
    groups: list[range],
    state: Any,
    sums: Running,
    d_floats: list[jax.Array],
    grads: Running,
) -> tuple[Any, Running, list[jax.Array], Running]:
    """The exact gradient: forward with states kept before each group, then backward.

    The sums are taken in the backward pass. So what only they need is not computed before it.
    """
    size = len(groups[0]) if groups else 0

    def bounds(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return k * size, jnp.minimum((k + 1) * size, cut.full)

    def read(i: jax.Array, state: Any) -> Any:
        return step.advance(f, params, state, cut[i])[0]

    def forward(k: jax.Array, carry: tuple) -> tuple:
        kept, state = carry
        return _put(kept, k, state), jax.lax.fori_loop(*bounds(k), read, state)

    def pull(state: Any, segment: Any, carry: tuple) -> tuple:
        sums, d_floats, grads = carry
        after, new, d_floats, grads = step.pull_back(f, params, state, segment, d_floats, grads)
        return after, (step.add(sums, new), d_floats, grads)

    def backward(k: jax.Array, kept: Any, carry: tuple) -> tuple:
        if size == 1:
            return pull(_get(kept, k), cut[k], carry)[1]
        first, stop = bounds(k)

        def again(i: jax.Array, carry: tuple) -> tuple:
            inner, state = carry
            state = read(i, state)
            return _put(inner, i + 1 - first, state), state

        def last(j: jax.Array, carry: tuple) -> tuple:
            i = stop - 1 - j
            return pull(_get(inner, i - first), cut[i], carry)[1]

        start = _get(kept, k)
        inner, _ = jax.lax.fori_loop(first, stop - 1, again, (_room(start, size), start))
        return jax.lax.fori_loop(0, stop - first, last, carry)

    carry = sums, d_floats, grads
    if groups:
        room = _room(state, len(groups))
        kept, state = jax.lax.fori_loop(0, len(groups), forward, (room, state))
    if cut.rest:
        state, carry = pull(state, cut.last(), carry)
    if groups:
        back = lambda j, carry: backward(len(groups) - 1 - j, kept, carry)  # noqa: E731
        carry = jax.lax.fori_loop(0, len(groups), back, carry)
    return state, *carry


def _room(state: Any, count: int) -> Any:
    """Returns room for that many states; the first one is there."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), state)


def _put(states: Any, index: jax.Array, state: Any) -> Any:
    def put(kept: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(kept, x, index, 0)

    return jax.tree.map(put, states, state)


def _get(states: Any, index: jax.Array) -> Any:
    def get(kept: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(kept, index, 0, keepdims=False)

    return jax.tree.map(get, states)
