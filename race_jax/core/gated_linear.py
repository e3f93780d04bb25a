"""Gated linear attention: a matrix a head, whose rows decay by gates of their own.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_tᵀ,   out_t = S_tᵀ q_t

The equation is computed chunk by chunk. With G the running sum of g in a chunk that S enters,

    out_t = Sᵀ (exp(G_t) q_t) + sum_{s <= t} (sum_h q_th k_sh exp(G_th - G_sh)) v_s
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.core.chunks import CHUNK
from race_jax.core.matrix_state import MatrixState, run_chunks

BLOCK = 8  # tokens whose pairs are weighed one by one


def gated_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    *,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: MatrixState | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, MatrixState]:
    """Computes causal attention by matrices whose rows decay, at a cost linear in the length.

        out_t = sum_{s <= t} (sum_h q_th k_sh exp(G_th - G_sh)) v_s

    G is the running sum of ``log_decay``. Sums are kept in float32 or wider.

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, T, K, H)``. Query head n reads key/value head ``n // (N // K)``.
      value: ``(B, T, K, V)``. The output has its dtype.
      log_decay: ``(B, T, K, H)``, or ``(B, T, K, 1)`` for one gate a head, <= 0. Values below -80
        count as -80.
      key_value_mask: ``(B, T)`` bool, True where there is a token.
      segment_ids: ``(B, T)`` int >= 0, in contiguous runs. A token sees only its own segment.
      initial_state: the state of earlier tokens, which this call continues.
      return_state: whether to return the state after the last token as well.

    Returns:
      The output ``(B, T, N, V)``, or the output and a `MatrixState`. Padded slots give zeros.

    Raises:
      ValueError: if shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.core.gated_linear import gated_linear_attention
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> gated_linear_attention(x, x, x, jnp.log(x / 2)).ravel().tolist()
      [1.0, 1.5, 1.75]

    Source: Yang et al. 2023 (arXiv 2312.06635), sections 4.1 to 4.3.
    """
    if log_decay.shape[3:] not in ((1,), key.shape[3:]):
        raise ValueError(
            f"log_decay must be (B, T, K, H) or (B, T, K, 1), got {log_decay.shape} for key "
            f"{key.shape}"
        )
    gate = masking.bound_log_decay(log_decay, None)
    return run_chunks(
        _step,
        query,
        key,
        value,
        {"log_decay": gate},
        key_value_mask=key_value_mask,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
    )


def _step(state: MatrixState, chunk: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Returns the rows of one chunk, and the matrix after it."""
    query, key, value = chunk["query"], chunk["key"], chunk["value"]
    total = jnp.cumsum(chunk["log_decay"], axis=2)  # (B, K, C, H or 1)
    decayed = jnp.where(chunk["entering"][..., None], jnp.exp(total), 0.0)
    rows = jnp.einsum("bkgth,bkhv->bkgtv", query * decayed[:, :, None], state.matrix)
    weights = jnp.where(chunk["visible"][:, :, None], _weights(query, key, total), 0.0)
    rows += jnp.einsum("bkgts,bksv->bkgtv", weights, value)
    staying = chunk["visible"][:, :, -1, :, None]
    kept = jnp.where(staying, jnp.exp(total[:, :, -1:] - total), 0.0)
    added = jnp.einsum("bksh,bksv->bkhv", key * kept, value)
    return rows, decayed[:, :, -1, :, None] * state.matrix + added


def _weights(query: jax.Array, key: jax.Array, total: jax.Array) -> jax.Array:
    """Returns the weights ``(B, K, G, C, C)`` of the pairs s <= t of one chunk.

    Every exponent is at most 0. Between two blocks of tokens, the decay is split at the border
    before the later block. Inside a block it is formed for each pair.
    """
    batch, kv_heads, groups, _, width = query.shape
    blocks = CHUNK // BLOCK
    total = jnp.broadcast_to(total, key.shape)
    split = lambda x: x.reshape(*x.shape[:-2], blocks, BLOCK, width)  # noqa: E731
    q, k, g = split(query), split(key), split(total)
    border = jnp.pad(g[:, :, :-1, -1], ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :, None]
    earlier = jnp.arange(CHUNK)[None, :] < BLOCK * jnp.arange(blocks)[:, None]
    exponent = jnp.where(earlier[None, None, ..., None], border - total[:, :, None], -jnp.inf)
    keys = key[:, :, None] * jnp.exp(exponent)  # (B, K, blocks, C, H)
    q_far = q * jnp.exp(g - border)[:, :, None]
    far = jnp.einsum("bkgith,bkish->bkgits", q_far, keys)
    lower = jnp.tril(jnp.ones((BLOCK, BLOCK), bool))[None, None, None, ..., None]
    exponent = jnp.where(lower, g[..., :, None, :] - g[..., None, :, :], -jnp.inf)
    near = jnp.einsum("bkgith,bkitsh->bkgits", q, k[:, :, :, None] * jnp.exp(exponent))
    # A choice, and no sum of `far` and `near` times the identity: on a CPU without AVX-512, jaxlib
    # 0.10.2 crashes in the gradient of this product, which it computes by YNNPACK.
    same = jnp.eye(blocks, dtype=bool)[:, None, :, None]  # (block of t, 1, block of s, 1)
    far = far.reshape(*far.shape[:-1], blocks, BLOCK)
    weights = jnp.where(same, near[..., None, :], far)
    return weights.reshape(batch, kv_heads, groups, CHUNK, CHUNK)
