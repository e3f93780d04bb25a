"""The state at the start of every split of a sequence, and its adjoint, in plain XLA.

With Y_0 the initial state and Y_j the sums of split j - 1,

    X_s = Σ_{j<=s} W_sj Y_j

W_sj is the decay over the splits between j and s, and 0 across a segment border. The last X is the
final state. Adjoints use the transpose of W.
"""

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST


def split_weights(
    log_decay: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array,
    shape: tuple[int, int, int],
    split: int,
) -> jax.Array:
    """Returns W (B, K, splits + 1, splits + 1), lower triangular.

    Each exponent is a sum over the splits between j and s only. The difference of two running sums
    over the whole sequence would lose precision.
    """
    batch, kv_heads, splits = shape
    states = jnp.arange(splits + 1)
    weights = (states[:, None] >= states).astype(jnp.float32)
    if log_decay is not None:
        totals = _split_totals(log_decay, splits, split)  # (B, K, splits)
        totals = jnp.pad(totals, ((0, 0), (0, 0), (1, 0)))  # entry s is the decay of split s - 1
        between = jnp.where(states[:, None] > states, totals[..., None], 0.0)
        weights = weights * jnp.exp(jnp.cumsum(between, axis=2))
    if segment_ids is not None:
        last = jnp.minimum(states[1:] * split, segment_ids.shape[1]) - 1
        leaving = jnp.concatenate([initial_segment[:, None], segment_ids[:, last]], axis=1)
        same = leaving[:, :, None] == leaving[:, None, :]
        weights = weights * same[:, None]
    return jnp.broadcast_to(weights, (batch, kv_heads, splits + 1, splits + 1))


def _split_totals(log_decay: jax.Array, splits: int, split: int) -> jax.Array:
    batch, length, kv_heads = log_decay.shape
    padding = ((0, 0), (0, splits * split - length), (0, 0))
    decay = jnp.pad(log_decay, padding).reshape(batch, splits, split, kv_heads)
    return decay.sum(axis=2).transpose(0, 2, 1)


def running_decay(log_decay: jax.Array, chunk: int) -> jax.Array:
    """Returns γ (B, K, T padded to chunks), the sum of log decay from the chunk's start, inclusive.

    It is computed once here, and not in each kernel for each query head. A sum over the whole
    sequence would lose the differences between neighbours to rounding.
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


def starting_states(
    weights: jax.Array, sums: jax.Array, initial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the states (B, K, splits, ...) at the start of each split, and the final state."""
    states = _mix(weights[:, :, :-1, 1:], sums) + _scaled(weights[:, :, :-1, 0], initial)
    final = _mix(weights[:, :, -1:, 1:], sums) + _scaled(weights[:, :, -1:, 0], initial)
    return states, final[:, :, 0]


def leaving_adjoints(
    weights: jax.Array, adjoints: jax.Array, d_final: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the adjoints of the state that leaves each split, and of the initial state.

    `adjoints` (B, K, splits, ...) are the cotangents of the starting states from their own splits.
    """
    back = weights.swapaxes(2, 3)
    leaving = _mix(back[:, :, 1:, :-1], adjoints) + _scaled(back[:, :, 1:, -1], d_final)
    initial = _mix(back[:, :, :1, :-1], adjoints) + _scaled(back[:, :, :1, -1], d_final)
    return leaving, initial[:, :, 0]


def _mix(weights: jax.Array, states: jax.Array) -> jax.Array:
    flat = states.reshape(*states.shape[:3], -1)
    mixed = jnp.matmul(weights, flat, precision=HIGHEST)
    return mixed.reshape(*mixed.shape[:3], *states.shape[3:])


def _scaled(weights: jax.Array, state: jax.Array) -> jax.Array:
    return weights.reshape(*weights.shape, *[1] * (state.ndim - 2)) * state[:, :, None]
