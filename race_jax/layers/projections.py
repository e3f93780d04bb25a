"""The projections of a RACE layer: from hidden states to hash projections, values and outputs.

    z_q = W (x A_q),  z_k = W (x A_k),  v = x A_v,  g = log sigmoid(x w + b)

x are the hidden states of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import hashing
from race_jax.layers import gates, products
from race_jax.layers.race_config import RACEConfig

Projection = Mapping[str, Any] | Callable[[jax.Array], jax.Array]


def hash_and_gate(
    x: jax.Array,
    sources: tuple[jax.Array, jax.Array],
    params: Mapping[str, Any],
    planes: jax.Array,
    settings: RACEConfig,
    *,
    together: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns z of the queries, z of the keys and the log decay.

    If the planes are folded, all of them are linear in hidden states, and may come from one
    product.

    Args:
      x: ``(B, T, D)``, hidden states of the keys, with padded slots cleared.
      sources: what queries and keys are hashed from: hidden states, or queries and keys themselves
        if those have been convolved.
      params: as for `functional.race_layer`.
      planes: ``(L, P, H)``, or flat ones.
      settings: the static settings of the layer.
      together: whether x are the hidden states of the queries too.
    """
    together = together and settings.folds
    names = ("query", "key")
    folded = [_folded(name, params, planes, settings) for name in names] if together else []
    if not folded or None in folded:
        z_q, z_k = (
            _hashed(source, name, params, planes, settings)
            for source, name in zip(sources, ("query", "key"), strict=True)
        )
        return z_q, z_k, _log_decay(x, params, settings)
    if settings.forget_gate != "data":
        z_q, z_k = products.side_by_side(x, folded, settings.precision)
        return z_q, z_k, _log_decay(x, params, settings)
    maps = [*folded, gates.data_gate(params)]
    z_q, z_k, logits = products.side_by_side(x, maps, settings.precision)
    return z_q, z_k, jax.nn.log_sigmoid(logits)


def _hashed(
    x: jax.Array,
    name: str,
    params: Mapping[str, Any],
    planes: jax.Array,
    settings: RACEConfig,
) -> jax.Array:
    """Returns hash projections ``(B, T, heads, L, P)`` of the queries or the keys.

    x are hidden states, or the queries or keys themselves if those have been convolved.
    """
    folded = _folded(name, params, planes, settings) if settings.folds else None
    if folded is not None:
        return products.side_by_side(x, [folded], settings.precision)[0]
    heads = x if settings.changes_heads else projected(x, name, params, settings)
    if settings.normalize_qk:
        heads = params[f"{name}_ln"](heads).astype(heads.dtype)
    return hashing.hash_projections(heads, planes)


def _folded(
    name: str, params: Mapping[str, Any], planes: jax.Array, settings: RACEConfig
) -> dict[str, jax.Array] | None:
    """Folds planes into a projection's kernel and bias; None if it is a function of its input."""
    weights: Projection = params[name]
    if not isinstance(weights, Mapping):
        return None
    wanted, given = _shape(name, settings), weights["kernel"].shape[1:]
    if given != wanted:
        raise ValueError(
            f"the kernel of the projection {name!r} makes heads of shape {given}; the layer needs "
            f"{wanted}"
        )
    # This product of weights is small and made once per call, so it is made exactly. TF32, the
    # default on a GPU, would keep only ten bits of each weight.
    with jax.default_matmul_precision("highest"):
        return {part: hashing.fold_planes(array, planes) for part, array in weights.items()}


def _shape(name: str, settings: RACEConfig) -> tuple[int, ...]:
    """Returns the shape of what a projection makes of one token."""
    return {
        "query": (settings.num_heads, settings.head_dim),
        "key": (settings.num_kv_heads, settings.head_dim),
        "value": (settings.num_kv_heads, settings.value_dim),
        "out": (settings.out_features,),
    }[name]


def projected(
    x: jax.Array, name: str, params: Mapping[str, Any], settings: RACEConfig
) -> jax.Array:
    """Applies the projection `name` to x, and returns heads or the layer's output in x's dtype."""
    projection: Projection = params[name]
    if isinstance(projection, Mapping):
        return _linear(x, projection, settings.precision, axes=2 if name == "out" else 1)
    out, shape = projection(x), _shape(name, settings)
    wanted = *x.shape[:2], *shape
    if out.shape == (*x.shape[:2], math.prod(shape)):  # nnx.Linear returns heads side by side
        out = out.reshape(wanted)
    if out.shape != wanted:
        raise ValueError(
            f"the projection {name!r} gave shape {out.shape} for an input of shape {x.shape}; the "
            f"layer needs {wanted}"
        )
    return out.astype(x.dtype)


def _linear(
    x: jax.Array,
    weights: Mapping[str, jax.Array],
    precision: jax.lax.PrecisionLike,
    *,
    axes: int = 1,
) -> jax.Array:
    """Contracts the last `axes` axes of x with the first ones of the kernel, and adds the bias."""
    kernel, bias = weights["kernel"].astype(x.dtype), weights.get("bias")
    if axes == 1 and not any(jax.typeof(kernel).sharding.spec):
        # With the heads side by side, the bias is a vector, which cuBLASLt adds to the product.
        flat = kernel.reshape(kernel.shape[0], -1)
        out = jnp.tensordot(x, flat, axes=1, precision=precision)
        out = out if bias is None else out + bias.astype(out.dtype).reshape(1, 1, -1)
        return out.reshape(*x.shape[:-1], *kernel.shape[1:])
    out = jnp.tensordot(x, kernel, axes=axes, precision=precision)
    return out if bias is None else out + jnp.expand_dims(bias.astype(out.dtype), (0, 1))


def _log_decay(x: jax.Array, params: Mapping[str, Any], settings: RACEConfig) -> jax.Array | None:
    """Returns the log decay ``(B, T, K)`` of hidden states x, or None without a gate."""
    return gates.log_decay(
        x,
        params,
        forget_gate=settings.forget_gate,
        half_life=settings.half_life,
        num_kv_heads=settings.num_kv_heads,
        precision=settings.precision,
    )
