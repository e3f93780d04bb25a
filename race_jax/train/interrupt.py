"""Requests to stop a run between two steps: signals and a time limit."""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType

from race_jax.train.console import warn

# SIGHUP comes when the terminal closes; Windows has none.
_NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}
_SIGNALS = {getattr(signal, name): word for name, word in _NAMES.items() if hasattr(signal, name)}
# make, timeout and job schedulers send one request twice: to a process, and to its group.
_SAME_REQUEST_SECONDS = 0.3


class StopRequest:
    """Records a request to stop. The loop reads it after each step.

    Inside `with`, SIGTERM, SIGHUP and Ctrl-C set `reason`. One line on standard error says so at
    once, even while a step runs. A second SIGTERM or Ctrl-C stops the run at once. Signals that the
    process was started to ignore, as under `nohup`, stay ignored.

    Args:
        max_seconds: seconds after which to stop, counted from `start_clock`; None sets no limit.
        exit_at_once: whether a second signal ends the whole process, even in the middle of a step,
            with status 128 + its number. Otherwise a second signal does what it did before `with`,
            but only when Python runs again, which is after the step.

    Example:
        >>> with StopRequest(max_seconds=1000.0) as stop:
        ...     print(stop.reason)
        None
    """

    def __init__(self, max_seconds: float | None = None, *, exit_at_once: bool = False):
        self._signal: str | None = None
        self._max_seconds = max_seconds
        self._exit_at_once = exit_at_once
        self._end: float | None = None
        self._former: dict[int, object] = {}
        self._former_fd = -1
        self._wake: socket.socket | None = None
        self._watcher: threading.Thread | None = None
        self._first: float | None = None

    def start_clock(self) -> None:
        """Starts the time of `max_seconds`. Only the first call has an effect."""
        if self._end is None and self._max_seconds is not None:
            self._end = time.monotonic() + self._max_seconds

    @property
    def signalled(self) -> str | None:
        """The name of the signal that asked to stop, or None."""
        return self._signal

    @property
    def reason(self) -> str | None:
        """The reason to stop, or None."""
        if self._signal is None and self._end is not None and time.monotonic() >= self._end:
            return f"config.run.max_seconds={self._max_seconds:g} is over"
        return self._signal

    def __enter__(self) -> "StopRequest":
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._watch()
            heard = [name for name in _SIGNALS if signal.getsignal(name) is not signal.SIG_IGN]
            self._former = {name: signal.signal(name, self._note) for name in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._wake is not None:
            signal.set_wakeup_fd(self._former_fd)
            self._wake.close()
            self._watcher.join()
        self._give_back()

    def _watch(self) -> None:
        """Starts a thread that notices a signal while the main thread waits inside XLA."""
        # A Python signal handler runs in the main thread, between two of its instructions. The
        # interpreter also writes the number of the signal to this socket at once.
        heard, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._former_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self._watcher.start()

    def _listen(self, heard: socket.socket) -> None:
        with heard:
            while numbers := heard.recv(64):
                for number in numbers:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        """Handles one signal in the watching thread."""
        name = _SIGNALS.get(number)
        if name is None or number not in self._former:
            return
        if self._first is None:
            self._first = time.monotonic()
            again = "press again" if number == signal.SIGINT else "send it again"
            warn(f"{name}: stopping after this step, saving; {again} to stop at once")
        elif self._exit_at_once and self._is_second(number):
            warn(f"{name} again: stopped at once; the last checkpoint is kept")
            os._exit(128 + number)

    def _is_second(self, number: int) -> bool:
        """Whether a further signal is a second request, and not the first one sent twice."""
        # A terminal that closes sends SIGHUP several times, and nobody is there to ask twice.
        hangs_up = number == getattr(signal, "SIGHUP", None)
        return not hangs_up and time.monotonic() - self._first >= _SAME_REQUEST_SECONDS

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = _SIGNALS[signal.Signals(number)]
        elif self._first is not None and self._is_second(number) and not self._exit_at_once:
            self._give_back()
            signal.raise_signal(number)

    def _give_back(self) -> None:
        for name, handler in self._former.items():
            with contextlib.suppress(TypeError):  # a handler set from C cannot be set again
                signal.signal(name, handler)
        self._former = {}
