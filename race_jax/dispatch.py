"""Which implementation runs, and the differentiable functions that run it.

Comes in: checked operands and an implementation's name. Goes out: outputs and final sums, with the
written-out gradient of aggregate/ or of the Pallas kernels.

Between platforms it is decided when a computation is lowered (``lax.platform_dependent``), where it
is known what it will run on, and never when a module is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.aggregate import bidirectional, causal
from race_jax.aggregate.chunk import Sums
from race_jax.aggregate.sweep import Tiling

IMPLEMENTATIONS = (None, "xla", "pallas")

# One core likes small chunks one after the other, a wide machine all blocks at once.
CAUSAL_CPU = Tiling(chunk=32, parallel=False)
CAUSAL_WIDE = Tiling(chunk=128, parallel=True)
BIDIRECTIONAL_CPU = Tiling(chunk=128, parallel=False)
BIDIRECTIONAL_WIDE = Tiling(chunk=128, parallel=True)

# Below so many tokens XLA overtakes the kernels in float32: it takes TF32 products, they six
# bfloat16 ones (docs/kernels.md). In bfloat16 the kernels were faster at every length measured.
FLOAT32_KERNELS_FROM = 2048

_log = logging.getLogger("race_jax")


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
      implementation: ``"xla"``, ``"pallas"``, or ``"pallas on cuda, xla elsewhere"``.
      reason: one sentence.
    """

    implementation: str
    reason: str


XLA_ASKED = Choice("xla", "implementation='xla' was asked for")
PALLAS_ASKED = Choice("pallas", "implementation='pallas' was asked for and the kernels support it")
BY_PLATFORM = Choice(
    "pallas on cuda, xla elsewhere",
    "implementation=None: the kernels support this call, and run wherever it is lowered for CUDA",
)
SHORT_FLOAT32 = Choice(
    "xla",
    f"the kernels are no faster than XLA in float32 below {FLOAT32_KERNELS_FROM} tokens",
)


def choose(
    z_q: jax.Array | jax.ShapeDtypeStruct,
    z_k: jax.Array | jax.ShapeDtypeStruct,
    value: jax.Array | jax.ShapeDtypeStruct,
    *,
    is_causal: bool,
    packed: bool,
    normalization: str,
    implementation: str | None,
) -> Choice:
    """Decides from static facts: shapes, dtypes, versions and the devices of this host.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: ``"pallas"`` for a call that the kernels do not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "xla":
        return XLA_ASKED
    reason = _limit(z_q, z_k, value, is_causal, packed, normalization)
    if implementation == "pallas":
        if reason:
            raise NotImplementedError(f"{reason}; pass implementation='xla' or None")
        return PALLAS_ASKED
    if reason is None:
        short = value.shape[1] < FLOAT32_KERNELS_FROM and value.dtype == jnp.float32
        return SHORT_FLOAT32 if short else BY_PLATFORM
    if has_cuda():
        _say_once(f"{reason}; using XLA")
    return Choice("xla", reason)


def _limit(
    z_q: Any, z_k: Any, value: Any, is_causal: bool, packed: bool, normalization: str
) -> str | None:
    if normalization != "global":
        return f"the RACE kernels have normalization='global' only, got {normalization!r}"
    if packed and not is_causal:
        return "the RACE kernels take segment_ids with is_causal=True only"
    if not has_cuda():  # without one the kernels are not even imported
        return "the RACE kernels run on CUDA devices, and this host has none"
    return _kernels().supports(z_q, z_k, value, is_causal=is_causal)


def explain(
    query: Any,
    key: Any,
    value: Any,
    planes: Any,
    *,
    is_causal: bool = False,
    segment_ids: Any = None,
    normalization: str = "global",
    implementation: str | None = None,
    **others: Any,
) -> Choice:
    """Says which implementation ``race_attention`` would run for these arguments, and why.

    Args:
      query: ``(B, T, N, H)``; arrays or ``jax.ShapeDtypeStruct``, here and below.
      key: ``(B, S, K, H)``.
      value: ``(B, S, K, V)``.
      planes: ``(L, P, H)`` or ``(K, L, P, H)``.
      is_causal: as for ``race_attention``.
      segment_ids: as for ``race_attention``.
      normalization: as for ``race_attention``.
      implementation: as for ``race_attention``.
      **others: further arguments of ``race_attention``; they do not change the choice.

    Returns:
      A ``Choice`` with the fields ``implementation`` and ``reason``.

    Raises:
      ValueError: an unknown implementation.
      NotImplementedError: ``"pallas"`` where the kernels do not support the call.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> x, planes = jnp.zeros((1, 8, 2, 16)), jnp.zeros((4, 3, 16))
      >>> race_jax.dispatch.explain(x, x, x, planes, implementation="xla").reason
      "implementation='xla' was asked for"

    Source: beyond the paper.
    """
    del others
    tables = tuple(planes.shape[-3:-1])
    shape = lambda x: jax.ShapeDtypeStruct((*x.shape[:3], *tables), jnp.float32)  # noqa: E731
    return choose(
        shape(query),
        shape(key),
        jax.ShapeDtypeStruct(value.shape, value.dtype),
        is_causal=is_causal,
        packed=segment_ids is not None,
        normalization=normalization,
        implementation=implementation,
    )


def has_cuda() -> bool:
    """Whether JAX has a CUDA device here, or compiles for an abstract one."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract.platform in ("cuda", "gpu")
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:  # JAX's word for "no such platform here"
        return False


