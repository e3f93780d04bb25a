"""Printing. A line that cannot be printed never ends a run.

Standard output may fail in the middle of a run: a reader such as `head` ends, a terminal closes, or
the disk of a log file is full. Its encoding may also lack a character.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import TextIO

_says = True  # whether this process prints what it does


def only_warn() -> None:
    """Makes `say` print nothing from now on, because another process of the run prints the same."""
    global _says
    _says = False


def say(text: str) -> None:
    r"""Prints `text` to standard output at once.

    A character that the output's encoding lacks is shown as an escape such as `\xe4`. If the output
    cannot be written, the text is lost. The first time, a sentence on standard error says so.

    Args:
        text: one or more lines, without the line end of the last one.
    """
    if _says:
        _print(text, sys.stdout)


def warn(text: str) -> None:
    """Prints `text` to standard error at once. If that fails, the text is lost.

    Args:
        text: one or more lines, without the line end of the last one.
    """
    _print(text, sys.stderr)


def decorate(what: str, act: Callable[[], None]) -> None:
    """Calls `act`, whose result the run does not need. An error becomes one sentence.

    Args:
        what: the name of the result, such as "the picture".
        act: makes the result.
    """
    try:
        act()
    except Exception as error:  # noqa: BLE001 (no such error may end a run)
        say(f"{what} is left out: {one_line(error)}")


def one_line(error: BaseException, limit: int = 300) -> str:
    r"""Returns the message of an error on one line, shortened to `limit` characters.

    Args:
        error: any error.
        limit: the largest number of characters of the message.

    Example:
        >>> one_line(ValueError("first,\n  second"))
        'first, second'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def settle() -> None:
    """Flushes both outputs, so that a failure of Python's own last flush changes no exit status."""
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
        # A full disk may get space again, but a reader or a terminal does not come back.
        if error.errno in (errno.EPIPE, errno.EIO):
            _silence(stream)
            if stream is sys.stdout:
                warn("nobody reads the standard output any more; the work goes on without it")
    except ValueError:
        return  # the stream is closed


def _silence(stream: TextIO) -> None:
    """Connects the stream to the null device, so that all further text is dropped."""
    with contextlib.suppress(OSError, ValueError):  # a stream that has no file
        number, null = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
