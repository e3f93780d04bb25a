"""Trains a model, such as a language model.

    .venv/bin/python scripts/train_lm.py --config configs/lm_default.py --config.run.steps=300

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

import os
import sys

FINISHED, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # 75 is EX_TEMPFAIL, "try again"


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    try:
        from race_jax.train import console, processes
    except ImportError as error:
        print(f"train_lm: {error}", file=sys.stderr)
        return REFUSED
    try:
        status = _run(argv)
    except (ValueError, ImportError, FloatingPointError, OSError, RuntimeError) as error:
        if "--traceback" in argv:
            raise
        status = REFUSED if isinstance(error, (ValueError, ImportError)) else FAILED
        console.warn(f"train_lm: {error}")
    except KeyboardInterrupt:
        status = 130
        console.warn("train_lm: interrupted outside the loop; the last checkpoint is kept")
    console.settle()
    if status in (FAILED, REFUSED) and processes.are_several():
        os._exit(status)  # a usual end would wait for the other processes
    return status


def _run(argv: list[str]) -> int:
    from race_jax.train.console import say
    from race_jax.train.flags import help_lines, parse_config
    from race_jax.train.loop import train

    if {"-h", "--help"} & set(argv):
        say(__doc__ + "\n".join(help_lines(argv)))
        return FINISHED
    words = [word for word in argv if word != "--traceback"]
    result = train(parse_config(words), exit_at_once=True)
    return FINISHED if result.stopped is None else STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
