"""What a table consists of: data, methods and budgets, each a record of settings.

A setting is a field of `race_jax.train.config.Config` by its dotted name without "config.", such as
`{"model.attention": "softmax"}`. A run takes the configuration file of its data. The settings of
the data and of the budget come on top of it, and the settings of the method come last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]

BUDGETS = ("tiny", "small", "paper")

# A model and a run that take seconds on a CPU, for the budget "tiny".
TINY: Settings = {
    "model.num_layers": 1,
    "model.width": 16,
    "model.num_heads": 2,
    "optimizer.warmup_steps": 1,
    "run.batch_size": 4,
    "run.steps": 6,
    "mesh.data": 1,
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a run's `summary.json` that the table shows.

    Attributes:
        path: the split and the name of the number, such as "valid.perplexity", or
            "training.tokens_per_second".
        label: the head of its column.
        digits: the number of digits after the point.
        scale: what the number is multiplied by; 100 shows a share in percent.
        lowest_is_best: whether a lower number is better.
    """

    path: str
    label: str
    digits: int = 2
    scale: float = 1.0
    lowest_is_best: bool = True


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        name: its name on the command line.
        label: its name in the table.
        settings: everything that it sets.
        parent: the name of the method that it was made from by `but`, or "".
        change: what `but` has set. It is the same as `settings` if there is no parent.
    """

    name: str
    label: str
    settings: Settings
    parent: str = ""
    change: Settings = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parent:
            object.__setattr__(self, "change", self.settings)

    def but(self, name: str, label: str, change: Settings) -> Method:
        """Returns a method that differs from this one by `change`.

        Example:
            >>> race = Method("race", "RACE", {"model.attention": "race"})
            >>> race.but("wide", "RACE, wide", {"model.race.num_tables": 16}).parent
            'race'
        """
        return Method(name, label, {**self.settings, **change}, self.name, change)


@dataclasses.dataclass(frozen=True)
class Data:
    """One data set, with the configuration that trains on it.

    Attributes:
        name: its name in folders and files.
        label: its name in the table.
        config: the configuration file.
        metrics: the columns. The figure shows the first one.
        budgets: the settings of each budget. A budget that is missing sets nothing.
        settings: what it sets in every budget, such as a length.
        size: its place on the axis of the figure, if the data sets of the table form a series.
    """

    name: str
    label: str
    config: str
    metrics: tuple[Metric, ...]
    budgets: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    settings: Settings = dataclasses.field(default_factory=dict)
    size: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        name: its name on the command line.
        title: its heading.
        data: the data sets.
        methods: the rows.
        budgets: the settings of each budget, for all data sets. Those of a data set come on top.
        tiny: the names of the data sets and of the methods that the budget "tiny" runs.
        size_label: the name of the figure's axis, if the data sets form a series.
        changes: what the command line sets in every run.
    """

    name: str
    title: str
    data: tuple[Data, ...]
    methods: tuple[Method, ...]
    budgets: Mapping[str, Settings] = dataclasses.field(default_factory=dict)
    tiny: tuple[str, ...] = ()
    size_label: str = ""
    changes: Settings = dataclasses.field(default_factory=dict)

    def has_budget(self, budget: str) -> bool:
        """Returns whether the table or one of its data sets says what a budget sets."""
        return any(budget in one.budgets for one in (self, *self.data))

    def settings(self, data: Data, method: Method, budget: str) -> dict[str, Any]:
        """Returns everything that a run sets. The command line has the last word."""
        common, own = self.budgets.get(budget, {}), data.budgets.get(budget, {})
        return {**data.settings, **common, **own, **method.settings, **self.changes}