@functools.cache
def _say_once(sentence: str) -> None:
    _log.warning(sentence)


def _kernels() -> ModuleType:
    """The kernel package, loaded only when a call asks for it."""
    import pallas_kernels

    return pallas_kernels


def _by_platform(choice: Choice, xla: Callable, tilings: tuple[Tiling, Tiling], pallas: Callable):
    """The function that runs for a choice, of the arrays alone."""
    cpu, wide = (functools.partial(xla, tiling=tiling) for tiling in tilings)
    if choice is PALLAS_ASKED:
        return pallas
    branches = {"cuda": pallas} if choice is BY_PLATFORM else {}
    return lambda *arrays: jax.lax.platform_dependent(*arrays, **branches, cpu=cpu, default=wide)


# custom_vjp outside and platform_dependent inside its two rules: the other way round, the residuals
# would be the union of all branches'. So every branch saves residuals of the same shapes.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_causal(choice: Choice, operands: causal.Operands) -> tuple[jax.Array, Sums]:
    """Causal attention: the output ``(B, T, N, V)`` and the final sums."""
    return _causal_forward(choice, operands)[0]


def _causal_forward(choice: Choice, operands: causal.Operands):
    batch, length, kv_heads = operands.value.shape[:3]
    blocks = causal.block_count(length)
    if choice.implementation != "xla":
        blocks = _kernels().split_count(length, batch * kv_heads)
    xla = functools.partial(causal.forward, blocks=blocks)
    run = _by_platform(choice, xla, (CAUSAL_CPU, CAUSAL_WIDE), _pallas_causal_forward)
    with jax.named_scope("race_attention/causal"):
        out, final, starts = run(operands)
    return (out, final), (operands, starts)


def _causal_backward(choice: Choice, residuals: tuple, cotangents: tuple):
    run = _by_platform(choice, causal.backward, (CAUSAL_CPU, CAUSAL_WIDE), _pallas_causal_backward)
    with jax.named_scope("race_attention/causal_backward"):
        return (run(*residuals, *cotangents),)


run_causal.defvjp(_causal_forward, _causal_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_bidirectional(choice: Choice, operands: bidirectional.Operands) -> tuple[jax.Array, Sums]:
    """Bidirectional attention: the output ``(B, T, N, V)`` and the total sums."""
    return _bidirectional_forward(choice, operands)[0]


def _bidirectional_forward(choice: Choice, operands: bidirectional.Operands):
    run = _by_platform(
        choice,
        bidirectional.forward,
        (BIDIRECTIONAL_CPU, BIDIRECTIONAL_WIDE),
        _pallas_bidirectional_forward,
    )
    with jax.named_scope("race_attention/bidirectional"):
        out, totals = run(operands)
    return (out, totals), (operands, totals)


def _bidirectional_backward(choice: Choice, residuals: tuple, cotangents: tuple):
    run = _by_platform(
        choice,
        bidirectional.backward,
        (BIDIRECTIONAL_CPU, BIDIRECTIONAL_WIDE),
        _pallas_bidirectional_backward,
    )
    with jax.named_scope("race_attention/bidirectional_backward"):
        return (run(*residuals, *cotangents),)


run_bidirectional.defvjp(_bidirectional_forward, _bidirectional_backward)


def _pallas_causal_forward(operands: causal.Operands) -> tuple[jax.Array, Sums, Sums]:
    out, numerator, mass, *starts = _kernels().causal_forward(*_kernel_arguments(operands))
    return out, Sums(numerator, mass), Sums(*starts)


def _pallas_causal_backward(
    operands: causal.Operands, starts: Sums, d_out: jax.Array, d_final: Sums
) -> causal.Operands:
    arguments = _kernel_arguments(operands)
    d_z_q, d_z_k, d_value, d_sharpness, d_log_decay, d_numerator, d_mass = (
        _kernels().causal_backward(*arguments, *starts, d_out, *d_final)
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
    """The kernels' order of arguments; z in the values' dtype, which halves its traffic in bf16."""
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


def _pallas_bidirectional_forward(operands: bidirectional.Operands) -> tuple[jax.Array, Sums]:
    z_q, z_k, value, sharpness, mask, sums = operands
    out, *totals = _kernels().bidirectional_forward(
        z_q.astype(value.dtype), z_k.astype(value.dtype), value, sharpness, mask, *sums
    )
    return out, Sums(*totals)


def _pallas_bidirectional_backward(
    operands: bidirectional.Operands, totals: Sums, d_out: jax.Array, d_totals: Sums
) -> bidirectional.Operands:
    z_q, z_k, value, sharpness, mask, sums = operands
    d_z_q, d_z_k, d_value, d_sharpness, *d_sums = _kernels().bidirectional_backward(
        z_q.astype(value.dtype),
        z_k.astype(value.dtype),
        value,
        sharpness,
        mask,
        *sums,
        *totals,
        d_out,
        *d_totals,
    )
    return bidirectional.Operands(
        d_z_q.astype(z_q.dtype), d_z_k.astype(z_k.dtype), d_value, d_sharpness, None, Sums(*d_sums)
    )
