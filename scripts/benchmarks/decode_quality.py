"""How good a selection is: the share of the best tokens that it finds, the mass, and the error.

Weights are w = softmax(q . k / sqrt(H)) over all visible tokens, and a selection keeps some.

    recall  the share of the best candidates by q . k that are kept; forced tokens do not count
    mass    the sum of w over the kept tokens
    error   RMS(sparse - dense) / RMS(dense) of the outputs

The keys of `runs` are alike over 32 neighbors, as those of a text are: with one of 64 Gaussian
centers c for every run, k = 0.6 c + 0.8 N(0, 1), q = 1.5 (0.5 c + 0.87 N(0, 1)), and
v = N(0, 1) exp(0.3 N(0, 1)).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

import race_jax
from race_jax.sparse import KVCache, Report, SparseCache, SparseConfig, sparse_decode_attention

CENTERS, RUN = 64, 32


class Quality(NamedTuple):
    """Means over queries and heads. `spread` is the least standard deviation of a head's scores."""

    recall: jax.Array
    mass: jax.Array
    error: jax.Array
    spread: jax.Array


def draw_runs(
    key: jax.Array, rows: int, length: int, heads: int, kv_heads: int, width: int
) -> tuple[jax.Array, KVCache]:
    """Draws one query of every head ``(B, 1, N, H)``, and a full cache of bfloat16."""
    keys = jax.random.split(key, 7)
    centers = jax.random.normal(keys[0], (rows, CENTERS, kv_heads, width))
    places = jax.random.randint(keys[1], (rows, -(-length // RUN)), 0, CENTERS)
    places = jnp.repeat(places, RUN, axis=1)[:, :length]
    row = jnp.arange(rows)[:, None]
    k = 0.6 * centers[row, places]
    k += 0.8 * jax.random.normal(keys[2], k.shape)
    v = jax.random.normal(keys[3], k.shape)
    v *= jnp.exp(0.3 * jax.random.normal(keys[4], (*k.shape[:3], 1)))
    wanted = jax.random.randint(keys[5], (rows, heads), 0, CENTERS)
    q = 0.5 * centers[row, wanted, jnp.arange(heads) // (heads // kv_heads)]
    q = 1.5 * (q + 0.87 * jax.random.normal(keys[6], q.shape))
    cache = KVCache.init(rows, length, kv_heads, width)
    cache = cache.append(k.astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    return q[:, None].astype(jnp.bfloat16), cache


def kept_mask(report: Report, heads: int, capacity: int) -> jax.Array:
    """Returns which tokens every head has read, ``(B, T, N, C)`` bool."""
    indices, count = report.indices, report.count
    real = jnp.arange(indices.shape[-1]) < count[..., None]
    at = jnp.where(real, indices, capacity)
    lead = jnp.indices(at.shape, sparse=True)[:3]
    mask = jnp.zeros((*at.shape[:3], capacity), bool).at[(*lead, at)].set(True, mode="drop")
    return jnp.repeat(mask, heads // mask.shape[2], axis=2)


def exact_logits(query: jax.Array, cache: KVCache) -> tuple[jax.Array, jax.Array]:
    """Returns q . k / sqrt(H) of the last T tokens, -inf where invisible, and their positions.

    The shapes are ``(B, T, N, C)`` and ``(B, T, 1, 1)``.
    """
    rows, count, heads, width = query.shape
    grouped = query.astype(jnp.float32).reshape(rows, count, cache.key.shape[2], -1, width)
    key = cache.key.astype(jnp.float32)
    logits = jnp.einsum("btkgh,bckh->btkgc", grouped, key, precision="highest")
    logits = logits.reshape(rows, count, heads, -1) / math.sqrt(width)
    positions = cache.length[:, None] - count + jnp.arange(count)
    positions = positions[..., None, None]
    slots = jnp.arange(cache.capacity)
    return jnp.where(slots <= positions, logits, -jnp.inf), positions


def recall_and_mass(
    query: jax.Array, cache: KVCache, mask: jax.Array, wanted: SparseConfig
) -> tuple[jax.Array, jax.Array]:
    """Returns recall and mass of every query and head, ``(B, T, N)`` each.

    Args:
      query: ``(B, T, N, H)``, the queries of the last T tokens.
      cache: the keys and values.
      mask: ``(B, T, N, C)`` bool, the tokens that were kept.
      wanted: the forced tokens, which recall leaves out, and the budget.
    """
    logits, positions = exact_logits(query, cache)
    mass = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0).sum(axis=-1)
    slots = jnp.arange(cache.capacity)
    forced = (slots < wanted.sink) | (slots > positions - wanted.window)
    candidates = jnp.where(forced, -jnp.inf, logits)
    number = max(1, wanted.budget - wanted.sink - wanted.window)
    found, best = jax.lax.top_k(candidates, min(number, cache.capacity))
    hit = jnp.take_along_axis(mask, best, axis=-1) & (found > -jnp.inf)
    return hit.sum(axis=-1) / jnp.maximum((found > -jnp.inf).sum(axis=-1), 1), mass


def quality(
    query: jax.Array, cache: SparseCache, wanted: SparseConfig, implementation: str | None = None
) -> Quality:
    """Measures the configuration of a cache.

    Args:
      query: ``(B, T, N, H)``, the queries of the last T tokens.
      cache: the cache.
      wanted: as for `recall_and_mass`. It is the same for all methods that are compared.
      implementation: "pallas", "xla", or None for the best one there is.
    """
    kv = cache.kv
    out, report = sparse_decode_attention(
        query, cache, implementation=implementation, return_report=True
    )
    dense = race_jax.dense_decode_attention(query, kv, implementation="xla").astype(jnp.float32)
    mask = kept_mask(report, query.shape[2], kv.capacity)
    recall, mass = recall_and_mass(query, kv, mask, wanted)
    rms = [jnp.sqrt(jnp.mean(jnp.square(x))) for x in (out.astype(jnp.float32) - dense, dense)]
    scores = race_jax.sparse.score(query, cache)
    visible = jnp.arange(kv.capacity) < kv.length[:, None, None, None]
    spread = jnp.std(scores, axis=-1, where=visible).min()
    return Quality(recall.mean(), mass.mean(), rms[0] / rms[1], spread)
