r"""The sentiment of film reviews: IMDB, in 512 byte pairs.

The model has the paper's sizes for this task: 1 layer of width 256 with 2 heads, and the mean over
the tokens. RACE has 2 tables of 3 planes. The byte pairs are trained on the training text by the
first run. A longer review loses its end. A tenth of the training reviews is the validation split.
`--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_imdb.py
Data:     imdb/{train,test}.tsv.xz under FOLDER
Hardware: a GPU; no whole run has been timed
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="text_classification")
    config.model.num_layers = 1
    config.model.width = 256
    config.model.num_heads = 2
    config.model.dropout_rate = 0.1
    config.model.positions = "learned"
    config.model.max_length = 512
    config.model.race.num_tables = 2
    config.model.race.num_planes = 3
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("imdb/train.tsv.xz",)
    config.data.test_files = ("imdb/test.tsv.xz",)
    config.data.valid_fraction = 0.1
    config.data.tokenizer = "bpe"
    config.data.tokenizer_file = "runs/tokenizers/imdb-8192.json"
    config.data.vocab_limit = 8192
    config.data.sequence_length = 512

    config.text_classification.classes = ("negative|0", "positive|1")

    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 200
    config.run.batch_size = 32
    config.run.steps = 4000
    config.run.eval_every = 500
    config.run.checkpoint_every = 500
    return config
