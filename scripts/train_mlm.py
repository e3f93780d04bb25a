"""Trains a masked language model, which guesses hidden tokens from those on both sides.

.venv/bin/python scripts/train_mlm.py --config configs/mlm_tinystories.py
"""

import sys

import command_line


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    return command_line.run("train_mlm", __doc__, argv, _other_task)


def _other_task(task: type) -> str | None:
    from race_jax.tasks.masked_lm import MaskedLM

    return None if task is MaskedLM else 'config.task="masked_lm"'


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
