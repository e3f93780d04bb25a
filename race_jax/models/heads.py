"""The language model, which is a transformer trunk and a head with the tied embedding.

It maps token ids (B, T) to logits (B, T, vocab) in float32. With the embedding table E,

    logits = hidden E^T

A chunked loss takes the hidden states instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.models.config import ModelConfig
from race_jax.models.transformer import Transformer, TransformerState


class TransformerLM(nnx.Module):
    r"""Causal language model: :math:`p(x_{t+1} \mid x_{\le t}) = softmax(h_t E^\top)`.

    If it is not causal, it is a masked language model, and row t of the logits is about token t.

    Args:
        config: the sizes and options.
        vocab_size: the number of tokens.
        is_causal: whether a token sees only itself and earlier tokens. If not, the attention takes
            no forgetting gate.
        rngs: the random streams "params", "planes" for the hash planes, and "dropout" if there is
            dropout.
        keep_rngs: whether the model keeps a fork of the dropout stream, as Flax's modules do, if
            there are dropout and such a stream.

    Raises:
        ValueError: if `ModelConfig.validate` raises it, or the vocabulary is empty.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from race_jax.models import ModelConfig, TransformerLM
        >>> config = ModelConfig(num_layers=1, width=16, num_heads=2)
        >>> model = TransformerLM(config, vocab_size=10, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[1, 2, 3]])
        >>> model(tokens).shape
        (1, 3, 10)
        >>> logits, state = model(tokens[:, :2], state=model.init_state(1))
        >>> logits, state = model(tokens[:, 2:], state=state)  # continues where it stopped
        >>> bool(jnp.allclose(logits, model(tokens)[:, 2:], atol=1e-5))
        True

    Source: the tied tables are those of Press and Wolf 2017.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        is_causal: bool = True,
        keep_rngs: bool = True,
        rngs: nnx.Rngs,
    ):
        self.trunk = Transformer(
            config, vocab_size, is_causal=is_causal, keep_rngs=keep_rngs, rngs=rngs
        )

    @property
    def embedding(self) -> nnx.Param:
        """The table E, shape (vocab, D) float32."""
        return self.trunk.embedding.tokens

    def init_state(self, batch: int, capacity: int | None = None) -> TransformerState:
        """Returns the state before any token, as `Transformer.init_state` does."""
        return self.trunk.init_state(batch, capacity)

    def hidden(self, tokens: jax.Array, **options: Any) -> jax.Array | tuple:
        """Returns hidden states (B, T, D), with the arguments of `Transformer.__call__`."""
        return self.trunk(tokens, **options)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states (..., D) to logits (..., vocab), summed in float32."""
        table = self.embedding[...].astype(hidden.dtype)
        with jax.named_scope("transformer/logits"):
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array, **options: Any) -> jax.Array | tuple:
        """Returns logits (B, T, vocab) float32, or (logits, state) if a state is given.

        The arguments are those of `Transformer.__call__`: segment_ids, positions, key_value_mask,
        state, deterministic and rngs.
        """
        out = self.hidden(tokens, **options)
        if isinstance(out, tuple):
            return self.logits(out[0]), out[1]
        return self.logits(out)
