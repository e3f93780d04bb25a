"""Decoding, which reads a prompt once and then draws one token after another.

A `TransformerLM` continues prompts (B, T), which may be padded, by tokens (B, n). With the
distribution cut to the top k and the top p,

    x_{t+1} ~ softmax(logits_t / temperature)
"""

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from race_jax.models.heads import TransformerLM
from race_jax.models.transformer import TransformerState
from race_jax.sparse.cache import KVCache
from race_jax.sparse.coded import SparseCache
from race_jax.sparse.config import SparseConfig
from race_jax.streaming.memory import fold

_NO_TOKENS = (
    "this model keeps no keys, so there is nothing to select from; its state has constant size "
    "already. Leave out the options of sparse decoding."
)
PROMPT_SEGMENT = 16384  # tokens of a prompt that are read at a time
CAPACITY_STEP = 1024  # tokens; the room of a cache is a multiple of it


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: the positive number by which the logits are divided.
        top_k: the number of likeliest tokens to draw among, or None for all.
        top_p: a probability in (0, 1], or None. After ``top_k``, only the likeliest tokens that
            together reach it are drawn among.
        greedy: whether to take the likeliest token. The other fields are then ignored.

    Raises:
        ValueError: if a field is out of range.

    Example:
        >>> from race_jax.models.decode import Sampling
        >>> Sampling(temperature=0.8, top_k=40).top_p is None
        True

    Source: top-p is the nucleus sampling of Holtzman et al. 2020.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    greedy: bool = False

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature} must be positive and finite; "
                "greedy decoding takes the likeliest token each time."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out for all tokens.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; leave it out for all tokens.")


