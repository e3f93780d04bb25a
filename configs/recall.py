"""Associative recall (MQAR): 4 pairs of key and value among 64 tokens, each asked for once.

The model has 2 layers of RACE attention with the short convolution. Another attention is chosen by
`--config.model.attention=softmax --config.model.positions=rope`. More pairs and longer rows are
chosen by `--config.recall.num_pairs` and `--config.data.sequence_length`.

Command:  .venv/bin/python scripts/train_lm.py --config configs/recall.py
Data:     drawn from the seed
Small:    add --config.recall.vocab_size=64 --config.run.steps=300
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.task = "recall"
    config.recall.num_pairs = 4
    config.data.sequence_length = 64

    config.model.num_layers = 2
    config.model.width = 128
    config.model.num_heads = 2
    config.model.race.short_conv = "before"

    config.optimizer.learning_rate = 1e-3
    config.run.batch_size = 256
    config.run.steps = 4000
    config.run.eval_every = 500
    return config
