"""Two slow and plain implementations of the definition, with which the fast ones are compared.

`all_pairs` forms the weights w_ts and normalizes them. `token_by_token` keeps tables, as the
paper's Algorithms 1 and 2 do. Both are written for one key/value head of one sequence and are
mapped over the others.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MIN_DENOMINATOR = 1e-30  # a row whose weights sum to less counts as seeing no key
MIN_LOG_DECAY = -80.0  # the lower bound of the gate
BUCKET_EPSILON = 1e-6  # keeps a division by an empty bucket finite, as in the released code


class Tables(NamedTuple):
    """Table sums over a span of tokens; the oracles' own form of `race_jax.RACEState`.

    Attributes:
      numerator: the decayed sum of phi(k) v, shape ``(B, K, F, V)``.
      mass: the decayed sum of phi(k), shape ``(B, K, F)``.
      log_decay: the total log decay of the span, shape ``(B, K)``.
      segment: the int32 segment of its last token, -1 before the first token, shape ``(B,)``.
    """

    numerator: jax.Array
    mass: jax.Array
    log_decay: jax.Array
    segment: jax.Array


class Head(NamedTuple):
    """One key/value head of one sequence, with the G = N // K query heads that share it."""

    query: jax.Array  # (G, T, H)
    key: jax.Array  # (S, H)
    value: jax.Array  # (S, V)
    planes: jax.Array  # (L, P, H)
    sharpness: jax.Array  # ()
    log_decay: jax.Array  # (S,)
    real: jax.Array  # (S,), False in padded slots
    segment_ids: jax.Array | None  # (S,)
    initial: Tables  # (F, V), (F,), (), ()


def all_pairs(
    query: jax.Array, key: jax.Array, value: jax.Array, planes: jax.Array, **options: Any
) -> jax.Array | tuple[jax.Array, Tables]:
    """Computes RACE attention from its weights, in time and memory T * S.

        w_ts = visible(t, s) exp(G_t - G_s) phi(q_t) . phi(k_s)
        out_t = sum_s w_ts v_s / sum_s w_ts

    Args:
      query: ``(B, T, N, H)``, float32 or float64. The result has the same dtype.
      key: ``(B, S, K, H)``.
      value: ``(B, S, K, V)``.
      planes: ``(L, P, H)`` or ``(K, L, P, H)``.
      **options: `sharpness`, `use_tanh`, `is_causal`, `log_decay`, `key_value_mask`, `segment_ids`,
        `normalization`, `initial_state` (Tables) and `return_state`, as in
        `race_jax.race_attention`.

    Returns:
      The output ``(B, T, N, V)``, or the output and the Tables after the last token.

    Raises:
      ValueError: if `log_decay` is given without `is_causal`, or `normalization` is unknown.

    Example:
      >>> x = jnp.arange(12.0).reshape(1, 3, 2, 2) / 12
      >>> out = all_pairs(x, x, x, jnp.ones((1, 2, 2)), is_causal=True)
      >>> out.shape, bool(jnp.allclose(out[:, 0], x[:, 0]))
      ((1, 3, 2, 2), True)

    Source: arXiv 2510.04008, Section 3 and Algorithms 1 and 2. The gate, masks and the state go
    beyond the paper.
    """
    return _map_heads(_all_pairs_one_head, query, key, value, planes, **options)


def token_by_token(
    query: jax.Array, key: jax.Array, value: jax.Array, planes: jax.Array, **options: Any
) -> jax.Array | tuple[jax.Array, Tables]:
    """Computes RACE attention from its tables, one token at a time.

        B_t = exp(g_t) B_{t-1} + phi(k_t) v_t,  A_t = exp(g_t) A_{t-1} + phi(k_t)
        out_t = phi(q_t) B_t / phi(q_t) . A_t

    Without causality, every query reads the final tables, or those of its own segment.

    Args:
      query: ``(B, T, N, H)``, float32 or float64. The result has the same dtype.
      key: ``(B, S, K, H)``.
      value: ``(B, S, K, V)``.
      planes: ``(L, P, H)`` or ``(K, L, P, H)``.
      **options: those of `all_pairs`.

    Returns:
      The output ``(B, T, N, V)``, or the output and the Tables after the last token.

    Raises:
      ValueError: as for `all_pairs`.

    Example:
      >>> x = jnp.arange(12.0).reshape(1, 3, 2, 2) / 12
      >>> planes = jnp.ones((1, 2, 2))
      >>> same = all_pairs(x, x, x, planes), token_by_token(x, x, x, planes)
      >>> bool(jnp.allclose(*same, atol=1e-6))
      True

    Source: arXiv 2510.04008, Algorithms 1 and 2. The gate, masks and the state go beyond the paper.
    """
    return _map_heads(_token_by_token_one_head, query, key, value, planes, **options)


