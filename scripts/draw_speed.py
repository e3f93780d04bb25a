"""Draws docs/figures/speed.svg: time and memory of attention over length, RACE beside softmax.

    .venv/bin/python scripts/draw_speed.py

The figures are those of docs/figures/speed_h100.json, which names the card and the command.
"""

import json
import pathlib

import matplotlib
import matplotlib.figure

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs" / "figures"
NAMES = {"pallas from qkv": "RACE", "cudnn softmax": "softmax (cuDNN)"}
PANELS = (
    ("ms", "milliseconds, forward and backward"),
    ("gib", "GiB, gradients included"),
)


def main() -> None:
    """Reads the measurements and writes the figure."""
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "race-jax", "font.size": 11}
    measured = json.loads((FOLDER / "speed_h100.json").read_text("utf-8"))
    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    ticks = {2**10: "1k", 2**14: "16k", 2**18: "256k", 2**22: "4M"}
    for axes, (field, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for attention, name in NAMES.items():
            rows = [row for row in measured["rows"] if row["attention"] == attention]
            points = [row["length"] for row in rows], [row[field] for row in rows]
            axes.loglog(*points, "o-", label=name, markersize=4)
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set(xlabel="length, tokens", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Causal attention on one {measured['machine']['device']}", fontsize=12)
    figure.savefig(FOLDER / "speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
