"""The gated delta rule: a matrix a head that replaces what it holds for a key.

    S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ,   out_t = S_tᵀ q_t

With a_t = exp(g_t), what a token adds is u_t = b_t (v_t - a_t S_{t-1}ᵀ k_t). Those of a chunk solve
a triangular system (the WY form). With G the running sum of g in the chunk that S enters,

    u_t + b_t sum_{s < t} exp(G_t - G_s) (k_t . k_s) u_s = b_t (v_t - exp(G_t) Sᵀ k_t)
    out_t = exp(G_t) Sᵀ q_t + sum_{s <= t} exp(G_t - G_s) (q_t . k_s) u_s
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.core.matrix_state import MatrixState, run_chunks


def gated_delta_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    rate: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: MatrixState | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, MatrixState]:
    """Computes the gated delta rule, at a cost linear in the length.

        S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ,   out_t = S_tᵀ q_t

    a_t is ``exp(log_decay)`` and b_t is ``rate``. Sums are kept in float32 or wider.

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, T, K, H)``, of length at most 1. Query head n reads key/value head
        ``n // (N // K)``.
      value: ``(B, T, K, V)``. The output has its dtype.
      rate: ``(B, T, K)``, from 0 to 1: how far the matrix moves to the new value.
      log_decay: ``(B, T, K)``, <= 0, or None. Values below -80 count as -80.
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
      >>> from race_jax.core.gated_delta import gated_delta_attention
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> value = jnp.arange(3.0).reshape(1, 3, 1, 1)
      >>> gated_delta_attention(x, x, value, x[..., 0]).ravel().tolist()
      [0.0, 1.0, 2.0]

    Source: Yang et al. 2024 (arXiv 2412.06464), sections 3.1 and 3.3.
    """
    gate = jnp.zeros_like(rate) if log_decay is None else log_decay
    return run_chunks(
        _step,
        query,
        key,
        value,
        {"rate": rate, "log_decay": masking.bound_log_decay(gate, None)},
        key_value_mask=key_value_mask,
        segment_ids=segment_ids,
        initial_state=initial_state,
        return_state=return_state,
    )


def _step(state: MatrixState, chunk: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Returns the rows of one chunk, and the matrix after it."""
    query, key, rate = chunk["query"], chunk["key"], chunk["rate"][..., None]
    total = jnp.cumsum(chunk["log_decay"], axis=2)  # (B, K, C)
    difference = total[..., :, None] - total[..., None, :]
    # The exponent is masked before exp, because it is positive above the diagonal and could
    # overflow.
    decay = jnp.exp(jnp.where(chunk["visible"], difference, -jnp.inf))
    entering = jnp.where(chunk["entering"], jnp.exp(total), 0.0)[..., None]
    overlap = jnp.einsum("bkth,bksh->bkts", key, key)
    system = jnp.tril(rate * decay * overlap, -1)
    held = entering * jnp.einsum("bkth,bkhv->bktv", key, state.matrix)
    added = jax.scipy.linalg.solve_triangular(
        system, rate * (chunk["value"] - held), lower=True, unit_diagonal=True
    )
    weights = jnp.einsum("bkgth,bksh->bkgts", query, key) * decay[:, :, None]
    rows = jnp.einsum("bkgth,bkhv->bkgtv", query * entering[:, :, None], state.matrix)
    rows += jnp.einsum("bkgts,bksv->bkgtv", weights, added)
    # The last token sees what stays.
    matrix = entering[:, :, -1:] * state.matrix
    return rows, matrix + jnp.einsum("bksh,bksv->bkhv", key * decay[:, :, -1, :, None], added)