def corner_softmax(
    x: jax.Array, planes: jax.Array, sharpness: jax.Array | float, use_tanh: bool = True
) -> jax.Array:
    """Computes the soft buckets phi_lr(x) by a softmax over all corners c_r.

        phi_lr(x) = softmax over r of beta sum_p u_lp c_rp,   u = tanh(W x) or u = W x

    Args:
      x: ``(..., H)``.
      planes: ``(L, P, H)``.
      sharpness: beta > 0, a scalar.
      use_tanh: whether u = tanh(W x), as in the paper.

    Returns:
      Features ``(..., L * 2**P)``. Corners are ordered as binary numbers: the first plane is the
      most significant bit, and -1 comes before +1.

    Example:
      >>> phi = corner_softmax(jnp.ones(3), jnp.ones((2, 2, 3)), 1.0)
      >>> phi.shape, [round(float(p), 2) for p in phi[:4]]
      ((8,), [0.01, 0.11, 0.11, 0.77])

    Source: arXiv 2510.04008, Section 3.
    """
    corners = jnp.array(list(itertools.product((-1, 1), repeat=planes.shape[-2])), x.dtype)
    z = jnp.einsum("...h,lph->...lp", x, planes)
    u = jnp.tanh(z) if use_tanh else z
    phi = jax.nn.softmax(sharpness * jnp.einsum("...lp,rp->...lr", u, corners), axis=-1)
    return phi.reshape(*x.shape[:-1], planes.shape[0] * len(corners))


def _all_pairs_one_head(
    head: Head, *, is_causal: bool, normalization: str, use_tanh: bool
) -> tuple[jax.Array, Tables]:
    phi_q, phi_k = _features(head, is_causal, use_tanh)
    decay, decay_initial = _visible_decay(head, is_causal)  # (T + 1, S), (T + 1,)
    final = Tables(
        numerator=jnp.einsum("s,sf,sv->fv", decay[-1], phi_k, head.value)
        + decay_initial[-1] * head.initial.numerator,
        mass=decay[-1] @ phi_k + decay_initial[-1] * head.initial.mass,
        log_decay=(head.initial.log_decay + head.log_decay.sum()) * is_causal,
        segment=_slot_segments(head)[-1],
    )
    decay, decay_initial = decay[:-1], decay_initial[:-1, None]
    if normalization == "bucket":
        numerator = jnp.einsum("ts,sf,sv->tfv", decay, phi_k, head.value)
        numerator += decay_initial[..., None] * head.initial.numerator
        mass = decay @ phi_k + decay_initial * head.initial.mass
        return _read_buckets(phi_q, numerator, mass, head.planes.shape[0]), final
    weights = jnp.einsum("ts,gtf,sf->gts", decay, phi_q, phi_k)
    weights_initial = decay_initial * phi_q
    numerator = weights @ head.value + weights_initial @ head.initial.numerator
    return _divide(numerator, weights.sum(-1) + weights_initial @ head.initial.mass), final


