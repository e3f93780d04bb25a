"""The classifier, which is a bidirectional transformer trunk, a pooling and a linear head.

It maps token ids (B, T), or vectors (B, T, C), to one row of logits (B, classes) for each sequence.

    logits = W pool(hidden) + b
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.models.config import ModelConfig
from race_jax.models.layers import (
    TokenEmbedding,
    ValueEmbedding,
    kernel_init,
    per_row,
    token_positions,
)
from race_jax.models.transformer import Transformer

POOLINGS = ("mean", "cls")


class Classifier(nnx.Module):
    r"""Classifies sequences: :math:`softmax(W\,pool(h_1 \ldots h_T) + b)`.

    Every token sees all others, so an attention with a forgetting gate is refused. Padding is never
    seen, and is not part of the mean.

    Args:
        config: the sizes and options.
        num_classes: the number of classes, at least 2.
        vocab_size: the number of tokens, if the inputs are token ids.
        channels: the width C of the vectors, if the inputs are vectors. Exactly one of the two is
            given.
        pooling: "mean" is the mean over the tokens that are not padding. "cls" puts a learned
            vector before the first token, and takes the hidden state there.
        keep_rngs: whether the model keeps a fork of the dropout stream, as Flax's modules do, if
            there are dropout and such a stream.
        rngs: the random streams "params", "planes" for the hash planes, and "dropout" if there is
            dropout.

    Raises:
        ValueError: if `ModelConfig.validate` raises it, the attention is causal only, or an
            argument is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from race_jax.models import Classifier, ModelConfig
        >>> config = ModelConfig(
        ...     num_layers=1, width=16, num_heads=2, race={"forget_gate": None}
        ... )
        >>> model = Classifier(config, num_classes=3, vocab_size=10, rngs=nnx.Rngs(0))
        >>> tokens, mask = jnp.array([[1, 2, 0]]), jnp.array([[True, True, False]])
        >>> model(tokens, key_value_mask=mask).shape
        (1, 3)

    Source: the mean over real tokens is that of the RACE paper's text tasks; the learned first
    token is that of Devlin et al. 2019 (BERT).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_classes: int,
        vocab_size: int | None = None,
        channels: int | None = None,
        pooling: str = "mean",
        keep_rngs: bool = True,
        rngs: nnx.Rngs,
    ):
        if num_classes < 2:
            raise ValueError(f"{num_classes=} must be at least 2.")
        if pooling not in POOLINGS:
            raise ValueError(f"{pooling=} is unknown; choose one of {list(POOLINGS)}.")
        if (vocab_size is None) == (channels is None) or (vocab_size or channels) < 1:
            raise ValueError(
                "give either vocab_size, for token ids, or channels, for vectors, and at least 1; "
                f"got {vocab_size=} and {channels=}."
            )
        # The learned first token makes each sequence one token longer.
        longer = dataclasses.replace(config, max_length=config.max_length + (pooling == "cls"))
        self.trunk = Transformer(longer, None, is_causal=False, keep_rngs=keep_rngs, rngs=rngs)
        self.max_length = config.max_length if config.positions == "learned" else None
        kind = TokenEmbedding if channels is None else ValueEmbedding
        self.embedding = kind(
            vocab_size or channels,
            config.width,
            max_length=self.max_length,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.first = (
            nnx.Param(kernel_init(rngs.params(), (config.width,), jnp.float32))
            if pooling == "cls"
            else None
        )
        self.head = nnx.Linear(
            config.width, num_classes, dtype=jnp.float32, kernel_init=kernel_init, rngs=rngs
        )
        self.input_rank = 2 if channels is None else 3

    def __call__(
        self,
        inputs: jax.Array,
        *,
        key_value_mask: jax.Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> jax.Array:
        """Returns logits (B, classes) in float32.

        Args:
            inputs: token ids (B, T), or vectors (B, T, C) if the model was made with ``channels``.
            key_value_mask: shape (B, T) bool, False at padding, or None for no padding.
            deterministic: whether dropout is off. If None, ``train()`` or ``eval()`` decides.
            rngs: the stream "dropout". The stream of the model is used if None.

        Raises:
            ValueError: if the inputs have another rank, or more tokens than learned positions, or
                the mask does not fit.
            TypeError: if token ids are not integers.
        """
        self._check(inputs, key_value_mask)
        slots = inputs if inputs.ndim == 2 else inputs[..., 0]
        positions = token_positions(
            inputs.shape[1], per_row(0, slots), key_value_mask=key_value_mask
        )
        with jax.named_scope("classifier/embedding"):
            x = self.embedding(inputs, positions)
        mask = key_value_mask
        if self.first is not None:
            x, positions, mask = _with_first(self.first[...], x, positions, mask)
        hidden = self.trunk.encode(
            x, positions=positions, key_value_mask=mask, deterministic=deterministic, rngs=rngs
        )
        with jax.named_scope("classifier/head"):
            pooled = hidden[:, 0] if self.first is not None else masked_mean(hidden, mask)
            return self.head(pooled)

    def _check(self, inputs: jax.Array, key_value_mask: jax.Array | None) -> None:
        if inputs.ndim != self.input_rank:
            wanted = "token ids (B, T)" if self.input_rank == 2 else "vectors (B, T, C)"
            raise ValueError(f"inputs must be {wanted}; got shape {inputs.shape}.")
        if self.input_rank == 2 and not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise TypeError(f"token ids must be integers; got {inputs.dtype}.")
        if key_value_mask is not None and key_value_mask.shape != inputs.shape[:2]:
            raise ValueError(
                f"key_value_mask must have shape {inputs.shape[:2]}; got {key_value_mask.shape}."
            )
        limit = self.max_length
        if limit is not None and inputs.shape[1] > limit:
            raise ValueError(
                f"{inputs.shape[1]} tokens are more than the learned positions, "
                f"max_length={limit}; shorten the sequences, or train with positions='none'."
            )


def masked_mean(hidden: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns the mean over the tokens where the mask is True, (B, D) in float32.

    Args:
        hidden: shape (B, T, D), floating.
        mask: shape (B, T) bool, or None for all tokens. A row without any token has the mean 0.

    Example:
        >>> masked_mean(jnp.arange(3.0)[None, :, None], jnp.array([[True, True, False]])).tolist()
        [[0.5]]
    """
    hidden = hidden.astype(jnp.float32)
    if mask is None:
        return jnp.mean(hidden, axis=1)
    total = jnp.sum(jnp.where(mask[..., None], hidden, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)[:, None]


def _with_first(first, x, positions, mask):
    """Puts the learned vector before every sequence. The tokens' positions then start at 1."""
    rows = jnp.broadcast_to(first.astype(x.dtype), (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([rows, x], axis=1)
    positions = jnp.concatenate([jnp.zeros_like(positions[:, :1]), positions + 1], axis=1)
    if mask is not None:
        mask = jnp.concatenate([jnp.ones_like(mask[:, :1]), mask], axis=1)
    return x, positions, mask
