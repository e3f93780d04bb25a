"""Prints the margin of every comparison of a test run, the smallest first.

    .venv/bin/python -m pytest -m "not gpu" --margins margins.jsonl tests/test_layer.py
    .venv/bin/python tests/margins.py margins.jsonl

A line is the worst comparison of one test, kind and dtype over all the files that are given. Its
margin is the bound divided by the error that was seen, for RMS or maximum, whichever is smaller.
The exit status is 1 if a margin is below `--least`, which is 3 by default. Another machine rounds
differently, and a smaller margin may fail there.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import sys
from collections.abc import Iterable


def margin(line: dict) -> float:
    """Bound over error, of RMS or of the maximum, whichever is nearer."""
    pairs = zip(line["bound"], line["seen"], strict=True)
    return min(bound / seen if seen else math.inf for bound, seen in pairs)


def worst(lines: Iterable[dict]) -> list[tuple[float, str, str, dict]]:
    """(margin, test, kind and dtype, line) of each test's worst comparison, the nearest first."""
    found: dict[tuple[str, str], tuple[float, dict]] = {}
    for line in lines:
        test = re.sub(r" \\((setup|call|teardown)\\)$", "", line["test"])
        key = test, f"{line['kind']} {line['dtype']}"
        if key not in found or margin(line) < found[key][0]:
            found[key] = margin(line), line
    return sorted(
        ((near, *key, line) for key, (near, line) in found.items()), key=lambda row: row[:3]
    )


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=pathlib.Path, help="what --margins wrote")
    parser.add_argument("--least", type=float, default=3.0, help="smallest margin allowed")
    parser.add_argument("--rows", type=int, help="print only so many lines")
    options = parser.parse_args()
    lines = [json.loads(line) for file in options.files for line in file.open(encoding="utf-8")]
    rows = worst(lines)
    print(f"{'margin':>8}  {'kind and dtype':<20}  test: array")
    for near, test, kind, line in rows[: options.rows]:
        print(f"{near:8.1f}  {kind:<20}  {test}: {line['what']}")
    close = sum(near < options.least for near, *_ in rows)
    print(f"{len(rows)} comparisons of {len(lines)}; {close} with a margin below {options.least:g}")
    return int(close > 0)


if __name__ == "__main__":
    sys.exit(main())
