"""The tasks by name. A new task is a file of this folder and a line here."""

import dataclasses

from race_jax.records import one_of
from race_jax.tasks.copy import Copy
from race_jax.tasks.images import ImageClassification
from race_jax.tasks.language_model import LanguageModel
from race_jax.tasks.listops import ListOps
from race_jax.tasks.long_documents import LongDocuments
from race_jax.tasks.lookup import Lookup
from race_jax.tasks.masked_lm import MaskedLM
from race_jax.tasks.needle import Needle
from race_jax.tasks.recall import Recall
from race_jax.tasks.task import Task
from race_jax.tasks.text_classification import TextClassification

TASKS: dict[str, type[Task]] = {
    "language_model": LanguageModel,
    "copy": Copy,
    "lookup": Lookup,
    "masked_lm": MaskedLM,
    "text_classification": TextClassification,
    "listops": ListOps,
    "images": ImageClassification,
    "long_documents": LongDocuments,
    "recall": Recall,
    "needle": Needle,
}
DEFAULT = "language_model"


def task_named(name: str) -> type[Task]:
    """Returns the task of this name.

    Raises:
        ValueError: there is no such task. The message lists those that there are.
    """
    one_of("config.task", name, tuple(TASKS))
    return TASKS[name]


def add_sections(config: type) -> type:
    """Gives a class, before it is made a dataclass, a field with the record of every task."""
    for name, task in TASKS.items():
        config.__annotations__[name] = task.config_class
        setattr(config, name, dataclasses.field(default_factory=task.config_class))
    return config