def _visible_decay(head: Head, is_causal: bool) -> tuple[jax.Array, jax.Array]:
    """Returns visible(t, s) exp(G_t - G_s) for keys s, and the same for the initial sums.

    There is one row for every query, and a last row for a reader after the last token, who sees the
    final state.
    """
    num_queries, num_keys = head.query.shape[1], head.real.size
    slots = _slot_segments(head)
    total = jnp.concatenate([jnp.zeros(1, head.log_decay.dtype), jnp.cumsum(head.log_decay)])
    if is_causal or head.segment_ids is not None:
        row_segment, row_total = jnp.append(slots[1:], slots[-1]), jnp.append(total[1:], total[-1])
    else:
        row_segment = jnp.full(num_queries + 1, slots[-1])
        row_total = jnp.zeros(num_queries + 1, total.dtype)
    visible = row_segment[:, None] == slots[1:]
    if is_causal:
        visible &= jnp.arange(num_keys) <= jnp.arange(num_keys + 1)[:, None]
    decay = jnp.exp(jnp.where(visible, row_total[:, None] - total[1:], -jnp.inf))
    return decay, jnp.where(row_segment == head.initial.segment, jnp.exp(row_total), 0)


def _slot_segments(head: Head) -> jax.Array:
    """Returns the segment of the initial state, then that of every slot.

    A padded slot has the segment of the last token before it.
    """
    start = head.initial.segment
    ids = jnp.maximum(start, 0) if head.segment_ids is None else head.segment_ids
    ids = jnp.concatenate([start[None], jnp.broadcast_to(ids, head.real.shape)])
    last_real = jnp.where(head.real, jnp.arange(1, ids.size), 0)
    return ids[jax.lax.cummax(jnp.concatenate([jnp.zeros(1, int), last_real]))]


def _token_by_token_one_head(
    head: Head, *, is_causal: bool, normalization: str, use_tanh: bool
) -> tuple[jax.Array, Tables]:
    phi_q, phi_k = _features(head, is_causal, use_tanh)
    num_queries, num_tables = head.query.shape[1], head.planes.shape[0]
    tokens = phi_k, head.value, head.log_decay
    ids = jnp.maximum(head.initial.segment, 0) if head.segment_ids is None else head.segment_ids
    ids = jnp.broadcast_to(ids, head.real.shape)
    final, (_, after) = jax.lax.scan(_add_token, head.initial, (*tokens, head.real, ids))
    final = final._replace(log_decay=final.log_decay * is_causal)
    if is_causal:
        numerator, mass = after.numerator, after.mass
    elif head.segment_ids is None:
        numerator, mass = (jnp.broadcast_to(x, (num_queries, *x.shape)) for x in final[:2])
    else:
        empty = jax.tree.map(jnp.zeros_like, head.initial)._replace(segment=jnp.int32(-1))
        real = jnp.ones_like(head.real)  # the forward scan gave padded slots their segments
        _, (before, _) = jax.lax.scan(
            _add_token, empty, (*tokens, real, after.segment), reverse=True
        )
        numerator, mass = after.numerator + before.numerator, after.mass + before.mass
    if normalization == "bucket":
        return _read_buckets(phi_q, numerator, mass, num_tables), final
    denominator = jnp.einsum("gtf,tf->gt", phi_q, mass)
    return _divide(jnp.einsum("gtf,tfv->gtv", phi_q, numerator), denominator), final


def _add_token(
    tables: Tables, token: tuple[jax.Array, ...]
) -> tuple[Tables, tuple[Tables, Tables]]:
    """Returns the tables after a token, and the tables just before its key is added.

    The latter are decayed to the time of the token, and are zero if it starts a new segment.
    """
    phi, value, log_decay, real, segment_id = token
    segment = jnp.where(real, segment_id, tables.segment).astype(jnp.int32)
    keep = jnp.where(segment == tables.segment, jnp.exp(log_decay), 0)
    total = tables.log_decay + log_decay
    met = Tables(keep * tables.numerator, keep * tables.mass, total, segment)
    after = Tables(met.numerator + phi[:, None] * value, met.mass + phi, total, segment)
    return after, (met, after)


def _features(head: Head, is_causal: bool, use_tanh: bool) -> tuple[jax.Array, jax.Array]:
    """Returns phi(q) and phi(k), zero at padded keys and, if causal, at padded queries."""
    phi_q = corner_softmax(head.query, head.planes, head.sharpness, use_tanh)
    phi_k = corner_softmax(head.key, head.planes, head.sharpness, use_tanh)
    phi_k = jnp.where(head.real[:, None], phi_k, 0)
    return (jnp.where(head.real[:, None], phi_q, 0) if is_causal else phi_q), phi_k


