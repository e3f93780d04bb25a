r"""The sentiment of film reviews, letter by letter: IMDB in 4,096 bytes.

This is the task "Text" of Long Range Arena. The model has 4 layers of width 256 with 4 heads, and
the mean over the bytes. RACE has 4 tables of 4 planes. A longer review loses its end. A tenth of
the training reviews is the validation split.
`--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_imdb_bytes.py
Data:     imdb/{train,test}.tsv.xz under FOLDER
Hardware: a GPU; no whole run has been timed
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="text_classification")
    config.model.num_layers = 4
    config.model.width = 256
    config.model.num_heads = 4
    config.model.dropout_rate = 0.1
    config.model.positions = "learned"
    config.model.max_length = 4096
    config.model.race.num_tables = 4
    config.model.race.num_planes = 4
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("imdb/train.tsv.xz",)
    config.data.test_files = ("imdb/test.tsv.xz",)
    config.data.valid_fraction = 0.1
    config.data.tokenizer = "bytes"
    config.data.sequence_length = 4096

    config.text_classification.classes = ("negative|0", "positive|1")

    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 500
    config.run.batch_size = 32
    config.run.steps = 10000
    config.run.eval_every = 1000
    config.run.checkpoint_every = 1000
    return config
