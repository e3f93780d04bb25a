r"""Fashion-MNIST: 28 x 28 pixels as 784 tokens, with the settings of the paper.

The model has 2 layers of width 384 with 4 heads and a learned first token for the head. RACE has 5
tables of 2 planes. Training images are flipped, and shifted by up to 4 pixels. 5 % of them are held
out for validation. `--config.model.attention=softmax` trains the same model with softmax attention.

Command:  RACE_JAX_DATA=FOLDER .venv/bin/python scripts/train_classifier.py \
              --config configs/cls_fashion_mnist.py
Data:     fashion-mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.xz under FOLDER
Hardware: a GPU; no whole run has been timed
Small:    add --config.images.patch_size=4 --config.data.sequence_length=49
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
    config.model.max_length = 784
    config.model.race.num_tables = 5
    config.model.race.num_planes = 2
    config.model.race.forget_gate = None
    config.model.race.short_conv = None
    config.model.race.output_norm = None
    config.model.race.output_gate = None

    config.data.source = "files"
    config.data.train_files = (
        "fashion-mnist/train-images-idx3-ubyte.xz",
        "fashion-mnist/train-labels-idx1-ubyte.xz",
    )
    config.data.test_files = (
        "fashion-mnist/t10k-images-idx3-ubyte.xz",
        "fashion-mnist/t10k-labels-idx1-ubyte.xz",
    )
    config.data.sequence_length = 784

    config.optimizer.learning_rate = 6e-4
    config.optimizer.b2 = 0.999
    config.run.batch_size = 28
    config.run.steps = 20_000  # about 10 epochs; the paper trains for 75
    config.run.eval_every = 2000
    config.run.checkpoint_every = 2000
    return config
