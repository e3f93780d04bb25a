"""What a table has measured: JSON with every run, and Markdown with means and deviations.

A cell is mean ± deviation over the seeds that have finished. The deviation is that of a sample,
with n - 1 in the denominator. One seed has none.
"""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.table import Data, Method, Metric, Table
from race_jax.train import summary
from race_jax.train.files import write_text
from reproduction.plan import Run, as_word, shown
from reproduction.work import outcome_of

TRIAL = (
    "**These numbers mean nothing.** The budget `tiny` trains for seconds, and on generated data "
    "unless `--data` is given. Models and data are smaller than the names of rows and of data sets "
    "say. It shows that every part works."
)
SPEED = "training.tokens_per_second"  # the path of a metric that no split has
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclasses.dataclass(frozen=True)
class Cell:
    """The mean and the deviation of some numbers; the deviation of a single one is None."""

    mean: float
    deviation: float | None

    def text(self, digits: int) -> str:
        """Returns the cell as the table shows it.

        Example:
            >>> Cell(87.0, 0.25).text(2), Cell(87.0, None).text(1)
            ('87.00 ± 0.25', '87.0')
        """
        deviation = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{deviation}"


def cell(numbers: Sequence[float]) -> Cell | None:
    """Returns mean and deviation, or None if there are no numbers.

    Example:
        >>> cell([1.0, 2.0, 3.0])
        Cell(mean=2.0, deviation=1.0)
    """
    if not numbers:
        return None
    return Cell(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def collect(table: Table, budget: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Reads what the runs of a table have measured.

    Args:
        table: the table.
        budget: the budget of the runs.
        runs: the runs.

    Returns:
        JSON values: "table", "title", "budget", and "runs" with one record of each run.
    """
    return {
        "table": table.name,
        "title": table.title,
        "budget": budget,
        "runs": [_record(run) for run in runs],
    }


def _record(run: Run) -> dict[str, Any]:
    found = summary.read(run.directory) or {}
    outcome = outcome_of(run)
    if found:  # a run may have been finished by the training script alone
        outcome["status"] = "finished"
    outcome["error"] = shown(outcome.get("error", ""))
    config = run.config.to_dict()
    del config["run"]["compilation_cache"]  # a folder of this machine
    return {
        "data": run.data.name,
        "method": run.method.name,
        "label": run.method.label,
        "seed": run.seed,
        **outcome,
        "scores": found.get("scores", {}),
        **{
            name: found.get(name)
            for name in ("speed", "parameters", "peak_bytes", "device", "platform", "devices")
        },
        "tokens_per_second": _tokens_per_second(run, found.get("speed")),
        "jax": found.get("jax"),
        "digests": found.get("digests"),
        "command": run.command,
        "log": shown(str(run.log)),
        "config": config,
    }


def _tokens_per_second(run: Run, speed: dict[str, Any] | None) -> float | None:
    """Returns the tokens that are read in a second, or None if batches have several lengths."""
    several = getattr(run.config.task_config(), "num_buckets", 1) > 1
    if several or not speed or speed["steps_per_second"] is None:
        return None
    return speed["steps_per_second"] * run.config.run.batch_size * run.config.data.sequence_length


def score(record: Mapping[str, Any], path: str) -> float | None:
    """Returns a number of a run by its path, or None.

    The path names a split and a score, such as "valid.perplexity", or is SPEED.
    """
    if path == SPEED:
        return record["tokens_per_second"]
    split, name = path.split(".")
    return record["scores"].get(split, {}).get(name)


def cells(records: Sequence[Mapping[str, Any]], data: str, method: str, path: str) -> Cell | None:
    """Returns mean and deviation of a number over the seeds of a row."""
    own = [r for r in records if (r["data"], r["method"]) == (data, method)]
    numbers = [score(record, path) for record in own]
    return cell([number for number in numbers if number is not None])


def write(table: Table, content: dict[str, Any], path: Path) -> None:
    """Writes the JSON file `path`, and the Markdown file beside it."""
    write_text(path, json.dumps(content, indent=1) + "\n")
    write_text(path.with_suffix(".md"), markdown(table, content))


def markdown(table: Table, content: dict[str, Any]) -> str:
    """Returns the Markdown of a table.

    Args:
        table: the table.
        content: what `collect` returned.

    Returns:
        The text. It has one section for each data set. Runs that failed or are missing are named.
    """
    records = content["runs"]
    parts = [f"# {table.title}", _conditions(content)]
    if content["budget"] == "tiny":
        parts.append(TRIAL)
    if table.changes:
        parts.append(f"Changed in every run: {_settings(table.changes)}.")
    for data in table.data:
        own = [record for record in records if record["data"] == data.name]
        if own:
            parts += [f"## {data.label}", _section(data, table.methods, own)]
    shown = {record["method"] for record in records}
    parts += ["## What the rows are", _changes([m for m in table.methods if m.name in shown])]
    if failed := [record for record in records if record["status"] == "failed"]:
        lines = [
            f"- {r['data']}, {r['method']}, seed {r['seed']}: {r['error']} (log: {r['log']})"
            for r in failed
        ]
        parts += ["## Runs that failed", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _conditions(content: dict[str, Any]) -> str:
    """Says on what, when and how the runs were made."""
    runs = [run for run in content["runs"] if run["status"] == "finished"]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(run[name]) for run in runs if run.get(name)})) or "none yet"

    together = sorted({run["jobs"] for run in runs if run.get("jobs")})
    sharing = ""
    if together and together[-1] > 1:
        sharing = (
            f" Up to {together[-1]} runs went on at the same time, which makes each one slower; "
            "compare speeds only of runs that were made with `--jobs 1`."
        )
    return (
        f"Budget `{content['budget']}`, {len(runs)} of {len(content['runs'])} runs finished. "
        f"Device: {all_of('device')}. JAX {all_of('jax')}. Dates: {all_of('date')}. Commits: "
        f"{all_of('commit')}.{sharing}\n\nA cell is the mean ± the deviation of a sample over the "
        "seeds. The speed is that of training, and the memory that of one device. The best mean is "
        "bold."
    )


def _section(data: Data, methods: Sequence[Method], records: Sequence[dict[str, Any]]) -> str:
    """Returns the table of one data set."""
    heads = ["attention", *(metric.label for metric in data.metrics)]
    if not _scores_speed(data):
        heads.append(f"{_units(records)}/s")
    lines = [[*heads, "parameters", "peak memory", "seeds"]]
    best = [_best(metric, data, methods, records) for metric in data.metrics]
    for method in methods:
        own = [record for record in records if record["method"] == method.name]
        if own:
            lines.append(_row(data, method, own, best))
    dashes = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], dashes, *lines[1:]])


def _row(
    data: Data, method: Method, records: Sequence[dict[str, Any]], best: Sequence[float | None]
) -> list[str]:
    texts = [method.label]
    for metric, winner in zip(data.metrics, best, strict=True):
        found = cells(records, data.name, method.name, metric.path)
        if found is None:
            texts.append("failed" if any(r["status"] == "failed" for r in records) else "")
            continue
        deviation = found.deviation and found.deviation * metric.scale
        text = Cell(found.mean * metric.scale, deviation).text(metric.digits)
        texts.append(f"**{text}**" if found.mean == winner else text)
    if not _scores_speed(data):
        speeds = cell([speed for record in records if (speed := _speed(record)) is not None])
        texts.append(f"{speeds.mean:,.0f}" if speeds else "")
    texts.append(_one_of(f"{r['parameters']:,}" for r in records if r["parameters"]))
    peaks = [r["peak_bytes"] for r in records if r["peak_bytes"]]
    texts.append(_bytes(max(peaks)) if peaks else "")
    finished = sum(record["status"] == "finished" for record in records)
    failed = sum(record["status"] == "failed" for record in records)
    texts.append(f"{finished} of {len(records)}" + (f", {failed} failed" if failed else ""))
    return texts


def _scores_speed(data: Data) -> bool:
    """Returns whether the speed is a metric, which has a column already."""
    return any(metric.path == SPEED for metric in data.metrics)


def _units(records: Sequence[dict[str, Any]]) -> str:
    """Returns what the speed of the runs counts."""
    measured = [r for r in records if r["speed"]]
    if not measured or measured[0]["tokens_per_second"] is not None:
        return "tokens"
    return measured[0]["speed"]["units"].replace("_", " ")


def _speed(record: dict[str, Any]) -> float | None:
    """Returns tokens per second or, if batches have several lengths, the task's own units."""
    if record["tokens_per_second"] is not None or not record["speed"]:
        return record["tokens_per_second"]
    return record["speed"]["per_second"]


def _best(
    metric: Metric, data: Data, methods: Sequence[Method], records: Sequence[dict[str, Any]]
) -> float | None:
    found = [cells(records, data.name, method.name, metric.path) for method in methods]
    means = [c.mean for c in found if c is not None]
    if len(means) < 2:
        return None
    return min(means) if metric.lowest_is_best else max(means)


def _changes(methods: Sequence[Method]) -> str:
    """Says what each row sets, or how it differs from another row."""
    labels = {method.name: method.label for method in methods}
    lines = []
    for method in methods:
        shown = method.parent in labels
        settings = method.change if shown else method.settings
        start = f"as “{labels[method.parent]}”, with " if shown else ""
        lines.append(f"- **{method.label}** (`{method.name}`): {start}{_settings(settings)}")
    return "\n".join(lines)


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={as_word(value)}`" for name, value in settings.items())


def _one_of(texts: Any) -> str:
    return ", ".join(dict.fromkeys(texts))


def _bytes(number: float) -> str:
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"
