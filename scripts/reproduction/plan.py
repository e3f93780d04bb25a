"""The runs of a table, each with its configuration, its command and its folder.

The name of a folder ends in a digest of everything that affects what the run learns. So a finished
run is found again, and a run of another configuration never takes its place.
"""

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.table import Data, Method, Table
from race_jax.data.sources import ROOT_VARIABLE, named_paths
from race_jax.train.config import Config
from race_jax.train.files import is_free
from race_jax.train.flags import parse_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts/train_lm.py"
OWN_FIELDS = ("run.seed", "run.tensorboard", "run.compilation_cache")  # that a run gets by itself


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a table.

    Attributes:
        data: the data set.
        method: the method.
        seed: the seed.
        config: the checked configuration.
        words: the words of the command after the name of the script.
        directory: the run's folder.
    """

    data: Data
    method: Method
    seed: int
    config: Config
    words: tuple[str, ...]
    directory: Path

    @property
    def name(self) -> str:
        """Data, method and seed in words."""
        return f"{self.data.name}, {self.method.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """The file with everything that the run has printed."""
        return self.directory / "log.txt"

    @property
    def work(self) -> int:
        """How much work the run is, by which the time left is estimated: its number of tokens."""
        run = self.config.run
        return run.steps * run.batch_size * self.config.data.sequence_length

    @property
    def command(self) -> str:
        """The command as a user would type it in the folder of the project."""
        return shown(shlex.join([".venv/bin/python", SCRIPT, *self.words]))


def make_runs(
    table: Table,
    budget: str,
    seeds: Sequence[int],
    methods: Sequence[str],
    data: Sequence[str],
    out: Path,
) -> list[Run]:
    """Returns the runs of a table: everything with the first seed, then with the next one.

    So the table is soon whole, and later seeds find programs that are compiled already.

    Args:
        table: the table.
        budget: "tiny", "small" or "paper".
        seeds: the seeds.
        methods: names of methods.
        data: names of data sets.
        out: the folder of all results.

    Raises:
        ValueError: a setting of the table cannot be used. The message names the run and the field.
    """
    return [
        _make_run(table.settings(d, m, budget), d, m, seed, out)
        for seed in seeds
        for d in table.data
        if d.name in data
        for m in table.methods
        if m.name in methods
    ]


def _make_run(settings: dict[str, Any], data: Data, method: Method, seed: int, out: Path) -> Run:
    own_values = seed, False, str(out / "compiled")
    settings = settings | dict(zip(OWN_FIELDS, own_values, strict=True))
    own = [f"--config.{field}={as_word(value)}" for field, value in settings.items()]
    try:
        config = parse_config(["--config", str(ROOT / data.config), *own])
    except ValueError as error:
        raise ValueError(f"{data.name}, {method.name}: {error}") from None
    directory = out / "runs" / f"{data.name}-{method.name}-seed{seed}-{digest(config)}"
    words = "--config", data.config, *own, f"--config.run.directory={directory}"
    return Run(data, method, seed, config, words, directory)


def check_files(runs: Sequence[Run], root: Path | None) -> None:
    """Checks that the files of the data are there, so that not every run fails for their lack.

    Args:
        runs: the runs.
        root: the folder of the data; None is the one that the environment names.

    Raises:
        ValueError: there is no such folder, or a file is missing in it. The message names it.
    """
    for run in runs:
        data = run.config.data
        if data.source != "files":
            continue
        if root is not None:
            data = dataclasses.replace(data, root=str(root))
        names = (*data.train_files, *data.valid_files, *data.test_files)
        if not (data.root or os.environ.get(ROOT_VARIABLE) or all(map(os.path.isabs, names))):
            raise ValueError(
                f"{run.data.name} is read from files; give the folder of the data with --data, or "
                f"by the environment variable {ROOT_VARIABLE}, or leave the data set out with "
                "--data-sets"
            )
        for field in ("train_files", "valid_files", "test_files"):
            for path in named_paths(data, field):
                if not path.exists():
                    raise ValueError(
                        f"{run.data.name} needs {path}, which does not exist; give the folder of "
                        "the data with --data, or leave the data set out with --data-sets"
                    )


def shown(text: str) -> str:
    """Returns a text in which paths inside the project start at its folder."""
    return text.replace(f"{ROOT}/", "")


def as_word(value: Any) -> str:
    """Returns a setting as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return "none" if value is None else str(value)


def digest(config: Config) -> str:
    """Returns a digest of the fields that affect what a run learns.

    Example:
        >>> one, other = Config(), Config()
        >>> other.run.log_every = 7
        >>> digest(one) == digest(other)
        True
        >>> other.run.seed = 7
        >>> digest(one) == digest(other)
        False
    """
    fields = {
        name: value
        for name, value in _flat(config.to_dict(), "config")
        if not is_free(name, config)
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def _flat(values: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", value
