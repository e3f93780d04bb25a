"""Attention of a few queries to the keys and values of a cache, in plain XLA.

Queries (B, T, N, H) and a cache of C slots give outputs (B, T, N, V). A query at position t sees
the slots up to t. For softmax,

    logit_ts = q_t . k_s / sqrt(H) - m (t - s)
    out_t = sum_{s <= t} softmax_s(logit_ts + G_t - G_s) v_s

G is the running sum of the forget gate. A `Rule` replaces the weights exp(logit) of softmax.

The cache is read block by block, up to the last block that holds a token that some query sees. With
the logarithm of a weight, w, and the largest so far, c, the sums over the blocks are

    mass = sum_s exp(w_s - c),   total = sum_s exp(w_s - c) v_s,   out = total / mass

`listed` reads only the slots of a list, in the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import shards
from race_jax.sparse.cache import KVCache, kinds_of, total_decay
from race_jax.sparse.selection import Selection

# On a CPU a block then stays in its own cache. On a GPU every block costs a wait for its number.
CPU_BLOCK, OTHER_BLOCK = 512, 8192
MOST_QUERIES = 1024  # queries that are computed at once
MOST_LOGITS = 2**26  # numbers of a block's logits, a quarter of a gigabyte
LOWEST = float(jnp.finfo(jnp.float32).min)


class Rule(NamedTuple):
    """How a logit becomes the weight of a token.

        w_ts = exp(G_t - G_s) exp(log_weight(logit_ts, n_t))
        out_t = sum_s w_ts v_s   (divided by sum_s w_ts if normalised)

    Attributes:
      log_weight: a function of the logits ``(B, K, G, T, S)`` and of the numbers of tokens that the
        queries see, ``(B, 1, 1, T, 1)``. It returns logarithms of weights, of the logits' shape.
      normalized: whether the weights are divided by their sum.
      scale: what q . k is multiplied by, or None for 1 / sqrt(H).
    """

    log_weight: Callable[[jax.Array, jax.Array], jax.Array]
    normalized: bool = True
    scale: float | None = None


SOFTMAX = Rule(lambda logits, count: logits)


class _Query(NamedTuple):
    scaled: jax.Array  # (B, T, K, G, H), times the scale of the rule
    positions: jax.Array  # (B, T) int32, or below 0 for a query that sees nothing
    slopes: jax.Array | None  # (K, G)


class _Sums(NamedTuple):
    largest: jax.Array  # (B, K, G, T, 1)
    mass: jax.Array  # (B, K, G, T, 1)
    total: jax.Array  # (B, K, G, T, V)


def dense(
    query: jax.Array,
    cache: KVCache,
    positions: jax.Array,
    slopes: jax.Array | None,
    rule: Rule = SOFTMAX,
) -> jax.Array:
    """Attends to every slot up to the position of each query.

    Args:
      query: ``(B, T, N, H)``.
      cache: the keys and values.
      positions: ``(B, T)`` int32, or below 0 for a query that sees nothing and gets zeros.
      slopes: ``(K, G)`` float32, by how much a logit falls per token of distance, or None.
      rule: how logits become weights.

    Returns:
      ``(B, T, N, V)``, in the dtype of the values. Sums are float32.
    """
    batch, length, heads, width = query.shape
    kv_heads = cache.key.shape[2]
    scaled = query.astype(jnp.float32) * (width**-0.5 if rule.scale is None else rule.scale)
    scaled = scaled.reshape(batch, length, kv_heads, heads // kv_heads, width)
    queries = _Query(scaled, positions, slopes)
    out = jax.lax.platform_dependent(
        queries,
        cache,
        cpu=functools.partial(_grouped, rule, min(CPU_BLOCK, cache.capacity)),
        default=functools.partial(_grouped, rule, min(OTHER_BLOCK, cache.capacity)),
    )
    return out.reshape(batch, length, heads, out.shape[-1]).astype(cache.value.dtype)


def _grouped(rule: Rule, block: int, queries: _Query, cache: KVCache) -> jax.Array:
    """Takes long prompts in groups, so that no matrix of all tokens by all slots is made."""
    batch, length, kv_heads, group = queries.scaled.shape[:4]
    most = max(1, MOST_LOGITS // max(1, batch * kv_heads * group * block))
    most = min(MOST_QUERIES, most)
    if length <= most:
        return _over_blocks(rule, block, queries, cache)
    number = -(-length // most)

    def split(x: jax.Array, fill: int) -> jax.Array:
        widths = [(0, 0), (0, number * most - length), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, number, most, *x.shape[2:]), 1, 0)

    def run(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _over_blocks(rule, block, _Query(*part, queries.slopes), cache)

    parts = split(queries.scaled, 0), split(queries.positions, -1)
    out = jnp.moveaxis(jax.lax.map(run, parts), 0, 1)
    return out.reshape(batch, number * most, *out.shape[3:])[:, :length]


def _over_blocks(rule: Rule, block: int, queries: _Query, cache: KVCache) -> jax.Array:
    """Returns ``(B, T, K, G, V)``."""
    batch, length, kv_heads, group, _ = queries.scaled.shape
    zeros = functools.partial(jnp.zeros_like, queries.scaled)
    rows = batch, kv_heads, group, length
    mass = zeros(shape=(*rows, 1))
    sums = _Sums(mass + LOWEST, mass, zeros(shape=(*rows, cache.value.shape[-1])))
    number = (queries.positions.max(initial=-1) + block) // block

    reached = None if cache.decay is None else total_decay(cache, queries.positions)  # G_t

    def step(index: jax.Array, sums: _Sums) -> _Sums:
        # The last block ends with the cache. Slots that the block before it has read are left out.
        start = jnp.minimum(index * block, cache.capacity - block)
        key, value, decay = (
            x if x is None else jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)
            for x in (cache.key, cache.value, cache.decay)
        )
        slots = start + jnp.arange(block, dtype=jnp.int32)
        sees = (slots <= queries.positions[..., None]) & (slots >= index * block)  # (B, T, S)
        logits = _log_weights(rule, queries, key.astype(jnp.float32), slots)
        if decay is not None:
            faded = jnp.minimum(reached[:, :, None] - decay[:, None], 0.0)  # (B, T, S, K)
            logits += jnp.moveaxis(faded, 3, 1)[:, :, None]
        return _added(sums, jnp.where(sees[:, None, None], logits, -jnp.inf), sees, value)

    sums = jax.lax.fori_loop(0, number, step, sums)
    if rule.normalized:
        out = sums.total / jnp.maximum(sums.mass, jnp.finfo(jnp.float32).tiny)
    else:
        out = sums.total * jnp.exp(sums.largest)
    return jnp.moveaxis(out, 3, 1)


def _log_weights(rule: Rule, queries: _Query, key: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns the logarithms ``(B, K, G, T, S)`` of the weights, without the decay."""
    logits = jnp.einsum("btkgh,bskh->bkgts", queries.scaled, key)
    positions = queries.positions[..., None]
    if queries.slopes is not None:
        distance = (positions - slots).astype(jnp.float32)[:, None, None]
        logits -= queries.slopes[None, :, :, None, None] * distance
    return rule.log_weight(logits, jnp.maximum(positions + 1, 1)[:, None, None])


