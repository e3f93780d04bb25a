"""How a run shows where it is: a progress bar on a terminal, else one line now and then.

The time left is the number of steps left times the mean time of a step.
"""

import math
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from race_jax.train.console import say


class Progress:
    """Reports of a running loop.

    Args:
        start: steps already taken.
        steps: steps of the whole run.
        tokens_per_step: tokens of one optimizer step.
        terminal: whether to draw a bar; None asks whether standard error is a terminal.
    """

    def __init__(
        self, start: int, steps: int, tokens_per_step: int, *, terminal: bool | None = None
    ):
        self._step, self._steps, self._tokens_per_step = start, steps, tokens_per_step
        self._trained_steps, self._trained_seconds = 0, 0.0
        terminal = sys.stderr.isatty() if terminal is None else terminal
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
        self._bar = (
            tqdm(total=steps, initial=start, bar_format=form, dynamic_ncols=True)
            if terminal
            else None
        )
        self._mark = time.monotonic()

    def resume(self) -> None:
        """Starts the clock again, so that time spent on anything but training does not count."""
        self._mark = time.monotonic()

    def update(self, step: int, loss: float) -> float:
        """Shows the mean loss of the steps since the last call; returns their tokens per second."""
        now = time.monotonic()
        steps, seconds = step - self._step, max(now - self._mark, 1e-9)
        self._step, self._mark = step, now
        self._trained_steps += steps
        self._trained_seconds += seconds
        rate = steps * self._tokens_per_step / seconds
        left = (self._steps - step) * self._trained_seconds / self._trained_steps
        text = (
            f"loss {loss:.4f} nats = {loss / math.log(2):.3f} bits a token  "
            f"{rate:,.0f} tokens/s  {_duration(left)} left"
        )
        if self._bar is None:
            width = len(str(self._steps))
            say(f"step {step:{width}}/{self._steps}  {text}")
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._draw(lambda: self._bar.update(steps))
        return rate

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._draw(self._bar.clear)
        say(text)
        if self._bar is not None:
            self._draw(self._bar.refresh)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._draw(self._bar.close)

    def _draw(self, act: Callable[[], object]) -> None:
        """Changes the bar; a terminal that has closed ends the bar, not the run."""
        try:
            act()
        except (OSError, ValueError):
            self._bar.disable = True
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
