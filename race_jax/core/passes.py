"""The passes of attention: steps of one backend, with the state combined between them.

                    causal                                 bidirectional
    forward         sums of every span                     sums of all keys
                    scan over the spans                    total
                    outputs, from the sums that enter      outputs, from the total
                    every span
    backward        adjoints of the sums that enter        adjoint of the total
                    every span
                    reversed scan                          total
                    gradients, from the adjoints of the    gradients, from the total adjoint
                    sums that leave every span

The plain XLA code and the GPU kernels offer the same steps. A sequence that is split over the
devices of a mesh axis takes the same steps too. The scan or the total then also goes over the
devices, and nothing else differs.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from race_jax.core import scan
from race_jax.core.shapes import Axis, Size
from race_jax.core.xla import bidirectional, causal
from race_jax.core.xla.chunk import Sums


class CausalSteps(Protocol):
    """The steps of one backend. Each can be called alone.

    Attributes:
      count: the number of spans of the sequence. It is the size of the axis ``spans`` below.
      size: the number of tokens in a span.
      scan_by: the way in which ``scan.exclusive`` combines the spans.
    """

    count: Size
    size: Size
    scan_by: str

    def sums(self, operands: causal.Operands) -> Sums:
        """Returns what every span adds: ``(B, K, spans, F, V)`` and ``(B, K, spans, F)``."""

    def outputs(self, operands: causal.Operands, starts: Sums) -> jax.Array:
        """Returns the outputs ``(B, T, N, V)``, from the sums that enter every span."""

    def adjoints(
        self, operands: causal.Operands, starts: Sums, final: Sums, d_out: jax.Array, d_final: Sums
    ) -> tuple[Any, Any, Any]:
        """Returns the adjoints of the sums that enter every span, from the span's own outputs.

        Also returns ``d_final`` in the form that the adjoints have, and what ``gradients`` needs of
        this step.
        """

    def gradients(
        self,
        operands: causal.Operands,
        starts: Sums,
        final: Sums,
        d_out: jax.Array,
        d_ends: Any,
        d_initial: Any,
        kept: Any,
    ) -> causal.Operands:
        """Returns the cotangents of the operands.

        They follow from ``d_ends``, the adjoints of the sums that leave every span, and from
        ``d_initial``, those of the sums that enter the first span.
        """


class BidirectionalSteps(Protocol):
    """The steps of one backend. Each can be called alone."""

    def sums(self, operands: bidirectional.Operands) -> Sums:
        """Returns the sums of all keys, without the initial sums."""

    def outputs(self, operands: bidirectional.Operands, totals: Sums) -> jax.Array:
        """Returns the outputs ``(B, T, N, V)``, from the total sums."""

    def adjoints(
        self, operands: bidirectional.Operands, totals: Sums, d_out: jax.Array, d_totals: Sums
    ) -> tuple[Any, Any, Any]:
        """Returns the adjoint of the totals from the outputs, and the rest as the causal step."""

    def gradients(
        self,
        operands: bidirectional.Operands,
        totals: Sums,
        d_out: jax.Array,
        d_sums: Any,
        kept: Any,
    ) -> bidirectional.Operands:
        """Returns the cotangents of the operands, from the whole adjoint of the totals."""


def causal_forward(
    steps: CausalSteps, operands: causal.Operands, axis_name: Axis | None = None
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


def causal_backward(
    steps: CausalSteps,
    operands: causal.Operands,
    final: Sums,
    starts: Sums,
    d_out: jax.Array,
    d_final: Sums,
    axis_name: Axis | None = None,
) -> causal.Operands:
    """Returns the cotangents of the operands, from what ``causal_forward`` returned."""
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


def bidirectional_forward(
    steps: BidirectionalSteps, operands: bidirectional.Operands, axis_name: Axis | None = None
) -> tuple[jax.Array, Sums]:
    """Returns the outputs and the total sums."""
    totals = scan.total(steps.sums(operands), operands.sums, axis_name=axis_name)
    return steps.outputs(operands, totals), totals


def bidirectional_backward(
    steps: BidirectionalSteps,
    operands: bidirectional.Operands,
    totals: Sums,
    d_out: jax.Array,
    d_totals: Sums,
    axis_name: Axis | None = None,
) -> bidirectional.Operands:
    """Returns the cotangents of the operands, from what ``bidirectional_forward`` returned."""
    adjoint, last, kept = steps.adjoints(operands, totals, d_out, d_totals)
    d_sums = scan.total(adjoint, last, axis_name=axis_name)
    return steps.gradients(operands, totals, d_out, d_sums, kept)


def _factors(steps: CausalSteps, operands: causal.Operands) -> jax.Array:
    return scan.span_factors(
        operands.log_decay,
        operands.segment,
        operands.initial_segment,
        count=steps.count,
        size=steps.size,
        like=operands.sums.mass,
    )
