"""Differentiable functions that run the chosen implementation.

They take checked operands and a `Plan`, and return outputs and final sums. Their gradients are
those of ``race_jax/core/xla`` or of the Pallas kernels. The platform is taken into account when a
computation is lowered (``lax.platform_dependent``), because only then is it known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import dispatch, passes
from race_jax.core.dispatch import BY_PLATFORM, PALLAS_ASKED, Choice, kernels
from race_jax.core.shapes import Axis, Size
from race_jax.core.xla import bidirectional, causal
from race_jax.core.xla.chunk import Sums
from race_jax.core.xla.sweep import Tiling, is_known

# A CPU is fastest with small chunks one after the other, a GPU or TPU with all blocks at once.
CAUSAL_CPU = 32  # tokens in a chunk
CAUSAL_WIDE = 128
BIDIRECTIONAL_CPU = Tiling(chunk=128, parallel=False)
BIDIRECTIONAL_WIDE = Tiling(chunk=128, parallel=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of a differentiable function.

    Attributes:
      choice: the implementation to run.
      hash_shape: (L, P), which the shape of a flat z does not tell.
      use_tanh: whether hash projections go through tanh.
      axis_name: the mesh axis over whose devices the sequence is split, or None.
      precision: JAX's setting `jax_default_matmul_precision` when the function was called. The
        gradient uses it too, even if it is traced after the setting has changed.
    """

    choice: Choice
    hash_shape: tuple[int, int]
    use_tanh: bool = True
    axis_name: Axis | None = None
    precision: str | None = dataclasses.field(
        default_factory=lambda: jax.config.jax_default_matmul_precision
    )

    @property
    def kernel_options(self) -> dict[str, Any]:
        exact = dispatch.exact_products(self.precision)
        return {"hash_shape": self.hash_shape, "use_tanh": self.use_tanh, "exact": exact}

    @property
    def columns(self) -> int | None:
        """The number of columns of a flat z, with the zeros at its end; None if z is (L, P)."""
        if self.choice.implementation == "xla":
            return None
        columns = kernels().projection_columns(*self.hash_shape)
        return None if columns == math.prod(self.hash_shape) else columns

    def logical(self, operands: Any) -> Any:
        """Returns operands with z of shape (..., L, P), as the XLA code takes them."""
        return operands._replace(z_q=self._logical(operands.z_q), z_k=self._logical(operands.z_k))

    def flat(self, gradient: Any, operands: Any) -> Any:
        """Converts the gradient of ``logical(operands)`` to that of ``operands``."""
        z_q, z_k = (
            self._flat(getattr(gradient, name), getattr(operands, name)) for name in ("z_q", "z_k")
        )
        return gradient._replace(z_q=z_q, z_k=z_k)

    def _logical(self, z: jax.Array) -> jax.Array:
        if z.shape[3:] == self.hash_shape:
            return z
        used = z[..., 0, : math.prod(self.hash_shape)]
        return used.reshape(*z.shape[:3], *self.hash_shape)

    def _flat(self, d_z: jax.Array, like: jax.Array) -> jax.Array:
        if d_z.shape == like.shape:
            return d_z
        d_z = d_z.reshape(*like.shape[:3], 1, math.prod(d_z.shape[3:]))
        return jnp.pad(d_z, [(0, 0)] * 4 + [(0, like.shape[4] - d_z.shape[4])])


def choose_plan(shapes: tuple, value: jax.Array, options: Any) -> Plan:
    """Returns the plan of a call, from the arguments of ``attention.attend``."""
    choice = dispatch.choose(
        *shapes,
        value,
        is_causal=options.is_causal,
        packed=options.segment_ids is not None,
        normalization=options.normalization,
        implementation=options.implementation,
    )
    return Plan(choice, shapes[0].shape[3:], options.use_tanh)


def _by_platform(plan: Plan, cpu: Callable, wide: Callable, pallas: Callable) -> Callable:
    """Returns f(*arrays) for a plan, dispatched by platform at lowering."""
    if plan.choice is PALLAS_ASKED:
        return pallas
    branches = {"cuda": pallas} if plan.choice is BY_PLATFORM else {}
    return lambda *arrays: jax.lax.platform_dependent(*arrays, **branches, cpu=cpu, default=wide)


# The custom_vjp is outside and platform_dependent is inside each of its two rules. In the opposite
# order, the residuals of all branches would be saved. Every branch must therefore save residuals of
# the same shapes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_causal(plan: Plan, operands: causal.Operands) -> tuple[jax.Array, Sums]:
    """Computes causal attention: the output ``(B, T, N, V)`` and the final sums."""
    return _causal_forward(plan, operands)[0]


