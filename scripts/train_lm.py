"""Trains a model, such as a language model.

.venv/bin/python scripts/train_lm.py --config configs/lm_default.py --config.run.steps=300
"""

import sys

import command_line


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    return command_line.run("train_lm", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
