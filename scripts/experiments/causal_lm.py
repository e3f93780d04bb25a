"""Causal language models: Penn Treebank, the text8 sample and WikiText-2.

`small` is the training of `configs/lm_ptb.py` and its two neighbors: 4 layers of width 256.
`paper` is the paper's model (8 layers of 8 heads, width 512, dropout 0.1, contexts of 1024) and its
AdamW, for about 100 epochs. Its tokens differ from the paper's: words or characters stand in place
of byte pairs of GPT-2, because the project brings no such vocabulary. So no perplexity can be
compared with the paper's.
"""

from typing import Any

from experiments.methods import CAUSAL
from experiments.table import TINY, Data, Metric, Table

PERPLEXITY = (
    Metric("valid.perplexity", "perplexity, valid"),
    Metric("test.perplexity", "perplexity, test"),
)


def epochs(steps: int) -> dict[str, int]:
    """Returns the settings of a run of so many steps, with a warm-up over 1 % of them."""
    return {
        "run.steps": steps,
        "run.eval_every": steps // 5,
        "optimizer.warmup_steps": steps // 100,
    }


def learned(length: int) -> dict[str, Any]:
    """Returns the settings of learned positions, for methods that do not say otherwise."""
    return {"model.positions": "learned", "model.max_length": length}


PTB = Data(
    "ptb",
    "Penn Treebank, words",
    "configs/lm_ptb.py",
    PERPLEXITY,
    {"paper": epochs(470)},
    learned(256),
)
TEXT8 = Data(
    "text8",
    "text8 sample, characters",
    "configs/lm_text8.py",
    (Metric("valid.bits_per_byte", "bits per character, held out", digits=3),),
    {"tiny": {"data.valid_tail": 2_000}, "paper": epochs(3350)},
    learned(512),
)
WIKITEXT2 = Data(
    "wikitext2",
    "WikiText-2, words",
    "configs/lm_wikitext2.py",
    PERPLEXITY,
    {"paper": epochs(1060)},
    learned(256),
)
BUDGETS: dict[str, dict[str, Any]] = {
    "tiny": TINY
    | {"model.num_layers": 2, "data.sequence_length": 32, "language_model.compare_xz": False},
    "paper": {
        "model.num_layers": 8,
        "model.width": 512,
        "model.num_heads": 8,
        "model.dropout_rate": 0.1,
        "model.max_length": 1024,
        "data.sequence_length": 1024,
        "optimizer.learning_rate": 6e-4,
        "optimizer.b2": 0.999,
        "optimizer.schedule": "linear",
        "optimizer.end_learning_rate": 0.0,
        "optimizer.accumulation_steps": 12,
        "run.batch_size": 192,
    },
}

TABLE = Table(
    name="causal_lm",
    title="Causal language models",
    data=(PTB, TEXT8, WIKITEXT2),
    methods=CAUSAL,
    budgets=BUDGETS,
    tiny=("ptb", "softmax_rope", "race_paper"),
)
