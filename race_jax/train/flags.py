"""The command line of a training script.

In: `--config FILE [--config.section.field=value ...]`. Out: a checked `Config`, or a ValueError of
one sentence that names the file or the field. Equation: none.
"""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from race_jax.train.config import Config
from race_jax.train.records import as_names, check_fields, unknown_field
from race_jax.train.sources import expand


def parse_config(argv: Sequence[str]) -> Config:
    """The checked configuration that a command line asks for.

    Args:
        argv: the words after the script's name. In overrides `none` stands for None where a field
            may be None. Names of files are separated by commas and may hold spaces; names that hold
            commas are written as a Python tuple, `("a,b.txt",)`.

    Returns:
        A checked `Config`; `run.directory` is `runs/<name of the config file>` unless given.

    Raises:
        ValueError: a missing file, an unknown field or a value that does not fit.
    """
    path, words = _config_file(argv)
    words, values = _split_overrides(words)
    config = _override(_load(path), words)
    for field, value in values.items():
        *sections, name = field.split(".")
        setattr(functools.reduce(getattr, sections, config), name, value)
    if config.run.directory is None:
        config.run.directory = f"runs/{path.stem}"
    return config.validate()


def _config_file(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """The path of the config module, which must exist, and the other words."""
    only_config = flags.FlagValues()
    flags.DEFINE_string("config", None, "config module", flag_values=only_config)
    try:
        rest = only_config(["train", *argv], known_only=True)[1:]
    except flags.Error as error:
        raise ValueError(f"{error}; give --config FILE.py") from None
    if not only_config.config:
        raise ValueError("no configuration given; pass --config configs/NAME.py")
    path = expand(only_config.config, "--config")
    if path.suffix != ".py":
        raise ValueError(f"--config must name a .py file with get_config(), got {path}")
    if not path.is_file():
        raise ValueError(f"--config names a file that does not exist: {path}")
    return path, rest


def _load(path: Path) -> Config:
    """What the `get_config()` of a module returns."""
    # Not config_flags.DEFINE_config_file: it turns errors in the module into later ones.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
    if not isinstance(config, Config):
        raise ValueError(
            f"--config {path} must have a get_config() that returns a race_jax.train.config.Config"
        )
    check_fields(config, "config")  # flags take a field's default only in its proper form
    return config


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Checks each override's field; takes out the values that absl's flags cannot parse.

    Returns:
        The other words; and by field None, or the names of a tuple.
    """
    words, values = [], {}
    remaining = iter(argv)
    for word in remaining:
        match = re.fullmatch(r"--?config\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
        kind = None if match is None else _kind(match[1])
        if type(None) in typing.get_args(kind) and match[2] in ("none", "None"):
            values[match[1]] = None
        elif typing.get_origin(kind) is tuple:
            text = next(remaining, None) if match[2] is None else match[2]
            values[match[1]] = _names(text, f"config.{match[1]}")
        else:
            words.append(word)
    return words, values


def _names(text: str | None, path: str) -> tuple[str, ...]:
    """The names of a tuple's field: comma-separated text, or a Python tuple or list of strings."""
    if text is None:
        raise ValueError(f"{path} needs a value, as in --{path}=a.txt,b.txt")
    value: Any = text
    if text.startswith(("(", "[")):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
    return as_names(value, path)


def _kind(field: str) -> Any:
    """The annotation of a dotted field of `Config`."""
    kind, path = Config, "config"
    for name in field.split("."):
        kinds = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in kinds:
            raise unknown_field(path, name, list(kinds))
        kind, path = kinds[name], f"{path}.{name}"
    if dataclasses.is_dataclass(kind):
        raise ValueError(f"{path} is a section; set one of its fields, as in {path}.FIELD=VALUE")
    return kind


def _override(config: Config, words: Sequence[str]) -> Config:
    """The record with `--config.section.field=value` applied."""
    values = flags.FlagValues()
    argv = ["train", *words]
    config_flags.DEFINE_config_dataclass("config", config, flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except flags.Error as error:
        raise ValueError(_sentence(error)) from None
    if rest:
        raise ValueError(f"arguments not understood: {' '.join(rest)}")
    return values.config


def _sentence(error: flags.Error) -> str:
    """What absl found wrong, in the words of our own errors where it is a field's value."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if match is None:
        return str(error)
    kind = _kind(match[1])
    kinds = [part.__name__ for part in typing.get_args(kind) or (kind,) if part is not type(None)]
    return f"config.{match[1]} must be {kinds[0]}, got {match[2]!r}"
