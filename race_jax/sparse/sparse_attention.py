"""Attention of new tokens to the best tokens of a cache, at most `budget` of them a head.

Every query scores all tokens that it sees, keeps the forced ones and the best others, and attends
to these exactly:

    out_t = sum_{s in kept(t)} softmax_s(q_t . k_s / sqrt(H)) v_s
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import dispatch, shards
from race_jax.core.dispatch import Choice
from race_jax.sparse import attention, scores, steps
from race_jax.sparse.cache import KVCache
from race_jax.sparse.coded import SparseCache, kinds_of
from race_jax.sparse.config import SparseConfig
from race_jax.sparse.selection import Selection
from race_jax.sparse.steps import Steps

SHORTEST_PREFIX = 4096  # slots; a cache of no more is always read whole in XLA
KINDS = shards.TOKENS, Selection(shards.TOKENS, shards.TOKENS)  # of outputs and lists


class Report(NamedTuple):
    """What the queries of a call have read.

    Attributes:
      indices: ``(B, T, M, budget)`` int32, the positions that were read, ascending, and 0 after
        ``count``. M is N, or K if heads share a list. They are all 0 if attention was dense.
      count: ``(B, T, M)`` int32, the number of tokens that were read. It is 0 where the output is
        NaN because the cache cannot answer the query.
      is_dense: whether attention was dense, because all sequences are short.
    """

    indices: jax.Array
    count: jax.Array
    is_dense: jax.Array


def sparse_decode_attention(
    query: jax.Array,
    cache: SparseCache,
    config: SparseConfig | None = None,
    *,
    query_mask: jax.Array | None = None,
    implementation: str | None = None,
    return_report: bool = False,
) -> jax.Array | tuple[jax.Array, Report]:
    r"""Computes exact attention of the last tokens of every row to the best tokens before them.

    .. math::
        out_t = \sum_{s \in kept(t)} \mathrm{softmax}_s(q_t \cdot k_s / \sqrt{H}) \, v_s

    The kept tokens are the first ``sink``, the last ``window`` with the query's own, and those of
    the others that score best, min(budget, visible) unique tokens in all. The weights are those of
    a softmax over the kept tokens alone, so the result is biased where attention is flat. All
    tokens are scored, so a step still takes time in proportion to the length. While every sequence
    is shorter than ``dense_below``, the result is that of `dense_decode_attention` to the last bit;
    under ``jax.vmap`` both are computed. Inside ``jax.shard_map`` over the batch, every device goes
    by the lengths of its own rows, and on an Explicit mesh by those of all rows.

    Args:
        query: shape (B, T, N, H), floating: the queries of the last T tokens appended. Each has its
            own list. The dtype may be another one than the cache's; scores and logits are float32
            in any case. The kernels then leave some steps to XLA.
        cache: the keys, values and codes of all tokens, also of these.
        config: what to keep, or None for the configuration of the cache. It may differ from that in
            everything that the codes do not depend on.
        query_mask: shape (B, T) bool, the mask of the `append`, or None. Padded queries return
            zeros.
        implementation: "xla", "pallas", or None for the kernels where they support the call.
        return_report: whether to return what was read as well.

    Returns:
        Shape (B, T, N, V), with the dtype of the values, or that and a `Report`. A row that has
        passed its capacity, or holds fewer tokens than there are queries, returns NaN.

    Raises:
        ValueError: if shapes do not fit, the cache has no codes or other ones, or a row is known to
            hold fewer tokens than its queries.
        TypeError: if the query is not floating, or the mask is not bool.
        NotImplementedError: if the implementation is "pallas" and the kernels do not support the
            call, or a gradient is taken.

    Example:
        >>> import jax, jax.numpy as jnp, race_jax
        >>> config = race_jax.SparseConfig(
        ...     budget=3, sink=1, window=1, scorer="oracle", dense_below=0
        ... )
        >>> cache = race_jax.SparseCache.init(
        ...     jax.random.key(0), 1, 8, kv_heads=1, head_dim=2, dtype=jnp.float32, config=config
        ... )
        >>> keys = jnp.array([0.0, 5.0, 1.0, 2.0, 0.0])[None, :, None, None] * jnp.ones(2)
        >>> cache = cache.append(keys, keys)
        >>> out, report = race_jax.sparse_decode_attention(
        ...     jnp.ones((1, 1, 1, 2)), cache, return_report=True
        ... )
        >>> report.indices[0, 0, 0].tolist(), int(report.count[0, 0, 0])
        ([0, 1, 4], 3)

    Source: arXiv 2602.06283. One selection in place of three lists goes beyond it.
    """
    config = _checked(query, cache, config, query_mask)
    choice = steps.choose(implementation, query, cache, config)
    # What the dense kernel cannot take is dense in XLA, also where "pallas" was asked for.
    dense_asked = None if implementation == "pallas" else implementation
    dense_choice = attention.choose_dense(dense_asked, query, cache.kv)
    query, cache = attention.inference_only((query, cache))
    with jax.named_scope("sparse_decode_attention"):
        out, report = _attend(choice, dense_choice, config, query, cache, query_mask)
    return (out, report) if return_report else out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attend(
    choice: Choice, dense_choice: Choice, config: SparseConfig, query, cache: SparseCache, mask
) -> tuple[jax.Array, Report]:
    """Attends to all tokens or to the best of them. It is compiled once, also outside of a jit."""
    is_dense = jnp.bool_(False)
    if config.dense_below > 0:  # all rows count, also those of other devices of an Explicit mesh
        is_dense = cache.length.max(initial=0) < config.dense_below
    arrays = {"query": query, "cache": cache, "is_dense": is_dense}
    kinds = {"query": shards.TOKENS, "cache": kinds_of(cache), "is_dense": shards.SHARED}
    if mask is not None:
        arrays["mask"], kinds["mask"] = mask, shards.SLOTS
    out, selection = shards.over_shards(
        lambda arrays, _: _attend_here(choice, dense_choice, config, **arrays),
        arrays,
        kinds,
        KINDS,
        kv_heads=cache.kv.key.shape[2],
        splits_sequence=False,
    )
    return out, Report(*selection, is_dense)


def _attend_here(
    choice: Choice, dense_choice: Choice, config: SparseConfig, query, cache, is_dense, mask=None
) -> tuple[jax.Array, Selection]:
    """Attends on one device."""
    positions = attention.query_positions(query.shape[1], cache.kv, mask)

    def sparse(query: jax.Array) -> tuple[jax.Array, Selection]:
        kernels = steps.of_kernels(query, cache, config)
        xla = functools.partial(_sparse_of_prefix, config)
        pallas = functools.partial(_sparse, kernels, config)
        return dispatch.by_platform(choice, xla, pallas)(query, cache, positions)

    def dense(query: jax.Array) -> tuple[jax.Array, Selection]:
        out = attention.over_all(dense_choice, query, cache.kv, positions)
        lists = query.shape[2] if config.selection == "head" else cache.kv.key.shape[2]
        seen = jnp.maximum(positions + 1, 0)[..., None]
        count = jnp.broadcast_to(seen, (*positions.shape, lists))
        indices = jnp.zeros((*count.shape, config.budget), jnp.int32)
        return shards.vary_alike((out, Selection(indices, count)), KINDS)

    if config.dense_below == 0:
        return sparse(query)
    return jax.lax.cond(is_dense, dense, sparse, query)


def _sparse_of_prefix(config: SparseConfig, query, cache: SparseCache, positions):
    """Reads the shortest of some prefixes that holds all tokens, so that free slots cost little."""
    sizes = _prefix_sizes(cache.capacity, config)
    if len(sizes) == 1:
        return _sparse(steps.XLA, config, query, cache, positions)
    branches = [
        lambda query, cache, positions, size=size: _sparse(
            steps.XLA, config, query, cache.first(size), positions
        )
        for size in sizes
    ]
    index = jnp.searchsorted(jnp.array(sizes[:-1], jnp.int32), cache.length.max(initial=0))
    return jax.lax.switch(index, branches, query, cache, positions)


def _prefix_sizes(capacity: int, config: SparseConfig) -> list[int]:
    """Returns lengths that grow by a factor of four, in whole pages, and the capacity.

    Example:
      >>> _prefix_sizes(70000, SparseConfig(budget=512))
      [4096, 16384, 65536, 70000]
    """
    page = config.coding().page_size or 1
    size, sizes = max(SHORTEST_PREFIX, config.budget), []
    while size < capacity:
        sizes.append(-(-size // page) * page)
        size *= 4
    return [*(size for size in sizes if size < capacity), capacity]


def _sparse(take: Steps, config: SparseConfig, query, cache: SparseCache, positions):
    """Takes all queries at once, or one after another if they are too many for the steps."""

    def some(query: jax.Array, positions: jax.Array) -> tuple[jax.Array, Selection]:
        scores = take.scores(query, cache, config, positions)
        selection = take.select(scores, config, positions)
        return take.attend(query, cache, selection, positions), selection

    def one(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Selection]:
        return jax.tree.map(lambda x: x[:, 0], some(*(x[:, None] for x in inputs)))

    count, group = query.shape[1], query.shape[2] // cache.kv.key.shape[2]
    if count == 1 or count * group <= take.most_queries:
        out, selection = some(query, positions)
    else:
        by_time = jnp.moveaxis(query, 1, 0), jnp.moveaxis(positions, 1, 0)
        out, selection = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), jax.lax.map(one, by_time))
    # The branches of a `lax.cond` must vary over the same axes of a shard_map.
    return shards.vary_alike((out, selection), KINDS)


def score(query: jax.Array, cache: SparseCache, config: SparseConfig | None = None) -> jax.Array:
    """Returns the scores ``(B, T, N, C)`` float32 of all slots, before any is forced or hidden.

    Args:
      query: ``(B, T, N, H)``, the queries of the last T tokens.
      cache: the codes of all tokens.
      config: as for `sparse_decode_attention`.

    Example:
      >>> import jax, jax.numpy as jnp, race_jax
      >>> config = race_jax.SparseConfig(scorer="oracle")
      >>> cache = race_jax.SparseCache.init(jax.random.key(0), 1, 8, 1, 2, config=config)
      >>> cache = cache.append(*2 * [jnp.ones((1, 3, 1, 2), jnp.bfloat16)])
      >>> race_jax.sparse.score(jnp.ones((1, 1, 2, 2)), cache).shape
      (1, 1, 2, 8)
    """
    config = _checked(query, cache, config, None)
    return _scores(config, query, cache)


@functools.partial(jax.jit, static_argnums=0)
def _scores(config: SparseConfig, query: jax.Array, cache: SparseCache) -> jax.Array:
    def run(arrays: tuple[jax.Array, SparseCache], _: None) -> jax.Array:
        query, cache = arrays
        positions = attention.query_positions(query.shape[1], cache.kv, None)
        return scores.by_name(query, cache, config, positions)

    return shards.over_shards(
        run,
        (query, cache),
        (shards.TOKENS, kinds_of(cache)),
        shards.TOKENS,
        kv_heads=cache.kv.key.shape[2],
        splits_sequence=False,
    )


def explain(query: jax.Array, cache: SparseCache, config: SparseConfig | None = None) -> Choice:
    """Says which implementation `sparse_decode_attention` would run, and why.

    Example:
      >>> import jax, jax.numpy as jnp, race_jax
      >>> config = race_jax.SparseConfig(scorer="oracle")
      >>> cache = race_jax.SparseCache.init(jax.random.key(0), 1, 8, 1, 2, config=config)
      >>> race_jax.sparse.explain(jnp.ones((1, 0, 1, 2)), cache).implementation
      Traceback (most recent call last):
      ValueError: query has no token; append the keys of at least one first.
    """
    config = _checked(query, cache, config, None)
    return steps.choose(None, query, cache, config)


def kept(config: SparseConfig, length: int, longest: int | None = None) -> tuple[int, bool]:
    """Returns how many tokens a query at the end of `length` tokens reads, and whether all.

    Args:
      config: the configuration.
      length: the number of tokens of its row, with its own.
      longest: the number of tokens of the longest row, or None for ``length``.

    Example:
      >>> import race_jax
      >>> config = race_jax.SparseConfig(budget=512, dense_below=1000)
      >>> race_jax.sparse.kept(config, 999), race_jax.sparse.kept(config, 1000)
      ((999, True), (512, False))
    """
    is_dense = (length if longest is None else longest) < config.dense_below
    return (length if is_dense else min(config.budget, length)), is_dense


def _checked(query, cache, config: SparseConfig | None, mask) -> SparseConfig:
    """Checks all arguments, and returns the configuration that counts."""
    if isinstance(cache, KVCache):
        raise ValueError(
            "this cache has no codes; make a SparseCache, or call dense_decode_attention."
        )
    if not isinstance(cache, SparseCache):
        raise TypeError(f"cache must be a SparseCache; got {type(cache).__name__}.")
    attention.check_query(query, cache.kv, mask)
    config = cache.config if config is None else config
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig; got {type(config).__name__}.")
    held, asked = cache.config.coding(), config.coding()
    if held != asked:
        raise ValueError(
            f"the cache was coded for {held.describe()}; config asks for {asked.describe()}: make "
            "a cache with SparseCache.init(config=...)."
        )
    return config
