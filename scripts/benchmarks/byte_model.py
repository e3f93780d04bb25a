"""A language model of bytes: its loss over a whole sequence, and over one segment of it.

The model is a `race_jax.models.TransformerLM` of 256 tokens. The loss is the sum of the nats of all
tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from race_jax.models import ModelConfig, TransformerLM
from race_jax.streaming.step import Step
from race_jax.tasks.losses import chunked_cross_entropy

VOCABULARY = 256
Sequence = dict[str, jax.Array]  # "inputs" and "targets" (1, T)


def shifted(tokens: np.ndarray | jax.Array) -> Sequence:
    """Inputs and targets (1, T) of tokens (1, T + 1)."""
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


class ByteModel:
    """The functions of a model, without its numbers.

    Args:
      config: its sizes and options.
    """

    def __init__(self, config: ModelConfig):
        self._config = config
        self._graph = nnx.split(nnx.eval_shape(self._make), nnx.Param, ...)[0]

    def _make(self) -> TransformerLM:
        return TransformerLM(self._config, VOCABULARY, keep_rngs=False, rngs=nnx.Rngs(0))

    def variables(self) -> tuple[nnx.State, nnx.State]:
        """Initial parameters, and what is not trained."""
        return nnx.split(self._make(), nnx.Param, ...)[1:]

    def nats(self, params: nnx.State, fixed: nnx.State, sequence: Sequence) -> jax.Array:
        """The loss of a sequence that is read at once."""
        model = nnx.merge(self._graph, params, fixed)
        return self._sums(model, model.hidden(sequence["inputs"]), sequence)[0]

    def step(self, fixed: nnx.State) -> Step:
        """The step of a segment for `race_jax.streaming`; its sums are nats and tokens."""

        def step(params: nnx.State, state: Any, segment: Sequence) -> tuple[Any, tuple]:
            model = nnx.merge(self._graph, params, fixed)
            hidden, state = model.hidden(segment["inputs"], state=state)
            return state, self._sums(model, hidden, segment)

        return step

    def state(self, params: nnx.State, fixed: nnx.State) -> Any:
        """The state before the first byte, of a model whose state has a fixed size."""
        return nnx.merge(self._graph, params, fixed).init_state(1)

    def _sums(self, model: TransformerLM, hidden: jax.Array, sequence: Sequence) -> tuple:
        weights = jnp.ones(hidden.shape[:2])
        return chunked_cross_entropy(hidden, model.embedding[...], sequence["targets"], weights)
