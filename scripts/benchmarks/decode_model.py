"""A trained softmax model that reads a context densely and goes on from it in another way.

The blocks of the model are run one by one. All of them have the same shapes, so that a way to
decode is compiled once, for one block, and in a thread beside others.
"""

import dataclasses
import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.decode_quality import exact_logits, kept_mask, recall_and_mass
from race_jax.core.rotary import rotate
from race_jax.core.state import EMPTY
from race_jax.layers.parts import Span, init_taps
from race_jax.layers.self_attention import AttentionState
from race_jax.layers.short_conv import TAPS
from race_jax.layers.softmax import SoftmaxAttention
from race_jax.models import TransformerLM
from race_jax.models.decode import room_for
from race_jax.sparse import KVCache, SparseCache, SparseConfig, sparse_decode_attention

CHUNK = 64  # tokens that are read at a time after the context
PROBES = 16  # last tokens of a text whose selections are looked at
WORKERS = 8


class Read(NamedTuple):
    """What has been read of some rows: the states of all layers, and the number of tokens."""

    layers: list[AttentionState]
    length: int

    @property
    def memories(self) -> list[KVCache] | list[SparseCache]:
        """The caches of all layers."""
        return [layer.memory for layer in self.layers]

    def with_memories(self, memories: list) -> "Read":
        """Returns the same with other caches."""
        layers = zip(self.layers, memories, strict=True)
        return self._replace(layers=[layer._replace(memory=memory) for layer, memory in layers])


@functools.partial(jax.jit, static_argnums=0)
def block_step(graph, variables, x, positions, state):
    """Runs one block: hidden states (B, T, D) and the state after them."""
    return nnx.merge(graph, variables)(x, positions, None, None, state, None)


@functools.partial(jax.jit, static_argnames="config")
def coded(key: jax.Array, cache: KVCache, *, config: SparseConfig) -> SparseCache:
    """Codes the tokens of one layer."""
    return SparseCache.of(key, cache, config)


class Runner:
    """Runs a model block by block.

    Args:
        model: a causal softmax model.
        rows: B, the rows of every call.
        context: the most tokens of a row.

    Raises:
        ValueError: the model is of another kind.
    """

    def __init__(self, model: TransformerLM, rows: int, context: int):
        config = model.trunk.blocks[0].attention.config
        softmax = all(isinstance(b.attention, SoftmaxAttention) for b in model.trunk.blocks)
        if not (softmax and model.trunk.keeps_tokens):
            raise ValueError(
                "the study needs a softmax model without forget gate, such as that of "
                "configs/lm_books_softmax.py"
            )
        if config.positions == "alibi":
            raise ValueError("sparse decoding does not go with ALiBi; train with positions='rope'")
        self._model, self._config, self.rows = model, config, rows
        self._state = model.init_state(rows, room_for(context))
        self._blocks = [nnx.split(block) for block in model.trunk.blocks]
        embed, norm = model.trunk.embedding, model.trunk.norm
        self._embed = jax.jit(lambda tokens, positions: embed(tokens, positions))
        self._norm = jax.jit(lambda x: norm(x))
        self._scores = jax.jit(self._nats_and_best)
        self._threads = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1))

    def _nats_and_best(self, hidden: jax.Array, targets: jax.Array) -> tuple:
        logits = jax.nn.log_softmax(self._model.logits(hidden))
        nats = -jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return nats, logits.argmax(axis=-1)

    def run(self, tokens: np.ndarray, read: Read, step: Any = None, keep: int = 0) -> tuple:
        """Reads further tokens.

        Args:
            tokens: shape (B, T).
            read: what has been read.
            step: `block_step` compiled for a way to decode, or None.
            keep: the number of last hidden states of every block that are returned.

        Returns:
            The hidden states (B, T, D) after the last norm, the new `Read`, and what was kept.
        """
        positions = read.length + np.arange(tokens.shape[1], dtype=np.int32)
        positions = jnp.asarray(np.broadcast_to(positions, tokens.shape))
        x, layers, kept = self._embed(jnp.asarray(tokens, jnp.int32), positions), [], []
        for (graph, variables), state in zip(self._blocks, read.layers, strict=True):
            kept.append(x[:, x.shape[1] - keep :])
            if step is None:
                x, state = block_step(graph, variables, x, positions, state)
            else:
                x, state = step(variables, x, positions, state)
            layers.append(state)
        return self._norm(x), Read(layers, read.length + tokens.shape[1]), kept

    def prefill(self, tokens: np.ndarray) -> Read:
        """Reads a context densely."""
        return self.run(tokens, Read(list(self._state.layers), 0))[1]

    def go_on(self, tokens: np.ndarray, read: Read, step: Any = None) -> tuple:
        """Reads (B, n CHUNK + 1) tokens chunk by chunk, and predicts all but the first.

        Returns:
            The nats and the likeliest tokens, each (B, n CHUNK), as NumPy arrays.
        """
        found = []
        for first in range(0, tokens.shape[1] - 1, CHUNK):
            piece = tokens[:, first : first + CHUNK + 1]
            hidden, read, _ = self.run(piece[:, :-1], read, step)
            found.append(self._scores(hidden, jnp.asarray(piece[:, 1:], jnp.int32)))
        parts = zip(*jax.device_get(found), strict=True)
        return tuple(np.concatenate(part, axis=1) for part in parts)

    def code(self, read: Read, config: SparseConfig, draw: int) -> Read:
        """Codes the tokens of all layers, with planes of their own for every layer and draw."""
        key = jax.random.key(draw)
        memories = [
            coded(jax.random.fold_in(key, i), memory, config=config)
            for i, memory in enumerate(read.memories)
        ]
        return read.with_memories(memories)

    def compile(self, config: SparseConfig) -> Future:
        """Begins to compile a block that reads a chunk with sparse attention."""
        layer, (graph, variables) = self._state.layers[0], self._blocks[0]
        make = functools.partial(SparseCache.of, config=config)
        memory = jax.eval_shape(make, jax.random.key(0), layer.memory)
        shape = self.rows, CHUNK
        positions = jax.ShapeDtypeStruct(shape, jnp.int32)
        x = jax.eval_shape(self._embed, positions, positions)
        inputs = graph, variables, x, positions, layer._replace(memory=memory)
        return self._threads.submit(lambda: block_step.lower(*inputs).compile())

    def probe(self, tokens: np.ndarray, read: Read) -> tuple[list[jax.Array], Read]:
        """Reads tokens densely, and returns the last queries (B, PROBES, N, H) of every layer."""
        _, read, kept = self.run(tokens, read, keep=PROBES + TAPS)
        positions = read.length - PROBES + jnp.arange(PROBES, dtype=jnp.int32)[None]
        positions = jnp.broadcast_to(positions, (self.rows, PROBES))
        span = Span(jnp.full(self.rows, EMPTY, jnp.int32), None, None)
        queries = []
        for x, (graph, variables) in zip(kept, self._blocks, strict=True):
            block = nnx.merge(graph, variables)
            taps = init_taps(self._config, self.rows)
            _, (query, _, _), _ = block.attention.project(block.attention_norm(x), taps, span)
            query = query[:, TAPS:]  # a convolution needs the tokens before
            turns = self._config.positions == "rope"
            queries.append(rotate(query, positions, self._config.rope_base) if turns else query)
        return queries, read


