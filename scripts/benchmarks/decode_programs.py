"""The programs that the benchmark of decoding times: one step of attention over distinct caches.

A step attends from one token of every row, layer after layer, each to a cache of its own. With one
cache, its codes would stay in the card's own cache from run to run. Every baseline reads keys and
values as they are stored, (B, C, K, H), without a copy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import race_jax
from benchmarks.arrays import Random
from benchmarks.decode_cells import Cell, Setting, Shape
from benchmarks.timing import first_line
from race_jax.sparse import KVCache, Selection, SparseCache, SparseConfig

Inputs = list[tuple[Any, Any]]  # of every layer: a query, or what stands for it, and a cache
Layer = Callable[[jax.Array, Any], jax.Array]
STAGES = ("scores", "select", "attend", "other")
SELECT_KERNELS = ("sparse_threshold", "sparse_gather", "sparse_finish")


def step(layer: Layer) -> Callable[[Inputs], list]:
    """Returns a function that runs one layer after another.

    A layer waits for the one before it, as in a model. The function takes the inputs of all layers,
    and returns their outputs.
    """
    layer = jax.jit(layer)

    def run(inputs: Inputs) -> list:
        outputs: list = []
        for query, cache in inputs:
            if outputs:
                query, outputs[-1] = jax.lax.optimization_barrier((query, outputs[-1]))
            outputs.append(layer(query, cache))
        return outputs

    return run


def dense_layers() -> dict[str, Layer]:
    """The dense baselines by name."""

    def of_jax(query, cache: KVCache, implementation: str, lengths: bool = True) -> jax.Array:
        return jax.nn.dot_product_attention(
            query,
            cache.key,
            cache.value,
            key_value_seq_lengths=cache.length if lengths else None,
            implementation=implementation,
        )

    found = {
        "cuDNN": functools.partial(of_jax, implementation="cudnn"),
        "cuDNN, whole buffer": functools.partial(of_jax, implementation="cudnn", lengths=False),
        "XLA": functools.partial(of_jax, implementation="xla"),
    }
    for name in ("xla", "pallas"):
        found[f"ours, {name}"] = functools.partial(
            race_jax.dense_decode_attention, implementation=name
        )
    return found


def sparse_layer(implementation: str | None) -> Layer:
    """Sparse attention with the configuration of the cache."""
    return functools.partial(
        race_jax.sparse_decode_attention, config=None, implementation=implementation
    )


def stage_layers(config: SparseConfig) -> dict[str, Layer]:
    """The stages of the plain XLA path, each from inputs of its own, to be timed one by one.

    "scores" reads a query and a `SparseCache`, "select" scores and a `KVCache`, and "attend" a
    query, and a `KVCache` with a `Selection`.
    """

    def select(scores: jax.Array, cache: KVCache) -> Selection:
        slots = jnp.arange(cache.capacity)
        visible = slots < cache.length[:, None, None]
        recent = slots >= cache.length[:, None, None] - config.window
        forced = visible & ((slots < config.sink) | recent)
        lists = scores
        if config.selection == "group":
            lists = scores.reshape(*scores.shape[:2], cache.key.shape[2], -1, scores.shape[-1])
            lists = lists.max(axis=3)
        options = {"forced": forced, "visible": visible, "budget": config.budget}
        return race_jax.sparse.select(lists, **options).indices

    def attend(query: jax.Array, pair: tuple[KVCache, Selection]) -> jax.Array:
        return race_jax.sparse.attend(query, *pair)

    return {"scores": race_jax.sparse.score, "select": select, "attend": attend}


def can_run(layer: Layer, query: Any, cache: Any) -> str:
    """Returns why a layer cannot run, or an empty string."""
    try:
        jax.eval_shape(layer, query, cache)
    except Exception as error:  # noqa: BLE001 - whatever it is, other layers may run
        return first_line(error)
    return ""


def query_random(shape: Shape, setting: Setting) -> Random:
    """How the queries of one layer are drawn."""
    sizes = shape.rows, 1, setting.heads, setting.head_dim
    return Random(sizes, "bfloat16", deviation=1.5)


def cache_random(shape: Shape, setting: Setting) -> Random:
    """How the keys of one layer are drawn, and its values."""
    sizes = shape.rows, shape.capacity, shape.kv_heads, setting.head_dim
    return Random(sizes, "bfloat16")


def draw_caches(shape: Shape, setting: Setting, layers: int) -> list[KVCache]:
    """Draws the keys and values of all layers, which differ from layer to layer."""
    random = cache_random(shape, setting)
    length = jnp.full(shape.rows, shape.length, jnp.int32)
    return [
        KVCache(random.draw(f"key {i}"), random.draw(f"value {i}"), length) for i in range(layers)
    ]


def cache_struct(shape: Shape, setting: Setting) -> KVCache:
    """The shapes of the cache of one layer, to compile for."""
    one = cache_random(shape, setting).struct()
    return KVCache(one, one, jax.ShapeDtypeStruct((shape.rows,), jnp.int32))


def coded_struct(cell: Cell, setting: Setting) -> SparseCache:
    """The shapes of the cache of one layer with its codes."""
    config = cell.config(setting)
    make = functools.partial(SparseCache.of, config=config)
    return jax.eval_shape(make, jax.random.key(0), cache_struct(cell.shape, setting))


def with_codes(caches: Sequence[KVCache], config: SparseConfig) -> list[SparseCache]:
    """Codes the tokens of all layers, with rotations or planes of their own."""
    make = coder(config)
    return [make(jax.random.key(i), cache) for i, cache in enumerate(caches)]


@functools.cache
def coder(config: SparseConfig) -> Callable[[jax.Array, KVCache], SparseCache]:
    """A compiled function from a key and a cache to the cache with codes, which shares its arrays.

    What XLA returns would be a copy of keys and values, so only what is new comes from it.
    """

    @jax.jit
    def parts(key: jax.Array, cache: KVCache) -> tuple:
        made = SparseCache.of(key, cache, config)
        return made.codes, made.factor, made.value_norm, made.pages, made.planes

    return lambda key, cache: SparseCache(cache, *parts(key, cache), config=config)


def stage_of(kernels: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Adds up the milliseconds of a run by stage, from the names of the kernels in their order.

    What runs between the kernel of the scores and that of the attention is the selection. Where
    XLA computes the scores, what runs before the kernels of the selection counts as scores.

    Example:
      >>> run = [("q8", 1.0), ("sparse_scores", 2.0), ("sort", 3.0), ("sparse_attend", 4.0)]
      >>> stage_of(run)
      {'scores': 2.0, 'select': 3.0, 'attend': 4.0, 'other': 1.0}
    """
    found = dict.fromkeys(STAGES, 0.0)
    before = "other" if any("sparse_scores" in name for name, _ in kernels) else "scores"
    now = before
    for name, ms in kernels:
        if "sparse_scores" in name:
            found["scores"] += ms
            now = "select"
        elif "sparse_attend" in name:
            found["attend"] += ms
            now = before
        else:
            now = "select" if any(part in name for part in SELECT_KERNELS) else now
            found[now] += ms
    return found
