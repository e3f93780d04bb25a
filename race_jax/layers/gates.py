"""The gates of a layer, which are the forget gate of the sums and the output gate, and its norm.

    g = log sigmoid(x w + b)          heads = RMSNorm(heads) * silu(x W_g)

g is the log decay of every token and key/value head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.layers import products

FORGET_GATES = (None, "fixed", "learned", "data")
SHORTEST_HALF_LIFE = 2.0  # tokens
BIAS_RANGE = (1.0, 6.0)  # half-lives of 2 to 280 tokens
EPSILON = 1e-6
OUTPUT_GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def check_gate(
    forget_gate: str | None,
    half_life: float | None,
    known: tuple[str | None, ...] = FORGET_GATES,
) -> None:
    """Raises ValueError unless the gate is one of the known ones and its half-life fits it."""
    if forget_gate not in known:
        choices = ", ".join(map(repr, known))
        raise ValueError(f"forget_gate must be one of {choices}; got {forget_gate!r}")
    if half_life is None:
        if forget_gate == "fixed":
            raise ValueError(
                'forget_gate="fixed" needs half_life, the longest half-life in tokens, for '
                "instance half_life=1024"
            )
    elif forget_gate is None:
        raise ValueError(f"half_life={half_life} has no effect without a forget_gate")
    elif forget_gate not in FORGET_GATES:
        raise ValueError(f"half_life={half_life} has no effect with forget_gate={forget_gate!r}")
    elif not SHORTEST_HALF_LIFE <= half_life < math.inf:
        raise ValueError(
            f"half_life must be finite and at least {SHORTEST_HALF_LIFE} tokens, got {half_life}"
        )


def check_direction(forget_gate: str | None, is_causal: bool) -> None:
    """Raises ValueError for a gate in a model that also sees later tokens."""
    if forget_gate is not None and not is_causal:
        raise ValueError(
            f"forget_gate={forget_gate!r} needs a causal model, because a gate has a direction; "
            "use forget_gate=None for an encoder."
        )


def half_lives(num_kv_heads: int, longest: float) -> np.ndarray:
    """Returns half-lives in tokens ``(K,)``, in a geometric series from 2 to `longest`.

    A single head gets the longest half-life.
    """
    return np.geomspace(longest, SHORTEST_HALF_LIFE, num_kv_heads)[::-1]


def initial_bias(num_kv_heads: int, half_life: float | None) -> np.ndarray:
    """Returns gate biases ``(K,)`` that spread the heads from short to long memory.

    If `half_life` is None, the biases go from 1 to 6. Otherwise ``sigmoid(b)`` is the decay per
    token of the half-lives from 2 to `half_life`.
    """
    if half_life is None:
        return np.linspace(*BIAS_RANGE[::-1], num_kv_heads)[::-1]
    return -np.log(np.expm1(math.log(2.0) / half_lives(num_kv_heads, half_life)))


def log_decay(
    x: jax.Array,
    params: Mapping[str, Any],
    *,
    forget_gate: str | None,
    half_life: float | None,
    num_kv_heads: int,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array | None:
    """Returns the log decay of every token, in float32 or wider.

    Args:
      x: ``(B, S, D)``, hidden states with padded slots cleared.
      params: ``gate_bias`` ``(K,)`` if the gate is ``"learned"`` or ``"data"``, and ``gate_kernel``
        ``(D, K)`` if it is ``"data"``.
      forget_gate: None, ``"fixed"``, ``"learned"`` or ``"data"``.
      half_life: the longest half-life of a fixed gate, in tokens.
      num_kv_heads: K.
      precision: the precision of the matrix product.

    Returns:
      ``(B, S, K)``, <= 0, or None without a gate.

    Source: beyond the paper.
    """
    if forget_gate is None:
        return None
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if forget_gate == "fixed":
        rates = jnp.asarray(-math.log(2.0) / half_lives(num_kv_heads, half_life), dtype)
    else:
        if forget_gate == "data":
            logits = products.side_by_side(x, [data_gate(params)], precision)[0]
        else:
            logits = params["gate_bias"].astype(dtype)[None, None]
        rates = jax.nn.log_sigmoid(logits)
    return jnp.broadcast_to(rates, (*x.shape[:2], num_kv_heads))


def data_gate(params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns kernel ``(D, K)`` and bias ``(K,)`` of the logits of a data gate."""
    return {"kernel": params["gate_kernel"], "bias": params["gate_bias"]}


def rms_norm(heads: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides each head by its root mean square.

        heads / sqrt(mean(heads**2) + 1e-6) * scale

    Args:
      heads: ``(B, T, N, V)``. The mean is taken over V.
      scale: ``(V,)``.

    Returns:
      ``(B, T, N, V)`` in float32 or wider.

    Source: Zhang and Sennrich 2019, section 3.
    """
    wide = heads.astype(jnp.promote_types(heads.dtype, jnp.float32))
    wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPSILON)
    return wide * jnp.expand_dims(scale.astype(wide.dtype), (0, 1, 2))


def output_gate(
    heads: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    kind: str,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Multiplies the heads by a function of the hidden states.

        heads * silu(x W_g)

    Args:
      heads: ``(B, T, N, V)``.
      x: ``(B, T, D)``, hidden states of the queries.
      kernel: ``(D, N, V)``.
      kind: the function, "silu" or "sigmoid".
      precision: the precision of the matrix product.

    Returns:
      ``(B, T, N, V)`` in the wider of the dtypes of `heads` and `x`.

    Source: beyond the paper.
    """
    logits = jnp.tensordot(x, kernel.astype(x.dtype), axes=1, precision=precision)
    return heads * OUTPUT_GATES[kind](logits)
