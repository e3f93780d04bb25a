"""The text of a benchmark: tables as markdown, names of lengths, and the progress bar."""

from collections.abc import Sequence

from tqdm import tqdm

SUFFIXES = {"k": 2**10, "M": 2**20}
BAR = "{percentage:3.0f}% |{bar}| {elapsed} gone, about {remaining} left"


def header(columns: dict[str, int]) -> list[str]:
    """The first two lines of a table, from the columns' names and widths."""
    return [
        markdown(list(columns), columns),
        markdown(["-" * w for w in columns.values()], columns),
    ]


def markdown(cells: Sequence[str], columns: dict[str, int]) -> str:
    """A line of the table, with columns of equal width."""
    pairs = zip(cells, columns.values(), strict=True)
    return f"| {' | '.join(cell.ljust(width) for cell, width in pairs)} |"


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """A cell of the table, empty where nothing is known."""
    return "" if value is None else f"{value * scale:.{digits}f}"


def length_name(length: int) -> str:
    """256k for 262144."""
    for suffix, unit in reversed(SUFFIXES.items()):
        if length % unit == 0:
            return f"{length // unit}{suffix}"
    return str(length)


def speed(point: dict) -> str:
    """Tokens a second of a point that has a time, in thousands or millions (10^3, 10^6)."""
    rate = point["length"] / point["seconds"]
    return f"{rate / 1e6:.3g}M" if rate >= 1e6 else f"{rate / 1e3:.3g}k"


def share(point: dict, matmul_rate: float) -> str:
    """The operations of a point that has a time, in percent of a rate in operations a second."""
    return f"{100 * point['operations'] / point['seconds'] / matmul_rate:.3g} %"


def progress_bar(total: int) -> tqdm:
    """How far the work is, where somebody watches."""
    return tqdm(total=total, bar_format=BAR, leave=False, disable=None)
