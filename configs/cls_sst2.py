r"""The sentiment of sentences and phrases of film reviews: SST-2.

The model has the paper's sizes for this task: 4 layers of width 384 with 8 heads, and the mean over
the words. RACE has 2 tables of 2 planes. The words are divided by white space. The development set
of GLUE is the validation split. The test split is that of the original treebank.
`--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_sst2.py
Data:     sst2/{train,dev,test-labelled}.tsv.xz under FOLDER
Hardware: a GPU; no whole run has been timed
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="text_classification")
    config.model.num_layers = 4
    config.model.width = 384
    config.model.num_heads = 8
    config.model.dropout_rate = 0.1
    config.model.positions = "learned"
    config.model.max_length = 64
    config.model.race.num_tables = 2
    config.model.race.num_planes = 2
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("sst2/train.tsv.xz",)
    config.data.valid_files = ("sst2/dev.tsv.xz",)
    config.data.test_files = ("sst2/test-labelled.tsv.xz",)
    config.data.tokenizer = "words"
    config.data.vocab_limit = 20_000
    config.data.sequence_length = 64

    config.text_classification.text_columns = ("sentence",)
    config.text_classification.test_text_columns = ("content",)
    config.text_classification.classes = ("negative|0", "positive|1")

    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 200
    config.run.batch_size = 32
    config.run.steps = 6000
    config.run.eval_every = 1000
    config.run.checkpoint_every = 1000
    return config
