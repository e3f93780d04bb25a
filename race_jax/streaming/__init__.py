"""Streaming: the exact loss and gradient over one very long sequence, segment by segment.

A sequence is cut into segments, and a state is carried from each segment to the next:

    state_i, sums_i = f(params, state_{i-1}, segment_i)        sums = sum_i sums_i

The gradient is computed from the last segment to the first. The states in between are kept in two
levels, so n segments need the memory of one segment and of about 2 sqrt(n) states. The result is
that of the whole sequence, wherever the sequence is cut.

`fold` and `value_and_grad` take arrays in memory and work under ``jax.jit``. `host_fold` and
`host_value_and_grad` read the segments one after the other, for instance from a file.

A segment here is a piece of the sequence. The ``segment_ids`` of packed documents are something
else: a row of packed documents may be cut anywhere.
"""

from race_jax.streaming.host import host_fold, host_value_and_grad
from race_jax.streaming.memory import fold, value_and_grad
from race_jax.streaming.segments import Segments
from race_jax.streaming.step import ValueAndGrad, is_finite

__all__ = [
    "Segments",
    "ValueAndGrad",
    "fold",
    "host_fold",
    "host_value_and_grad",
    "is_finite",
    "value_and_grad",
]
