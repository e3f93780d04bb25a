"""What a run shows of its progress."""

import time

from race_jax.train.progress import Progress


def test_a_long_step_reports_its_parts(monkeypatch, capsys):
    """There is at most a line a minute. The first step tells how many parts there are."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = Progress(0, 4, "loss {:.2f}".format, "tokens", parts=8, terminal=False)

    def parts(count):
        for _ in range(count):
            now[0] += 40.0
            shown.part()
        return [line for line in capsys.readouterr().out.splitlines() if "%" in line]

    assert parts(4) == [
        "step 1: 25 % done, 4 min 00 s left",
        "step 1: 50 % done, 2 min 40 s left",
    ]
    shown.update(1, 2.0, 10.0)
    assert parts(4) == [
        "step 2: 50 % done, 1 min 20 s left",
        "step 2: 99 % done, 0 s left",
    ]