@functools.partial(jax.jit, static_argnums=2)
def selected_quality(query: jax.Array, cache: SparseCache, wanted: SparseConfig) -> tuple:
    """Mean recall and mass of the lists of a layer, `decode_quality.recall_and_mass`."""
    _, report = sparse_decode_attention(query, cache, return_report=True)
    mask = kept_mask(report, query.shape[2], cache.capacity)
    recall, mass = recall_and_mass(query, cache.kv, mask, wanted)
    return recall.mean(), mass.mean()


class Statistics(NamedTuple):
    """What decides between scorers, for every key/value head ``(K,)`` of a layer.

    Attributes:
      key_spread: standard deviation over mean of the norms of keys, within a sequence.
      value_spread: the same of values.
      value_and_attention: the correlation of the norm of a value with the attention it gets.
      mean_key_share: |mean of keys|^2 / mean of |key|^2.
      overlap: the mean share of the best candidates that two query heads of a group have in common.
    """

    key_spread: jax.Array
    value_spread: jax.Array
    value_and_attention: jax.Array
    mean_key_share: jax.Array
    overlap: jax.Array


@functools.partial(jax.jit, static_argnums=2)
def statistics(query: jax.Array, cache: KVCache, wanted: SparseConfig) -> Statistics:
    """Measures a layer with the last queries ``(B, T, N, H)`` of full rows."""
    real = (jnp.arange(cache.capacity) < cache.length[:, None])[..., None]  # (B, C, 1)
    key, value = cache.key.astype(jnp.float32), cache.value.astype(jnp.float32)
    norms = [jnp.linalg.norm(x, axis=-1) for x in (key, value)]  # (B, C, K)
    spreads = [jnp.std(x, 1, where=real) / jnp.mean(x, 1, where=real) for x in norms]
    mean = jnp.mean(key, axis=1, where=real[..., None])
    share = jnp.square(mean).sum(-1) / jnp.mean(jnp.square(norms[0]), 1, where=real)
    logits, positions = exact_logits(query, cache)
    kv_heads = key.shape[2]
    weights = jax.nn.softmax(logits, axis=-1)
    weights = weights.reshape(*weights.shape[:2], kv_heads, -1, weights.shape[-1])
    attention = jnp.moveaxis(weights.mean(axis=(1, 3)), 1, 2)  # (B, C, K)

    def centered(x: jax.Array) -> jax.Array:
        return jnp.where(real, x - jnp.mean(x, 1, keepdims=True, where=real), 0)

    a, b = centered(norms[1]), centered(attention)
    scale = jnp.sqrt(jnp.square(a).sum(1) * jnp.square(b).sum(1))
    correlation = (a * b).sum(1) / jnp.maximum(scale, 1e-30)
    slots = jnp.arange(cache.capacity)
    forced = (slots < wanted.sink) | (slots > positions - wanted.window)
    number = max(1, wanted.budget - wanted.sink - wanted.window)
    candidates = jnp.where(forced, -jnp.inf, logits)
    _, best = jax.lax.top_k(candidates, number)
    mask = kept_mask_of(best, cache.capacity).reshape(*weights.shape[:4], -1)
    both = jnp.einsum("btkgc,btkhc->btkgh", mask, mask) / number
    group = both.shape[-1]
    pairs = (both.sum((-1, -2)) - group) / max(1, group * (group - 1))
    per_head = *spreads, correlation, share
    return Statistics(*(x.mean(axis=0) for x in per_head), pairs.mean(axis=(0, 1)))


def kept_mask_of(indices: jax.Array, capacity: int) -> jax.Array:
    """Returns 1 at the listed tokens, ``(B, T, N, C)`` float32."""
    lead = jnp.indices(indices.shape, sparse=True)[:3]
    return jnp.zeros((*indices.shape[:3], capacity)).at[(*lead, indices)].set(1)


def for_budget(read: Read, config: SparseConfig) -> Read:
    """The same codes with another budget or selection."""
    memories = [dataclasses.replace(memory, config=config) for memory in read.memories]
    return read.with_memories(memories)
