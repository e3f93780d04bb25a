r"""A masked language model of words on WikiText-2: 15 % of the words are hidden and guessed.

It is a small transformer of RACE attention that sees all words: 4 layers of width 256, 256 words of
context, dropout 0.2. The hidden words of the validation and test splits are the same in every run.
`--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_mlm.py \
              --config configs/mlm_wikitext2.py
Data:     wikitext/wikitext-2.{train,valid,test}.txt.xz under FOLDER
Hardware: a GPU; no whole run has been timed
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="masked_lm")
    config.model.positions = "learned"
    config.model.max_length = 256
    config.model.dropout_rate = 0.2
    config.model.race.forget_gate = None
    config.model.race.short_conv = "qkv"  # beyond the paper; docs/results.md says what it is worth
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("wikitext/wikitext-2.train.txt.xz",)
    config.data.valid_files = ("wikitext/wikitext-2.valid.txt.xz",)
    config.data.test_files = ("wikitext/wikitext-2.test.txt.xz",)
    config.data.tokenizer = "words"
    config.data.end_of_line = True
    config.data.sequence_length = 256

    config.run.batch_size = 32
    config.run.steps = 5000
    config.run.eval_every = 1000
    config.run.checkpoint_every = 1000
    return config
