"""Associative recall of several pairs (MQAR): which value was written after this key?

A row of T tokens begins with K pairs, "key value key value ...". In the rest each key stands once
more, 2 K + 2 g tokens from the start, and there its value is asked for. The gaps g of a row are
distinct, and short ones are likelier: p(g) ~ (g + 1)^(power - 1). All other tokens are blank.
"""

import dataclasses

import numpy as np

from race_jax.models import TransformerLM
from race_jax.records import above_zero, at_least
from race_jax.tasks.answers import VALID, AnswerTask
from race_jax.tasks.task import Batch, TaskConfig

BLANK = 0


@dataclasses.dataclass
class RecallConfig(TaskConfig):
    """Associative recall. The defaults are those of the task's authors at their shortest length.

    Attributes:
        num_pairs: K, the pairs of a row. T must be at least 4 K.
        vocab_size: number of different tokens. Token 0 is the blank, the rest of the lower half are
            keys, and the upper half are values.
        power: the exponent of the gaps. 1 makes all gaps equally likely; near 0 short ones prevail.
        random_filler: whether the tokens between the questions are drawn from the whole vocabulary
            instead of left blank.
        held_out_rows: number of rows of the held-out split, made up to whole batches.
    """

    num_pairs: int = 4
    vocab_size: int = 8192
    power: float = 0.01
    random_filler: bool = False
    held_out_rows: int = 3000

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field is out of range. The message starts with its name.
        """
        at_least("num_pairs", self.num_pairs, 1)
        at_least("vocab_size", self.vocab_size, 2 * self.num_pairs + 2)
        above_zero("power", self.power)
        at_least("held_out_rows", self.held_out_rows, 1)


class Recall(AnswerTask):
    """Associative recall.

    Source: Arora et al. 2023, "Zoology: Measuring and improving recall in efficient language
    models", section 3 and its public code.
    """

    config_class = RecallConfig

    def __init__(self, config):
        options, length = config.task_config(), config.data.sequence_length
        if length < 4 * options.num_pairs:
            raise ValueError(
                f"config.data.sequence_length must be >= {4 * options.num_pairs}, four times "
                f"config.recall.num_pairs={options.num_pairs}, got {length}"
            )

        def draw(split: int):
            return lambda rng: draw_rows(rng, config.run.batch_size, length, options)

        super().__init__(config, draw, {"valid": VALID}, options.held_out_rows)
        filler = "random tokens" if options.random_filler else "blanks"
        self.description = (
            f"recall: {options.num_pairs} pairs among {length} tokens, vocabulary "
            f"{options.vocab_size:,}, {filler} between the questions, drawn from the seed"
        )

    @staticmethod
    def make_model(config, record, rngs):
        """Makes a causal transformer over keys, values and the blank."""
        size = config.task_config().vocab_size
        return TransformerLM(config.model, size, keep_rngs=False, rngs=rngs)


def draw_rows(rng: np.random.Generator, count: int, length: int, options: RecallConfig) -> Batch:
    """Draws rows of pairs and questions.

    Args:
        rng: the source of random numbers.
        count: B, the number of rows.
        length: T, at least four times `options.num_pairs`.
        options: the settings of the task.

    Returns:
        Inputs and targets of shape (B, T) int32, and weights (B, T) float32.

    Example:
        >>> options = RecallConfig(num_pairs=1, vocab_size=4)
        >>> rows = draw_rows(np.random.default_rng(0), 1, 4, options)
        >>> key, value, asked, blank = rows["inputs"][0].tolist()
        >>> key == asked, int(rows["targets"][0, 2]) == value, rows["weights"][0].tolist()
        (True, True, [0.0, 0.0, 1.0, 0.0])
    """
    pairs, half = options.num_pairs, options.vocab_size // 2
    keys = 1 + _distinct(rng, count, pairs, half - 1)
    values = half + _distinct(rng, count, pairs, options.vocab_size - half)
    asked = 2 * pairs + 2 * _gaps(rng, count, pairs, (length - 2 * pairs) // 2, options.power)
    if options.random_filler:
        inputs = rng.integers(0, options.vocab_size, (count, length), np.int32)
    else:
        inputs = np.full((count, length), BLANK, np.int32)
    inputs[:, 0 : 2 * pairs : 2], inputs[:, 1 : 2 * pairs : 2] = keys, values
    targets, weights = np.zeros_like(inputs), np.zeros(inputs.shape, np.float32)
    np.put_along_axis(inputs, asked, keys, axis=1)
    np.put_along_axis(targets, asked, values, axis=1)
    np.put_along_axis(weights, asked, 1.0, axis=1)
    return {"inputs": inputs, "targets": targets, "weights": weights}


def _distinct(rng: np.random.Generator, count: int, number: int, below: int) -> np.ndarray:
    """Draws rows of distinct numbers in [0, below), (count, number) int32."""
    rows = [rng.choice(below, number, replace=False) for _ in range(count)]
    return np.stack(rows).astype(np.int32)


def _gaps(
    rng: np.random.Generator, count: int, number: int, below: int, power: float
) -> np.ndarray:
    """Draws rows of distinct gaps in [0, below), (count, number).

    The gaps of a row are drawn one after the other with probability ~ (g + 1)^(power - 1). The
    order of log p + Gumbel noise is the order of such draws without replacement.
    """
    log_p = (power - 1) * np.log(np.arange(1, below + 1))
    return np.argsort(-(log_p + rng.gumbel(size=(count, below))), axis=1)[:, :number]