def _added(sums: _Sums, logits: jax.Array, sees: jax.Array, value: jax.Array) -> _Sums:
    """Returns the sums with those of one block of values ``(B, S, K, V)``."""
    largest = jnp.maximum(sums.largest, logits.max(axis=-1, keepdims=True))
    weights, fade = jnp.exp(logits - largest), jnp.exp(sums.largest - largest)
    seen = sees.any(axis=1)[..., None, None]
    value = jnp.where(seen, value.astype(jnp.float32), 0)  # other slots may hold NaN
    added = jnp.einsum("bkgts,bskv->bkgtv", weights, value)
    mass = sums.mass * fade + weights.sum(axis=-1, keepdims=True)
    return _Sums(largest, mass, sums.total * fade + added)


def listed(query: jax.Array, cache: KVCache, selection: Selection) -> jax.Array:
    """Attends to the tokens of a list, exactly.

    Args:
      query: ``(B, T, N, H)``.
      cache: the keys and values.
      selection: lists ``(B, T, M, budget)``, where M is N, or K if heads share a list.

    Returns:
      ``(B, T, N, V)``, in the dtype of the values, and zeros for an empty list. Sums are float32.
    """
    return shards.over_shards(
        lambda arrays, _: _listed(*arrays),
        (query, cache, selection),
        (shards.TOKENS, kinds_of(cache), Selection(shards.TOKENS, shards.TOKENS)),
        shards.TOKENS,
        kv_heads=cache.key.shape[2],
        splits_sequence=False,
    )


def _listed(query: jax.Array, cache: KVCache, selection: Selection) -> jax.Array:
    batch, length, heads, width = query.shape
    kv_heads, lists = cache.key.shape[2], selection.indices.shape[2]
    scaled = query.astype(jnp.float32) / math.sqrt(width)
    scaled = scaled.reshape(batch, length, lists, heads // lists, width)
    rows = jnp.arange(batch)[:, None, None, None]
    head = (jnp.arange(lists) // (lists // kv_heads))[None, None, :, None]
    key, value = (
        x[rows, selection.indices, head].astype(jnp.float32) for x in (cache.key, cache.value)
    )  # (B, T, M, budget, H or V)
    real = jnp.arange(selection.indices.shape[-1]) < selection.count[..., None]
    logits = jnp.einsum("btmgh,btmsh->btmgs", scaled, key)
    logits = jnp.where(real[:, :, :, None], logits, -jnp.inf)
    largest = jnp.maximum(logits.max(axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp(logits - largest)
    mass = jnp.maximum(weights.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    value = jnp.where(real[..., None], value, 0)  # slot 0 of an empty row may hold NaN
    out = jnp.einsum("btmgs,btmsv->btmgv", weights, value) / mass
    return out.reshape(batch, length, heads, out.shape[-1]).astype(cache.value.dtype)
