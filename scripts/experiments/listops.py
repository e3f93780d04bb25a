"""ListOps of the Long Range Arena: the digit that a nested list of 500 to 2,000 tokens comes to.

`small` and `paper` have the arena's model, 4 layers of width 512, in bfloat16. `paper` trains for
the arena's 5,000 steps, and `small` for 1,500 of them.
"""

from experiments.methods import ENCODER
from experiments.table import TINY, Data, Table
from experiments.text import TEST, VALID, short

TABLE = Table(
    name="listops",
    title="ListOps, up to 2,000 tokens",
    data=(Data("listops", "ListOps", "configs/cls_listops.py", (TEST, VALID)),),
    methods=ENCODER,
    budgets={
        "tiny": TINY
        | {
            "data.sequence_length": 32,
            "listops.max_depth": 4,
            "listops.longer_than": 4,
            "listops.train_examples": 64,
            "listops.valid_examples": 16,
            "listops.test_examples": 16,
        },
        "small": {"model.dtype": "bfloat16", "optimizer.warmup_steps": 200} | short(1500),
        "paper": {"model.dtype": "bfloat16"},
    },
    tiny=("listops", "softmax", "race_paper"),
)
