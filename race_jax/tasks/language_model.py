"""Language modeling: to predict the next token of a text.

Equations: bits per byte = nats / (ln 2 · bytes), and perplexity = exp(nats per token). The bits per
byte of a compressor are 8 · compressed bytes / bytes.
"""

import dataclasses
import lzma
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from race_jax.data.text import Data, HeldOut, build_data
from race_jax.data.tokenizer import from_dict
from race_jax.models import TransformerLM, decode
from race_jax.records import at_least
from race_jax.tasks.losses import chunked_cross_entropy
from race_jax.tasks.task import Task, TaskConfig, shapes_of

TEMPERATURE = 0.7  # of the sample: short samples of a small model read better a little below 1


@dataclasses.dataclass
class LanguageModelConfig(TaskConfig):
    """Language modeling: what is printed at the end of a run.

    Attributes:
        compare_xz: also print the bits per byte that xz -9e needs for the held-out text.
        sample_length: tokens of the sample that the trained model draws; 0 draws none.
        sample_prompt: text that the sample continues.
    """

    compare_xz: bool = False
    sample_length: int = 0
    sample_prompt: str = "\n"

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        at_least("sample_length", self.sample_length, 0)
        if self.sample_length and not self.sample_prompt:
            raise ValueError(
                f'sample_prompt must not be empty with sample_length={self.sample_length}, got ""'
            )


class LanguageModel(Task):
    """Next-token prediction on the text that `config.data` describes."""

    config_class = LanguageModelConfig
    free_fields = ("compare_xz", "sample_length", "sample_prompt")
    loss_unit = "nats per token"
    weight_name = "tokens"
    reads_token_files = True

    def __init__(self, config):
        self._options, self._seed = config.task_config(), config.run.seed
        self._data = build_data(
            config.data,
            batch_size=config.run.batch_size,
            seed=self._seed,
            unread=config.reads_from_disk() or config.mesh.coordinator is not None,
        )
        self._prompt = prompt_ids(self._options, self._data)
        self._splits = {"valid": self._data.valid}
        if self._data.test is not None:
            self._splits["test"] = self._data.test
        self.train = self._data.train
        self.held_out = {name: split.batches for name, split in self._splits.items()}
        self.digests = self._data.digests
        self.record = {"tokenizer": self._data.tokenizer.to_dict()}
        self.batch = shapes_of(next(iter(self._data.valid.batches)))
        self.description = self._data.description

    @staticmethod
    def make_model(config, record, rngs):
        """Makes a causal transformer over the tokenizer's vocabulary."""
        vocab_size = from_dict(record["tokenizer"]).vocab_size
        return TransformerLM(config.model, vocab_size, keep_rngs=False, rngs=rngs)

    @staticmethod
    def companion(record):
        """Returns the tokenizer."""
        return from_dict(record["tokenizer"])

    @staticmethod
    def loss_sums(model, batch, rngs):
        """Computes the nats of the next tokens, and their number."""
        hidden = model.hidden(
            batch["inputs"].astype(jnp.int32),
            segment_ids=batch.get("segment_ids"),
            deterministic=rngs is None,
            rngs=rngs,
        )
        table = model.embedding[...]
        targets = batch["targets"].astype(jnp.int32)
        return chunked_cross_entropy(hidden, table, targets, batch["weights"])

    @staticmethod
    def init_state(model, batch):
        """Returns the state of the model before any token."""
        return model.init_state(len(batch["inputs"]))

    @staticmethod
    def segment_sums(model, segment, state, rngs):
        """Computes the nats of the next tokens of one segment, and their number."""
        hidden, state = model.hidden(
            segment["inputs"].astype(jnp.int32),
            segment_ids=segment.get("segment_ids"),
            state=state,
            deterministic=rngs is None,
            rngs=rngs,
        )
        table = model.embedding[...]
        targets = segment["targets"].astype(jnp.int32)
        return state, chunked_cross_entropy(hidden, table, targets, segment["weights"])

    @classmethod
    def loss_text(cls, loss):
        """Describes a training loss in nats and in bits."""
        return f"loss {loss:.4f} nats = {loss / math.log(2):.3f} bits a token"

    def metrics(self, split, sums):
        """Computes the loss, the perplexity and, if the tokens encode the text, bits per byte."""
        held_out, num_bytes = self._splits[split], None
        if held_out.encodes_text:
            num_bytes = held_out.num_bytes * sums["weight"] / held_out.num_tokens
        return evaluation_figures(sums["loss"], sums["weight"], num_bytes)

    def score_text(self, split, metrics):
        """Describes an evaluation in words; see the function `score_text`."""
        return score_text(metrics, self._splits[split])

    def end_facts(self):
        """Returns the bits per byte of xz on the held-out text, if the options ask for them."""
        if not self._options.compare_xz:
            return {}
        held_out = self._data.valid
        if held_out.text is None:
            return {"xz -9e": "not measured, because the token file does not have the text"}
        same = "same text" if held_out.encodes_text else "of the whole text"
        return {"xz -9e": f"{xz_bits_per_byte(held_out.text):.3f} bits per byte, {same}"}

    def sample_lines(self, model, directory):
        """Returns a continuation of the prompt, if the options ask for one."""
        if not self._options.sample_length:
            return []
        return sample_lines(
            self._options, self._data, model, self._prompt, directory, seed=self._seed
        )


