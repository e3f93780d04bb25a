"""A language model of words on the Penn Treebank.

It is a small transformer of RACE attention: 4 layers of width 256, 256 words of context, dropout
0.3, weight decay 0.5. The whole validation and test splits are scored, in windows that do not
overlap. `--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_lm.py --config configs/lm_ptb.py
Data:     ptb/ptb.{train,valid,test}.txt.xz under FOLDER, one sentence a line
Hardware: one NVIDIA H100, about three minutes with ten others beside it
Result:   perplexity 85.5 on the validation split and 80.1 on the test split, with a weight decay of
          0.1. With 0.5, and with softmax in every fourth block, 83.7 and 78.2 (docs/results.md)
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.model.dropout_rate = 0.3

    config.data.source = "files"
    config.data.train_files = ("ptb/ptb.train.txt.xz",)
    config.data.valid_files = ("ptb/ptb.valid.txt.xz",)
    config.data.test_files = ("ptb/ptb.test.txt.xz",)
    config.data.tokenizer = "words"
    config.data.end_of_line = True
    config.data.sequence_length = 256

    config.optimizer.weight_decay = 0.5
    config.run.batch_size = 32
    config.run.steps = 2500
    config.run.eval_every = 500
    config.run.checkpoint_every = 500
    return config