def _causal_forward(plan: Plan, operands: causal.Operands):
    blocks = _spans(plan, operands)

    def xla(chunk, in_turn, operands):
        logical = plan.logical(operands)
        if in_turn:
            return causal.forward(logical, blocks=blocks, chunk=chunk, use_tanh=plan.use_tanh)
        steps = causal.XLASteps(operands.value.shape[1], blocks, chunk, plan.use_tanh)
        return passes.causal_forward(steps, logical, plan.axis_name)

    def pallas(operands):
        return passes.causal_forward(_kernel_steps(plan, operands), operands, plan.axis_name)

    with jax.named_scope("race_attention/causal"):
        run = _by_platform(plan, *_causal_on(plan, blocks, xla), pallas)
        out, final, starts = run(operands)
    return (out, final), (operands, final, starts)


def _causal_backward(plan: Plan, residuals: tuple, cotangents: tuple):
    blocks = residuals[2].mass.shape[2]

    def xla(chunk, in_turn, operands, final, starts, *cotangents):
        logical = plan.logical(operands)
        if in_turn:
            gradient = causal.backward(
                logical, starts, *cotangents, chunk=chunk, use_tanh=plan.use_tanh
            )
        else:
            steps = causal.XLASteps(operands.value.shape[1], blocks, chunk, plan.use_tanh)
            given = logical, final, starts, *cotangents
            gradient = passes.causal_backward(steps, *given, plan.axis_name)
        return plan.flat(gradient, operands)

    def pallas(operands, *rest):
        steps = _kernel_steps(plan, operands)
        return passes.causal_backward(steps, operands, *rest, plan.axis_name)

    with _backward_scope("causal", plan):
        run = _by_platform(plan, *_causal_on(plan, blocks, xla), pallas)
        return (run(*residuals, *cotangents),)


def _causal_on(plan: Plan, blocks: Size, xla: Callable) -> tuple[Callable, Callable]:
    """Returns the XLA code for a CPU, and for other platforms.

    Blocks run in turn on a CPU, and where there is one or their number is symbolic. If the sequence
    is split over devices, the sums must be known before the outputs, and blocks run side by side.
    """
    alone = not is_known(blocks) or blocks == 1
    cpu, wide = (plan.axis_name is None and in_turn for in_turn in (True, alone))
    return functools.partial(xla, CAUSAL_CPU, cpu), functools.partial(xla, CAUSAL_WIDE, wide)


def _spans(plan: Plan, operands: causal.Operands) -> Size:
    """Returns the number of spans whose sums are saved. It is the same on every platform."""
    if plan.choice.implementation == "xla":
        return causal.block_count(operands.value.shape[1])
    return _kernel_steps(plan, operands).count


def _kernel_steps(plan: Plan, operands: causal.Operands) -> passes.CausalSteps:
    return kernels().CausalSteps.of(operands, **plan.kernel_options)


run_causal.defvjp(_causal_forward, _causal_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_bidirectional(plan: Plan, operands: bidirectional.Operands) -> tuple[jax.Array, Sums]:
    """Computes bidirectional attention: the output ``(B, T, N, V)`` and the total sums."""
    return _bidirectional_forward(plan, operands)[0]


def _bidirectional_forward(plan: Plan, operands: bidirectional.Operands):
    def xla(tiling, operands):
        steps = bidirectional.XLASteps(tiling, plan.use_tanh)
        return passes.bidirectional_forward(steps, plan.logical(operands), plan.axis_name)

    def pallas(operands):
        steps = kernels().BidirectionalSteps(**plan.kernel_options)
        return passes.bidirectional_forward(steps, operands, plan.axis_name)

    with jax.named_scope("race_attention/bidirectional"):
        out, totals = _by_platform(plan, *_tiled(xla), pallas)(operands)
    return (out, totals), (operands, totals)


def _bidirectional_backward(plan: Plan, residuals: tuple, cotangents: tuple):
    def xla(tiling, operands, *rest):
        steps = bidirectional.XLASteps(tiling, plan.use_tanh)
        given = plan.logical(operands), *rest, plan.axis_name
        gradient = passes.bidirectional_backward(steps, *given)
        return plan.flat(gradient, operands)

    def pallas(operands, *rest):
        steps = kernels().BidirectionalSteps(**plan.kernel_options)
        return passes.bidirectional_backward(steps, operands, *rest, plan.axis_name)

    with _backward_scope("bidirectional", plan):
        return (_by_platform(plan, *_tiled(xla), pallas)(*residuals, *cotangents),)


run_bidirectional.defvjp(_bidirectional_forward, _bidirectional_backward)


def _tiled(xla: Callable) -> list[Callable]:
    return [functools.partial(xla, tiling) for tiling in (BIDIRECTIONAL_CPU, BIDIRECTIONAL_WIDE)]


@contextlib.contextmanager
def _backward_scope(form: str, plan: Plan):
    with (
        jax.named_scope(f"race_attention/{form}_backward"),
        jax.default_matmul_precision(plan.precision),
    ):
        yield
