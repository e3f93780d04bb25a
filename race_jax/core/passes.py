"""The causal pass: steps of one backend, with a scan over the state between them.

    forward    sums of every span -> scan -> outputs, from the sums that enter every span
    backward   adjoints of the sums that enter every span -> reversed scan -> gradients, from the
               adjoints of the sums that leave every span

The plain XLA code and the GPU kernels offer the same steps. A sequence that is split over devices
takes the same steps too: its scan also goes over the devices of a mesh axis, and nothing else
differs.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from race_jax.core import scan
from race_jax.core.shapes import Size
from race_jax.core.xla.causal import Operands
from race_jax.core.xla.chunk import Sums


class Steps(Protocol):
    """The steps of one backend. Each can be called alone.

    Attributes:
      count: the number of spans of the sequence. It is the axis ``spans`` below.
      size: the number of tokens in a span.
      scan_by: the way in which ``scan.exclusive`` combines the spans.
    """

    count: Size
    size: Size
    scan_by: str

    def sums(self, operands: Operands) -> Sums:
        """Returns what every span adds: ``(B, K, spans, F, V)`` and ``(B, K, spans, F)``."""

    def outputs(self, operands: Operands, starts: Sums) -> jax.Array:
        """Returns the outputs ``(B, T, N, V)``, from the sums that enter every span."""

    def adjoints(
        self, operands: Operands, starts: Sums, final: Sums, d_out: jax.Array, d_final: Sums
    ) -> tuple[Any, Any, Any]:
        """Returns the adjoints of the sums that enter every span, from its own outputs.

        Also returns ``d_final`` in the form that the adjoints have, and what ``gradients`` needs of
        this step.
        """

    def gradients(
        self,
        operands: Operands,
        starts: Sums,
        final: Sums,
        d_out: jax.Array,
        d_ends: Any,
        d_initial: Any,
        kept: Any,
    ) -> Operands:
        """Returns the cotangents of the operands.

        They follow from the adjoints of the sums that leave every span, ``d_ends``, and of those
        that enter the first, ``d_initial``.
        """


def forward(
    steps: Steps, operands: Operands, axis_name: str | None = None
) -> tuple[jax.Array, Sums, Sums]:
    """Returns the outputs, the sums after the last token, and those that enter every span."""
    starts, final = scan.exclusive(
        _factors(steps, operands),
        steps.sums(operands),
        operands.sums,
        by=steps.scan_by,
        axis_name=axis_name,
    )
    return steps.outputs(operands, starts), final, starts


def backward(
    steps: Steps,
    operands: Operands,
    final: Sums,
    starts: Sums,
    d_out: jax.Array,
    d_final: Sums,
    axis_name: str | None = None,
) -> Operands:
    """Returns the cotangents of the operands, from what ``forward`` returned."""
    adjoints, last, kept = steps.adjoints(operands, starts, final, d_out, d_final)
    d_ends, d_initial = scan.exclusive(
        _factors(steps, operands),
        adjoints,
        last,
        reverse=True,
        by=steps.scan_by,
        axis_name=axis_name,
    )
    return steps.gradients(operands, starts, final, d_out, d_ends, d_initial, kept)


def _factors(steps: Steps, operands: Operands) -> jax.Array:
    return scan.span_factors(
        operands.log_decay,
        operands.segment,
        operands.initial_segment,
        count=steps.count,
        size=steps.size,
        like=operands.sums.mass,
    )
