r"""Long documents: the book that a window of 16,384 bytes is from, of 15 books.

The model has 4 layers of width 256 with 4 heads, and the mean over the bytes, in the place of the
paper's Arxiv task. The last 15 % of each book are the test region, the 15 % before them the
validation region, and a window is left out before each. Longer windows are chosen by
`--config.data.sequence_length=32768` or 65536. `--config.model.attention=softmax` trains the same
model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_long_documents.py
Author:   add --config.long_documents.target=author
          --config.data.train_files=books/train/war-and-peace.md.xz,books/train/bleak-house.md.xz
          --config.data.valid_files=books/train/anna-karenina.md.xz,books/train/little-dorrit.md.xz
Data:     books/{train,valid,test}/*.md.xz under FOLDER
Hardware: a GPU; no whole run has been timed
Small:    add --config.data.sequence_length=1024 --config.model.num_layers=2
          --config.model.width=64 --config.optimizer.accumulation_steps=1 --config.run.steps=300
          --config.optimizer.warmup_steps=50 --config.optimizer.learning_rate=1e-3
"""

from race_jax.train.config import Config

BOOKS = (
    "train/anna-karenina train/bleak-house train/brothers-karamazov train/count-of-monte-cristo "
    "train/david-copperfield train/don-quixote train/les-miserables train/little-dorrit "
    "train/tom-jones train/war-and-peace train/wealth-of-nations valid/middlemarch valid/moby-dick "
    "test/pickwick-papers test/vanity-fair"
).split()


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="long_documents")
    config.model.num_layers = 4
    config.model.width = 256
    config.model.num_heads = 4
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = tuple(f"books/{name}.md.xz" for name in BOOKS)
    config.data.sequence_length = 2**14

    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.accumulation_steps = 8
    config.run.batch_size = 32
    config.run.steps = 2000
    config.run.eval_every = 500
    config.run.checkpoint_every = 500
    return config
