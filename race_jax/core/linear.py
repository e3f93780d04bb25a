"""Linear attention over given features, which is what RACE attention computes after its hash.

The other linear attentions of this library build on it and share RACE's masks and state. It is one
rematerialised scan over chunks, written for clarity rather than speed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from race_jax.core import chunks, masking, shards
from race_jax.core.chunks import CHUNK
from race_jax.core.state import RACEState, normalize


def linear_attention(
    phi_q: jax.Array,
    phi_k: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: RACEState | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, RACEState]:
    """Computes attention whose weights are products of features, at a cost linear in the length.

        out_t = sum_s w_ts v_s / sum_s w_ts
        w_ts  = visible(t, s) exp(G_t - G_s) phi_q(t) . phi_k(s)

    G is the running sum of ``log_decay``. Sums are kept in float32 or wider.

    Args:
      phi_q: ``(B, T, N, F)``, features of the queries, >= 0.
      phi_k: ``(B, S, K, F)``, features of the keys, >= 0. Query head n reads key/value head
        ``n // (N // K)``.
      value: ``(B, S, K, V)``. The output has its dtype.
      is_causal: whether a token sees only itself and earlier tokens. This needs T == S.
      log_decay: ``(B, S, K)``, <= 0, the forgetting gate; it needs ``is_causal=True``.
      key_value_mask: ``(B, S)`` bool, True where there is a token.
      segment_ids: ``(B, T)`` int >= 0, in contiguous runs. A token sees only its own segment.
      initial_state: the state of earlier tokens, which this call continues.
      return_state: whether to return the state after the last token as well.

    Returns:
      The output ``(B, T, N, V)``, or the output and a ``RACEState``.

    Raises:
      ValueError: if shapes do not fit, or two arguments exclude each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.core.linear import linear_attention
      >>> phi, value = jnp.ones((1, 3, 1, 4)), jnp.arange(3.0).reshape(1, 3, 1, 1)
      >>> linear_attention(phi, phi, value, is_causal=True).ravel().tolist()
      [0.0, 0.5, 1.0]

    Source: Katharopoulos et al. 2020, section 3. The gate, packing and the state are those of RACE
    attention.
    """
    batch, length, kv_heads, value_dim = value.shape
    _check(phi_q, phi_k, value, is_causal, log_decay, segment_ids, initial_state, return_state)
    masking.check_key_value_mask(key_value_mask, (batch, length))
    masking.check_segment_ids(segment_ids, (batch, phi_q.shape[1]), key_value_mask)
    masking.check_log_decay(log_decay, (batch, length, kv_heads), key_value_mask)
    dtype = jnp.promote_types(jnp.result_type(phi_q, phi_k, value), jnp.float32)
    state = initial_state
    if state is None:
        state = RACEState.init(batch, kv_heads, phi_k.shape[3], value_dim, dtype)
    arrays = {
        "phi_q": phi_q,
        "phi_k": phi_k,
        "value": value,
        "log_decay": log_decay,
        "mask": key_value_mask,
        "segment_ids": segment_ids,
        "state": state,
    }
    arrays = {name: array for name, array in arrays.items() if array is not None}
    run = functools.partial(_run, dtype=dtype, is_causal=is_causal)
    out, state = shards.over_shards(
        lambda arrays, _: run(**arrays),
        arrays,
        {name: _AXES[name] for name in arrays},
        (shards.TOKENS, STATE_AXES),
        kv_heads=kv_heads,
        splits_sequence=False,
    )
    return (out, state) if return_state else out


STATE_AXES = RACEState(shards.TABLES, shards.TABLES, shards.TABLES, shards.ROWS)
_AXES = dict.fromkeys(("phi_q", "phi_k", "value", "log_decay"), shards.TOKENS)
_AXES |= dict.fromkeys(("mask", "segment_ids"), shards.SLOTS) | {"state": STATE_AXES}


# Compiled as one program, so that a call outside `jax.jit` compiles once, and not its loop anew.
@functools.partial(jax.jit, static_argnames=("dtype", "is_causal"))
def _run(
    phi_q: jax.Array,
    phi_k: jax.Array,
    value: jax.Array,
    state: RACEState,
    log_decay: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    dtype: jnp.dtype,
    is_causal: bool,
) -> tuple[jax.Array, RACEState]:
    """Computes ``linear_attention`` for the rows and heads of one device."""
    kv_heads = value.shape[2]
    arrays = {
        "phi_q": phi_q.astype(dtype),
        "phi_k": masking.select_tokens(phi_k.astype(dtype), mask),
        "value": masking.select_tokens(value.astype(dtype), mask),
        "log_decay": masking.bound_log_decay(log_decay, mask),
        "mask": mask,
        "segment": masking.fill_segments(segment_ids, mask, state.segment),
    }
    if is_causal:
        rows, state = _scan(arrays, state, inclusive=True)
        rows = masking.select_tokens(rows, mask)
    elif segment_ids is not None:
        rows, _ = _scan(arrays, state, inclusive=True)
        flip = lambda tree: jax.tree.map(lambda x: jnp.flip(x, axis=1), tree)  # noqa: E731
        after, _ = _scan(flip(arrays), state, inclusive=False)
        rows += flip(after)
    else:
        state = state.update(arrays["phi_k"], arrays["value"], key_value_mask=mask)
        rows = _read(_grouped(arrays["phi_q"], kv_heads), state)
    out = normalize(rows[..., :-1], rows[..., -1]).astype(value.dtype)
    return out.reshape(*phi_q.shape[:3], value.shape[3]), state


def _scan(
    arrays: dict[str, jax.Array | None], state: RACEState, *, inclusive: bool
) -> tuple[jax.Array, RACEState]:
    """Returns numerators and masses ``(B, T, K, G, V + 1)``, and the state after the last token."""
    batch, length, kv_heads = arrays["value"].shape[:3]
    grouped = _grouped(arrays["phi_q"], kv_heads)
    if not length:
        shape = (*grouped.shape[:4], arrays["value"].shape[3] + 1)
        return jnp.zeros(shape, grouped.dtype), state
    mask = jnp.ones((batch, length), bool) if arrays["mask"] is None else arrays["mask"]
    arrays = arrays | {"phi_q": grouped, "mask": mask}

    @jax.checkpoint
    def step(state: RACEState, chunk: dict) -> tuple[RACEState, jax.Array]:
        rows = _chunk_rows(chunk, state, inclusive=inclusive)
        after = state.update(
            chunk["phi_k"],
            chunk["value"],
            log_decay=chunk["log_decay"],
            key_value_mask=chunk["mask"],
            segment_ids=chunk["segment"],
        )
        return after, rows

    state, rows = jax.lax.scan(step, state, chunks.cut(arrays))
    return chunks.join(rows, length), state


def _chunk_rows(chunk: dict, state: RACEState, *, inclusive: bool) -> jax.Array:
    """Returns numerators and masses of one chunk's queries, from the chunk and from the state."""
    visible = jnp.tril(jnp.ones((CHUNK, CHUNK), bool), 0 if inclusive else -1)[None, None]
    phi_q, segment = chunk["phi_q"], chunk["segment"]
    from_state = phi_q
    if segment is not None:
        visible = visible & (segment[:, None, :, None] == segment[:, None, None, :])
        seen = (segment == state.segment[:, None])[..., None, None, None]
        from_state = jnp.where(seen, from_state, 0.0)
    decay = visible.astype(phi_q.dtype)
    if chunk["log_decay"] is not None:
        total = jnp.moveaxis(jnp.cumsum(chunk["log_decay"], axis=1), 1, 2)  # (B, K, C)
        difference = total[..., :, None] - total[..., None, :]
        # The exponent is masked before exp, because it is positive above the diagonal and could
        # overflow.
        decay = jnp.exp(jnp.where(visible, difference, -jnp.inf))
        from_state = from_state * jnp.exp(jnp.moveaxis(total, 2, 1))[..., None, None]
    weights = jnp.einsum("btkgf,bskf->bkgts", phi_q, chunk["phi_k"]) * decay[:, :, None]
    numerator = jnp.einsum("bkgts,bskv->btkgv", weights, chunk["value"])
    mass = jnp.moveaxis(weights.sum(axis=-1), 3, 1)
    return jnp.concatenate([numerator, mass[..., None]], axis=-1) + _read(from_state, state)


