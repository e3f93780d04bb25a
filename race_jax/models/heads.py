"""What stands on the trunk: the language-model head with the tied embedding.

In: token ids (B, T). Out: logits (B, T, vocab) float32, or the hidden states for a chunked loss.
Equation: logits = hidden E^T, with E the table that embedded the tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.models.config import ModelConfig
from race_jax.models.transformer import Transformer, TransformerState


class TransformerLM(nnx.Module):
    r"""Causal language model: :math:`p(x_{t+1} \mid x_{\le t}) = softmax(h_t E^\top)`.

    Args:
        config: sizes and choices.
        vocab_size: number of tokens.
        rngs: streams "params", for the hash planes "planes", and with dropout "dropout".
        keep_rngs: keep a fork of the dropout stream, where there is dropout and a stream, as
            Flax's modules do.

    Raises:
        ValueError: as `ModelConfig.validate`, or an empty vocabulary.

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
        >>> logits, state = model(tokens[:, 2:], state=state)  # reads on where it stopped
        >>> bool(jnp.allclose(logits, model(tokens)[:, 2:], atol=1e-5))
        True

    Source: tied tables after Press and Wolf 2017; the rest is `Transformer`.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, *, keep_rngs: bool = True, rngs: nnx.Rngs
    ):
        self.trunk = Transformer(config, vocab_size, is_causal=True, keep_rngs=keep_rngs, rngs=rngs)

    @property
    def embedding(self) -> nnx.Param:
        """The table E, shape (vocab, D) float32."""
        return self.trunk.embedding.tokens

    def init_state(self, batch: int) -> TransformerState:
        """The state before the first token; see `Transformer.init_state`."""
        return self.trunk.init_state(batch)

    def hidden(self, tokens: jax.Array, **options: Any) -> jax.Array | tuple:
        """Hidden states (B, T, D) after the last norm; arguments of `Transformer.__call__`."""
        return self.trunk(tokens, **options)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (..., D) to logits (..., vocab), summed in float32."""
        table = self.embedding[...].astype(hidden.dtype)
        with jax.named_scope("transformer/logits"):
            return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def __call__(self, tokens: jax.Array, **options: Any) -> jax.Array | tuple:
        """Logits (B, T, vocab) float32, or (logits, state) where a state is given.

        Takes the arguments of `Transformer.__call__`: segment_ids, positions, key_value_mask,
        state, deterministic, rngs.
        """
        out = self.hidden(tokens, **options)
        if isinstance(out, tuple):
            return self.logits(out[0]), out[1]
        return self.logits(out)
