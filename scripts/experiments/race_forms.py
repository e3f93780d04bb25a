"""The forms of RACE on language modeling, one change at a time: which part is worth what?

Data and budgets are those of `causal_lm`.
"""

from experiments.causal_lm import BUDGETS, PTB, TEXT8
from experiments.methods import RACE_FORMS
from experiments.table import Table

TABLE = Table(
    name="race_forms",
    title="Forms of RACE",
    data=(TEXT8, PTB),
    methods=RACE_FORMS,
    budgets=BUDGETS,
    tiny=("text8", "race_paper", "race_wide"),
)