def sample(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row.

    Args:
        logits: shape (B, vocab) float32.
        key: a key of `jax.random`, which greedy decoding ignores.
        sampling: how to draw.

    Returns:
        Shape (B,) int32. It is -1 where the logits hold NaN or infinity and no token is likeliest.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from race_jax.models.decode import Sampling, sample
        >>> sample(jnp.array([[0.0, 3.0, 1.0]]), jax.random.key(0), Sampling(top_k=1)).tolist()
        [1]
    """
    # -inf excludes a token. NaN, +inf, or -inf alone are not a distribution.
    possible = jnp.isfinite(logits.max(axis=-1))
    return jnp.where(possible, _choose(logits, key, sampling), -1).astype(jnp.int32)


def _choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if sampling.top_k is not None:
        kept = jnp.arange(ranked.shape[-1]) < sampling.top_k
        ranked = jnp.where(kept, ranked, -jnp.inf)
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(ranked, axis=-1)
        likelier = jnp.cumsum(probabilities, axis=-1) - probabilities
        ranked = jnp.where(likelier < sampling.top_p, ranked, -jnp.inf)
    rank = jax.random.categorical(key, ranked, axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def stream(
    model: TransformerLM,
    prompt: np.ndarray,
    *,
    max_tokens: int,
    key_value_mask: np.ndarray | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop_token: int | Sequence[int] = (),
    sparse: SparseConfig | None = None,
    dense_layers: int = 0,
) -> Iterator[np.ndarray]:
    """Draws the continuation of each prompt, and yields it token by token.

    The prompt is read once. With a state of fixed size it is read piece by piece, in memory that
    does not grow with it, and every further token costs the same, whatever the length so far. With
    softmax, sigmoid and angular attention the state is a cache of the keys and values of all
    tokens, and a further token costs as much as the cache is long. Its room is that of the prompt
    and ``max_tokens``, rounded up. An attention without a state reads the whole sequence again for
    every token. With learned positions the continuation ends where their table ends, with a
    warning.

    Args:
        model: a causal language model.
        prompt: shape (B, T) integers in [0, vocab), T at least 1. If its rows are sharded over a
            mesh, each device continues its own rows.
        max_tokens: the number of tokens to draw, at least 1.
        key_value_mask: shape (B, T) bool, True where there is a token, or None for no padding.
            Prompts of unequal length are padded left or right. Each needs at least one token.
        sampling: how to draw.
        seed: the seed of the draws, 0 to 2**32 - 1. The same seed gives the same tokens.
        stop_token: a token, or several, after which a row ends. The stop token itself is yielded,
            and repeated while other rows go on. The iterator ends once every row has stopped. The
            tokens of other rows do not depend on it.
        sparse: for a softmax model, which tokens of the cache a new token reads, or None for all.
            The prompt is read densely in any case.
        dense_layers: with ``sparse``, the number of first layers that read all tokens.

    Returns:
        An iterator of arrays of shape (B,) int32, at most ``max_tokens`` of them.

    Raises:
        ValueError: if the prompt is empty, a token is outside the vocabulary, the mask has a wrong
            shape, ``max_tokens`` is below 1, the prompt is longer than the learned positions, the
            seed is out of range, or ``sparse`` is given for a model that keeps no tokens.
        TypeError: if the prompt, the seed or a stop token is not an integer.
        FloatingPointError: if the logits of a row that has not stopped are NaN or infinite. The
            iterator raises it, after it has yielded the tokens before.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from race_jax.models import ModelConfig, TransformerLM
        >>> from race_jax.models.decode import Sampling, stream
        >>> config = ModelConfig(num_layers=1, width=16, num_heads=2)
        >>> model = TransformerLM(config, vocab_size=10, rngs=nnx.Rngs(0))
        >>> tokens = stream(model, np.array([[1, 2, 3]]), max_tokens=4)
        >>> len(list(tokens))
        4
    """
    sharding = getattr(prompt, "sharding", None)
    prompt, mask = _checked_prompt(model, prompt, key_value_mask, max_tokens)
    stops = _checked_stops(model, stop_token)
    key = _checked_key(seed)
    count = max_tokens
    room = remaining_positions(model, int(mask.sum(axis=1).max()))
    if room is not None and room < max_tokens:
        warnings.warn(
            f"learned positions end at max_length={model.trunk.max_length}: "
            f"{room} tokens instead of {max_tokens}.",
            stacklevel=2,
        )
        count = room
    if sparse is not None:
        _check_sparse(model, sparse, dense_layers)
    elif dense_layers:
        raise ValueError(f"{dense_layers=} has no effect without sparse; leave it out")
    capacity = room_for(prompt.shape[1] + count, sparse)
    if isinstance(sharding, NamedSharding):
        prompt, mask = jax.device_put((prompt, mask), sharding)
    if model.trunk.carries_state:
        state = _Plan(capacity, sparse, dense_layers)
        return _until_stopped(_carry_state(model, prompt, mask, count, state, sampling, key), stops)
    return _until_stopped(_read_again(model, prompt, mask, count, sampling, key), stops)


def generate(model: TransformerLM, prompt: np.ndarray, **options: Any) -> np.ndarray:
    """Returns the continuations that `stream` yields, as one array of shape (B, n) int32.

    A row that stops before others is filled with its stop token.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from race_jax.models import ModelConfig, TransformerLM
        >>> from race_jax.models.decode import Sampling, generate
        >>> config = ModelConfig(num_layers=1, width=16, num_heads=2, attention="softmax")
        >>> model = TransformerLM(config, vocab_size=10, rngs=nnx.Rngs(0))
        >>> generate(model, np.array([[1, 2]]), max_tokens=3, sampling=Sampling(greedy=True)).shape
        (1, 3)
    """
    return np.stack(list(stream(model, prompt, **options)), axis=1)


def remaining_positions(model: TransformerLM, length: int) -> int | None:
    """Returns how many tokens can be drawn after `length` tokens, or None if there is no limit.

    Raises:
        ValueError: if the learned positions leave no room for another token.
    """
    limit = model.trunk.max_length
    if limit is None:
        return None
    if length > limit:
        raise ValueError(
            f"a prompt of {length} tokens does not fit the learned positions, "
            f"max_length={limit}; shorten it."
        )
    # The last drawn token is never read, so it needs no position of its own.
    return limit - length + 1


def _checked_prompt(model, prompt, key_value_mask, max_tokens) -> tuple[np.ndarray, np.ndarray]:
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ValueError(
            f"prompt must have shape (batch, tokens) with at least one token; got {prompt.shape}."
        )
    if not np.issubdtype(prompt.dtype, np.integer):
        raise TypeError(f"prompt must be token ids, integers; got {prompt.dtype}.")
    if not isinstance(max_tokens, int | np.integer) or max_tokens < 1:
        raise ValueError(f"{max_tokens=} must be an integer of at least 1.")
    mask = np.ones(prompt.shape, bool) if key_value_mask is None else np.asarray(key_value_mask)
    if mask.shape != prompt.shape or mask.dtype != np.bool_:
        raise ValueError(
            f"key_value_mask must be bool of the prompt's shape {prompt.shape}; "
            f"got {mask.dtype} {mask.shape}."
        )
    if not mask.any(axis=1).all():
        raise ValueError("every prompt needs at least one token that key_value_mask does not hide.")
    prompt = np.where(mask, prompt, 0).astype(np.int32)
    vocab_size = model.embedding.shape[0]
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(
            f"prompt holds token ids from {prompt.min()} to {prompt.max()}; "
            f"the vocabulary is 0 to {vocab_size - 1}."
        )
    return prompt, mask


def _checked_stops(model: TransformerLM, stop_token: int | Sequence[int]) -> np.ndarray:
    stops = np.atleast_1d(np.asarray(stop_token))
    if stops.size == 0:
        return stops.astype(np.int32)
    if not np.issubdtype(stops.dtype, np.integer):
        raise TypeError(f"stop_token must be a token id or several, integers; got {stop_token!r}.")
    vocab_size = model.embedding.shape[0]
    if stops.min() < 0 or stops.max() >= vocab_size:
        raise ValueError(f"{stop_token=} is outside the vocabulary, 0 to {vocab_size - 1}.")
    return stops


def _checked_key(seed: int) -> jax.Array:
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer; got {seed!r}.") from None
    if not 0 <= seed < 2**32:
        raise ValueError(
            f"seed={seed} must lie from 0 to 2**32 - 1, because JAX's keys hold 32 bits of a "
            "seed, and another seed would draw the same tokens as one of these."
        )
    return jax.random.key(seed)


def _until_stopped(tokens: Iterator[np.ndarray], stops: np.ndarray) -> Iterator[np.ndarray]:
    """Yields tokens until all rows have stopped, and raises FloatingPointError for token -1."""
    last = stopped = None
    for index, drawn in enumerate(tokens):
        if last is not None:
            drawn = np.where(stopped, last, drawn)
        failed = np.flatnonzero(drawn < 0)
        if failed.size:
            raise FloatingPointError(
                f"the model's logits are NaN or infinite for row(s) {failed.tolist()} at token "
                f"{index} of the continuation; look for NaN in its parameters, which training may "
                "have left, or use dtype='float32' if bfloat16 overflows."
            )
        yield drawn
        last, stopped = drawn, np.isin(drawn, stops)
        if stopped.all():
            return


def room_for(length: int, sparse: SparseConfig | None = None) -> int:
    """Returns the capacity of a cache for `length` tokens, which is a multiple of 1,024.

    Prompts of similar lengths then share their programs. With "quest" it is also a multiple of the
    page size.
    """
    step = CAPACITY_STEP
    if sparse is not None:
        step = math.lcm(step, sparse.coding().page_size or 1)
    return -(-length // step) * step


class _Plan(NamedTuple):
    """How a state is made: its room, and the options of sparse decoding."""

    capacity: int
    sparse: SparseConfig | None
    dense_layers: int


def sparse_state(
    state: TransformerState, config: SparseConfig, key: jax.Array, *, dense_layers: int = 0
) -> TransformerState:
    """Returns the state with the tokens of all caches coded, so that further tokens are sparse.

    Args:
        state: a state of a softmax model, which has read any number of tokens. If caches have codes
            already, they are made anew.
        config: what each query reads.
        key: a key of `jax.random`. Every layer draws rotations or planes of its own from it.
        dense_layers: the number of first layers that stay dense.

    Raises:
        ValueError: if the state keeps no tokens, their number does not fit the configuration, or
            there are fewer layers than ``dense_layers``.

    Example:
        >>> import jax, race_jax
        >>> from flax import nnx
        >>> from race_jax.models import ModelConfig, TransformerLM
        >>> from race_jax.models.decode import sparse_state
        >>> config = ModelConfig(num_layers=1, width=16, num_heads=2, attention="softmax")
        >>> state = TransformerLM(config, vocab_size=10, rngs=nnx.Rngs(0)).init_state(1, 64)
        >>> sparse = race_jax.SparseConfig(budget=8, sink=1, window=2)
        >>> type(sparse_state(state, sparse, jax.random.key(0)).layers[0].memory).__name__
        'SparseCache'
    """

    def is_cache(x: object) -> bool:
        return isinstance(x, KVCache | SparseCache)

    def coded(cache: KVCache | SparseCache, layer: int) -> KVCache | SparseCache:
        kv = cache.kv if isinstance(cache, SparseCache) else cache
        if layer < dense_layers:
            return kv
        return SparseCache.of(jax.random.fold_in(key, layer), kv, config)

    _check_dense_layers(dense_layers, len(state.layers))
    if not any(map(is_cache, jax.tree.leaves(state, is_leaf=is_cache))):
        raise ValueError(_NO_TOKENS)
    layers = [
        jax.tree.map(
            lambda x, i=i: coded(x, i) if is_cache(x) else x,
            layer,
            is_leaf=is_cache,
        )
        for i, layer in enumerate(state.layers)
    ]
    return state._replace(layers=tuple(layers))


def _check_dense_layers(dense_layers: int, layers: int) -> None:
    if not isinstance(dense_layers, int) or not 0 <= dense_layers <= layers:
        raise ValueError(
            f"{dense_layers=} must be an integer from 0 to the {layers} layers of the model."
        )


def check_decodes_sparsely(model: TransformerLM) -> None:
    """Checks that a model can read the best of its tokens, whatever the options.

    Args:
        model: a causal language model, whose variables may be shapes without values.

    Raises:
        ValueError: if it keeps no keys, as with RACE attention.
        NotImplementedError: if its attention does not go with sparse scores.
    """
    _check_sparse(model, SparseConfig(scorer="oracle"), 0)  # it needs no codes, so it always fits


def _check_sparse(model: TransformerLM, config: SparseConfig, dense_layers: int) -> None:
    """Raises what a step would raise, before anything is drawn."""
    if not isinstance(config, SparseConfig):
        raise TypeError(f"sparse must be a SparseConfig or None; got {type(config).__name__}.")
    if not model.trunk.keeps_tokens:
        raise ValueError(_NO_TOKENS)
    _check_dense_layers(dense_layers, len(model.trunk.blocks))

    graph, variables = nnx.split(model)

    def step(variables: nnx.State) -> object:
        model = nnx.merge(graph, variables)
        state = model.init_state(1, room_for(1, config))
        state = sparse_state(state, config, jax.random.key(0), dense_layers=dense_layers)
        return model(jnp.zeros((1, 1), jnp.int32), state=state, deterministic=True)

    jax.eval_shape(step, variables)


def _carry_state(model, prompt, mask, count, plan, sampling, key) -> Iterator[np.ndarray]:
    graph, variables = nnx.split(model)
    masked = None if mask.all() else mask
    tokens, state = _prefill(graph, variables, prompt, masked, key, plan, sampling)
    yield np.asarray(tokens)
    for i in range(1, count):
        tokens, state = _step(graph, variables, tokens, state, key, i, sampling)
        yield np.asarray(tokens)


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _prefill(graph, variables, prompt, mask, key, plan, sampling):
    model = nnx.merge(graph, variables)
    state = model.init_state(prompt.shape[0], plan.capacity)

    def read(variables, carry, segment):
        (state, last), (tokens, mask) = carry, segment
        out, state = nnx.merge(graph, variables).hidden(
            tokens, key_value_mask=mask, state=state, deterministic=True
        )
        seen = jnp.ones(tokens.shape, bool) if mask is None else mask
        found = _last_hidden(out, seen)
        if last is not None:
            found = jnp.where(jnp.any(seen, axis=1, keepdims=True), found, last)
        return (state, found), ()

    # A state of fixed size goes from segment to segment, so memory does not grow with the prompt.
    # The first piece, which may be shorter, gives the state its sharding.
    length = prompt.shape[1]
    size = length if model.trunk.keeps_tokens else (length - 1) % PROMPT_SEGMENT + 1
    first = jax.tree.map(lambda x: x[:, :size], (prompt, mask))
    rest = jax.tree.map(lambda x: x[:, size:], (prompt, mask))
    carry, _ = read(variables, (state, None), first)
    if size < length:
        carry, _ = fold(read, segment_length=PROMPT_SEGMENT)(variables, carry, rest)
    state, last = carry
    if plan.sparse is not None:
        # The prompt is read densely. The rotations are the same for every seed of the draws.
        options = {"dense_layers": plan.dense_layers}
        state = sparse_state(state, plan.sparse, jax.random.key(0), **options)
    return sample(model.logits(last), jax.random.fold_in(key, 0), sampling), state


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=3)
def _step(graph, variables, tokens, state, key, i, sampling):
    model = nnx.merge(graph, variables)
    logits, state = model(tokens[:, None], state=state, deterministic=True)
    return sample(logits[:, 0], jax.random.fold_in(key, i), sampling), state


def _read_again(model, prompt, mask, count, sampling, key) -> Iterator[np.ndarray]:
    graph, variables = nnx.split(model)
    # The buffer has the final length and a masked end, so that every token runs the same program.
    room = ((0, 0), (0, count - 1))
    buffer = jnp.pad(jnp.asarray(prompt), room)
    mask = jnp.pad(jnp.asarray(mask), room)
    for i in range(count):
        tokens, buffer, mask = _reread(
            graph, variables, buffer, mask, key, i, prompt.shape[1] + i, sampling
        )
        yield np.asarray(tokens)


@functools.partial(jax.jit, static_argnums=(0, 7), donate_argnums=(2, 3))
def _reread(graph, variables, buffer, mask, key, i, slot, sampling):
    model = nnx.merge(graph, variables)
    last = _last_hidden(model.hidden(buffer, key_value_mask=mask, deterministic=True), mask)
    tokens = sample(model.logits(last), jax.random.fold_in(key, i), sampling)
    # The last of `count` tokens is never read. It lies beyond the buffer and is dropped.
    return (
        tokens,
        buffer.at[:, slot].set(tokens, mode="drop"),
        mask.at[:, slot].set(True, mode="drop"),
    )


def _last_hidden(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the hidden state (B, D) of each row's last unpadded token."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
