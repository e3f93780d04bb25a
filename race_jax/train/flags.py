"""The command line of a training script: `--config FILE [--config.section.field=value ...]`.

Every error is a ValueError of one sentence, which names the file or the field.
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
import traceback
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
    """Makes the checked configuration that a command line describes.

    Args:
        argv: the words after the script's name. If a field may be None, `none` stands for it. File
            names are separated by commas, and may contain spaces. Names that contain commas are
            written as a Python tuple, `("a,b.txt",)`.

    Returns:
        A checked `Config`. If `run.directory` is not given, it is `runs/` with the name of the
        config file. Overrides that change what is learned are added to that name, as in
        `runs/lm_default-steps=300`, so that each experiment has its own folder.

    Raises:
        ValueError: a file is missing, a field is unknown, or a value cannot be used.
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
    """Lists every field of the configuration with its type, value and meaning.

    Args:
        argv: the words of the command line. The values are those of its `--config` file, if it
            names one that can be read. Otherwise they are the defaults of `Config`.

    Returns:
        The lines to print.
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
    """Returns the lines of one section. The sections inside it follow its own fields."""
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
            meanings.get(field.name, ""), 94, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    return lines + inner


def _meanings(kind: type) -> dict[str, str]:
    """Reads the meaning of each field from the section "Attributes" of a record's docstring."""
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
            break  # the next section of the docstring
    return found


def _kind_name(kind: Any) -> str:
    """Returns the name of an annotation, such as `int`, `float or none` or `tuple`."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    if type(None) not in typing.get_args(kind):
        return getattr(kind, "__name__", str(kind))
    return " or ".join([*(part.__name__ for part in parts), "none"])


def _suffix(argv: Sequence[str], given: Config, config: Config) -> str:
    """Returns the part of the folder's name that is made from overrides that change the result."""
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
    # The text is too long for the name of a folder, or has characters that a name must not have.
    return f"{safe[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _config_file(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """Returns the path of the config module, which must exist, and the other words."""
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
    """Returns what the `get_config()` of a module returns."""
    # config_flags.DEFINE_config_file is not used, because it hides errors in the module.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # whatever the user's code raises
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.line]
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else "?"
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(
            f"--config {path} must have a get_config() that returns a race_jax.train.config.Config"
        )
    check_fields(config, "config")  # flags need defaults of the proper type
    return config


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Checks the field of each override, and parses the values that absl's flags cannot parse.

    Returns:
        The words that are left for absl, and the parsed values by field: None or a tuple of names.
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
            if match is not None:  # the last value of a field counts
                values.pop(match[1], None)
    return words, values


def _names(text: str | None, path: str) -> tuple[str, ...]:
    """Parses names that are separated by commas, or a Python tuple or list of strings."""
    if text is None:
        raise ValueError(f"{path} needs a value, as in --{path}=a.txt,b.txt")
    value: Any = text
    if text.startswith(("(", "[")):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
    return as_names(value, path)


def _kind(field: str) -> Any:
    """Returns the annotation of a dotted field of `Config`."""
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
    """Applies the words `--config.section.field=value` to the record."""
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
    """Describes an error of absl. One about the value of a field gets the words of our own."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error), re.DOTALL)
    if match is None:
        return str(error)
    kind = _kind(match[1])
    kinds = [part.__name__ for part in typing.get_args(kind) or (kind,) if part is not type(None)]
    return f"config.{match[1]} must be {kinds[0]}, got {match[2]!r}"
