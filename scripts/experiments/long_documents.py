"""Long documents: which of 15 books is a window of 16K, 32K or 64K bytes from?

It stands in the place of the paper's classes of Arxiv papers. All runs compute in bfloat16, which
lets softmax use cuDNN on a GPU. `small` reads 2,000 batches of 8 windows, one window at a time.
`paper` has the paper's batches of 2 x 16 and about 100 epochs, with a warm-up over a tenth of them.
Attentions that form all pairs of tokens in memory are left out.
"""

from typing import Any

from experiments.methods import ENCODER_LINEAR_TIME
from experiments.table import TINY, Data, Table
from experiments.text import TEST, VALID


def windows(size: int, steps: int) -> Data:
    """Returns the data of one length, with the steps of about 100 epochs."""
    length = size * 1024
    paper: dict[str, Any] = {
        "run.steps": steps,
        "run.eval_every": steps // 10,
        "optimizer.warmup_steps": steps // 10,
    }
    return Data(
        f"bytes_{size}k",
        f"windows of {size}K bytes",
        "configs/cls_long_documents.py",
        (TEST, VALID),
        {"paper": paper},
        settings={"data.sequence_length": length, "model.max_length": length},
        size=length,
    )


TABLE = Table(
    name="long_documents",
    title="Long documents",
    data=(windows(16, 3300), windows(32, 1650), windows(64, 830)),
    methods=ENCODER_LINEAR_TIME,
    budgets={
        "tiny": TINY
        | {
            "data.train_files": ("books/train/bleak-house.md.xz", "books/train/tom-jones.md.xz"),
            "data.sequence_length": 64,
            "optimizer.accumulation_steps": 1,
        },
        "small": {
            "model.dtype": "bfloat16",
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 30,
            "run.batch_size": 8,
            "run.steps": 2000,
            "run.eval_every": 250,
        },
        "paper": {"model.dtype": "bfloat16", "optimizer.accumulation_steps": 16},
    },
    tiny=("bytes_16k", "softmax", "race_paper"),
    size_label="length of a window, bytes",
)
