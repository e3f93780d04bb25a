"""A language model of words on WikiText-2.

It is a small transformer of RACE attention: 4 layers of width 256, 256 words of context, dropout
0.2, weight decay 0.5. The whole validation and test splits are scored, in windows that do not
overlap. `--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_lm.py --config configs/lm_wikitext2.py
Data:     wikitext/wikitext-2.{train,valid,test}.txt.xz under FOLDER
Hardware: one NVIDIA H200, four and a half minutes with two others beside it
Result:   perplexity 97.1 on the validation split and 93.4 on the test split, with a weight decay of
          0.1. With 0.5, and with softmax in every fourth block and a dropout of 0.3, 90.3 and 86.1
          (docs/results.md)
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.model.dropout_rate = 0.2

    config.data.source = "files"
    config.data.train_files = ("wikitext/wikitext-2.train.txt.xz",)
    config.data.valid_files = ("wikitext/wikitext-2.valid.txt.xz",)
    config.data.test_files = ("wikitext/wikitext-2.test.txt.xz",)
    config.data.tokenizer = "words"
    config.data.end_of_line = True
    config.data.sequence_length = 256

    config.optimizer.weight_decay = 0.5
    config.run.batch_size = 32
    config.run.steps = 5000
    config.run.eval_every = 1000
    config.run.checkpoint_every = 1000
    return config
