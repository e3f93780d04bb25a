"""Angular attention, the kernel that RACE attention approximates, computed from all pairs.

With theta the angle between a query and a key,

    out_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = (1 - theta_ts / pi)^gamma
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from race_jax.core.pairs import pair_attention
from race_jax.layers import cached, positions
from race_jax.layers.positions import PairsConfig
from race_jax.layers.self_attention import Call, unit_vectors
from race_jax.sparse.exact import Rule

# The slope of the angle is infinite at a cosine of 1 or -1. Weights change by less than
# gamma * 5e-4 here.
LARGEST_COSINE = 1.0 - 1e-6
EPSILON = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class AngularConfig(PairsConfig):
    """Options of angular attention, and the sizes of a layer.

    Attributes:
        degree: the exponent gamma, > 0. RACE with P planes approximates gamma = P.

    Raises:
        ValueError: if a value is not allowed.
    """

    NAME: ClassVar[str] = "angular"
    POSITIONS: ClassVar[tuple[str, ...]] = ("rope",)

    degree: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.degree < float("inf"):
            raise ValueError(f"degree must be > 0 and finite, got {self.degree}.")


def angular_kernel(cosine: jax.Array, degree: float) -> jax.Array:
    """Returns (1 - theta / pi)^degree for the cosine of an angle theta.

    Args:
      cosine: any shape. Cosines closer to 1 or -1 than 1e-6 count as that far, where the gradient
        is zero.
      degree: the exponent gamma.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.layers.angular import angular_kernel
      >>> [round(float(x), 4) for x in angular_kernel(jnp.array([0.5, 0.0, -0.5]), 2.0)]
      [0.4444, 0.25, 0.1111]

    Source: arXiv 2510.04008, section 3.
    """
    bounded = jnp.clip(cosine, -LARGEST_COSINE, LARGEST_COSINE)
    return (1.0 - jnp.arccos(bounded) / jnp.pi) ** degree


class AngularAttention(cached.CachedAttention):
    """Self-attention by the angles between queries and keys.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: arXiv 2510.04008, section 3. A forget gate goes beyond it.
    """

    config_class = AngularConfig

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call) -> Any:
        """Returns the heads' outputs, and the cache if the call has one.

        The positions of the call are needed for RoPE. The cache holds keys of length one.
        """
        settings, degree = self.config, self.config.degree
        if call.memory is not None:
            rule = Rule(lambda cosine, _: jnp.log(angular_kernel(cosine, degree)), scale=1.0)
            unit_key = unit_vectors(key, EPSILON).astype(key.dtype)
            unit_query = unit_vectors(query, EPSILON)
            return cached.attend_and_keep(unit_query, unit_key, value, call, settings, rule)
        query, key, _ = positions.place(query, key, call.positions, settings)
        return pair_attention(
            unit_vectors(query, EPSILON),
            unit_vectors(key, EPSILON),
            value,
            lambda cosine, _: angular_kernel(cosine, degree),
            normalized=True,
            log_decay=call.log_decay,
            **call.masks(),
        )
