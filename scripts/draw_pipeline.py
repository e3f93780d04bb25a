"""Draws how the four warpgroups of a kernel wait for each other: docs/figures/pipeline.svg.

    .venv/bin/python scripts/draw_pipeline.py

The order of the steps, the barriers and the slots are those of pallas_kernels/warp_forward.py and
warp_key_value.py, with one query head for each key/value head. The lengths of the steps are chosen
so that the picture is easy to read. They are not measured.
"""

import argparse
import pathlib
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

TARGET = pathlib.Path(__file__).resolve().parents[1] / "docs" / "figures" / "pipeline.svg"
# Text stays text: the file is small, and its words can be found and read at any size.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pipeline",
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Arial"],
}
COLOURS = ("#cfe3f7", "#fbe0c3", "#d3ecd0", "#eedcf3", "#f8d3d3", "#e8e4c9")
CHUNKS = len(COLOURS)


class Work(NamedTuple):
    """A warpgroup is busy with one chunk."""

    label: str
    chunk: int
    length: float


class Wait(NamedTuple):
    """It waits until a barrier has completed for the use of a slot by one chunk."""

    barrier: str
    chunk: int


class Arrive(NamedTuple):
    """It arrives at a barrier."""

    barrier: str
    chunk: int


class Arrow(NamedTuple):
    """An arrival to be drawn; its name stands beside the arrow's start, right or left of it."""

    barrier: str
    chunk: int
    producer: str
    consumer: str
    side: str = "right"


class Panel(NamedTuple):
    """One kernel: the steps of its warpgroups, and how many arrivals complete its barriers."""

    title: str
    steps: dict[str, list]
    arrivals: dict[str, int]
    arrows: list[Arrow]


class Timeline(NamedTuple):
    """When everything happens."""

    busy: list[tuple[str, Work, float]]  # warpgroup, work, start
    arrived: dict[tuple[str, str, int], float]  # warpgroup, barrier, chunk
    resumed: dict[tuple[str, str, int], float]


def simulate(panel: Panel) -> Timeline:
    """Lets every warpgroup run until it waits for an arrival that has not happened yet."""
    line, arrivals = Timeline([], {}, {}), defaultdict(list)
    clocks = dict.fromkeys(panel.steps, 0.0)
    left = {name: iter(steps) for name, steps in panel.steps.items()}
    blocked: dict[str, Wait | None] = dict.fromkeys(panel.steps)

    def run(name: str, steps: Iterator) -> None:
        while (step := blocked[name] or next(steps, None)) is not None:
            match step:
                case Work():
                    line.busy.append((name, step, clocks[name]))
                    clocks[name] += step.length
                case Arrive():
                    arrivals[step.barrier, step.chunk].append(clocks[name])
                    line.arrived[name, step.barrier, step.chunk] = clocks[name]
                case Wait():
                    times = arrivals[step.barrier, step.chunk]
                    done = len(times) == panel.arrivals.get(step.barrier, 1)
                    blocked[name] = None if done else step
                    if not done:
                        return
                    clocks[name] = max(clocks[name], *times)
                    line.resumed[name, step.barrier, step.chunk] = clocks[name]
        left.pop(name)

    while left:
        before = len(line.busy) + len(line.arrived)
        for name, steps in list(left.items()):
            run(name, steps)
        if left and before == len(line.busy) + len(line.arrived):
            raise RuntimeError(f"these warpgroups wait for ever: {blocked}")
    return line


def fetched(chunk: int, *, keys: tuple[str, float, int], queries: tuple[str, float, int]) -> list:
    """The copies of one chunk: each is a label, a length, and after how many chunks a slot ends."""
    steps = []
    for name, (label, length, slots) in {"keys": keys, "queries": queries}.items():
        if chunk >= slots:
            steps.append(Wait(f"{name}_free", chunk - slots))
        steps += [Work(label, chunk, length), Arrive(f"{name}_full", chunk)]
    return steps


def forward_panel() -> Panel:
    """The outputs: two readers take turns."""
    steps: dict[str, list] = {"fetcher": [], "keeper": [], "reader 0": [], "reader 1": []}
    for chunk in range(CHUNKS):
        steps["fetcher"] += fetched(chunk, keys=("zk, v", 0.8, 5), queries=("zq", 0.4, 4))
        steps["keeper"] += [
            Wait("keys_full", chunk),
            Work("hash k", chunk, 0.8),
            *([Wait("state_free", chunk - 2)] if chunk >= 2 else []),
            Work("pass on", chunk, 0.8),
            Arrive("state_full", chunk),
            Work("absorb", chunk, 0.7),
            Arrive("keys_free", chunk),
        ]
        steps[f"reader {chunk % 2}"] += [
            Wait("state_full", chunk),
            Wait("queries_full", chunk),
            Work("hash q", chunk, 0.8),
            Arrive("queries_free", chunk),
            Work("A, A v, φq S", chunk, 2.0),
            Work("send o", chunk, 0.8),
            Arrive("state_free", chunk),
            Arrive("keys_free", chunk),
        ]
    return Panel(
        "Outputs, forward in time: chunk 0, 1, 2, … "
        "(the queries' gradients have the same form; their readers make dzq)",
        steps,
        {"keys_free": 2},
        [
            Arrow("keys_full", 0, "fetcher", "keeper"),
            Arrow("queries_full", 0, "fetcher", "reader 0"),
            Arrow("state_full", 0, "keeper", "reader 0"),
            Arrow("state_free", 1, "reader 1", "keeper"),
            Arrow("keys_free", 0, "reader 0", "fetcher", "left"),
        ],
    )


