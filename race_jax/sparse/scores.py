"""Scores of cached tokens for a query, one function a scorer.

Each takes queries (B, T, N, H) and a `SparseCache`, and returns scores (B, T, N, C). Query head n
reads key/value head n // G.

    socket       |v_j| sum_l phi_{l, b_l(k_j)}(q), with phi the soft hash of the query
    linear       f_j sum_i q8_i level_i(k_j), with q8 the rotated query in 8 bits
    hamming      -(number of differing signs)
    quest        sum_i max(q_i lo_i, q_i hi_i) over the page of the token
    oracle       q . k_j
    random       a hash of the seed, the head, the query's position and j
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from race_jax.sparse import codes
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.config import SparseConfig

Scorer = Callable[[jax.Array, SparseCache, SparseConfig, jax.Array], jax.Array]
LOWEST = float(jnp.finfo(jnp.float32).min)


def socket(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """The score of SOCKET, with the value's norm if that is wanted."""
    del positions
    scores = soft_counts(query, cache.codes, cache.planes, config)
    if cache.value_norm is None:
        return scores
    return scores * _per_query_head(cache.value_norm, query)


def socket_unit(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """The same for queries of length one, whose projections do not saturate tanh."""
    del positions
    norm = jnp.linalg.norm(query.astype(jnp.float32), axis=-1, keepdims=True)
    unit = query.astype(jnp.float32) / jnp.where(norm > 0, norm, 1)
    return soft_counts(unit, cache.codes, cache.planes, config)


def soft_counts(query, words: jax.Array, planes: jax.Array, config: SparseConfig) -> jax.Array:
    """Returns sum_l phi_{l, b_l(k)}(q), table by table, without the 2^P corners.

    With u = tanh(W q) and the signs c of a key's code,
    log phi_l = a sum_p c_p u_p - sum_p log 2 cosh(a u_p).
    """
    coding = config.coding()
    count, tables = coding.num_planes, coding.num_tables
    logits = config.sharpness_for(query.shape[-1]) * jnp.tanh(codes.project(query, planes))
    grouped = _grouped(logits, words.shape[1])  # (B, T, K, G, L P)
    by_table = jnp.moveaxis(grouped.reshape(*grouped.shape[:-1], tables, count), -2, 0)
    order = jnp.arange(count - 1, -1, -1, dtype=jnp.uint32)

    def add(total: jax.Array, table) -> tuple[jax.Array, None]:
        index, logits = table
        bits = (codes.code_of_table(words, index, count)[..., None] >> order) & 1
        signs = 2 * bits.astype(jnp.float32) - 1  # (B, K, C, P)
        agreement = jnp.einsum("btkgp,bkcp->btkgc", logits, signs, precision="highest")
        whole = jnp.logaddexp(logits, -logits).sum(axis=-1, keepdims=True)
        return total + jnp.exp(agreement - whole), None

    shape = (*grouped.shape[:-1], words.shape[2])
    zeros = jnp.zeros_like(grouped, shape=shape) + 0 * words[:, None, :, None, :, 0]
    total, _ = jax.lax.scan(add, zeros, (jnp.arange(tables), by_table))
    return _joined(total)


def linear(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """The integer product of a rounded query and a key's levels, times the key's factor."""
    del positions
    rounded, _ = codes.round_query(query, cache.planes)
    bits = config.coding().code_bits
    return levels_product(rounded, cache.codes, bits) * _per_query_head(cache.factor, query)


def hamming(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """Minus the number of signs in which query and key differ."""
    del config, positions
    signs = codes.signs(query, cache.planes)
    return (levels_product(signs, cache.codes, 1) - signs.shape[-1]) / 2


def levels_product(rounded: jax.Array, words: jax.Array, bits: int) -> jax.Array:
    """Returns sum_i q8_i level_i, an exact integer in float32, ``(B, T, N, C)``."""
    levels = codes.unpack_levels(words, bits, rounded.shape[-1])
    return _joined(jnp.einsum("btkgm,bkcm->btkgc", _grouped(rounded, words.shape[1]), levels))


def quest(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """An upper bound of q . k over the page. A page that is not full has no score."""
    del positions
    grouped = _grouped(query.astype(jnp.float32), cache.pages.shape[1])
    lowest, highest = jnp.moveaxis(cache.pages.astype(jnp.float32), -2, 0)  # (B, K, pages, H)

    def product(part: jax.Array, bound: jax.Array) -> jax.Array:
        return jnp.einsum("btkgh,bkph->btkgp", part, bound, precision="highest")

    # max(q lo, q hi) is q hi where q > 0, and q lo elsewhere.
    scores = product(jnp.maximum(grouped, 0), highest) + product(jnp.minimum(grouped, 0), lowest)
    size = config.coding().page_size
    full = (jnp.arange(scores.shape[-1]) + 1) * size <= cache.length[:, None]
    scores = jnp.where(full[:, None, None, None], scores, LOWEST)
    return jnp.repeat(_joined(scores), size, axis=-1)


def oracle(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """The exact product, which is the limit of any selection of the best tokens."""
    del config, positions
    key = cache.kv.key.astype(jnp.float32)
    grouped = _grouped(query.astype(jnp.float32), key.shape[2])
    return _joined(jnp.einsum("btkgh,bckh->btkgc", grouped, key, precision="highest"))


def random(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """Numbers that say nothing of the keys, the same for the same seed, head and positions.

    Where heads are split over devices, each device counts its own, so that heads of different
    devices have the same numbers.
    """
    del config
    mixed = cache.planes
    for part in (
        positions[:, :, None, None],
        jnp.arange(query.shape[2])[:, None],
        jnp.arange(cache.capacity),
    ):
        mixed = _mix(mixed ^ part.astype(jnp.uint32))
    return (mixed >> 8).astype(jnp.float32)


def _mix(x: jax.Array) -> jax.Array:
    """Spreads every bit of 32 over all of them; a one-to-one map."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


FUNCTIONS: dict[str, Scorer] = {
    "socket": socket,
    "socket_unit": socket_unit,
    "sign_linear": linear,
    "quantized": linear,
    "hamming": hamming,
    "quest": quest,
    "oracle": oracle,
    "random": random,
}


def by_name(query, cache: SparseCache, config: SparseConfig, positions) -> jax.Array:
    """Returns the scores ``(B, T, N, C)`` of the scorer that the configuration names."""
    return FUNCTIONS[config.scorer](query, cache, config, positions)


def unit(query: jax.Array, cache: SparseCache, config: SparseConfig) -> jax.Array | float:
    """Returns what a score of each query is worth, so that those of several heads compare."""
    if config.scorer in ("sign_linear", "quantized"):
        return codes.round_query(query, cache.planes)[1]
    return 1.0


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """``(B, T, N, X)`` as ``(B, T, K, G, X)``."""
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, x.shape[-1])


def _joined(x: jax.Array) -> jax.Array:
    """``(B, T, K, G, C)`` as ``(B, T, N, C)``."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[-1])


def _per_query_head(x: jax.Array, query: jax.Array) -> jax.Array:
    """``(B, K, C)`` as ``(B, 1, N, C)`` float32."""
    return jnp.repeat(x, query.shape[2] // x.shape[1], axis=1)[:, None].astype(jnp.float32)
