"""Transformers with RACE or other attention, and decoding from them.

A `ModelConfig` describes a Flax NNX model that maps token ids to logits.
"""

from race_jax.models.config import ModelConfig
from race_jax.models.heads import TransformerLM
from race_jax.models.transformer import Transformer, TransformerState, parameter_count

__all__ = ["ModelConfig", "Transformer", "TransformerLM", "TransformerState", "parameter_count"]
