"""Trains a classifier of sequences, such as texts.

.venv/bin/python scripts/train_classifier.py --config configs/cls_sst2.py
"""

import sys

import command_line


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    return command_line.run("train_classifier", __doc__, argv, _other_task)


def _other_task(task: type) -> str | None:
    from race_jax.tasks.classification import Classification
    from race_jax.tasks.registry import TASKS

    if issubclass(task, Classification):
        return None
    names = [name for name, kind in TASKS.items() if issubclass(kind, Classification)]
    return f"classifiers: config.task must be {' or '.join(names)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
