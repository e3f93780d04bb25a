r"""A masked language model of short stories: 15 % of the tokens are hidden and guessed.

The model has the paper's sizes for this task: 6 layers of width 384 with 4 heads, and 512 tokens of
context. RACE has 4 tables of 4 planes. The tokens are byte pairs, which the first run trains on the
training text. Stories follow each other, with the line between them that stands in the file.
`--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_mlm.py \
              --config configs/mlm_tinystories.py
Data:     tinystories/{train,valid,test}.txt.xz under FOLDER: 5,235 stories to train on
Hardware: a GPU; no whole run has been timed
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="masked_lm")
    config.model.num_layers = 6
    config.model.width = 384
    config.model.num_heads = 4
    config.model.dropout_rate = 0.1
    config.model.positions = "learned"
    config.model.max_length = 512
    config.model.race.num_tables = 4
    config.model.race.num_planes = 4
    config.model.race.forget_gate = None
    config.model.race.short_conv = "qkv"  # beyond the paper; docs/results.md says what it is worth
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("tinystories/train.txt.xz",)
    config.data.valid_files = ("tinystories/valid.txt.xz",)
    config.data.test_files = ("tinystories/test.txt.xz",)
    config.data.tokenizer = "bpe"
    config.data.tokenizer_file = "runs/tokenizers/tinystories-4096.json"
    config.data.vocab_limit = 4096
    config.data.sequence_length = 512

    config.optimizer.learning_rate = 6e-4
    config.optimizer.b2 = 0.999
    config.optimizer.warmup_steps = 200
    config.run.batch_size = 32
    config.run.steps = 4000
    config.run.eval_every = 500
    config.run.checkpoint_every = 500
    return config