def evaluation_figures(nats: float, weight: float, num_bytes: float | None) -> dict[str, float]:
    """Computes the numbers of an evaluation.

    Args:
        nats: weighted sum over the scored tokens.
        weight: how many tokens were scored.
        num_bytes: number of bytes that those tokens stand for; None if it is not certain that the
            tokens encode the text.

    Returns:
        The loss (nats per token), the perplexity and, given `num_bytes`, the bits per byte.

    Example:
        >>> figures = evaluation_figures(nats=80 * math.log(2), weight=40, num_bytes=80)
        >>> round(figures["perplexity"], 6), round(figures["bits_per_byte"], 6)
        (4.0, 1.0)
    """
    loss = nats / weight
    figures = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
    if num_bytes is not None:
        figures["bits_per_byte"] = nats / math.log(2) / num_bytes
    return figures


def prompt_ids(options: LanguageModelConfig, data: Data) -> np.ndarray:
    """Encodes `sample_prompt`. It is done before training, so that no run fails at its end.

    Raises:
        ValueError: a sample is wanted, but this vocabulary has no ids for its prompt.
    """
    prompt = options.sample_prompt
    if not options.sample_length:
        return np.zeros(0, np.int32)
    try:
        ids = data.tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"config.language_model.sample_prompt {prompt!r}: {error}") from error
    if not len(ids):
        raise ValueError(f"config.language_model.sample_prompt must hold a token, got {prompt!r}")
    return ids


def sample_lines(
    options: LanguageModelConfig,
    data: Data,
    model: TransformerLM,
    prompt: np.ndarray,
    directory: Path,
    *,
    seed: int,
) -> list[str]:
    """Draws a continuation of `sample_prompt`, and gives the command for more.

    Args:
        options: the task's own record.
        data: the text and its tokenizer.
        model: the trained model, on one device.
        prompt: the ids that `prompt_ids` returned.
        directory: the run's folder.
        seed: the seed of the draws.

    Returns:
        The lines to print.
    """
    drawn = decode.generate(
        model,
        prompt[None],
        max_tokens=options.sample_length,
        sampling=decode.Sampling(temperature=TEMPERATURE),
        seed=seed,
    )
    text = options.sample_prompt
    return [
        f"{'sample':10} {drawn.shape[1]} tokens after {text!r}, temperature {TEMPERATURE}:",
        text + data.tokenizer.decode(drawn[0]),
        f"{'next':10} {_generate_command(directory, text)}",
    ]


def _generate_command(directory: Path, prompt: str) -> str:
    """Returns the command for more samples, with the Python that runs this program."""
    python, script = Path(sys.executable), Path(sys.argv[0]).with_name("generate.py")
    if not script.is_file():  # a program of the user's own called `train`
        script = Path("scripts", "generate.py")
    here = Path.cwd()
    words = [
        path.relative_to(here) if path.is_relative_to(here) else path for path in (python, script)
    ]
    words += ["--checkpoint", directory, "--prompt", prompt, "--temperature", TEMPERATURE]
    return shlex.join(map(str, words))


def xz_bits_per_byte(text: bytes | memoryview) -> float:
    """Computes the bits per byte that the best preset of xz needs for `text`.

    Example:
        >>> xz_bits_per_byte(b"again and again " * 1000) < 0.1
        True
    """
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def score_text(record: dict[str, Any], held_out: HeldOut) -> str:
    """Describes an evaluation in words.

    Args:
        record: the numbers that `evaluation_figures` returned.
        held_out: the split that was scored.

    Returns:
        The loss and the perplexity. If the tokens encode the whole text, the bits per byte come
        first. Otherwise the share of `<unk>` and the reason come last.
    """
    text = f"{record['loss']:.4f} nats a token, perplexity {record['perplexity']:.2f}"
    if held_out.encodes_text:
        size = f"over {held_out.num_bytes:,} bytes"
        return f"{record['bits_per_byte']:.3f} bits per byte, {text}, {size}"
    unknown = held_out.num_unknown / held_out.num_tokens
    reason = "the tokens do not encode the whole text"
    if held_out.text is None:
        reason = "the token file does not tell whether its tokens encode the whole text"
    return (
        f"{text}, over {held_out.num_tokens:,} tokens, {unknown:.1%} of them <unk> "
        f"(no bits per byte: {reason})"
    )
