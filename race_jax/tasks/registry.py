"""The tasks by name: a new one is a file of this folder and a line here."""

from race_jax.records import one_of
from race_jax.tasks.copy import Copy
from race_jax.tasks.language_model import LanguageModel
from race_jax.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "language_model": LanguageModel,
    "copy": Copy,
}


def task_named(name: str) -> type[Task]:
    """The task of that name. Raises ValueError listing those that there are."""
    one_of("config.task", name, tuple(TASKS))
    return TASKS[name]
