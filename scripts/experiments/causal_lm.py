"""Causal language models: Penn Treebank, the text8 sample and WikiText-2.

`small` is the training of `configs/lm_ptb.py` and its two neighbors: 4 layers of width 256.
`paper` is the paper's model (8 layers of 8 heads, width 512, dropout 0.1, contexts of 1024) and its
AdamW. Its tokens differ from the paper's: words or characters stand in place of byte pairs, because
the project brings no tokenizer of byte pairs. So no perplexity can be compared with the paper's.
"""

from experiments.methods import CAUSAL
from experiments.table import Data, Metric, Table

PERPLEXITY = (
    Metric("valid.perplexity", "perplexity, valid"),
    Metric("test.perplexity", "perplexity, test"),
)


def epochs(steps: int) -> dict[str, int]:
    """The paper's 100 epochs, with a warm-up over 1 % of the steps."""
    return {
        "run.steps": steps,
        "run.eval_every": steps // 5,
        "optimizer.warmup_steps": steps // 100,
    }


TABLE = Table(
    name="causal_lm",
    title="Causal language models",
    data=(
        Data(
            "ptb",
            "Penn Treebank, words",
            "configs/lm_ptb.py",
            PERPLEXITY,
            {"paper": epochs(470)},
        ),
        Data(
            "text8",
            "text8 sample, characters",
            "configs/lm_text8.py",
            (Metric("valid.bits_per_byte", "bits per character, held out", digits=3),),
            {"tiny": {"data.valid_tail": 2_000}, "paper": epochs(3350)},
        ),
        Data(
            "wikitext2",
            "WikiText-2, words",
            "configs/lm_wikitext2.py",
            PERPLEXITY,
            {"paper": epochs(1060)},
        ),
    ),
    methods=CAUSAL,
    budgets={
        "tiny": {
            "model.num_layers": 1,
            "model.width": 16,
            "model.num_heads": 2,
            "data.sequence_length": 32,
            "language_model.compare_xz": False,
            "optimizer.warmup_steps": 1,
            "run.batch_size": 4,
            "run.steps": 6,
            "mesh.data": 1,
        },
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
    },
    tiny=("ptb", "softmax_rope", "race_paper"),
)
