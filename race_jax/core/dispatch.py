"""Chooses the implementation of a call, and gives the reason for the choice.

The choice depends on the shapes and dtypes of the call and on the name that the caller asks for.
It is made when a function is called, never when a module is imported. Where it depends on the
platform, ``implementations.py`` completes it at lowering.
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

IMPLEMENTATIONS = (None, "xla", "pallas")

# In float32, XLA is at least as fast as the kernels below this number of tokens and above this
# number of features (docs/kernels.md). In bfloat16 the kernels were faster at every size measured.
FLOAT32_KERNELS_FROM = 1024
FLOAT32_KERNELS_FEATURES = 64

# The values of `jax_default_matmul_precision` that ask for more than TF32 products.
EXACT_PRECISIONS = (
    "highest",
    "float32",
    "F32_F32_F32",
    "F64_F64_F64",
    "TF32_TF32_F32_X3",
    "BF16_BF16_F32_X3",
    "BF16_BF16_F32_X6",
    "BF16_BF16_F32_X9",
)

_log = logging.getLogger("race_jax")


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that runs, and the reason for it.

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
WIDE_FLOAT32 = Choice(
    "xla",
    "the kernels are no faster than XLA in float32 above "
    f"{FLOAT32_KERNELS_FEATURES} features, F = L * 2**P",
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
    """Chooses an implementation from shapes, dtypes, versions and the devices of this host.

    Raises:
      ValueError: if the implementation is unknown.
      NotImplementedError: if it is ``"pallas"`` and the kernels do not support the call.
    """
    choice = decide(
        implementation, lambda: _limit(z_q, z_k, value, is_causal, packed, normalization)
    )
    if choice is not BY_PLATFORM:
        return choice
    tables, planes = z_q.shape[3:]
    if value.dtype == jnp.float32 and tables * 2**planes > FLOAT32_KERNELS_FEATURES:
        return WIDE_FLOAT32
    short = value.dtype == jnp.float32 and value.shape[1] < FLOAT32_KERNELS_FROM
    return SHORT_FLOAT32 if short else BY_PLATFORM


def decide(implementation: str | None, limit: Callable[[], str | None]) -> Choice:
    """Chooses from what the caller asks for and what the kernels cannot do.

    Args:
      implementation: one of ``IMPLEMENTATIONS``.
      limit: returns why the kernels cannot run the call, or None. It is not asked about ``"xla"``.

    Raises:
      ValueError: if the implementation is unknown.
      NotImplementedError: if it is ``"pallas"`` and the kernels do not support the call.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "xla":
        return XLA_ASKED
    reason = limit()
    if implementation == "pallas":
        if reason:
            raise NotImplementedError(f"{reason}; pass implementation='xla' or None")
        return PALLAS_ASKED
    if reason is None:
        return BY_PLATFORM
    if has_cuda():
        _say_once(f"{reason}; using XLA")
    return Choice("xla", reason)


def by_platform(choice: Choice, xla: Callable, pallas: Callable) -> Callable:
    """Returns the function of the choice. With both, the platform decides at lowering."""
    if choice.implementation == BY_PLATFORM.implementation:
        return lambda *arrays: jax.lax.platform_dependent(*arrays, cuda=pallas, default=xla)
    return xla if choice.implementation == "xla" else pallas


def without_cuda(kind: str) -> str | None:
    """Returns why kernels of a kind cannot run if this host has no CUDA device, or None.

    The kernels need not be imported on such a host.
    """
    if has_cuda():
        return None
    return f"the {kind} kernels run on CUDA devices, and this host has none"


def _limit(
    z_q: Any, z_k: Any, value: Any, is_causal: bool, packed: bool, normalization: str
) -> str | None:
    if normalization != "global":
        return f"the RACE kernels support normalization='global' only; got {normalization!r}"
    if packed and not is_causal:
        return "the RACE kernels support segment_ids with is_causal=True only"
    if not all(isinstance(size, int) for size in (*z_q.shape, *value.shape)):
        return "the RACE kernels need known sizes, but this call has symbolic ones (jax.export)"
    if reason := without_cuda("RACE"):
        return reason
    exact = exact_products(jax.config.jax_default_matmul_precision)
    return kernels().supports(z_q, z_k, value, is_causal=is_causal, exact=exact)


def exact_products(precision: str | None) -> bool:
    """Returns whether a value of `jax_default_matmul_precision` asks for more than TF32."""
    return precision in EXACT_PRECISIONS


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
      query: ``(B, T, N, H)``. Every array may also be a ``jax.ShapeDtypeStruct``.
      key: ``(B, S, K, H)``.
      value: ``(B, S, K, V)``.
      planes: ``(L, P, H)`` or ``(K, L, P, H)``.
      is_causal: as for ``race_attention``.
      segment_ids: as for ``race_attention``.
      normalization: as for ``race_attention``.
      implementation: as for ``race_attention``.
      **others: further arguments of ``race_attention``. They do not change the choice.

    Returns:
      A ``Choice`` with the fields ``implementation`` and ``reason``.

    Raises:
      ValueError: if the implementation is unknown.
      NotImplementedError: if it is ``"pallas"`` and the kernels do not support the call.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> x, planes = jnp.zeros((1, 8, 2, 16)), jnp.zeros((4, 3, 16))
      >>> race_jax.explain(x, x, x, planes, implementation="xla").reason
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
    """Returns whether JAX has a CUDA device here, or compiles for an abstract one."""
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return abstract.platform in ("cuda", "gpu")
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:  # JAX raises this if the platform does not exist here
        return False


@functools.cache
def _say_once(sentence: str) -> None:
    _log.warning(sentence)


def kernels() -> ModuleType:
    """Returns the kernel package, which is imported only when a call needs it."""
    import pallas_kernels

    return pallas_kernels
