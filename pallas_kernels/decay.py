"""Sums of the log decay along a sequence, and of its gradient, each within a chunk or a split.

A sum over the whole sequence would lose the differences between neighbors to rounding.
"""

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST


def running_decay(log_decay: jax.Array, chunk: int) -> jax.Array:
    """Returns γ (B, K, T padded to chunks), the sum of log decay from the chunk's start, inclusive.

    It is computed once here, and not in each kernel for each query head. A sum over the whole
    sequence would lose the differences between neighbors to rounding.
    """
    batch, length, kv_heads = log_decay.shape
    decay = jnp.pad(log_decay, ((0, 0), (0, -length % chunk), (0, 0)))
    decay = decay.transpose(0, 2, 1).reshape(batch, kv_heads, -1, chunk)
    since = jnp.matmul(decay, jnp.triu(jnp.ones((chunk, chunk))), precision=HIGHEST)
    return since.reshape(batch, kv_heads, -1)


def later_flow(flow: jax.Array, later: jax.Array, chunk: int, split: int) -> jax.Array:
    """Returns dg (B, K, T): Σ_{u>=t} (row_u - column_u) to the end of t's split, plus `later`.

    `later` (B, K, splits) is ⟨Λ_e, X_e⟩ at the end of each split. It stands for all later splits,
    so that no sum is longer than a split.
    """
    batch, kv_heads, length = flow.shape
    splits = later.shape[2]
    padded = jnp.pad(flow, ((0, 0), (0, 0), (0, splits * split - length)))
    chunks = padded.reshape(batch, kv_heads, splits, split // chunk, chunk)
    within = jnp.matmul(chunks, jnp.tril(jnp.ones((chunk, chunk))), precision=HIGHEST)
    totals = within[..., 0]
    after = jnp.cumsum(totals[..., ::-1], axis=3)[..., ::-1] - totals + later[..., None]
    return (within + after[..., None]).reshape(batch, kv_heads, -1)[..., :length]
