"""Transformers with RACE or other attention, and decoding from them.

A `ModelConfig` describes a Flax NNX model that maps token ids to logits, one row of logits for each
token (`TransformerLM`) or for each sequence (`Classifier`).
"""

from race_jax.models.classifier import Classifier
from race_jax.models.config import ModelConfig
from race_jax.models.heads import TransformerLM
from race_jax.models.transformer import Transformer, TransformerState, parameter_count

__all__ = [
    "Classifier",
    "ModelConfig",
    "Transformer",
    "TransformerLM",
    "TransformerState",
    "parameter_count",
]
