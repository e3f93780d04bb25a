"""Speed of training by the length of sequences, at 65,536 tokens a step.

The model is that of `configs/lm_text8.py`, 4 layers of width 256, in bfloat16, which lets softmax
use cuDNN on a GPU. A run is too short to learn much: read the speeds, with `--jobs 1`.
"""

from experiments.methods import (
    LINEAR_BEST,
    RACE_BEST,
    RACE_P4,
    RACE_PAPER,
    RACE_WINDOW_ROPE,
    SOFTMAX_ROPE,
    SOFTMAX_ROPE_FULL,
)
from experiments.table import TINY, Data, Metric, Table

TOKENS = 65_536
SPEED = Metric(
    "training.tokens_per_second", "thousand tokens/s", 1, scale=1e-3, lowest_is_best=False
)


def windows(length: int) -> Data:
    """Returns the data of one length."""
    return Data(
        f"tokens_{length}",
        f"windows of {length:,} tokens",
        "configs/lm_text8.py",
        (SPEED,),
        {"tiny": {"data.valid_tail": 2_000, "data.sequence_length": 32}},
        settings={
            "data.sequence_length": length,
            "model.max_length": length,
            "run.batch_size": TOKENS // length,
        },
        size=length,
    )


TABLE = Table(
    name="speed",
    title="Speed of training",
    data=tuple(windows(length) for length in (512, 2048, 8192, 32_768)),
    methods=(
        *(SOFTMAX_ROPE, SOFTMAX_ROPE_FULL),
        *(RACE_PAPER, RACE_P4, RACE_BEST, RACE_WINDOW_ROPE, LINEAR_BEST),
    ),
    budgets={
        "tiny": TINY | {"model.num_layers": 4, "language_model.compare_xz": False},
        "small": {
            "model.dtype": "bfloat16",
            "language_model.compare_xz": False,
            "language_model.sample_length": 0,
            "run.steps": 160,
            "run.log_every": 20,
            "run.eval_every": 160,
            "run.eval_batches": 1,
            "run.checkpoint_every": 160,
        },
    },
    tiny=("tokens_512", "softmax_rope", "race_best"),
    size_label="tokens of a window",
)
