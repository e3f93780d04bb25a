"""What a run prints. A line that cannot be shown never ends the run.

Standard output may go away in the middle of a run: a reader such as `head` leaves, a terminal
closes, the disk of a log file is full. It may also use an encoding that lacks a character.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import TextIO


def say(text: str) -> None:
    r"""Prints `text` to standard output at once.

    A character that the output's encoding lacks is shown as an escape such as `\xe4`. An output
    that cannot be written is left out; the first time, a sentence on standard error says so.

    Args:
        text: one or more lines, without the last line end.
    """
    _print(text, sys.stdout)


def warn(text: str) -> None:
    """Prints `text` to standard error at once, or not at all where that fails.

    Args:
        text: one or more lines, without the last line end.
    """
    _print(text, sys.stderr)


def decorate(what: str, act: Callable[[], None]) -> None:
    """Calls `act`, which the run can do without; an error becomes one sentence.

    Args:
        what: the name of what is made, as in "the picture".
        act: makes it.
    """
    try:
        act()
    except Exception as error:  # noqa: BLE001 (what only decorates a run must not end it)
        say(f"{what} is left out: {one_line(error)}")


def one_line(error: BaseException, limit: int = 300) -> str:
    r"""The message of an error without its line ends, cut to `limit` characters.

    Args:
        error: any error.
        limit: the most characters that are kept.

    Example:
        >>> one_line(ValueError("first,\n  second"))
        'first, second'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def settle() -> None:
    """Empties both outputs, so that Python's own last flush cannot change the exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _silence(stream)


def _print(text: str, stream: TextIO | None) -> None:
    if stream is None:  # Python has no standard output, as under pythonw
        return
    try:
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            shown = text.encode(encoding, "backslashreplace").decode(encoding)
            print(shown, file=stream, flush=True)
    except OSError as error:
        # A full disk may have space again; a reader or a terminal that has left does not come back.
        if error.errno in (errno.EPIPE, errno.EIO):
            _silence(stream)
            if stream is sys.stdout:
                warn("nobody reads the standard output any more; the run goes on without it")
    except ValueError:
        return  # the stream is closed


def _silence(stream: TextIO) -> None:
    """Leads the stream to nowhere, with what it still holds."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file needs no silence
        number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