def _grouped(phi_q: jax.Array, kv_heads: int) -> jax.Array:
    """Groups query heads by the head that they read: ``(B, T, N, F)`` to ``(B, T, K, G, F)``."""
    batch, length, heads, features = phi_q.shape
    return phi_q.reshape(batch, length, kv_heads, heads // kv_heads, features)


def _read(phi_q: jax.Array, state: RACEState) -> jax.Array:
    """Returns the numerators and masses ``(B, T, K, G, V + 1)`` that queries read from a state."""
    numerator = jnp.einsum("btkgf,bkfv->btkgv", phi_q, state.numerator)
    mass = jnp.einsum("btkgf,bkf->btkg", phi_q, state.mass)
    return jnp.concatenate([numerator, mass[..., None]], axis=-1)


def _check(phi_q, phi_k, value, is_causal, log_decay, segment_ids, initial_state, return_state):
    shapes = f"got phi_q {phi_q.shape}, phi_k {phi_k.shape}, value {value.shape}"
    if phi_q.ndim != 4 or phi_k.ndim != 4 or value.ndim != 4:
        raise ValueError(f"phi_q, phi_k and value must have 4 axes (B, T, heads, size); {shapes}")
    if phi_k.shape[:3] != value.shape[:3] or phi_q.shape[0] != phi_k.shape[0]:
        raise ValueError(f"phi_k and value must agree in (B, S, K), and phi_q in B; {shapes}")
    if phi_q.shape[3] != phi_k.shape[3] or phi_q.shape[2] % max(value.shape[2], 1):
        raise ValueError(
            f"phi_q and phi_k must have equal features, and N must be a multiple of K; {shapes}"
        )
    if (is_causal or segment_ids is not None) and phi_q.shape[1] != phi_k.shape[1]:
        raise ValueError(f"is_causal and segment_ids need as many queries as keys; {shapes}")
    if log_decay is not None and not is_causal:
        raise ValueError(
            "log_decay needs is_causal=True, because a forgetting gate has a direction"
        )
    if segment_ids is not None and not is_causal and (initial_state is not None or return_state):
        raise ValueError(
            "segment_ids with a state needs is_causal=True, because the sums of a bidirectional "
            "call would mix segments"
        )