def key_value_panel() -> Panel:
    """The gradients of keys and values: three warpgroups work at the same chunk."""
    steps: dict[str, list] = {"fetcher": [], "keeper": [], "keys": [], "values": []}
    for turn in range(CHUNKS):
        again = turn >= 2  # both slots have been used
        steps["fetcher"] += fetched(turn, keys=("zk, v", 0.9, 2), queries=("zq, do, rows", 1.2, 3))
        steps["keeper"] += [
            *([Wait("state_free", turn - 2)] if again else []),
            Work("pass Λ", turn, 0.7),
            Arrive("state_full", turn),
            Wait("queries_full", turn),
            Work("hash q", turn, 0.7),
            *([Wait("hashed_free", turn - 2)] if again else []),
            Work("q̂", turn, 0.3),
            Arrive("hashed_full", turn),
            Work("absorb", turn, 0.7),
            Arrive("queries_free", turn),
        ]
        steps["keys"] += [
            Wait("keys_full", turn),
            Wait("state_full", turn),
            Work("v Λ", turn, 0.5),
            Wait("queries_full", turn),
            Work("T", turn, 0.5),
            Arrive("queries_free", turn),
            Wait("hashed_full", turn),
            Work("T q̂", turn, 0.5),
            Arrive("hashed_free", turn),
            Arrive("state_free", turn),
            Arrive("keys_free", turn),
            Wait("phi_full", turn),
            Arrive("phi_free", turn),
            Work("send dzk", turn, 1.0),
        ]
        steps["values"] += [
            Wait("keys_full", turn),
            Work("hash k", turn, 0.7),
            *([Wait("phi_free", turn - 2)] if again else []),
            Arrive("phi_full", turn),
            Wait("state_full", turn),
            Work("φk Λ", turn, 0.5),
            Wait("hashed_full", turn),
            Work("A", turn, 0.4),
            Arrive("hashed_free", turn),
            Wait("queries_full", turn),
            Work("A do", turn, 0.5),
            Arrive("queries_free", turn),
            Arrive("state_free", turn),
            Arrive("keys_free", turn),
            Work("send dv", turn, 0.8),
        ]
    return Panel(
        "Gradients of keys and values, back in time: chunk 0 is the last of its split",
        steps,
        {"keys_free": 2, "queries_free": 3, "state_free": 2, "hashed_free": 2},
        [
            Arrow("queries_full", 0, "fetcher", "keeper", "left"),
            Arrow("hashed_full", 0, "keeper", "keys"),
            Arrow("phi_full", 1, "values", "keys", "left"),
            Arrow("keys_free", 0, "values", "fetcher"),
        ],
    )


def draw_panel(axes, panel: Panel, end: float) -> None:
    """One row for each warpgroup; arrows lead from an arrival to the one that waited for it."""
    line, rows = simulate(panel), {name: -row for row, name in enumerate(panel.steps)}
    for name, work, start in line.busy:
        if start >= end:
            continue
        length = min(work.length, end - start)
        axes.barh(
            rows[name], length, left=start, height=0.56, color=COLOURS[work.chunk],
            edgecolor="#666666", linewidth=0.6,
        )  # fmt: skip
        if length == work.length:
            axes.text(
                start + length / 2, rows[name], f"{work.label}\n{work.chunk}",
                ha="center", va="center", fontsize=7, linespacing=1.1,
            )  # fmt: skip
    for arrow in panel.arrows:
        source = line.arrived[arrow.producer, arrow.barrier, arrow.chunk], rows[arrow.producer]
        where = line.resumed[arrow.consumer, arrow.barrier, arrow.chunk], rows[arrow.consumer]
        sign = 1 if where[1] > source[1] else -1
        source, where = (source[0], source[1] + 0.28 * sign), (where[0], where[1] - 0.28 * sign)
        freed = arrow.barrier.endswith("free")
        colour = "#b03030" if freed else "#1f4e9c"
        axes.annotate(
            "", where, source,
            arrowprops={"arrowstyle": "->", "color": colour, "ls": "--" if freed else "-"},
        )  # fmt: skip
        along = 0.22 / abs(where[1] - source[1])  # the middle of the gap between two rows
        middle = source[0] + along * (where[0] - source[0]), source[1] + 0.22 * sign
        right = arrow.side == "right"
        axes.annotate(
            arrow.barrier, middle, (4 if right else -4, 0), textcoords="offset points",
            color=colour, fontsize=7.5, va="center", ha="left" if right else "right",
        )  # fmt: skip
    axes.set_title(panel.title, loc="left", fontsize=9.5)
    axes.set(xlim=(0, end), ylim=(-3.45, 0.45), xticks=[])
    axes.set_yticks(list(rows.values()), list(rows))
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw(target: pathlib.Path) -> None:
    """Draws both panels into a file, .svg or .png."""
    import matplotlib
    import matplotlib.figure

    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(11, 6.2), layout="constrained")
        for axes, panel in zip(
            figure.subplots(2, 1), (forward_panel(), key_value_panel()), strict=True
        ):
            draw_panel(axes, panel, end=11.8)
        figure.supxlabel(
            "Time runs to the right. A box is a step and its chunk. "
            "Blue: a slot is full. Red, dashed: a slot is free again.",
            fontsize=9,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if target.suffix == ".svg" else None
        figure.savefig(target, dpi=110, metadata=metadata)
    print(f"wrote {target.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=TARGET, help="an .svg or .png file")
    draw(parser.parse_args().output)
