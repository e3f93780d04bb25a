"""Needle retrieval: 4 lines "key=value" hidden in 1,024 bytes, all asked for at the end.

The model has 2 layers of RACE attention with the short convolution. Longer rows are chosen by
`--config.data.sequence_length`, and very long ones are read by
`--config.optimizer.segment_length`. The accuracy is given by the depth of the needle.

Command:  .venv/bin/python scripts/train_lm.py --config configs/needle.py
Text:     add --config.needle.filler=text, and --config.data.source=files with the files to hide in
Data:     drawn from the seed
Small:    add --config.data.sequence_length=128 --config.needle.value_length=1
          --config.run.batch_size=32 --config.run.steps=300
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.task = "needle"
    config.data.sequence_length = 1024

    config.model.num_layers = 2
    config.model.width = 128
    config.model.num_heads = 2
    config.model.race.short_conv = "before"

    config.optimizer.learning_rate = 1e-3
    config.run.batch_size = 64
    config.run.steps = 4000
    config.run.eval_every = 500
    return config
