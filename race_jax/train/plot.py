"""The loss curve of a run as a PNG file."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from race_jax.train.files import write_whole
from race_jax.train.metrics import Record


def plot_losses(records: Sequence[Record], path: Path, *, title: str, unit: str) -> None:
    """Draws training and held-out losses by step.

    Args:
        records: what the run measured.
        path: the PNG file.
        title: the text above the axes. It is shown as it is, without formulas.
        unit: the unit of the loss.

    Raises:
        ValueError: there is no training record.
        OSError: the file cannot be written.
    """
    # pyplot is not used, because it would choose a window system and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [record for record in records if record["kind"] == "train"]
    held_out = [record for record in records if record["kind"] in ("eval", "final")]
    if not train:
        raise ValueError("no training record to draw")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = ([record[name] for record in train] for name in ("step", "loss"))
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training")
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="its running mean")
    if held_out:
        axes.plot(
            [record["step"] for record in held_out],
            [record["loss"] for record in held_out],
            "o-",
            color="tab:orange",
            label=f"held out, last {held_out[-1]['loss']:.3f}",
        )
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})")
    axes.set_title(title, parse_math=False)  # $...$ in the name of a folder is no formula
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a box is drawn instead
        write_whole(path, FigureCanvasAgg(figure).print_png)


def _running_mean(losses: Sequence[float]) -> list[float]:
    """Computes exponential means that are corrected for their start, over at most ten losses."""
    keep = min(0.9, max(0.0, 1 - 5 / len(losses)))  # a mean of a short run must not lag behind it
    total = weight = 0.0
    means = []
    for loss in losses:
        total, weight = keep * total + loss, keep * weight + 1.0
        means.append(total / weight)
    return means
