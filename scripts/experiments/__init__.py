"""The tables of docs/results.md as records of settings, one file each.

table      what a table consists of: data, methods, budgets
methods    the rows that several tables share
causal_lm  and so on: one table each, a `TABLE`

A new table is one file here and its name in `NAMES`. `scripts/reproduce.py NAME` runs it.
"""

import importlib

from experiments.table import Table

NAMES = (
    *("causal_lm", "race_forms", "masked_lm", "text", "images", "listops"),
    *("long_documents", "recall", "speed"),
)


def find(name: str) -> Table:
    """Returns the table of this name, which must be one of `NAMES`."""
    return importlib.import_module(f"experiments.{name}").TABLE
