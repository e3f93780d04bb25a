"""A language model of characters on the first 6.9 million characters of text8.

It is a small transformer of RACE attention: 4 layers of width 256, 512 characters
of context, no dropout. The last 300,000 characters are held out. Its results cannot be compared
with results on the whole of text8. `--config.model.attention=softmax` trains the same model with
softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_lm.py --config configs/lm_text8.py
Data:     text8/text8.first-6877825-bytes.txt.xz under FOLDER
Hardware: one NVIDIA H100, about two and a half minutes with seven others beside it
Result:   1.706 bits per character held out, with a deviation of 0.005 between three seeds
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.data.source = "files"
    config.data.train_files = ("text8/text8.first-6877825-bytes.txt.xz",)
    config.data.valid_tail = 300_000
    config.data.tokenizer = "characters"
    config.data.sequence_length = 512

    config.run.batch_size = 32
    config.run.steps = 2000
    config.run.eval_every = 500
    config.run.checkpoint_every = 500
    config.language_model.compare_xz = True
    return config
