"""A softmax language model of bytes on whole books, on which sparse decoding is studied.

Windows have 4,096 bytes. Most of those to train on carry 8 to 32 lines "#name=value", scattered in
the text, some of which are repeated at the end of the window, up to 128 times in all.
`scripts/study_decoding.py` measures how well the trained model still looks them up when it decodes
with sparse attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_lm.py \
              --config configs/lm_books_softmax.py
Data:     books/ under FOLDER: 11 books to train on, 2 held out, 2 for the test
Hardware: one NVIDIA H100, four minutes, with --config.optimizer.accumulation_steps=2
Result:   1.683 bits per byte of the test books, and no line found, when every window repeated 128
          lines. After a run in shorter windows, and with a dropout of 0.1 and a weight of 8, as
          docs/decoding.md has them, 1.634 bits, and all lines of the test books
Small:    add --config.model.num_layers=2 --config.model.width=64 --config.run.steps=2
          --config.optimizer.warmup_steps=1 --config.run.batch_size=2
          --config.data.train_files=books/valid/moby-dick.md.xz
          --config.data.valid_files=books/valid/moby-dick.md.xz --config.data.test_files=
"""

from race_jax.train.config import Config

TRAIN = (
    "anna-karenina bleak-house brothers-karamazov count-of-monte-cristo david-copperfield "
    "don-quixote les-miserables little-dorrit tom-jones war-and-peace wealth-of-nations"
).split()


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config()
    config.task = "lookup"
    config.lookup.share = 0.9
    config.lookup.most_questions = 128
    config.lookup.answer_weight = 4

    config.model.attention = "softmax"
    config.model.positions = "rope"
    config.model.softmax.short_conv = "before"  # finds lines in windows of 1,024, "qkv" does not
    config.model.num_layers = 8
    config.model.width = 512
    config.model.num_heads = 8
    config.model.num_kv_heads = 2
    config.model.dtype = "bfloat16"

    config.data.source = "files"
    config.data.train_files = tuple(f"books/train/{name}.md.xz" for name in TRAIN)
    config.data.valid_files = ("books/valid/middlemarch.md.xz", "books/valid/moby-dick.md.xz")
    config.data.test_files = ("books/test/pickwick-papers.md.xz", "books/test/vanity-fair.md.xz")
    config.data.sequence_length = 4096

    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.0
    config.run.batch_size = 32
    config.run.steps = 2200
    config.run.log_every = 50
    config.run.eval_every = 550
    config.run.eval_batches = 8
    config.run.checkpoint_every = 550
    return config
