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

from race_jax.core import dispatch
from race_jax.core.dispatch import BY_PLATFORM, PALLAS_ASKED, Choice, kernels
from race_jax.core.xla import bidirectional, causal
from race_jax.core.xla.chunk import Sums
from race_jax.core.xla.sweep import Tiling

# A CPU is fastest with small chunks one after the other, a GPU or TPU with all blocks at once.
CAUSAL_CPU = Tiling(chunk=32, parallel=False)
CAUSAL_WIDE = Tiling(chunk=128, parallel=True)
BIDIRECTIONAL_CPU = Tiling(chunk=128, parallel=False)
BIDIRECTIONAL_WIDE = Tiling(chunk=128, parallel=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static arguments of a differentiable function.

    Attributes:
      choice: the implementation to run.
      hash_shape: (L, P), which the shape of a flat z does not tell.
      precision: JAX's setting `jax_default_matmul_precision` when the function was called. The
        gradient uses it too, even if it is traced after the setting has changed.
    """

    choice: Choice
    hash_shape: tuple[int, int]
    precision: str | None = dataclasses.field(
        default_factory=lambda: jax.config.jax_default_matmul_precision
    )

    @property
    def kernel_options(self) -> dict[str, Any]:
        exact = dispatch.exact_products(self.precision)
        return {"hash_shape": self.hash_shape, "exact": exact}

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
        d_z = d_z.reshape(*like.shape[:3], 1, -1)
        return jnp.pad(d_z, [(0, 0)] * 4 + [(0, like.shape[4] - d_z.shape[4])])


def _by_platform(plan: Plan, xla: Callable, tilings: tuple[Tiling, Tiling], pallas: Callable):
    """Returns f(*arrays) for a plan, dispatched by platform at lowering."""
    cpu, wide = (functools.partial(xla, tiling=tiling) for tiling in tilings)
    pallas = functools.partial(pallas, plan)
    if plan.choice is PALLAS_ASKED:
        return pallas
    branches = {"cuda": pallas} if plan.choice is BY_PLATFORM else {}
    return lambda *arrays: jax.lax.platform_dependent(*arrays, **branches, cpu=cpu, default=wide)


def _backward(plan: Plan, backward: Callable) -> Callable:
    """Returns a function for XLA's gradients of the operands, with z in the shape given."""

    def run(operands, *rest, tiling):
        return plan.flat(backward(plan.logical(operands), *rest, tiling=tiling), operands)

    return run


# The custom_vjp is outside and platform_dependent is inside each of its two rules. In the opposite
# order, the residuals of all branches would be saved. Every branch must therefore save residuals of
# the same shapes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_causal(plan: Plan, operands: causal.Operands) -> tuple[jax.Array, Sums]:
    """Computes causal attention: the output ``(B, T, N, V)`` and the final sums."""
    return _causal_forward(plan, operands)[0]


def _causal_forward(plan: Plan, operands: causal.Operands):
    batch, length, kv_heads = operands.value.shape[:3]
    blocks = causal.block_count(length)
    if plan.choice.implementation != "xla":
        blocks = kernels().split_count(length, batch * kv_heads)

    def xla(operands, *, tiling):
        return causal.forward(plan.logical(operands), blocks=blocks, tiling=tiling)

    run = _by_platform(plan, xla, (CAUSAL_CPU, CAUSAL_WIDE), _pallas_causal_forward)
    with jax.named_scope("race_attention/causal"):
        out, final, starts = run(operands)
    return (out, final), (operands, final, starts)


def _causal_backward(plan: Plan, residuals: tuple, cotangents: tuple):
    def xla(operands, final, starts, *cotangents, tiling):
        del final
        return causal.backward(operands, starts, *cotangents, tiling=tiling)

    xla = _backward(plan, xla)
    run = _by_platform(plan, xla, (CAUSAL_CPU, CAUSAL_WIDE), _pallas_causal_backward)
    with _backward_scope("causal", plan):
        return (run(*residuals, *cotangents),)


run_causal.defvjp(_causal_forward, _causal_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_bidirectional(plan: Plan, operands: bidirectional.Operands) -> tuple[jax.Array, Sums]:
    """Computes bidirectional attention: the output ``(B, T, N, V)`` and the total sums."""
    return _bidirectional_forward(plan, operands)[0]


def _bidirectional_forward(plan: Plan, operands: bidirectional.Operands):
    def xla(operands, *, tiling):
        return bidirectional.forward(plan.logical(operands), tiling=tiling)

    tilings = BIDIRECTIONAL_CPU, BIDIRECTIONAL_WIDE
    run = _by_platform(plan, xla, tilings, _pallas_bidirectional_forward)
    with jax.named_scope("race_attention/bidirectional"):
        out, totals = run(operands)
    return (out, totals), (operands, totals)


def _bidirectional_backward(plan: Plan, residuals: tuple, cotangents: tuple):
    xla, tilings = _backward(plan, bidirectional.backward), (BIDIRECTIONAL_CPU, BIDIRECTIONAL_WIDE)
    run = _by_platform(plan, xla, tilings, _pallas_bidirectional_backward)
    with _backward_scope("bidirectional", plan):
        return (run(*residuals, *cotangents),)


run_bidirectional.defvjp(_bidirectional_forward, _bidirectional_backward)


@contextlib.contextmanager
def _backward_scope(form: str, plan: Plan):
    with (
        jax.named_scope(f"race_attention/{form}_backward"),
        jax.default_matmul_precision(plan.precision),
    ):
        yield


def _pallas_causal_forward(plan: Plan, operands: causal.Operands) -> tuple[jax.Array, Sums, Sums]:
    out, numerator, mass, *starts = kernels().causal_forward(
        *_kernel_arguments(operands), **plan.kernel_options
    )
    return out, Sums(numerator, mass), Sums(*starts)


def _pallas_causal_backward(
    plan: Plan,
    operands: causal.Operands,
    final: Sums,
    starts: Sums,
    d_out: jax.Array,
    d_final: Sums,
) -> causal.Operands:
    arguments = *_kernel_arguments(operands), *final, *starts, d_out, *d_final
    d_z_q, d_z_k, d_value, d_sharpness, d_log_decay, d_numerator, d_mass = (
        kernels().causal_backward(*arguments, **plan.kernel_options)
    )
    return causal.Operands(
        z_q=d_z_q.astype(operands.z_q.dtype),
        z_k=d_z_k.astype(operands.z_k.dtype),
        value=d_value.astype(operands.value.dtype),
        sharpness=d_sharpness,
        log_decay=d_log_decay,
        mask=None,
        segment=None,
        sums=Sums(d_numerator, d_mass),
        initial_segment=None,
    )


def _kernel_arguments(operands: causal.Operands) -> tuple:
    """Returns the arguments of the kernels.

    z is cast to the values' dtype, which halves its traffic in bfloat16.
    """
    dtype = operands.value.dtype
    return (
        operands.z_q.astype(dtype),
        operands.z_k.astype(dtype),
        operands.value,
        operands.sharpness,
        operands.log_decay,
        operands.mask,
        operands.segment,
        *operands.sums,
        operands.initial_segment,
    )


def _pallas_bidirectional_forward(
    plan: Plan, operands: bidirectional.Operands
) -> tuple[jax.Array, Sums]:
    z_q, z_k, value, sharpness, mask, sums = operands
    out, *totals = kernels().bidirectional_forward(
        z_q.astype(value.dtype),
        z_k.astype(value.dtype),
        value,
        sharpness,
        mask,
        *sums,
        **plan.kernel_options,
    )
    return out, Sums(*totals)


def _pallas_bidirectional_backward(
    plan: Plan, operands: bidirectional.Operands, totals: Sums, d_out: jax.Array, d_totals: Sums
) -> bidirectional.Operands:
    z_q, z_k, value, sharpness, mask, sums = operands
    d_z_q, d_z_k, d_value, d_sharpness, *d_sums = kernels().bidirectional_backward(
        z_q.astype(value.dtype),
        z_k.astype(value.dtype),
        value,
        sharpness,
        mask,
        *sums,
        *totals,
        d_out,
        *d_totals,
        **plan.kernel_options,
    )
    return bidirectional.Operands(
        d_z_q.astype(z_q.dtype), d_z_k.astype(z_k.dtype), d_value, d_sharpness, None, Sums(*d_sums)
    )
