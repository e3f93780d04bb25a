"""The layer for Flax Linen, under the name that users import: `race_jax.linen.RACEAttention`."""

from race_jax.layers.race_linen import RACEAttention

__all__ = ["RACEAttention"]
