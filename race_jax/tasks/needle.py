"""Needle retrieval: lines "key=value" are hidden in filler, and values are asked for at the end.

A row of bytes consists of filler with the needles at random depths in it, and then of questions,
each "?key=value", whose value has weight 1. An answer is right if all its digits are. The accuracy
is given over all questions, and by the depth at which the needle was hidden.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.data.documents import Corpus
from race_jax.data.sources import load_corpus
from race_jax.models import TransformerLM
from race_jax.records import at_least, one_of
from race_jax.tasks.answers import TEST, TRAIN, VALID, AnswerTask
from race_jax.tasks.task import Batch, TaskConfig

FILLERS = ("noise", "text")
# What "noise" repeats. It says nothing, so whatever is read besides it is a needle.
NOISE = b"The sea is wide. The road is long. It rains again. We walk on and come home. "
DEPTHS = 5  # equal parts of the filler, by which the accuracy is given
_BYTES = 256
_LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)


@dataclasses.dataclass
class NeedleConfig(TaskConfig):
    """Needle retrieval.

    Attributes:
        num_needles: number of lines "key=value" that are hidden in a row.
        num_questions: how many of them are asked for at the end, in random order.
        key_length: capital letters of a key. The keys of a row are distinct.
        value_length: digits of a value.
        filler: "noise" (the same short sentences again and again) or "text" (windows of the text
            that `config.data` names; the held-out text serves for the held-out rows).
        held_out_rows: number of rows of a held-out split, made up to whole batches.
    """

    num_needles: int = 4
    num_questions: int = 4
    key_length: int = 2
    value_length: int = 4
    filler: str = "noise"
    held_out_rows: int = 512

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        for name in ("num_needles", "num_questions", "key_length", "value_length", "held_out_rows"):
            at_least(name, getattr(self, name), 1)
        one_of("filler", self.filler, FILLERS)
        if self.num_questions > self.num_needles:
            raise ValueError(
                f"num_questions must be <= num_needles {self.num_needles}, got {self.num_questions}"
            )
        if self.num_needles > len(_LETTERS) ** self.key_length:
            raise ValueError(
                f"num_needles must be <= {len(_LETTERS) ** self.key_length}, the number of keys of "
                f"{self.key_length} letters, got {self.num_needles}; raise key_length"
            )

    @property
    def needle_bytes(self) -> int:
        """The bytes of a line with its line breaks; a question has as many."""
        return self.key_length + self.value_length + 3


class Needle(AnswerTask):
    """Needle retrieval over bytes.

    Source: beyond the paper; the form is that of the "needle in a haystack" tests, such as RULER
    (Hsieh et al. 2024).
    """

    config_class = NeedleConfig
    loss_unit = "nats per digit"
    weight_name = "digits"

    def __init__(self, config):
        options, length = config.task_config(), config.data.sequence_length
        _check_length(options, length, config.mesh.seq)
        texts, digests = _fillers(config, options.filler)

        def draw(split: int):
            def rows(rng: np.random.Generator) -> Batch:
                count = config.run.batch_size
                drawn = [draw_row(rng, length, texts[split], options) for _ in range(count)]
                return {name: np.stack([row[name] for row in drawn]) for name in drawn[0]}

            return rows

        splits = {"valid": VALID} | ({"test": TEST} if TEST in texts else {})
        super().__init__(config, draw, splits, options.held_out_rows)
        self.digests = digests
        self.description = (
            f"needle: {options.num_needles} lines hidden in {length} bytes of {options.filler}, "
            f"{options.num_questions} asked for, drawn from the seed"
        )

    @staticmethod
    def make_model(config, record, rngs):
        """Makes a causal transformer over bytes."""
        return TransformerLM(config.model, _BYTES, keep_rngs=False, rngs=rngs)

    @classmethod
    def right_sums(cls, hit, batch):
        """Counts answers and right answers, in all and by the depth of the needle."""
        depths, missed = batch["depths"], jnp.cumsum(~hit & (batch["weights"] > 0), axis=1)
        ends = depths > 0  # the last digit of each answer
        # What was missed up to the end of the answer before this one.
        before = jax.lax.cummax(jnp.where(ends, missed, 0), axis=1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))
        right = ends & (missed == before)
        sums = {"right": jnp.sum(right), "asked": jnp.sum(ends)}
        for part in range(DEPTHS):
            here = depths == part + 1
            sums[f"right_{part}"], sums[f"asked_{part}"] = jnp.sum(right & here), jnp.sum(here)
        return {name: number.astype(jnp.float32) for name, number in sums.items()}

    def metrics(self, split, sums):
        """Computes the loss, the accuracy, and the accuracy by depth, in percent of the filler."""
        figures = super().metrics(split, sums)
        for part in range(DEPTHS):
            if sums.get(f"asked_{part}"):
                first, last = (100 * border // DEPTHS for border in (part, part + 1))
                accuracy = sums[f"right_{part}"] / sums[f"asked_{part}"]
                figures[f"accuracy_{first}_to_{last}"] = accuracy
        return figures


def draw_row(
    rng: np.random.Generator, length: int, filler: np.ndarray, options: NeedleConfig
) -> Batch:
    r"""Draws one row.

    Args:
        rng: the source of random numbers.
        length: T.
        filler: bytes from which windows are cut. A short text is repeated.
        options: the settings of the task.

    Returns:
        Inputs and targets of shape (T,) int32, weights (T,) float32, and depths (T,) int32, which
        are 0 except at the last digit of an answer, where they are the part of the filler that hid
        the needle, counted from 1 to `DEPTHS`.

    Example:
        >>> options = NeedleConfig(num_needles=1, num_questions=1, key_length=1, value_length=2)
        >>> text = np.frombuffer(b"so it is ", np.uint8)
        >>> row = draw_row(np.random.default_rng(3), 27, text, options)
        >>> bytes(row["inputs"].astype(np.uint8))
        b's \nC=12\nso it is so it\n?C=1'
        >>> bytes(row["targets"][row["weights"] > 0].astype(np.uint8))
        b'12'
    """
    count, asked, size = options.num_needles, options.num_questions, options.needle_bytes
    room = length + 1 - (count + asked) * size
    if len(filler) < room:
        filler = np.resize(filler, room + len(filler) - 1)  # room for every start
    start = rng.integers(len(filler) - room + 1)
    window = filler[start : start + room]
    lines = _lines(rng, options)
    places = _places(rng, window, count)
    hidden = np.insert(window, np.repeat(places, size), lines.ravel())
    chosen = rng.permutation(count)[:asked]
    questions = np.roll(lines[chosen], 1, axis=1)
    questions[:, 0], questions[:, 1] = ord("\n"), ord("?")
    row = np.concatenate([hidden, questions.ravel()]).astype(np.int32)
    weights, depths = np.zeros(length, np.float32), np.zeros(length, np.int32)
    last = len(hidden) - 2 + size * np.arange(1, asked + 1)  # the input before the last digit
    weights[last[:, None] - np.arange(options.value_length)] = 1.0
    depths[last] = 1 + np.minimum(places[chosen] * DEPTHS // room, DEPTHS - 1)
    return {"inputs": row[:-1], "targets": row[1:], "weights": weights, "depths": depths}


def _lines(rng: np.random.Generator, options: NeedleConfig) -> np.ndarray:
    r"""Draws the needles, each "\nkey=value\n", (needles, bytes) uint8."""
    count, base = options.num_needles, len(_LETTERS)
    numbers = rng.choice(base**options.key_length, count, replace=False)
    digits = numbers[:, None] // base ** np.arange(options.key_length) % base
    values = rng.integers(0, 10, (count, options.value_length)) + ord("0")
    breaks, equals = np.full((count, 1), ord("\n")), np.full((count, 1), ord("="))
    parts = [breaks, _LETTERS[digits], equals, values, breaks]
    return np.concatenate(parts, axis=1).astype(np.uint8)


def _places(rng: np.random.Generator, window: np.ndarray, count: int) -> np.ndarray:
    """Draws where needles are hidden: sorted, each after a word if there are words."""
    borders = 1 + np.flatnonzero((window == ord(" ")) | (window == ord("\n")))
    borders = np.concatenate([[0], borders])
    drawn = np.sort(rng.integers(0, len(window) + 1, count))
    return borders[np.searchsorted(borders, drawn, side="right") - 1]


def _fillers(config, filler: str) -> tuple[dict[int, np.ndarray], dict[str, str]]:
    """Returns the bytes of each split, and the digests of what was read."""
    if filler == "noise":
        return dict.fromkeys((TRAIN, VALID), np.frombuffer(NOISE, np.uint8)), {}
    corpus: Corpus = load_corpus(config.data)
    splits = zip((TRAIN, VALID, TEST), (corpus.train, corpus.valid, corpus.test), strict=True)
    texts = {
        split: np.frombuffer(b"\n".join(document.data for document in documents), np.uint8)
        for split, documents in splits
        if documents
    }
    return texts, {"data": corpus.digest()}


def _check_length(options: NeedleConfig, length: int, devices: int) -> None:
    """Raises ValueError if a row has no room, or its questions do not fit on one device."""
    lines = (options.num_needles + options.num_questions) * options.needle_bytes
    if length < lines:
        raise ValueError(
            f"config.data.sequence_length must be >= {lines}, the bytes of "
            f"{options.num_needles} needles and {options.num_questions} questions, got {length}"
        )
    last = max(0, length - (devices - 1) * -(-length // devices))
    if options.num_questions * options.needle_bytes > last:
        raise ValueError(
            f"config.mesh.seq={devices} must leave {options.num_questions * options.needle_bytes} "
            f"bytes to the last device, so that no question is cut, got {last}; lower "
            "config.needle.num_questions or config.mesh.seq, or change config.data.sequence_length"
        )
