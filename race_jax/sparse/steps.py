"""The steps of sparse decoding, in plain XLA and by the kernels, and which of the two run.

    scores(query, cache, config, positions)    -> Scores       (B, T, M, C)
    select(scores, config, positions)          -> Selection    lists (B, T, M, budget)
    attend(query, cache, selection, positions) -> outputs      (B, T, N, V)

M is N, or K if heads share a list.

Scores of slots behind the position of a query have no meaning, and no step reads them. Scores of
one kind are selected by either kind of `select`, and so on, so that each kernel stands for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import dispatch
from race_jax.core.dispatch import Choice
from race_jax.sparse import codes, exact
from race_jax.sparse import scores as scorers
from race_jax.sparse.attention import attention_limit, guarded
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.config import SparseConfig
from race_jax.sparse.selection import Selection
from race_jax.sparse.selection import select as select_by_sorting


class Scores(NamedTuple):
    """Scores ``(B, T, M, C)``, and the sample of every row that a kernel has taken, or None."""

    values: jax.Array
    sample: jax.Array | None = None


class Steps(NamedTuple):
    """The three steps, and how many queries of a key/value head they take at once."""

    scores: Callable[..., Scores]
    select: Callable[..., Selection]
    attend: Callable[..., jax.Array]
    most_queries: int


def choose(
    implementation: str | None, query: jax.Array, cache: SparseCache, config: SparseConfig
) -> Choice:
    """Returns which implementation runs, and why.

    If it is None, the kernels run for the steps that they support.

    Raises:
      ValueError: if the implementation is unknown.
      NotImplementedError: if it is ``"pallas"`` and the kernels do not support every step.
    """

    def limit() -> str | None:
        found = limits(query, cache, config)
        every = implementation == "pallas" or all(found)
        return next(filter(None, found), None) if every else None

    choice = dispatch.decide(implementation, limit)
    if choice is not dispatch.BY_PLATFORM:
        return choice
    missing = [reason for reason in limits(query, cache, config) if reason]
    reason = "; ".join([choice.reason, *(f"one step is XLA's: {reason}" for reason in missing)])
    return Choice(choice.implementation, reason)


def limits(query, cache: SparseCache, config: SparseConfig) -> tuple[str | None, ...]:
    """Returns why the kernels cannot compute scores, select and attend, or None for each."""
    if reason := dispatch.without_cuda("sparse"):
        return (reason,) * 3
    kernels = dispatch.kernels().sparse
    sharing = 1 if config.selection == "head" else query.shape[2] // cache.kv.key.shape[2]
    return (
        kernels.supports(query, cache.codes, scorer=config.scorer),
        kernels.supports_selection(query, cache.kv.key),
        attention_limit(query, cache.kv, sharing),
    )


def of_kernels(query, cache: SparseCache, config: SparseConfig) -> Steps:
    """Returns the steps with a kernel for each that the kernels support."""
    scores, select, attend = (reason is None for reason in limits(query, cache, config))
    return Steps(
        kernel_scores if scores else xla_scores,
        kernel_select if select else xla_select,
        kernel_attend if attend else xla_attend,
        most_queries=16,
    )


def xla_scores(query, cache: SparseCache, config: SparseConfig, positions) -> Scores:
    """Returns scores of every slot. Heads that share a list share the largest of their scores."""
    found = scorers.by_name(query, cache, config, positions)
    if config.selection == "head":
        return Scores(found)
    found = found * scorers.unit(query, cache, config)
    batch, length, heads, capacity = found.shape
    kv_heads = cache.kv.key.shape[2]
    return Scores(found.reshape(batch, length, kv_heads, heads // kv_heads, capacity).max(3))


def kernel_scores(query, cache: SparseCache, config: SparseConfig, positions) -> Scores:
    """Returns the same up to the position of each query, with forced tokens at +inf."""
    kernels = dispatch.kernels().sparse
    bits, kv_heads = config.coding().code_bits or 1, cache.kv.key.shape[2]
    is_hamming = config.scorer == "hamming"
    if kernels.supports_queries(query) is None:
        rounded, unit = kernels.rounded_queries(
            query, cache.planes, kv_heads=kv_heads, bits=bits, signs=is_hamming
        )
    elif is_hamming:
        rounded, unit = codes.signs(query, cache.planes), jnp.ones_like(query[..., 0], jnp.float32)
    else:
        rounded, unit = codes.round_query(query, cache.planes)
        unit = unit[..., 0]
    found = kernels.linear_scores(
        rounded,
        cache.codes,
        cache.factor,
        positions,
        unit if config.selection == "group" else None,
        bits=bits,
        forced=kernels.Forced(config.sink, config.window),
        coordinates=len(cache.planes),
        group=query.shape[2] // kv_heads,
    )
    return Scores(*found)


def xla_select(scores: Scores, config: SparseConfig, positions: jax.Array) -> Selection:
    """Returns the forced tokens and the best others that each query sees."""
    slots = jnp.arange(scores.values.shape[-1], dtype=jnp.int32)
    positions = positions[..., None]
    visible = slots <= positions
    forced = visible & ((slots < config.sink) | (slots > positions - config.window))
    return select_by_sorting(scores.values, forced=forced, visible=visible, budget=config.budget)


def xla_attend(query, cache: SparseCache, selection: Selection, positions) -> jax.Array:
    """Returns attention to the tokens of the lists, and NaN for queries that are LOST."""
    return guarded(exact.listed(query, cache.kv, selection), positions)


def kernel_select(scores: Scores, config: SparseConfig, positions: jax.Array) -> Selection:
    """Returns the same, without a look at tokens behind the position of a query."""
    sizes = {"budget": config.budget, "sink": config.sink, "window": config.window}
    kernels = dispatch.kernels().sparse
    return Selection(*kernels.select(scores.values, positions, sample=scores.sample, **sizes))


def kernel_attend(query, cache: SparseCache, selection: Selection, positions) -> jax.Array:
    """Returns the same."""
    key, value = cache.kv.key, cache.kv.value
    kernels = dispatch.kernels().sparse
    return kernels.listed_attention(query, key, value, *selection, positions=positions)


# XLA takes one query after another, because each reads tokens of its own.
XLA = Steps(xla_scores, xla_select, xla_attend, most_queries=0)
