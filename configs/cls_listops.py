"""ListOps of the Long Range Arena: the digit that a nested list of up to 2,000 tokens comes to.

The model has the sizes of the arena's base model: 4 layers of width 512 with 8 heads, and a learned
first token for the head. Always answering 0 would be right for 17 % of the examples.
`--config.model.attention=softmax` trains the same model with softmax attention.

Command:  .venv/bin/python scripts/train_classifier.py --config configs/cls_listops.py
Data:     drawn from a seed, which takes about half a minute
Hardware: a GPU; no whole run has been timed
Small:    add --config.data.sequence_length=64 --config.listops.max_depth=4
          --config.listops.longer_than=10 --config.listops.train_examples=8000
          --config.model.num_layers=2 --config.model.width=64 --config.model.num_heads=4
          --config.run.steps=600 --config.optimizer.warmup_steps=50
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="listops")
    config.model.num_layers = 4
    config.model.width = 512
    config.model.num_heads = 8
    config.model.mlp_ratio = 2
    config.model.positions = "learned"
    config.model.max_length = 2000
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.sequence_length = 2000

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 500
    config.run.batch_size = 32
    config.run.steps = 5000
    config.run.eval_every = 1000
    config.run.checkpoint_every = 1000
    return config
