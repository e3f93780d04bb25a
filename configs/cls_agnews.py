r"""The topic of news items: AG News, with 10,001 of its 120,000 training items.

The model has 4 layers of width 256 with 4 heads, and the mean over the tokens. RACE has 2 tables of
2 planes. The byte pairs are trained on the training text by the first run. Only descriptions are
read, because the training file has no titles. A tenth of the training items is the validation
split. `--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_agnews.py
Data:     agnews/train-10001.tsv.xz and agnews/test.csv.xz under FOLDER
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
    config.model.max_length = 128
    config.model.race.num_tables = 2
    config.model.race.num_planes = 2
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("agnews/train-10001.tsv.xz",)
    config.data.test_files = ("agnews/test.csv.xz",)
    config.data.valid_fraction = 0.1
    config.data.tokenizer = "bpe"
    config.data.tokenizer_file = "runs/tokenizers/agnews-8192.json"
    config.data.vocab_limit = 8192
    config.data.sequence_length = 128

    config.text_classification.text_columns = ("0",)
    config.text_classification.label_column = "1"
    config.text_classification.test_text_columns = ("2",)
    config.text_classification.test_label_column = "0"
    config.text_classification.classes = ("World|1", "Sports|2", "Business|3", "Sci/Tech|4")

    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 100
    config.run.batch_size = 32
    config.run.steps = 2000
    config.run.eval_every = 250
    config.run.checkpoint_every = 250
    return config
