"""One pre-norm transformer block, with the attention chosen by name.

A block maps hidden states (B, T, D) to hidden states (B, T, D), and carries the layer's state:

    x += attention(norm(x)),   x += MLP(norm(x))
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.layers import registry
from race_jax.models.config import ModelConfig
from race_jax.models.layers import INIT_STD, MLP, kernel_init
from race_jax.models.norm import LayerNorm

ATTENTION = 2  # folded into a block's key for its attention, beside the two of dropout


class Block(nnx.Module):
    """One pre-norm block, in which attention and MLP are each added to their input.

    Kernels are drawn from N(0, 0.02^2). Those of the two projections that add to the residual
    stream are smaller by sqrt(2 * num_layers), so that the 2 * num_layers branches together add
    the variance of one branch, whatever the depth.

    Args:
        config: a validated record.
        attention: the name of the attention.
        is_causal: whether a token sees only itself and earlier tokens.
        rngs: the random streams "params" and "planes".

    Source: the initial values are those of GPT-2 (Radford et al. 2019, section 2.3, and its code).
    """

    def __init__(self, config: ModelConfig, attention: str, *, is_causal: bool, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        branch_init = nnx.initializers.normal(INIT_STD / math.sqrt(2 * config.num_layers))
        self.attention_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = registry.find(attention).from_config(
            config.attention_config(attention),
            is_causal=is_causal,
            kernel_init=kernel_init,
            out_kernel_init=branch_init,
            rngs=rngs,
        )
        self.mlp_norm = LayerNorm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(
            width, config.mlp_ratio * width, dtype=dtype, out_kernel_init=branch_init, rngs=rngs
        )
        self.dropout = nnx.Dropout(config.dropout_rate)
        self.is_causal = is_causal

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        key_value_mask: jax.Array | None,
        segment_ids: jax.Array | None,
        state: tuple | None,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, tuple | None]:
        """Maps x (B, T, D) to (B, T, D) and the next state, which is None without a state."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        # On a GPU, XLA makes one operation of a product and the addition to x, and computes it in
        # place. It copies x before if a reshape hides that x is needed later, as it is in the
        # backward pass of LayerNorm. A single row is therefore a matrix here. Several rows stay
        # apart, because joining two axes that a mesh may split would gather x on every device.
        single = x.shape[0] == 1
        x = jnp.squeeze(x, 0) if single else x
        normal = self.attention_norm(x)
        attended, state = self._attend(
            jnp.expand_dims(normal, 0) if single else normal,
            *(positions, key_value_mask, segment_ids, state, dropout_key),
        )
        x += self._drop(jnp.squeeze(attended, 0) if single else attended, keys[0])
        x += self._drop(self.mlp(self.mlp_norm(x)), keys[1])
        return jnp.expand_dims(x, 0) if single else x, state

    def _attend(self, x, positions, key_value_mask, segment_ids, state, dropout_key):
        key = None
        if dropout_key is not None and getattr(self.attention, "needs_rngs", False):
            key = jax.random.fold_in(dropout_key, ATTENTION)
        out = self.attention(
            x,
            positions=positions,
            mask=key_value_mask,
            segment_ids=segment_ids,
            is_causal=self.is_causal,
            state=state,
            deterministic=key is None,
            rngs=key,
        )
        return (out, None) if state is None else out

    def _drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.dropout(x, deterministic=key is None, rngs=key)


def apply(block: Block, *arguments: Any, remat: bool = False) -> tuple:
    """Calls a block so that equal blocks are traced and compiled only once.

    Args:
        block: the block.
        *arguments: the arguments of ``Block.__call__``.
        remat: whether the activations are recomputed in the backward pass instead of kept.
    """
    graph, variables = nnx.split(block)
    return _apply(graph, remat, variables, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(graph: nnx.GraphDef, remat: bool, variables: nnx.State, *arguments: Any) -> tuple:
    def run(variables: nnx.State, *arguments: Any) -> tuple:
        return nnx.merge(graph, variables)(*arguments)

    return (jax.checkpoint(run) if remat else run)(variables, *arguments)
