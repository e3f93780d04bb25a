"""Which implementation runs, and why.

Comes in: shapes and dtypes of a call, and an implementation's name. Goes out: a `Choice`. What it
leaves to the platform is decided in implementations.py; nothing is when a module is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = (None, "xla", "pallas")

# In float32 XLA overtakes the kernels below so many tokens and above so many features
# (docs/kernels.md). In bfloat16 the kernels were faster at every size measured.
FLOAT32_KERNELS_FROM = 1024
FLOAT32_KERNELS_FEATURES = 64

# What `jax_default_matmul_precision` may say where TF32 products are not enough.
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
        tables, planes = z_q.shape[3:]
        if value.dtype == jnp.float32 and tables * 2**planes > FLOAT32_KERNELS_FEATURES:
            return WIDE_FLOAT32
        short = value.dtype == jnp.float32 and value.shape[1] < FLOAT32_KERNELS_FROM
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
    if not all(isinstance(size, int) for size in (*z_q.shape, *value.shape)):
        return "the RACE kernels need sizes that are known, and jax.export was given symbolic ones"
    if not has_cuda():  # without one the kernels are not even imported
        return "the RACE kernels run on CUDA devices, and this host has none"
    exact = exact_products(jax.config.jax_default_matmul_precision)
    return kernels().supports(z_q, z_k, value, is_causal=is_causal, exact=exact)


def exact_products(precision: str | None) -> bool:
    """Whether this value of `jax_default_matmul_precision` asks for more than TF32 products."""
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


def kernels() -> ModuleType:
    """The kernel package, loaded only when a call asks for it."""
    import pallas_kernels

    return pallas_kernels
