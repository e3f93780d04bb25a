r"""CIFAR-10: 32 x 32 pixels as 1,024 tokens, from JPEG files.

The model has 2 layers of width 384 with 4 heads and a learned first token for the head. RACE has 4
tables of 4 planes. Training images are flipped, and shifted by up to 4 pixels. 5 % of them are held
out for validation. `--config.images.grey=True` reads brightness in place of colors. The pixels of
JPEG files are not those of the original data set, so the accuracy is not to be compared with
published ones. `--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_cifar10.py
Data:     cifar10-jpeg/{train,test}.tar.xz under FOLDER, with files SPLIT/CLASS/NAME.jpg
Hardware: a GPU; no whole run has been timed
Small:    add --config.images.patch_size=4 --config.data.sequence_length=64
          --config.model.width=64 --config.run.batch_size=64 --config.run.steps=600
          --config.optimizer.learning_rate=1e-3
"""

from race_jax.train.config import Config


def get_config() -> Config:
    """Returns the configuration of the run."""
    config = Config(task="images")
    config.model.num_layers = 2
    config.model.width = 384
    config.model.num_heads = 4
    config.model.dropout_rate = 0.1
    config.model.positions = "learned"
    config.model.max_length = 1024
    config.model.race.num_tables = 4
    config.model.race.num_planes = 4
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = ("cifar10-jpeg/train.tar.xz",)
    config.data.test_files = ("cifar10-jpeg/test.tar.xz",)
    config.data.sequence_length = 1024

    config.optimizer.learning_rate = 6e-4
    config.optimizer.b2 = 0.999
    config.run.batch_size = 32
    config.run.steps = 15_000
    config.run.eval_every = 1500
    config.run.checkpoint_every = 1500
    return config
