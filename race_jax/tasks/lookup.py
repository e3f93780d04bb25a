r"""Language modeling of bytes, with lines to be looked up in a share of the windows.

Such a window is text with lines "#name=value" scattered in it. At its end some of these lines are
written once more. Their values cannot be guessed, so a model has to find them in the text:

    ... wide as the sea.\n#kqv=4711\n It rained ... and so we\n#kqv=4711

In training all bytes count, and those of the repeated values more. In the held-out text, a window
with lines counts for the accuracy only, and all others for the bits per byte. The first held-out
window never has lines, so that there are always bytes to measure.
"""

import dataclasses
import functools
import zlib
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from race_jax.data.windows import Batch
from race_jax.records import at_least
from race_jax.tasks.language_model import LanguageModel, LanguageModelConfig
from race_jax.tasks.losses import chunked_cross_entropy
from race_jax.tasks.task import shapes_of

_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
MOST_WEIGHT = 255  # of uint8, the dtype of weights
HELD_OUT_SHARE = 0.1  # the largest share of held-out windows with lines


@dataclasses.dataclass
class LookupConfig(LanguageModelConfig):
    """Language modeling with lines to be looked up.

    Attributes:
        share: the share of the training windows that have lines, in [0, 1]. Of the held-out windows
            it is at most 10 %, so that bits per byte are measured on the same text for every larger
            share.
        least_lines: the smallest number of lines of such a window.
        most_lines: the largest number. Every number between them is equally likely.
        name_length: the small letters of a name. The names of a window are distinct.
        value_length: the digits of a value.
        least_questions: the smallest number of lines that are repeated at the end of a training
            window. A held-out window repeats one.
        most_questions: the largest number. Every number between them is equally likely. If a window
            has fewer lines, they come again in another order. Where every window has many
            questions, no line that is asked for the first time is a whole window away, and a model
            does not learn to find such lines.
        answer_weight: the weight of a digit of a repeated value in training, where others have 1.
        compare_xz: also print the bits per byte that xz -9e needs for the held-out text.
        sample_length: tokens of the sample that the trained model draws; 0 draws none.
        sample_prompt: text that the sample continues.
    """

    share: float = 0.1
    least_lines: int = 8
    most_lines: int = 32
    name_length: int = 3
    value_length: int = 4
    least_questions: int = 1
    most_questions: int = 1
    answer_weight: int = 1

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        super().validate()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")
        for name in ("least_lines", "name_length", "value_length", "least_questions"):
            at_least(name, getattr(self, name), 1)
        at_least("most_lines", self.most_lines, self.least_lines)
        at_least("most_questions", self.most_questions, self.least_questions)
        if self.most_lines > len(_LETTERS) ** self.name_length:
            raise ValueError(
                f"most_lines must be <= {len(_LETTERS) ** self.name_length}, the number of names "
                f"of {self.name_length} letters, got {self.most_lines}; raise name_length"
            )
        if not 1 <= self.answer_weight <= MOST_WEIGHT:
            raise ValueError(
                f"answer_weight must lie in [1, {MOST_WEIGHT}], got {self.answer_weight}"
            )

    @property
    def line_bytes(self) -> int:
        """The bytes of a line with the line breaks before and after it."""
        return self.name_length + self.value_length + 4


class Lookup(LanguageModel):
    """Next-byte prediction, with lines to be looked up in a share of the windows.

    Source: beyond the paper. The lines are those of the "needle in a haystack" tests.
    """

    config_class = LookupConfig
    reads_token_files = False

    def __init__(self, config):
        options = config.task_config()
        _check(config, options)
        super().__init__(config)
        train = functools.partial(_with_lines, options=options, seed=config.run.seed)
        self.train = self.train.map(train)
        self.held_out = {name: _held_out(split, options) for name, split in self.held_out.items()}
        self.batch = shapes_of(next(iter(self.held_out["valid"])))
        self.description += (
            f"; {options.share:.0%} of the training windows have {options.least_lines} to "
            f"{options.most_lines} lines to look up"
        )

    @classmethod
    def score_sums(cls, model, batch):
        """Computes the nats of the text, and the number of values and of right ones."""
        hidden = model.hidden(batch["inputs"].astype(jnp.int32), deterministic=True)
        targets, asked = batch["targets"].astype(jnp.int32), batch["asked"] > 0
        table = model.embedding[...]
        loss, weight = chunked_cross_entropy(hidden, table, targets, batch["weights"])
        best = jax.lax.map(lambda row: jnp.argmax(model.logits(row), -1), hidden)
        rows = asked.any(axis=1)
        right = rows & ((best == targets) | ~asked).all(axis=1)
        sums = {"asked": rows.sum(), "right": right.sum()}
        sums = {name: number.astype(jnp.float32) for name, number in sums.items()}
        return {"loss": loss, "weight": weight, **sums}

    def metrics(self, split, sums):
        """Computes the numbers of language modeling, and the accuracy of the values."""
        figures = super().metrics(split, sums)
        if sums.get("asked"):
            figures["accuracy"] = sums["right"] / sums["asked"]
        return figures

    def score_text(self, split, metrics):
        """Describes an evaluation in words."""
        text = super().score_text(split, metrics)
        if "accuracy" not in metrics:
            return text
        return f"{text}, {metrics['accuracy']:.1%} of the values found"


