"""A task is one file and one line: nothing else of the project names it or speaks its language."""

import ast
import dataclasses
import pathlib
import re

import pytest

from race_jax.tasks.registry import TASKS
from race_jax.train.config import Config

ROOT = pathlib.Path(__file__).resolve().parents[2] / "race_jax"
OF_TASKS = re.compile(
    r"\b(nats?|bits|tokens?|tokenizers?|symbols?|perplexity|prompt|language|"
    r"LanguageModel|language_model|Copy|copy\.symbols|xz)\b"
)


def code_of(file: pathlib.Path) -> list[str]:
    """The lines of a module without docstrings and comments."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        match node:
            case ast.Module(body=body) | ast.ClassDef(body=body) | ast.FunctionDef(body=body):
                node.body = [part for part in body if not is_text(part)] or [ast.Pass()]
    return ast.unparse(tree).splitlines()


def is_text(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


@pytest.mark.parametrize("file", sorted((ROOT / "train").glob("*.py")), ids=lambda file: file.stem)
def test_the_code_of_the_trainer_knows_no_task(file):
    assert not [line for line in code_of(file) if OF_TASKS.search(line)]


def test_the_code_of_a_task_would_be_noticed():
    assert [line for line in code_of(ROOT / "tasks" / "copy.py") if OF_TASKS.search(line)]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_all_that_the_trainer_asks(name):
    task = TASKS[name]
    assert task.loss_unit
    assert task.weight_name
    assert task.loss_text(1.0).startswith("loss 1.0000 nats")
    record = getattr(Config(task=name), name)
    assert type(record) is task.config_class
    assert Config(task=name).task_config() == record
    for field in dataclasses.fields(record):
        assert f"        {field.name}: " in task.config_class.__doc__
    assert set(task.free_fields) <= {field.name for field in dataclasses.fields(record)}
