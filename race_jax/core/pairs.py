"""Attention that weighs every pair of tokens, for methods that are not softmax.

    out_t = sum_s w_ts v_s,   or, normalised,   out_t = sum_s w_ts v_s / sum_s w_ts
    w_ts = visible(t, s) exp(G_t - G_s) weigh(q_t . k_s + bias_ts)

Time and memory are quadratic in the length.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from race_jax.core import masking, shards
from race_jax.core.state import normalize

Weigh = Callable[[jax.Array, jax.Array], jax.Array]


def pair_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    weigh: Weigh,
    *,
    normalized: bool,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Computes attention from the weights of all pairs.

        out_t = sum_s w_ts v_s   (divided by sum_s w_ts if normalised)
        w_ts = visible(t, s) exp(G_t - G_s) weigh(q_t . k_s + bias_ts)

    G is the running sum of ``log_decay``. Weights are float32 or wider.

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, S, K, H)``. Query head n uses key/value head ``n // (N // K)``.
      value: ``(B, S, K, V)``. The output has its dtype.
      weigh: a function of the logits ``(B, K, G, T, S)`` and of the numbers of keys that the
        queries see ``(B, 1, 1, T, 1)``. It returns weights of the logits' shape.
      normalized: whether the weights are divided by their sum.
      bias: ``(B, N, T, S)``, which is added to the logits, or None.
      is_causal: whether a token sees only itself and earlier tokens. This needs T == S.
      log_decay: ``(B, S, K)``, <= 0, the forget gate; it needs ``is_causal=True``.
      key_value_mask: ``(B, S)`` bool, True where there is a token.
      segment_ids: ``(B, T)`` int. A token sees only its own segment. This needs T == S.

    Returns:
      The output ``(B, T, N, V)``, which is zero where a query sees no key.

    Raises:
      ValueError: if shapes do not fit, or two arguments exclude each other.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from race_jax.core.pairs import pair_attention
      >>> x = jnp.ones((1, 3, 1, 1))
      >>> relu = lambda logits, count: jax.nn.relu(logits) / count
      >>> value = jnp.arange(3.0).reshape(1, 3, 1, 1)
      >>> pair_attention(x, x, value, relu, normalized=False, is_causal=True).ravel().tolist()
      [0.0, 0.5, 1.0]
    """
    _check(query, key, value, is_causal, log_decay, segment_ids)
    masking.check_key_value_mask(key_value_mask, key.shape[:2])
    masking.check_segment_ids(segment_ids, query.shape[:2], key_value_mask)
    masking.check_log_decay(log_decay, key.shape[:3], key_value_mask)
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "log_decay": log_decay,
        "bias": bias,
        "mask": key_value_mask,
        "segment_ids": segment_ids,
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    return shards.over_shards(
        lambda arrays, _: _all_pairs(weigh, normalized, is_causal, **arrays),
        arrays,
        {name: _AXES[name] for name in arrays},
        shards.TOKENS,
        kv_heads=key.shape[2],
        splits_sequence=False,
    )


_AXES = dict.fromkeys(("query", "key", "value", "log_decay"), shards.TOKENS)
_AXES |= dict.fromkeys(("mask", "segment_ids"), shards.SLOTS) | {"bias": shards.TABLES}


def _all_pairs(
    weigh: Weigh,
    normalized: bool,
    is_causal: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None = None,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Computes ``pair_attention`` for the rows and heads of one device."""
    batch, length, heads, width = query.shape
    kv_heads, pairs = key.shape[2], (length, key.shape[1])
    dtype = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    key, wide = (masking.select_tokens(x, mask) for x in (key, value.astype(dtype)))
    visible = _visible(batch, pairs, is_causal, mask, segment_ids)[:, None, None]
    if is_causal or segment_ids is not None:
        query = masking.select_tokens(query, mask)
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key, preferred_element_type=dtype)
    if bias is not None:
        logits += bias.reshape(logits.shape)
    count = jnp.sum(visible, axis=-1, keepdims=True, dtype=jnp.int32)
    weights = jnp.where(visible, weigh(logits, jnp.maximum(count, 1)), 0.0)
    if log_decay is not None:
        total = jnp.cumsum(masking.bound_log_decay(log_decay, mask), axis=1)
        total = jnp.moveaxis(total, 2, 1)[:, :, None]  # (B, K, 1, S)
        difference = total[..., :, None] - total[..., None, :]
        weights *= jnp.exp(jnp.where(visible, difference, -jnp.inf))
    out = jnp.einsum("bkgts,bskv->btkgv", weights, wide)
    if normalized:
        out = normalize(out, jnp.moveaxis(weights.sum(axis=-1), 3, 1))
    return out.reshape(batch, length, heads, value.shape[3]).astype(value.dtype)


def _visible(
    batch: int,
    pairs: tuple[int, int],
    is_causal: bool,
    mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Returns which keys ``(B, T, S)`` a query sees. Padded queries of one sequence see none."""
    visible = jnp.ones((batch, *pairs), bool)
    if mask is not None:
        visible &= mask[:, None, :]
    if is_causal:
        visible &= jnp.tril(jnp.ones(pairs, bool))[None]
    if segment_ids is not None:
        visible &= segment_ids[:, :, None] == segment_ids[:, None, :]
    if mask is not None and (is_causal or segment_ids is not None):
        visible &= mask[:, :, None]
    return visible


def _check(query, key, value, is_causal, log_decay, segment_ids) -> None:
    shapes = f"got query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"query, key and value must have 4 axes (B, T, heads, size); {shapes}")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ValueError(f"key and value must agree in (B, S, K), and query in B; {shapes}")
    if query.shape[3] != key.shape[3] or query.shape[2] % max(key.shape[2], 1):
        raise ValueError(
            f"query and key must have one width, and N must be a multiple of K; {shapes}"
        )
    if (is_causal or segment_ids is not None) and query.shape[1] != key.shape[1]:
        raise ValueError(f"is_causal and segment_ids need as many queries as keys; {shapes}")
    if log_decay is not None and not is_causal:
        raise ValueError("log_decay needs is_causal=True, because a forget gate has a direction")
