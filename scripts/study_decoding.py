r"""How well a trained softmax model decodes with sparse attention, by scorer, ratio and selection.

    RACE_JAX_DATA=FOLDER .venv/bin/python scripts/study_decoding.py \
        --checkpoint runs/lm_books_softmax --out runs/study.json

The model of `configs/lm_books_softmax.py` reads a context densely. What comes after it is read with
sparse attention, 64 tokens at a time, each with a list of its own:

    bits       bits per byte of the end of windows of held-out books
    found      the share of looked-up values of which every digit is the likeliest one, also by the
               part of the text in which the line stands
    recall     the share of the best candidates that the last queries keep, over all layers
    mass       the attention that falls on what they keep

Rows are measured in the order of importance until --seconds are over: first one draw of rotations
or planes, at 20x, 50x, 10x and 5x, and then the other draws. The results go to the file --out, and
a table to the file of the same name that ends in .md.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from bench_kernels import names, output, positive
from benchmarks.decode_cells import METHODS, WINDOW_ONLY
from benchmarks.decode_model import (
    CHUNK,
    PROBES,
    Read,
    Runner,
    for_budget,
    selected_quality,
    statistics,
)
from command_line import main_of
from race_jax.data.sources import named_paths, read_file
from race_jax.sparse import SparseConfig, budget_for
from race_jax.tasks.lookup import LookupConfig, with_lookups
from race_jax.train.checkpoint import load_for_inference

RATIOS = (20, 50, 10, 5)
DRAWN = ("quantized", "sign_linear", "hamming", "socket", "socket_unit", "random")
SOME = (
    "quantized, 4 bits",
    "sign_linear, 256 bits",
    "socket, 600 bits",
    "oracle",
    "quest",
    "random + window",
    WINDOW_ONLY,
)
DEPTHS = 5
SINK, WINDOW = 16, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to decode."""

    method: str
    ratio: int
    selection: str
    draw: int

    def config(self, context: int, sink: int, window: int) -> SparseConfig:
        """The options for a context of so many tokens."""
        budget = budget_for(context, self.ratio)
        if self.method == WINDOW_ONLY:
            window = budget - sink
        return SparseConfig(
            budget=budget,
            sink=sink,
            window=window,
            selection=self.selection,
            dense_below=0,
            **METHODS[self.method],
        )


def cases(methods: list[str], draws: int) -> list[Case]:
    """All cases, the most important ones first."""
    found = []
    for draw, ratio, selection in itertools.product(range(draws), RATIOS, ("head", "group")):
        for method in methods:
            repeats = draw and METHODS[method]["scorer"] not in DRAWN
            if repeats or (method == WINDOW_ONLY and (draw or selection == "group")):
                continue
            found.append(Case(method, ratio, selection, draw))
    return found