def _divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides rows by their total weight. Rows that see no key are zero and have zero gradients."""
    seen = (denominator >= MIN_DENOMINATOR)[..., None]
    return jnp.where(seen, numerator / jnp.where(seen, denominator[..., None], 1), 0)


def _read_buckets(
    phi_q: jax.Array, numerator: jax.Array, mass: jax.Array, num_tables: int
) -> jax.Array:
    """Normalises per bucket, as the released code does.

    The result is 1/L sum_lr phi_lr(q) B_lr / (A_lr + 1e-6).
    """
    buckets = numerator / (mass + BUCKET_EPSILON)[..., None]
    return jnp.einsum("gtf,tfv->gtv", phi_q, buckets) / num_tables


def _map_heads(
    one_head: Callable[..., tuple[jax.Array, Tables]],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    planes: jax.Array,
    *,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    normalization: str = "global",
    use_tanh: bool = True,
    return_state: bool = False,
    **options: Any,
) -> jax.Array | tuple[jax.Array, Tables]:
    """Maps `one_head` over the batch and the key/value heads."""
    if log_decay is not None and not is_causal:
        raise ValueError("log_decay has a direction in time; pass is_causal=True with it")
    if normalization not in ("global", "bucket"):
        raise ValueError(f"{normalization=} must be 'global' or 'bucket'")
    if log_decay is None:
        log_decay = jnp.zeros(value.shape[:3], value.dtype)
    heads = _split_heads(query, key, value, planes, log_decay, is_causal=is_causal, **options)

    over_heads = Tables(0, 0, 0, None)
    one_head = functools.partial(
        one_head, is_causal=is_causal, normalization=normalization, use_tanh=use_tanh
    )
    one_sequence = jax.vmap(
        one_head,
        in_axes=(Head(0, 0, 0, 0, 0, 0, None, None, over_heads),),
        out_axes=(0, over_heads),
    )
    all_sequences = jax.vmap(one_sequence, in_axes=(Head(0, 0, 0, None, None, 0, 0, 0, 0),))
    with jax.default_matmul_precision("highest"):
        out, final = all_sequences(heads)  # (B, K, G, T, V)
    out = out.transpose(0, 3, 1, 2, 4).reshape(*query.shape[:3], value.shape[-1])
    return (out, final) if return_state else out


def _split_heads(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    planes: jax.Array,
    log_decay: jax.Array,
    *,
    is_causal: bool,
    sharpness: jax.Array | float = 1.0,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: Tables | None = None,
) -> Head:
    """Returns the arguments, heads first, with defaults filled in and padding cleared."""
    batch, num_keys, kv_heads, value_dim = value.shape
    num_features = planes.shape[-3] * 2 ** planes.shape[-2]
    if initial_state is None:
        initial_state = Tables(
            numerator=jnp.zeros((batch, kv_heads, num_features, value_dim), value.dtype),
            mass=jnp.zeros((batch, kv_heads, num_features), value.dtype),
            log_decay=jnp.zeros((batch, kv_heads), value.dtype),
            segment=jnp.full(batch, -1, jnp.int32),
        )
    if key_value_mask is None:
        real = jnp.ones((batch, num_keys), bool)
    else:
        real = key_value_mask
        key, value = (jnp.where(real[..., None, None], x, 0) for x in (key, value))
        log_decay = jnp.where(real[..., None], log_decay, 0)
        query = jnp.where(real[..., None, None], query, 0) if is_causal else query
    grouped = query.reshape(*query.shape[:2], kv_heads, query.shape[2] // kv_heads, query.shape[3])
    return Head(
        query=grouped.transpose(0, 2, 3, 1, 4),
        key=key.swapaxes(1, 2),
        value=value.swapaxes(1, 2),
        planes=jnp.broadcast_to(planes, (kv_heads, *planes.shape[-3:])),
        sharpness=jnp.broadcast_to(jnp.asarray(sharpness, value.dtype), (kv_heads,)),
        log_decay=jnp.maximum(log_decay, MIN_LOG_DECAY).swapaxes(1, 2),
        real=real,
        segment_ids=segment_ids,
        initial=initial_state,
    )
