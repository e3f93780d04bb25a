"""The progress of a run: a progress bar on a terminal, and lines of text elsewhere.

The time left is the number of steps left times the mean time of a step.
"""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from race_jax.train.console import say

# The least time between two reports of the parts of a step.
BAR_SECONDS, LINE_SECONDS = 1.0, 60.0


class Progress:
    """Shows the progress of a running loop.

    Args:
        start: number of steps that were already taken.
        steps: number of steps of the whole run.
        loss_text: a function that describes a loss in words.
        unit: what the speed counts, such as "tokens".
        parts: about how many calls of `part` a step makes, if it is made of parts.
        terminal: whether to draw a bar; None asks whether standard error is a terminal.
    """

    def __init__(
        self,
        start: int,
        steps: int,
        loss_text: Callable[[float], str],
        unit: str,
        *,
        parts: int = 0,
        terminal: bool | None = None,
    ):
        self._step, self._steps, self._loss_text, self._unit = start, steps, loss_text, unit
        self._trained_steps, self._trained_seconds = 0, 0.0
        self._parts, self._parts_done = parts, 0
        terminal = sys.stderr.isatty() if terminal is None else terminal
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
        self._bar = (
            tqdm(total=steps, initial=start, bar_format=form, dynamic_ncols=True)
            if terminal
            else None
        )
        self._mark = self._part_shown = time.monotonic()

    def resume(self) -> None:
        """Starts the clock again, so that only the time of training counts."""
        self._mark = time.monotonic()

    def update(self, step: int, loss: float, count: float) -> float:
        """Shows the loss and the speed of the steps since the last call.

        Args:
            step: number of steps taken.
            loss: the mean loss of the steps since the last call.
            count: number of units that these steps trained on.

        Returns:
            The speed in units per second.
        """
        now = time.monotonic()
        steps, seconds = step - self._step, max(now - self._mark, 1e-9)
        self._step, self._mark = step, now
        self._parts = max(self._parts_done // steps, 1) if self._parts_done else self._parts
        self._parts_done, self._part_shown = 0, now
        self._trained_steps += steps
        self._trained_seconds += seconds
        rate = count / seconds
        left = (self._steps - step) * self._trained_seconds / self._trained_steps
        speed = f"{rate:,.0f} {self._unit}/s"
        text = f"{self._loss_text(loss)}  {speed}  {duration(left)} left"
        if self._bar is None:
            width = len(str(self._steps))
            say(f"step {step:{width}}/{self._steps}  {text}")
        else:
            self._bar.set_postfix_str(text, refresh=False)
            self._draw(lambda: self._bar.update(steps))
        return rate

    def part(self) -> None:
        """Shows that one more part of a long step is done: in the bar, or as a line a minute."""
        self._parts_done += 1
        now = time.monotonic()
        if now - self._part_shown < (LINE_SECONDS if self._bar is None else BAR_SECONDS):
            return
        self._part_shown = now
        parts = max(self._parts, 1)
        steps, done = divmod(self._parts_done - 1, parts)
        percent = min(100 * (done + 1) // parts, 99)
        left = (now - self._mark) * max(parts - done - 1, 0) / self._parts_done
        text = f"step {self._step + steps + 1}: {percent} % done, {duration(left)} left"
        if self._bar is None:
            say(text)
        else:
            self._draw(lambda: self._bar.set_postfix_str(text))

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._draw(self._bar.clear)
        say(text)
        if self._bar is not None:
            self._draw(self._bar.refresh)

    def close(self) -> None:
        """Closes the bar, which stays visible as it is."""
        if self._bar is not None:
            self._draw(self._bar.close)

    def _draw(self, act: Callable[[], object]) -> None:
        """Changes the bar. If the terminal has closed, the bar ends and the run goes on."""
        try:
            act()
        except (OSError, ValueError):
            self._bar.disable = True
            self._bar = None


def duration(seconds: float) -> str:
    """Returns a time in words.

    Example:
        >>> duration(8.2), duration(70), duration(7260)
        ('8 s', '1 min 10 s', '2 h 01 min')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
