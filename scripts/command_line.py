"""What scripts share: the command line of those that train, and how all of them end."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL, "try again"
OPTIONS = """
The same command again continues the run from its last checkpoint. SIGTERM, SIGHUP, Ctrl-C and
config.run.max_seconds end the run after the current step, with a checkpoint. A second Ctrl-C or
SIGTERM ends it at once.

Exit status:
    0    the run is finished
    1    the run failed; the message says why, and the last checkpoint is kept
    2    nothing was started, because the command line, the configuration, the data or the run
         directory cannot be used
    75   the run was stopped early, and its state is saved; the same command continues it
    128 + the number of a signal   the run was stopped at once by a second signal

Options:
    --help          shows this text and every field of the configuration
    --traceback     shows where an error occurred
"""


def run(
    name: str, text: str, argv: list[str], trains: Callable[[type], str | None] = lambda task: None
) -> int:
    """Runs a training script and returns its exit status.

    Args:
        name: the name of the script, which messages begin with.
        text: what `--help` says first.
        argv: the words after the name of the script.
        trains: takes the class of the task, and says what the script trains instead if it does not
            train this task, or returns None.
    """
    try:
        from race_jax.train import console, processes
    except ImportError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return REFUSED
    try:
        status = _train(text, argv, trains)
    except (ValueError, ImportError, FloatingPointError, OSError, RuntimeError) as error:
        if "--traceback" in argv:
            raise
        status = REFUSED if isinstance(error, (ValueError, ImportError)) else FAILED
        console.warn(f"{name}: {error}")
    except KeyboardInterrupt:
        status = 130
        console.warn(f"{name}: interrupted outside the loop; the last checkpoint is kept")
    console.settle()
    if status in (FAILED, REFUSED) and processes.are_several():
        os._exit(status)  # a usual end would wait for the other processes
    return status


def _train(text: str, argv: list[str], trains: Callable[[type], str | None]) -> int:
    from race_jax.tasks.registry import task_named
    from race_jax.train.console import say
    from race_jax.train.flags import help_lines, parse_config
    from race_jax.train.loop import train

    if {"-h", "--help"} & set(argv):
        say(text + OPTIONS + "\n".join(help_lines(argv)))
        return FINISHED
    config: Any = parse_config([word for word in argv if word != "--traceback"])
    instead = trains(task_named(config.task))
    if instead is not None:
        raise ValueError(
            f"config.task={config.task!r} is not trained by this script, which trains {instead}; "
            "scripts/train_lm.py trains every task"
        )
    result = train(config, exit_at_once=True)
    return FINISHED if result.stopped is None else STOPPED


def why_not_written(path: Path) -> str:
    """Returns why a file could not be written after all the work, or nothing.

    Example:
        >>> why_not_written(Path("/")).endswith("is a folder; name a file in it")
        True
    """
    if path.is_dir():
        return f"{path} is a folder; name a file in it"
    if not path.absolute().parent.is_dir():
        return f"there is no folder {path.parent}; make it first"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"{path} may not be written; name another file"
    return ""


def main_of(run: Callable[[list[str]], int | None]) -> None:
    """Ends the process with the status of a script's `main`, which gets the words after the name.

    Ctrl-C, and a reader of the standard output that has ended, such as `head`, end it in words or
    in silence, as a shell would: with the status 128 + the number of the signal.

    Example:
        >>> main_of(lambda words: 0)
        Traceback (most recent call last):
        SystemExit: 0
    """
    name = os.path.basename(sys.argv[0])
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C; files that it has written are kept", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)
