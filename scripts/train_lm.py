"""Trains a language model: `python scripts/train_lm.py --config configs/NAME.py`.

In: a config module and overrides such as `--config.model.num_layers=2`. Out: a run directory.
The same command again goes on where the last one ended. `--traceback` shows where an error arose.
"""

import sys

from race_jax.train.flags import parse_config
from race_jax.train.loop import train


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        train(parse_config([word for word in argv if word != "--traceback"]))
    except (ValueError, ImportError, FloatingPointError, RuntimeError) as error:
        if "--traceback" in argv:
            raise
        print(f"train_lm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_lm: interrupted outside the loop; the last checkpoint stands", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