def with_lookups(
    rng: np.random.Generator, ids: np.ndarray, options: LookupConfig, questions: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Scatters lines in a text, and repeats some of them at its end.

    Args:
        rng: the source of random numbers.
        ids: shape (n,) uint8: the text. Its end is cut off to make room.
        options: the settings of the task.
        questions: the number of lines that are repeated. None comes again before all others came.

    Returns:
        The new ids (n,), a mask (n,) of the digits that are repeated, and the places (questions,)
        at which the repeated lines begin.

    Raises:
        ValueError: the text has no room for the lines.

    Example:
        >>> options = LookupConfig(least_lines=1, most_lines=1, name_length=1, value_length=2)
        >>> text = np.frombuffer(b"so it is and so it was for us", np.uint8)
        >>> ids, asked, places = with_lookups(np.random.default_rng(3), text, options, 1)
        >>> bytes(ids)
        b'so i\n#v=01\nt is and so \n#v=01'
        >>> bytes(ids[asked]), places.tolist()
        (b'01', [4])
    """
    size, count = options.line_bytes, rng.integers(options.least_lines, options.most_lines + 1)
    room = len(ids) - count * size - questions * (size - 1)
    if room < 0:
        raise ValueError(
            f"{len(ids)} bytes have no room for {count} lines and {questions} questions of {size} "
            "bytes; give a longer text"
        )
    base = len(_LETTERS)
    numbers = rng.choice(base**options.name_length, count, replace=False)
    letters = _LETTERS[numbers[:, None] // base ** np.arange(options.name_length) % base]
    digits = rng.integers(0, 10, (count, options.value_length)) + ord("0")
    marks = [np.full((count, 1), ord(mark)) for mark in "\n#=\n"]
    lines = np.concatenate([*marks[:2], letters, marks[2], digits, marks[3]], axis=1)
    lines = lines.astype(np.uint8)
    places = np.sort(rng.integers(0, room + 1, count))
    hidden = np.insert(ids[:room], np.repeat(places, size), lines.ravel())
    rounds = [rng.permutation(count) for _ in range(-(-questions // count))]
    chosen = np.concatenate(rounds)[:questions]
    asked = np.zeros((questions, size - 1), bool)
    asked[:, -options.value_length :] = True
    return (
        np.concatenate([hidden, lines[chosen, :-1].ravel()]),
        np.concatenate([np.zeros(len(hidden), bool), asked.ravel()]),
        places[chosen] + chosen * size,
    )


def _held_out(split: grain.IterDataset[Batch], options: LookupConfig) -> grain.IterDataset[Batch]:
    """Returns held-out batches with lines. The first row has none, so that some text is scored."""
    first = next(iter(split))
    plain = np.append(first["inputs"][0], first["targets"][0, -1]).tobytes()
    return split.map(lambda batch: _with_lines(batch, options, seed=0, plain=plain))


def _with_lines(
    batch: Batch, options: LookupConfig, seed: int, plain: bytes | None = None
) -> dict[str, Any]:
    """Returns a batch in which a share of the full rows have lines, chosen by their bytes.

    `plain` is given for held-out batches. A row of these bytes has no lines.
    """
    batch = {name: array.copy() for name, array in batch.items()}
    batch["asked"] = np.zeros_like(batch["weights"])
    share = options.share if plain is None else min(options.share, HELD_OUT_SHARE)
    for row in range(len(batch["inputs"])):
        ids = np.append(batch["inputs"][row], batch["targets"][row, -1])
        rng = np.random.default_rng((seed, zlib.crc32(ids.tobytes())))
        is_full = batch["weights"][row].all()
        if not is_full or rng.random() >= share or ids.tobytes() == plain:
            continue
        questions = 1
        if plain is None:
            questions = rng.integers(options.least_questions, options.most_questions + 1)
        ids, asked, _ = with_lookups(rng, ids, options, questions)
        batch["inputs"][row], batch["targets"][row] = ids[:-1], ids[1:]
        batch["asked"][row] = asked[1:]
        weight = np.where(asked[1:], options.answer_weight, 1)
        batch["weights"][row] = weight if plain is None else 0
    return batch


def _check(config, options: LookupConfig) -> None:
    """Raises ValueError if windows are not whole rows of bytes with room for the lines."""
    if config.data.tokenizer != "bytes" or config.data.packing != "contiguous":
        raise ValueError(
            'config.task="lookup" needs config.data.tokenizer="bytes" and config.data.packing='
            f'"contiguous", got {config.data.tokenizer!r} and {config.data.packing!r}'
        )
    if config.mesh.coordinator is not None:
        raise ValueError(
            'config.task="lookup" runs in one process; leave out config.mesh.coordinator'
        )
    least = (options.most_lines + options.most_questions) * options.line_bytes
    if config.data.sequence_length < least:
        raise ValueError(
            f"config.data.sequence_length must be >= {least}, the bytes of {options.most_lines} "
            f"lines and {options.most_questions} questions, got {config.data.sequence_length}"
        )
