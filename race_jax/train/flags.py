"""The command line of a training script: `--config FILE [--config.section.field=value ...]`.

A wrong word gives a ValueError of one sentence that names the file or the field.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import re
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from race_jax.data.sources import expand
from race_jax.records import as_names, check_fields, unknown_field
from race_jax.tasks.registry import TASKS
from race_jax.train.config import Config
from race_jax.train.files import is_free


def parse_config(argv: Sequence[str]) -> Config:
    """The checked configuration that a command line asks for.

    Args:
        argv: the words after the script's name. In overrides `none` stands for None where a field
            may be None. Names of files are separated by commas and may hold spaces; names that hold
            commas are written as a Python tuple, `("a,b.txt",)`.

    Returns:
        A checked `Config`. Unless given, `run.directory` is `runs/` and the name of the config
        file; overrides that change what is learned are added to it, as in
        `runs/lm_default-steps=300`, so that each experiment has its own folder.

    Raises:
        ValueError: a missing file, an unknown field or a value that does not fit.
    """
    path, words = _config_file(argv)
    words, values = _split_overrides(words)
    config = _load(path)
    given = copy.deepcopy(config)
    config = _override(config, words)
    for field, value in values.items():
        *sections, name = field.split(".")
        setattr(functools.reduce(getattr, sections, config), name, value)
    config = config.validate()
    if config.run.directory is None:
        config.run.directory = f"runs/{path.stem}{_suffix(argv, given, config)}"
    return config


def help_lines(argv: Sequence[str]) -> list[str]:
    """One entry for each field of the configuration: its name, kind, value and meaning.

    Args:
        argv: the words of the command line. The values are those of its `--config`, if it names
            one that can be read, and the defaults of `Config` otherwise.
    """
    try:
        words = [word for word in argv if word not in ("-h", "--help")]
        config = _load(_config_file(words)[0])
    except ValueError:
        config = Config()
    lines = []
    for section in dataclasses.fields(config):
        record = getattr(config, section.name)
        if dataclasses.is_dataclass(record):
            lines += _section_lines(record, section.name)
            continue
        lines += ["", f"  --config.{section.name}={record!r} ({section.type.__name__})"]
        lines += [f"      what is trained: {', '.join(TASKS)}."]
    return lines


def _section_lines(record: Any, path: str) -> list[str]:
    """The lines of one section; the sections within it follow its own fields."""
    if not dataclasses.fields(record):
        return []  # some attentions have no options
    meanings, kinds = _meanings(type(record)), typing.get_type_hints(type(record))
    lines, inner = ["", inspect.getdoc(record).splitlines()[0]], []
    for field in dataclasses.fields(record):
        kind, value = kinds[field.name], getattr(record, field.name)
        if dataclasses.is_dataclass(kind):
            inner += _section_lines(value, f"{path}.{field.name}")
            continue
        shown = "none" if value is None else repr(value)
        lines.append(f"  --config.{path}.{field.name}={shown} ({_kind_name(kind)})")
        lines += textwrap.wrap(
            meanings[field.name], 94, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return lines + inner


def _meanings(kind: type) -> dict[str, str]:
    """What each field of a record means, from the section "Attributes" of its docstring."""
    _, _, text = inspect.getdoc(kind).partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.split("\n"):
        entry = re.fullmatch(r"    (\w+(?:, \w+)*): (.*)", line)
        if entry is not None:
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line.strip():
            break  # the docstring's next section
    return found


def _kind_name(kind: Any) -> str:
    """The name of an annotation: `int`, `float or none`, `tuple`."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    if type(None) not in typing.get_args(kind):
        return getattr(kind, "__name__", str(kind))
    return " or ".join([*(part.__name__ for part in parts), "none"])


def _suffix(argv: Sequence[str], given: Config, config: Config) -> str:
    """What the overrides that change the result add to the name of the run's folder."""
    fields = sorted(set(re.findall(r"^--?config\.([\w.]+)", "\n".join(argv), re.MULTILINE)))
    said = []
    for field in fields:
        before, now = (functools.reduce(getattr, field.split("."), c) for c in (given, config))
        if before != now and not is_free(f"config.{field}", config):
            value = ",".join(now) if isinstance(now, tuple) else now
            said.append(f"-{field.split('.')[-1]}={'none' if value is None else value}")
    text = "".join(said)
    safe = re.sub(r"[^\w.,=+-]", "_", text)
    if safe == text and len(text) <= 100:
        return text
    # A name with letters that a file's must not have, or too long for one.
    return f"{safe[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


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
            if match is not None:  # the last word about a field counts
                values.pop(match[1], None)
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
