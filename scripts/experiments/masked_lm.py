"""Masked language models: short stories and WikiText-2, of whose tokens 15 % are guessed.

`small` trains the models of `configs/mlm_tinystories.py` and `configs/mlm_wikitext2.py` for about
half of their steps. That of the stories is the paper's, 6 layers of width 384. `paper` trains the
stories for about 100 epochs, as the paper does. It has fewer stories than the paper, and byte pairs
in place of word pieces.
"""

from experiments.causal_lm import PERPLEXITY
from experiments.methods import ENCODER
from experiments.table import TINY, Data, Table
from experiments.text import short

TABLE = Table(
    name="masked_lm",
    title="Masked language models",
    data=(
        Data(
            "tinystories",
            "Tiny Stories, byte pairs",
            "configs/mlm_tinystories.py",
            PERPLEXITY,
            {
                "tiny": {"data.tokenizer": "words"},
                "small": short(2000),
                "paper": {"run.steps": 7500, "optimizer.warmup_steps": 75},
            },
        ),
        Data(
            "wikitext2",
            "WikiText-2, words",
            "configs/mlm_wikitext2.py",
            PERPLEXITY,
            {"small": short(3000)},
        ),
    ),
    methods=ENCODER,
    budgets={"tiny": TINY | {"data.sequence_length": 32}},
    tiny=("wikitext2", "softmax", "race_paper"),
)
