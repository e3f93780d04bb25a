"""The figures of `scripts/reproduce.py`: lines over sizes, and numbers that lie far away."""

from experiments.table import Data, Method, Table
from reproduction import figure
from tests.test_reproduce import LOSS, TABLE


def test_a_series_of_data_is_drawn_as_lines(tmp_path):
    data = tuple(Data(f"d{n}", f"{n}", "", LOSS, size=n) for n in (8, 16))
    table = Table("t", "t", data, TABLE.methods, size_label="pairs")
    runs = [
        {"data": f"d{n}", "method": "good", "scores": {"valid": {"loss": n + seed}}}
        for n in (8, 16)
        for seed in (0, 1)
    ]
    assert figure.draw(table, {"budget": "small", "runs": runs}, tmp_path / "t.svg")
    assert "pairs" in (tmp_path / "t.svg").read_text()
    assert not figure.draw(table, {"budget": "small", "runs": []}, tmp_path / "none.svg")


def test_a_number_far_away_is_written_at_the_edge(tmp_path):
    methods = tuple(Method(f"m{n}", f"row {n}", {}) for n in range(5))
    table = Table("t", "t", TABLE.data, methods)
    runs = [
        {"data": "copy", "method": f"m{n}", "scores": {"valid": {"loss": loss}}}
        for n, loss in enumerate((1.0, 1.1, 1.2, 1.3, 9.0))
    ]
    assert figure.draw(table, {"budget": "small", "runs": runs}, tmp_path / "t.svg")
    drawn = (tmp_path / "t.svg").read_text()
    assert "9.000 →" in drawn
    assert "1.300 →" not in drawn