def book_rows(ids: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Cuts rows (rows, length) out of a text, evenly spread over it."""
    if len(ids) < length:
        raise ValueError(f"the held-out text has {len(ids)} bytes; a row needs {length}")
    starts = np.linspace(0, len(ids) - length, rows).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


def lookup_rows(texts: np.ndarray, options: LookupConfig) -> tuple[np.ndarray, ...]:
    """Returns rows that end with a line that is looked up, masks of its digits, and its depths."""
    rng = np.random.default_rng(0)
    made = [with_lookups(rng, text, options, 1) for text in texts]
    ids, asked, places = (np.stack(parts) for parts in zip(*made, strict=True))
    return ids, asked, np.minimum(places[:, 0] * DEPTHS // ids.shape[1], DEPTHS - 1)


class Study:
    """The model, and what it has read densely.

    Args:
        runner: the model.
        texts: shape (B, context + 1): windows of books.
        lookups: what `lookup_rows` returns, for a multiple of B rows.
        scored: how many of the last tokens of a window are scored.
    """

    def __init__(self, runner: Runner, texts: np.ndarray, lookups: tuple, scored: int):
        self._runner, self._texts, self._scored = runner, texts, scored
        self.context = texts.shape[1] - 1
        self._text = runner.prefill(texts[:, : self.context - scored])
        ids, self._asked, self._depths = lookups
        self._ids = np.split(ids, len(ids) // runner.rows)
        self._questions = [runner.prefill(rows[:, : -CHUNK - 1]) for rows in self._ids]
        inner = texts[:, self.context - scored : self.context]
        self._queries, self._whole = runner.probe(inner, self._text)
        self._codes: dict[str, Any] = {}

    def score(self, text: Read, questions: list[Read], step: Any = None) -> dict:
        """Reads the ends of all rows, and returns bits per byte and the share of values found."""
        nats, _ = self._runner.go_on(self._texts[:, self.context - self._scored :], text, step)
        hits = []
        for rows, read in zip(self._ids, questions, strict=True):
            end = rows[:, -CHUNK - 1 :]
            hits.append(self._runner.go_on(end, read, step)[1] == end[:, 1:])
        right = (np.concatenate(hits) | ~self._asked[:, -CHUNK:]).all(axis=1)
        by_depth = [right[self._depths == part] for part in range(DEPTHS)]
        return {
            "bits_per_byte": float(nats.mean() / math.log(2)),
            "found": float(right.mean()),
            "found_by_depth": [float(x.mean()) if len(x) else None for x in by_depth],
        }

    def dense(self) -> dict:
        """The scores of dense decoding."""
        return self.score(self._text, self._questions)

    def coded(self, config: SparseConfig, draw: int) -> tuple[Read, list[Read], Read]:
        """All that was read, with codes. Those of the last scorer and draw are kept."""
        key = f"{config.coding()} {draw}"
        if key not in self._codes:
            self._codes.clear()
            code = self._runner.code
            self._codes[key] = (
                code(self._text, config, draw),
                [code(read, config, draw) for read in self._questions],
                code(self._whole, config, draw),
            )
        text, questions, whole = self._codes[key]
        return (
            for_budget(text, config),
            [for_budget(read, config) for read in questions],
            for_budget(whole, config),
        )

    def sparse(self, case: Case, config: SparseConfig, step: Any, window: int) -> dict:
        """The scores of one case, and recall and mass of every layer."""
        text, questions, whole = self.coded(config, case.draw)
        wanted = dataclasses.replace(config, window=window)
        layers = [
            selected_quality(query, memory, wanted)
            for query, memory in zip(self._queries, whole.memories, strict=True)
        ]
        recall, mass = np.array(jax.device_get(layers), np.float64).T
        scores = self.score(text, questions, step)
        return scores | {"recall": recall.tolist(), "mass": mass.tolist()}

    def statistics(self, wanted: SparseConfig) -> list[dict]:
        """What decides between scorers, for every layer and key/value head."""
        found = [
            statistics(query, memory, wanted)
            for query, memory in zip(self._queries, self._whole.memories, strict=True)
        ]
        return [
            {name: x.tolist() for name, x in zip(layer._fields, layer, strict=True)}
            for layer in jax.device_get(found)
        ]


def measured(study: Study, runner: Runner, options: argparse.Namespace) -> Iterator[dict]:
    """Yields a row for dense decoding and for every case, as far as the time allows."""
    start = time.monotonic()
    yield {"method": "dense", "ratio": 1, "selection": "head", "draw": 0} | study.dense()
    todo = []
    for case in cases(options.methods, options.draws):
        config = case.config(study.context, options.sink, options.window)
        todo.append((case, config))
    steps = {config: runner.compile(config) for config in dict.fromkeys(c for _, c in todo)}
    for case, config in todo:
        if time.monotonic() - start > options.seconds:
            break
        step = steps[config].result()
        yield dataclasses.asdict(case) | study.sparse(case, config, step, options.window)
    for future in steps.values():
        future.cancel()


def table(rows: list[dict]) -> list[str]:
    """A markdown table of the means over draws, with the range of the bits."""
    names = ["scorer", "ratio", "lists", "draws", "bits", "over dense", "range", "found"]
    names += [f"{100 * i // DEPTHS} to {100 * (i + 1) // DEPTHS} %" for i in range(DEPTHS)]
    lines = [f"| {' | '.join([*names, 'recall', 'mass'])} |", "|---" * (len(names) + 2) + "|"]
    dense = next(row for row in rows if row["method"] == "dense")["bits_per_byte"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["ratio"], row["method"], row["selection"]), []).append(row)
    for (ratio, method, selection), own in sorted(groups.items()):
        bits = [row["bits_per_byte"] for row in own]
        cells = [method, f"{ratio}x", selection, str(len(own)), f"{np.mean(bits):.4f}"]
        cells += [f"{np.mean(bits) - dense:+.4f}", f"{max(bits) - min(bits):.4f}"]
        cells.append(f"{np.mean([row['found'] for row in own]):.3f}")
        for part in range(DEPTHS):
            known = [row["found_by_depth"][part] for row in own]
            known = [x for x in known if x is not None]
            cells.append(f"{np.mean(known):.2f}" if known else "")
        for name in ("recall", "mass"):
            values = [np.mean(row[name]) for row in own if name in row]
            cells.append(f"{np.mean(values):.3f}" if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def statistics_table(layers: list[dict]) -> list[str]:
    """A markdown table of the statistics: means over the heads of a layer."""
    names = list(layers[0])
    titles = [name.replace("_", " ") for name in names]
    lines = [f"| layer | {' | '.join(titles)} |", "|---" * (len(names) + 1) + "|"]
    for index, layer in enumerate(layers):
        values = [f"{np.mean(layer[name]):.3f}" for name in names]
        lines.append(f"| {index} | {' | '.join(values)} |")
    return lines


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, positive(int)
    methods = names([name.replace(", ", " ") for name in METHODS], "method")
    add("--checkpoint", required=True, help="the directory of a training run")
    add("--data", help="the folder of the books; without it: the variable RACE_JAX_DATA")
    default = ",".join(SOME).replace(", ", " ")
    add("--methods", type=methods, default=default, help="by commas")
    add("--context", type=count, help="tokens of a row; without it: the model's windows")
    add("--rows", type=count, default=32, help="windows of books")
    add("--questions", type=count, default=64, help="rows with a line to look up")
    add("--scored", type=count, default=256, help="last tokens of a window that are scored")
    add("--draws", type=count, default=3, help="draws of rotations or planes")
    add("--sink", type=count, default=SINK, help="first tokens that are always read")
    add("--window", type=count, default=WINDOW, help="last tokens that are always read")
    seconds = positive(float)
    add("--seconds", type=seconds, default=150.0, help="no case is begun after so many seconds")
    add("--out", type=output(".json"), default="study.json", help="the results; .md beside it")
    options = parser.parse_args(words)
    options.methods = [name for name in METHODS if name.replace(", ", " ") in options.methods]
    if options.scored % CHUNK:
        parser.error(f"--scored {options.scored} must be a multiple of {CHUNK}")
    return options


def prepared(options: argparse.Namespace) -> tuple[Study, Runner, dict]:
    """Loads the model and the held-out books, and reads all contexts densely."""
    model, _, config = load_for_inference(options.checkpoint)
    if options.data is not None:
        config.data.root = options.data
    context = options.context or config.data.sequence_length
    least = options.scored + options.window + options.sink + PROBES
    if context < least:
        raise ValueError(f"a context of {context} tokens is too short; it needs {least}")
    field = "test_files" if config.data.test_files else "valid_files"
    paths = named_paths(config.data, field)
    ids = np.frombuffer(b"\n\n".join(read_file(path) for path in paths), np.uint8)
    runner = Runner(model, options.rows, context)
    texts = book_rows(ids, options.rows, context + 1)
    count = -(-options.questions // options.rows) * options.rows
    lookup = config.lookup if config.task == "lookup" else LookupConfig()
    lookups = lookup_rows(book_rows(ids, count, context + 1), lookup)
    about = {
        "checkpoint": str(options.checkpoint),
        "books": [path.name for path in paths],
        "context": context,
        "rows": options.rows,
        "scored": options.scored,
        "questions": count,
        "sink": options.sink,
        "window": options.window,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    return Study(runner, texts, lookups, options.scored), runner, about


def main(words: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    options = parse(words)
    try:
        study, runner, about = prepared(options)
        wanted = Case("oracle", RATIOS[0], "head", 0).config(
            study.context, options.sink, options.window
        )
        content = {"about": about, "statistics": study.statistics(wanted), "rows": []}
        for row in measured(study, runner, options):
            content["rows"].append(row)
            options.out.write_text(json.dumps(content, indent=1))
            print(
                f"{row['method']}, {row['ratio']}x, {row['selection']}, draw {row['draw']}: "
                f"{row['bits_per_byte']:.4f} bits, {row['found']:.3f} found",
                flush=True,
            )
    except (ValueError, RuntimeError) as error:
        print(f"study_decoding: {error}", file=sys.stderr)
        return 2
    lines = [", ".join(f"{name} {value}" for name, value in about.items()), ""]
    lines += [*table(content["rows"]), "", *statistics_table(content["statistics"])]
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    total = len(cases(options.methods, options.draws)) + 1
    if len(content["rows"]) < total:
        print(f"{total - len(content['rows'])} of {total} rows were left out; raise --seconds")
    return 0


if __name__ == "__main__":
    main_of(main)
