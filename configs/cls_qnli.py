r"""Whether a sentence holds the answer to a question: QNLI, with a tenth of its training pairs.

The model has the paper's sizes for this task: 4 layers of width 384 with 8 heads, and the mean over
the tokens. RACE has 2 tables of 2 planes. Question and sentence are one sequence, with a separator
between them. The tokens are byte pairs, which the first run trains on the training text. The
development set of GLUE is the validation split.
`--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_qnli.py
Data:     qnli/train-10475.tsv.xz and qnli/dev.tsv.xz under FOLDER
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
    config.model.max_length = 256
    config.model.race.num_tables = 2
    config.model.race.num_planes = 2
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("qnli/train-10475.tsv.xz",)
    config.data.valid_files = ("qnli/dev.tsv.xz",)
    config.data.tokenizer = "bpe"
    config.data.tokenizer_file = "runs/tokenizers/qnli-8192.json"
    config.data.vocab_limit = 8192
    config.data.sequence_length = 256

    config.text_classification.text_columns = ("question", "sentence")
    config.text_classification.classes = ("entailment|0", "not_entailment|1")

    config.optimizer.learning_rate = 3e-4
    config.optimizer.b2 = 0.999
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 200
    config.run.batch_size = 32
    config.run.steps = 3000
    config.run.eval_every = 500
    config.run.checkpoint_every = 500
    return config
