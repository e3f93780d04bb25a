"""The layer for Flax Linen, which users import as `race_jax.linen.RACEAttention`."""

from race_jax.layers.race_linen import RACEAttention

__all__ = ["RACEAttention"]
