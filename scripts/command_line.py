"""The command line that the training scripts share: what they print, and how they end."""

import os
import sys
from collections.abc import Callable
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
