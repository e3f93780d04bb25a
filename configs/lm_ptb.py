"""Word-level language model on the Penn Treebank.

Trains RACE attention with a data gate at the settings of a small transformer: 4 layers of width
256, 256 words of context, dropout 0.2, the whole validation and test splits scored in
non-overlapping windows. `--config.model.attention=softmax` trains its softmax twin.

Command:   RACE_JAX_DATA=FOLDER python scripts/train_lm.py --config configs/lm_ptb.py
Data:      ptb/ptb.{train,valid,test}.txt.xz under FOLDER, one sentence a line
Hardware:  one NVIDIA H200, about a minute and a half with two others beside it
Expect:    perplexity 87.0 on the validation split, 81.4 on the test split (softmax: 105.9, 98.5)
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """The run's settings."""
    config = Config()
    config.model.positions = "learned"
    config.model.max_length = 256
    config.model.dropout_rate = 0.2

    config.data.source = "files"
    config.data.train_files = ("ptb/ptb.train.txt.xz",)
    config.data.valid_files = ("ptb/ptb.valid.txt.xz",)
    config.data.test_files = ("ptb/ptb.test.txt.xz",)
    config.data.tokenizer = "words"
    config.data.end_of_line = True
    config.data.sequence_length = 256

    config.run.batch_size = 32
    config.run.steps = 2500
    config.run.eval_every = 500
    config.run.checkpoint_every = 500
    return config
