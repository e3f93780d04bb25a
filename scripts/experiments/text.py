"""Text classification: SST-2, QNLI, IMDB and AG News, and IMDB in 4,096 bytes.

`small` has fewer steps than the files `configs/cls_*.py`: 1 to 6 passes over the examples. `paper`
has the paper's AdamW: a learning rate of 1e-5 and a weight decay of 5e-5, for about 10 epochs. The
paper says this of IMDB; for the other data sets the number of epochs is ours.
"""

from typing import Any

from experiments.methods import ENCODER
from experiments.table import TINY, Data, Metric, Table

VALID = Metric("valid.accuracy", "accuracy, valid, %", 1, 100.0, lowest_is_best=False)
TEST = Metric("test.accuracy", "accuracy, test, %", 1, 100.0, lowest_is_best=False)


def epochs(steps: int) -> dict[str, Any]:
    """Returns the budget of a run of so many steps of 32 texts."""
    return {"run.steps": steps, "run.eval_every": steps // 10}


def short(steps: int) -> dict[str, Any]:
    """Returns the budget of a shorter run, which is scored four times."""
    return {
        "run.steps": steps,
        "run.eval_every": steps // 4,
        "run.checkpoint_every": steps // 2,
    }


TABLE = Table(
    name="text",
    title="Text classification",
    data=(
        Data(
            "sst2",
            "SST-2",
            "configs/cls_sst2.py",
            (VALID, TEST),
            {"small": short(3000), "paper": epochs(21_000)},
        ),
        Data(
            "qnli",
            "QNLI, a tenth of its training pairs",
            "configs/cls_qnli.py",
            (VALID,),
            {"small": short(2000), "paper": epochs(3300)},
        ),
        Data(
            "imdb",
            "IMDB",
            "configs/cls_imdb.py",
            (TEST, VALID),
            {"small": short(2000), "paper": epochs(7000)},
        ),
        Data(
            "agnews",
            "AG News, 10,001 training items",
            "configs/cls_agnews.py",
            (TEST, VALID),
            {"small": short(1000), "paper": epochs(2800)},
        ),
        Data(
            "imdb_bytes",
            "IMDB, 4,096 bytes",
            "configs/cls_imdb_bytes.py",
            (TEST, VALID),
            {
                # In one part, softmax with all pairs of 32 x 4,096 tokens takes 83 GB.
                "small": short(2500)
                | {"optimizer.warmup_steps": 250, "optimizer.accumulation_steps": 4}
            },
        ),
    ),
    methods=ENCODER,
    budgets={
        "tiny": TINY | {"data.tokenizer": "words", "data.sequence_length": 16},
        "paper": {
            "optimizer.learning_rate": 1e-5,
            "optimizer.end_learning_rate": 0.0,
            "optimizer.weight_decay": 5e-5,
        },
    },
    tiny=("sst2", "softmax", "race_paper"),
)
