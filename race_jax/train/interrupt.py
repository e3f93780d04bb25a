"""Ways to ask a run to stop between two steps.

In: SIGTERM, Ctrl-C, a time limit. Out: the reason to stop, once there is one. Equation: none.
"""

import signal
import threading
import time
from types import FrameType, TracebackType

_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequest:
    """Notes a request to stop, for the loop to honour after the step at hand.

    Inside `with`, SIGTERM and Ctrl-C only set `reason`. A second signal acts as usual, so that a
    step that hangs can still be ended.

    Args:
        max_seconds: time after which to stop, from now on; None for no limit.

    Example:
        >>> with StopRequest(max_seconds=1000.0) as stop:
        ...     print(stop.reason)
        None
    """

    def __init__(self, max_seconds: float | None = None):
        self._signal: str | None = None
        self._max_seconds = max_seconds
        self._end = None if max_seconds is None else time.monotonic() + max_seconds
        self._former: dict[int, object] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._signal is None and self._end is not None and time.monotonic() >= self._end:
            return f"config.run.max_seconds={self._max_seconds:g} is over"
        return self._signal

    def __enter__(self) -> "StopRequest":
        # Python allows handlers in the main thread only; elsewhere the caller owns the signals.
        if threading.current_thread() is threading.main_thread():
            self._former = {name: signal.signal(name, self._note) for name in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = _SIGNALS[signal.Signals(number)]
        self._give_back()

    def _give_back(self) -> None:
        for name, handler in self._former.items():
            signal.signal(name, handler)
        self._former = {}
