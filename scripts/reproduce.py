"""Trains everything that a table of docs/results.md needs, and writes the table.

    RACE_JAX_DATA=FOLDER .venv/bin/python scripts/reproduce.py causal_lm --budget small --jobs 4

Writes TABLE.json with every run, TABLE.md with means and deviations, and TABLE.svg to the folder
--out. The files are renewed whenever a run ends. The same command goes on where it was stopped:
finished runs are kept, the others continue from their last checkpoint, and failed ones are tried
again. Ctrl-C, SIGTERM and SIGHUP stop the runs after their current step.

--config.FIELD=VALUE changes a field of the configuration in every run, as in scripts/train_lm.py.
Such a table needs a folder of its own:

    scripts/reproduce.py causal_lm --config.model.dropout_rate=0.3 --out runs/dropout

Exit status:
    0    every run is finished
    1    a run failed, which the table names with its log; or the table cannot be written
    2    nothing was started, because the command line or a setting cannot be used
    75   the command was stopped; the same command goes on
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import experiments
from bench_kernels import positive
from benchmarks.text import progress_bar
from experiments.table import BUDGETS, Table
from gpus import visible_gpus
from race_jax.train.console import say, warn
from race_jax.train.progress import duration
from reproduction import figure, miniature, results
from reproduction.plan import OWN_FIELDS, Run, check_files, make_runs
from reproduction.work import environments, is_finished, work

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75
LINE_SECONDS = 60.0  # between two lines of progress where no terminal shows a bar


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; stops with a sentence where it asks for what cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, positive(int)
    add("table", choices=experiments.NAMES, help="the table")
    add("--budget", choices=BUDGETS, default="small", help="tiny: seconds, with generated data")
    add("--seeds", type=count, help="number of seeds; without it: 3, or 1 for the budget tiny")
    add("--methods", help="rows, by commas; without it: all")
    add("--data-sets", help="data sets, by commas; without it: all")
    add("--jobs", type=count, default=1, help="runs at the same time, dealt out to the GPUs")
    add("--out", type=pathlib.Path, help="folder; without it: runs/tables-BUDGET")
    add("--data", type=pathlib.Path, help="folder of the data; without it: RACE_JAX_DATA")
    add("--keep", action="store_true", help="keep the checkpoints of finished runs")
    add("--show", action="store_true", help="train nothing: write the table of what is there")
    options, others = parser.parse_known_args(words)
    try:
        changes = dict(_field(word) for word in others)
    except ValueError as error:
        parser.error(str(error))
    if changes and options.out is None:
        parser.error(
            "--config changes what is compared; give the table a folder of its own (--out)"
        )
    options.table = dataclasses.replace(experiments.find(options.table), changes=changes)
    if options.budget == "paper" and not options.table.has_budget("paper"):
        parser.error(f"the table {options.table.name} has no budget 'paper'; take 'small'")
    tiny = options.table.tiny if options.budget == "tiny" else ()
    for name, parts in (("methods", options.table.methods), ("data_sets", options.table.data)):
        known = [part.name for part in parts]
        chosen = [word.strip() for word in (getattr(options, name) or "").split(",") if word]
        if unknown := [word for word in chosen if word not in known]:
            flag = name.replace("_", "-")
            parser.error(f"--{flag}: there is no {unknown[0]!r}; there are {', '.join(known)}")
        setattr(options, name, chosen or [part for part in known if part in tiny] or known)
    options.seeds = options.seeds or (1 if options.budget == "tiny" else 3)
    options.out = (options.out or pathlib.Path("runs", f"tables-{options.budget}")).resolve()
    options.data = options.data and options.data.resolve()
    if options.data and not options.data.is_dir():
        parser.error(f"--data: there is no folder {options.data}")
    return options


def _field(word: str) -> tuple[str, str]:
    """Returns the field and the value of a word such as --config.model.width=64.

    Raises:
        ValueError: the word is not of this form, or the field is not free.
    """
    flag, found, value = word.partition("=")
    field = flag.removeprefix("--config.")
    if not found or field in ("", flag):
        raise ValueError(f"unknown argument {word!r}; a change is written --config.FIELD=VALUE")
    if field in (*OWN_FIELDS, "run.directory"):
        raise ValueError(
            f"{field} is not free, because each run has its own; see --seeds and --out"
        )
    return field, value


class Progress:
    """Shows runs as they start and end, renews the table, and estimates the time left."""

    def __init__(self, table: Table, options: argparse.Namespace, runs: Sequence[Run]):
        self._table, self._options, self._runs = table, options, runs
        self._left = self._at_start = float(sum(r.work for r in runs if not is_finished(r)))
        self._since = self._shown = time.monotonic()
        self._bar = progress_bar(round(self._left))
        self._told: set[pathlib.Path] = set()

    def started(self, run: Run) -> None:
        """Says that a run starts."""
        self.say(f"start      {run.name}")

    def ended(self, run: Run, outcome: dict[str, Any]) -> None:
        """Says how a run has ended, and renews the table."""
        status = outcome["status"]
        say_more = {"failed": f": {outcome['error']} (log: {run.log})"}.get(status, "")
        self._tell(f"{status:10} {run.name}, {duration(outcome['seconds'])}{say_more}")

    def found(self, run: Run) -> None:
        """Says that another process has finished a run, and renews the table."""
        self._tell(f"finished   {run.name}, by another process")

    def _tell(self, text: str) -> None:
        finished = sum(map(is_finished, self._runs))  # by whatever process
        self.say(f"{text}; {finished} of {len(self._runs)} are finished")
        write_table(self._table, self._options, self._runs)

    def waits(self, run: Run) -> None:
        """Says once that a run is trained by another process."""
        if run.directory not in self._told:
            self._told.add(run.directory)
            self.say(f"wait       {run.name} is trained by another process")

    def progress(self, left: float) -> None:
        """Moves the bar or, from time to time, prints a line."""
        self._bar.update(round(self._left) - round(left))
        self._left, now = left, time.monotonic()
        done, seconds = self._at_start - left, now - self._since
        if self._bar.disable and now - self._shown > LINE_SECONDS and done > 0:
            self._shown = now
            text = duration(seconds * left / done)
            say(f"{done / self._at_start:.0%} of the work of this start is done, {text} left")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.clear()
        say(text)
        self._bar.refresh()

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def write_table(table: Table, options: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """Writes what has been measured so far, as JSON, Markdown and SVG; returns it."""
    path = options.out / f"{table.name}.json"
    content = results.collect(table, options.budget, runs)
    results.write(table, content, path)
    figure.draw(table, content, path.with_suffix(".svg"))
    return content


def main(words: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    options = parse(words)
    try:
        return run(options)
    except OSError as error:
        warn(f"reproduce: {options.out} cannot be written: {error}; finished runs are kept")
        return FAILED


def run(options: argparse.Namespace) -> int:
    """Trains what is missing, writes the table, and returns the exit status."""
    table: Table = options.table
    try:
        runs = make_runs(
            table,
            options.budget,
            range(options.seeds),
            options.methods,
            options.data_sets,
            options.out,
        )
        if options.budget == "tiny" and not options.data:
            options.data = options.out / "miniature"
            miniature.write(options.data)
        if not options.show:
            check_files(runs, options.data)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        warn(f"reproduce: {error}")
        return REFUSED
    if not options.show:
        given = dict(os.environ)
        slots = environments(options.jobs, visible_gpus(given), options.data, given)
        progress = Progress(table, options, runs)
        try:
            work(runs, slots, progress, keep=options.keep)
        finally:
            progress.close()
    content = write_table(table, options, runs)
    say(results.markdown(table, content))
    say(f"{options.out / table.name}.json, .md and .svg have the table")
    states = [run["status"] for run in content["runs"]]
    left = len(states) - states.count("finished") - states.count("failed")
    if left:
        say(f"{left} of {len(states)} runs are not finished; the same command goes on from here")
        return STOPPED
    return FAILED if "failed" in states else FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
