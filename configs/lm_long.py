"""A language model of bytes on whole books: every book is one sequence of up to 4 million tokens.

Sequences are read in segments of 65,536 tokens. The state of the model is carried from segment to
segment, so the loss and the gradient are those of the whole book. The model has a data gate,
whose half-lives start at up to a million tokens.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_lm.py --config configs/lm_long.py
Data:     books/ under FOLDER: 11 books to train on, 2 held out, 2 for the test
Hardware: a GPU; no whole run has been timed
Small:    add --config.model.num_layers=2 --config.model.width=64 --config.run.steps=2
          --config.optimizer.warmup_steps=1 --config.data.train_files=books/valid/moby-dick.md.xz
          --config.data.valid_files=books/valid/moby-dick.md.xz --config.data.test_files=
          --config.data.sequence_length=1310720
"""

from race_jax.train.config import Config

TRAIN = (
    "anna-karenina bleak-house brothers-karamazov count-of-monte-cristo david-copperfield "
    "don-quixote les-miserables little-dorrit tom-jones war-and-peace wealth-of-nations"
).split()


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.model.race.half_life = 2.0**20

    config.data.source = "files"
    config.data.train_files = tuple(f"books/train/{name}.md.xz" for name in TRAIN)
    config.data.valid_files = ("books/valid/middlemarch.md.xz", "books/valid/moby-dick.md.xz")
    config.data.test_files = ("books/test/pickwick-papers.md.xz", "books/test/vanity-fair.md.xz")
    config.data.packing = "packed"  # a file is a document, and a book stands in one row
    config.data.sequence_length = 2**22

    config.optimizer.segment_length = 2**16
    config.optimizer.warmup_steps = 20
    config.run.batch_size = 1
    config.run.steps = 330
    config.run.log_every = 1
    config.run.checkpoint_every = 33
    return config
