"""The trunk of a model: an embedding, blocks and a norm, with the state between calls.

It maps token ids (B, T), with masks as vectors, to hidden states (B, T, D). A state continues a
sequence.

    hidden = norm(block_n(... block_1(embedding(tokens))))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.core import masking, sequence
from race_jax.core.shapes import Axis
from race_jax.core.state import EMPTY
from race_jax.models import block as block_module
from race_jax.models.block import Block
from race_jax.models.config import ModelConfig
from race_jax.models.layers import TokenEmbedding, per_row, token_positions
from race_jax.models.norm import LayerNorm

_NO_STATE = (
    "this model carries no state, because it is not causal or its attention keeps none; pass the "
    "whole sequence for every token."
)
_NO_CAPACITY = (
    "this model has no state of fixed size, because its attention keeps the keys and values of all "
    "tokens; say for how many there must be room, as in init_state({}, capacity=1024)."
)
_TOO_LONG = (
    "position {} is beyond the learned positions, max_length={}; shorten the sequence, or train "
    "with positions='none'."
)


class TransformerState(NamedTuple):
    """The state of a transformer after the tokens that it has read.

    Attributes:
        layers: the state of the attention of each block.
        position: shape (B,) int32, the number of tokens read of the current segment.
        segment: shape (B,) int32, the segment of the last token, or -1 before the first token.
    """

    layers: tuple
    position: jax.Array
    segment: jax.Array


class Transformer(nnx.Module):
    """A transformer without a head, which maps token ids to hidden states.

    Dropout is off until ``model.train()``, and off again after ``model.eval()``.

    Args:
        config: the sizes and options, which are validated here.
        vocab_size: the number of tokens. None makes a trunk without an embedding, which reads
            vectors with `encode` only.
        is_causal: True for language models, False for encoders, which take no forgetting gate.
        keep_rngs: whether the model keeps a fork of the dropout stream, as Flax's modules do, if
            there are dropout and such a stream.
        rngs: the random streams "params", "planes" and, with dropout, "dropout", or a default
            stream for them.

    Raises:
        ValueError: if a config field is out of range, the vocabulary is empty, or an encoder has a
            forgetting gate.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int | None,
        *,
        is_causal: bool,
        keep_rngs: bool = True,
        rngs: nnx.Rngs,
    ):
        config.validate()
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"{vocab_size=} must be at least 1.")
        dtype = jnp.dtype(config.dtype)
        self.max_length = config.max_length if config.positions == "learned" else None
        self.embedding = (
            None
            if vocab_size is None
            else TokenEmbedding(
                vocab_size, config.width, max_length=self.max_length, dtype=dtype, rngs=rngs
            )
        )
        self.blocks = nnx.List(
            [
                Block(config, config.attention_of(block), is_causal=is_causal, rngs=rngs)
                for block in range(config.num_layers)
            ]
        )
        self.norm = LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)
        self.deterministic = True
        self.axis_name = None
        attentions = [block.attention for block in self.blocks]
        self.needs_rngs = config.dropout_rate > 0 or any(
            getattr(attention, "needs_rngs", False) for attention in attentions
        )
        keep_rngs = keep_rngs and self.needs_rngs
        has_stream = "dropout" in rngs or "default" in rngs
        self.rngs = rngs.dropout.fork() if keep_rngs and has_stream else None
        self.keeps_tokens = is_causal and any(map(_has_cache, attentions))
        self.carries_state = is_causal and all(
            _has_cache(attention) or _has_state(attention) for attention in attentions
        )
        self.remat = config.remat

    def init_state(self, batch: int, capacity: int | None = None) -> TransformerState:
        """Returns the state before any token, for `batch` sequences.

        Args:
            batch: the number of sequences B.
            capacity: the number of tokens of a sequence that there is room for, in a model whose
                attention keeps all keys and values. Other models need no room and ignore it.

        Raises:
            NotImplementedError: if the model is not causal, or its attention carries no state, or
                the state needs a capacity and none is given.
        """
        if not self.carries_state:
            raise NotImplementedError(_NO_STATE)
        if self.keeps_tokens and capacity is None:
            raise NotImplementedError(_NO_CAPACITY.format(batch))
        layers = tuple(
            attention.init_cache(batch, capacity)
            if _has_cache(attention)
            else attention.init_state(batch)
            for attention in (block.attention for block in self.blocks)
        )
        position, segment = jnp.zeros(batch, jnp.int32), jnp.full(batch, EMPTY, jnp.int32)
        return TransformerState(layers, position, segment)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        key_value_mask: jax.Array | None = None,
        state: TransformerState | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> jax.Array | tuple[jax.Array, TransformerState]:
        """Returns the hidden states after the last norm, and the new state if one is given.

        Args:
            tokens: shape (B, T) integers in [0, vocab_size). An id out of range gives NaN.
            segment_ids: shape (B, T) integers, one contiguous run per packed document, or None.
            positions: shape (B, T) integers. If None, the unpadded tokens of each segment are
                counted, from the state's position on.
            key_value_mask: shape (B, T) bool, True where there is a token, or None.
            state: the state from `init_state` or an earlier call.
            deterministic: whether dropout is off. If None, ``train()`` or ``eval()`` decides.
            rngs: the stream "dropout". The stream of the model is used if None.

        Returns:
            Shape (B, T, D) in the dtype of the computation, or that and a `TransformerState`.

        Raises:
            ValueError: if tokens have a wrong rank, vectors have another shape, there are more
                tokens than learned positions, or dropout has no stream of random numbers.
            TypeError: if tokens are not integers.
            NotImplementedError: if a state is given to a model that carries none.
        """
        self._check(tokens, segment_ids, positions, key_value_mask, state)
        drop_keys = self._dropout_keys(deterministic, rngs)
        start = per_row(0 if state is None else state.position, tokens)
        start_segment = per_row(EMPTY if state is None else state.segment, tokens)
        if self.axis_name is not None:
            start, start_segment = _entering(
                start, start_segment, tokens, key_value_mask, segment_ids, self.axis_name
            )
        if positions is None:
            positions = token_positions(
                tokens.shape[1],
                start,
                key_value_mask=key_value_mask,
                segment_ids=segment_ids,
                start_segment=start_segment,
            )
        self._check_positions(positions)
        with jax.named_scope("transformer/embedding"):
            x = self.embedding(tokens, positions)
        states = None if state is None else state.layers
        x, layers = self._run_blocks(x, positions, key_value_mask, segment_ids, states, drop_keys)
        if state is None:
            return x
        position = _next_position(positions, start, key_value_mask)
        ids = masking.fill_segments(segment_ids, key_value_mask, start_segment)
        segment = masking.last_segment(ids, key_value_mask, start_segment, tokens.shape[1])
        if self.axis_name is not None:
            position, segment = sequence.from_last((position, segment), self.axis_name)
        return x, TransformerState(layers, position, segment)

    def encode(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        key_value_mask: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> jax.Array:
        """Returns the hidden states of vectors that are embedded already.

        Args:
            x: shape (B, T, D), floating.
            positions: shape (B, T) integers, for attentions that use them.
            key_value_mask: shape (B, T) bool, True where there is a vector, or None.
            deterministic: as for `__call__`.
            rngs: as for `__call__`.

        Returns:
            Shape (B, T, D) in the dtype of the computation.

        Raises:
            ValueError: if dropout has no stream of random numbers.
        """
        drop_keys = self._dropout_keys(deterministic, rngs)
        return self._run_blocks(x, positions, key_value_mask, None, None, drop_keys)[0]

    def _run_blocks(
        self, x, positions, key_value_mask, segment_ids, states, drop_keys
    ) -> tuple[jax.Array, tuple]:
        """Returns the hidden states after the last norm, and the next state of each block."""
        with jax.named_scope("transformer/embedding"):
            x = self.dropout(x, deterministic=drop_keys[0] is None, rngs=drop_keys[0])
        layers = [None] * len(self.blocks) if states is None else list(states)
        for i, block in enumerate(self.blocks):
            inputs = x, positions, key_value_mask, segment_ids, layers[i], drop_keys[i + 1]
            with jax.named_scope(f"transformer/block_{i}"):
                x, layers[i] = block_module.apply(block, *inputs, remat=self.remat)
        return self.norm(x), tuple(layers)

    def set_view(self, deterministic: bool | None = None, axis_name: Axis | None = None) -> None:
        """Sets what ``nnx.view`` changes.

        Args:
            deterministic: whether dropout is off, or None to leave it as it is.
            axis_name: the mesh axis over whose devices the sequence is split, or None to leave it.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if axis_name is not None:
            self.axis_name = axis_name

    def _dropout_keys(self, deterministic: bool | None, rngs) -> list:
        count = len(self.blocks) + 1
        deterministic = self.deterministic if deterministic is None else deterministic
        if deterministic or not self.needs_rngs:
            return [None] * count
        rngs = self.rngs if rngs is None else rngs
        if rngs is None:
            raise ValueError(
                f"a training step (deterministic=False) with dropout_rate={self.dropout.rate} "
                "needs random numbers; pass rngs=nnx.Rngs(dropout=seed)."
            )
        key = rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()
        return list(jax.random.split(key, count))

    def _check(self, tokens, segment_ids, positions, key_value_mask, state) -> None:
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (batch, tokens); got {tokens.shape}.")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers; got {tokens.dtype}.")
        for name, vector in (
            ("segment_ids", segment_ids),
            ("positions", positions),
            ("key_value_mask", key_value_mask),
        ):
            if vector is not None and vector.shape != tokens.shape:
                raise ValueError(
                    f"{name} must have the shape of tokens, {tokens.shape}; got {vector.shape}."
                )
        consecutive = segment_ids is None and positions is None and key_value_mask is None
        if self.max_length is not None and consecutive and tokens.shape[1] > self.max_length:
            raise ValueError(_TOO_LONG.format(tokens.shape[1] - 1, self.max_length))
        if state is not None and not self.carries_state:
            raise NotImplementedError(_NO_STATE)
        if state is not None and state.position.shape != tokens.shape[:1]:
            raise ValueError(
                f"state is for a batch of {state.position.shape[0]}, but tokens have shape "
                f"{tokens.shape}; make one with init_state({tokens.shape[0]})."
            )

    def _check_positions(self, positions: jax.Array) -> None:
        if self.max_length is None or isinstance(positions, jax.core.Tracer) or not positions.size:
            return
        last = int(positions.max())
        if last >= self.max_length:
            raise ValueError(_TOO_LONG.format(last, self.max_length))


def parameter_count(model: nnx.Module) -> int:
    """Returns the number of trainable numbers in a module, without fixed hash planes.

    Example:
        >>> from flax import nnx
        >>> from race_jax.models import parameter_count
        >>> parameter_count(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        8
    """
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _has_cache(attention: nnx.Module) -> bool:
    """Returns whether an attention keeps the tokens, in a state that grows with the length."""
    make = getattr(attention, "init_cache", None)
    return make is not None and jax.eval_shape(lambda: make(1, 1)) is not None


def _has_state(attention: nnx.Module) -> bool:
    """Returns whether an attention carries a state of fixed size."""
    return jax.eval_shape(lambda: attention.init_state(1)) is not None


def _entering(start, start_segment, tokens, key_value_mask, segment_ids, axis_name) -> tuple:
    """Returns the position and the segment before the stretch of tokens of each device."""
    length = tokens.shape[1]
    entering = sequence.entering_segment(
        segment_ids, key_value_mask, start_segment, length, axis_name
    )
    zero = jnp.zeros_like(entering)
    own = token_positions(
        length,
        zero,
        key_value_mask=key_value_mask,
        segment_ids=segment_ids,
        start_segment=entering,
    )
    ids = masking.fill_segments(segment_ids, key_value_mask, entering)
    leaving = masking.last_segment(ids, key_value_mask, entering, length)
    count = _next_position(own, zero, key_value_mask)
    starts_anew = (leaving != entering) & (entering != EMPTY)
    return sequence.entering_count(count, starts_anew, start, axis_name), entering


def _next_position(positions, start, key_value_mask) -> jax.Array:
    """Returns the position after each row's last unpadded token, or `start` if it has none."""
    length = positions.shape[1]
    if length == 0:
        return start
    if key_value_mask is None:
        return positions[:, -1] + 1
    last = length - 1 - jnp.argmax(key_value_mask[:, ::-1], axis=1)
    after = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0] + 1
    return jnp.where(jnp.any(key_value_mask, axis=1), after, start)
