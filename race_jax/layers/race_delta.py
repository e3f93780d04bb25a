"""The delta rule on RACE's features, whose state replaces what it holds for a soft bucket.

    S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ,   out_t = S_tᵀ q_t
    q_t = phi(W x_t A_q) / |phi(W x_t A_q)|,   k_t = phi(W x_t A_k) / |phi(W x_t A_k)|

phi is the soft hash, b_t = sigmoid(x_t W_b), and a_t is the forget gate, 1 without one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.core import hashing
from race_jax.layers.gated_delta import GatedDeltaAttention, GatedDeltaConfig
from race_jax.layers.hash_options import HashOptions
from race_jax.layers.planes import make_planes
from race_jax.layers.self_attention import unit_vectors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RACEDeltaConfig(HashOptions, GatedDeltaConfig):
    """Options of the delta rule on RACE's features, and the sizes of a layer.

    Attributes:
        qkv_activation: the function that queries, keys and values go through after their
            projections and convolutions, None or "silu". The hash reads signs, of which "silu"
            leaves few that are negative.

    Raises:
        ValueError: if a value is not allowed.
    """

    NAME: ClassVar[str] = "race_delta"

    num_tables: int = 16
    num_planes: int = 2
    sharpness: float = 1.0
    use_tanh: bool = False
    qkv_activation: str | None = None
    forget_gate: str | None = None
    output_gate: str | None = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.complete_hash()

    @property
    def key_width(self) -> int:
        """The number of rows of a head's matrix, which is F."""
        return self.features

    def own_parameters(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Returns the initializers of the parameters besides the projections."""
        return super().own_parameters() | self.hash_parameters()


class RACEDeltaAttention(GatedDeltaAttention):
    """Causal self-attention by the delta rule on soft buckets.

        S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ,   out_t = S_tᵀ q_t

    q_t and k_t are the features phi of the token's query and key, ``(F,)`` with F = L 2^P, divided
    by their length. A matrix S is ``(F, V)``. A token writes only what the matrix does not return
    already, so a key that comes again replaces its value. In RACE, its values would be averaged.

    ``planes`` ``(L, P, H)`` is a `HashPlanes` variable, or a parameter if the planes are learned.

    Args:
        config: the sizes and options.
        rngs: random streams; "params" is needed. Planes are drawn from "planes" if there is such a
            stream or a default one.
        **initializers: `kernel_init` and `out_kernel_init`, as for `GatedDeltaAttention`.

    Source: beyond the paper. The features are those of arXiv 2510.04008, Algorithm 1, and the rule
    is that of Yang et al. 2024 (arXiv 2412.06464), section 3.1.
    """

    config_class = RACEDeltaConfig

    def __init__(self, config: RACEDeltaConfig, *, rngs: nnx.Rngs, **initializers: Any):
        super().__init__(config, rngs=rngs, **initializers)
        self.planes = make_planes(config, rngs)

    def vectors(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the features of queries (B, T, N, F) and keys (B, T, K, F), of length 1."""
        config = self.config
        sharpness = config.current_sharpness(self.parameters())
        of_keys = jnp.broadcast_to(sharpness, config.num_kv_heads)
        of_queries = jnp.repeat(of_keys, config.num_heads // config.num_kv_heads)
        return self._features(query, of_queries), self._features(key, of_keys)

    def _features(self, x: jax.Array, sharpness: jax.Array) -> jax.Array:
        projections = hashing.hash_projections(x, self.planes[...])
        phi = hashing.soft_hash(projections, sharpness, use_tanh=self.config.use_tanh)
        # The features of each table sum to one, so no length is near zero.
        return unit_vectors(phi, epsilon=0.0)
