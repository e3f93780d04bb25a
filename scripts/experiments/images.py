"""Image classification, one token for each pixel: Fashion-MNIST and CIFAR-10.

`small` trains for less than 2 epochs. `paper` trains for 75 epochs, as the paper does on
Fashion-MNIST. CIFAR-10 comes from JPEG files, so that its accuracies cannot be compared with
published ones.
"""

from typing import Any

from experiments.methods import ENCODER
from experiments.table import TINY, Data, Table
from experiments.text import TEST, VALID, short


def epochs(steps: int) -> dict[str, Any]:
    """Returns the settings of a run of so many steps."""
    return {"run.steps": steps, "run.eval_every": steps // 5}


TABLE = Table(
    name="images",
    title="Image classification",
    data=(
        Data(
            "fashion_mnist",
            "Fashion-MNIST, 784 pixels",
            "configs/cls_fashion_mnist.py",
            (TEST, VALID),
            {
                "tiny": {"data.sequence_length": 16, "images.patch_size": 2},
                "small": short(3000),
                "paper": epochs(152_700),
            },
        ),
        Data(
            "cifar10",
            "CIFAR-10, 1,024 pixels",
            "configs/cls_cifar10.py",
            (TEST, VALID),
            {
                "tiny": {"data.sequence_length": 16, "images.patch_size": 8},
                "small": short(2400),
                "paper": epochs(111_300),
            },
        ),
    ),
    methods=ENCODER,
    budgets={"tiny": TINY},
    tiny=("fashion_mnist", "softmax", "race_paper"),
)
