"""Language modelling: predict the next token of a text.

Equations: bits per byte = nats / (ln 2 · bytes); perplexity = exp(nats per token). The bits per
byte of a compressor are 8 · compressed bytes / bytes.
"""

import lzma
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from race_jax.data.text import Data, HeldOut, build_data
from race_jax.data.tokenizer import from_dict
from race_jax.models import TransformerLM, decode
from race_jax.tasks.losses import chunked_cross_entropy
from race_jax.tasks.task import Task, shapes_of

TEMPERATURE = 0.7  # of the sample: short samples of a small model read better a little below 1


class LanguageModel(Task):
    """Next-token prediction on the text that `config.data` describes."""

    def __init__(self, config):
        self._config = config
        run = config.run
        self._data = build_data(config.data, batch_size=run.batch_size, seed=run.seed)
        self._prompt = sample_prompt(config, self._data)
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
        """A causal transformer over the tokenizer's vocabulary."""
        vocab_size = from_dict(record["tokenizer"]).vocab_size
        return TransformerLM(config.model, vocab_size, keep_rngs=False, rngs=rngs)

    @staticmethod
    def companion(record):
        """The tokenizer."""
        return from_dict(record["tokenizer"])

    @staticmethod
    def loss_sums(model, batch, rngs):
        """The nats of the next tokens."""
        hidden = model.hidden(
            batch["inputs"],
            segment_ids=batch.get("segment_ids"),
            deterministic=rngs is None,
            rngs=rngs,
        )
        table = model.embedding[...]
        return chunked_cross_entropy(hidden, table, batch["targets"], batch["weights"])

    def metrics(self, split, sums):
        """Loss, perplexity and, where the tokens encode the text, bits per byte."""
        held_out, num_bytes = self._splits[split], None
        if held_out.encodes_text:
            num_bytes = held_out.num_bytes * sums["weight"] / held_out.num_tokens
        return evaluation_figures(sums["nats"], sums["weight"], num_bytes)

    def score_text(self, split, metrics):
        """See the function `score_text`."""
        return score_text(metrics, self._splits[split])

    def end_facts(self):
        """What xz makes of the held-out text, if that is asked for."""
        if not self._config.run.compare_xz:
            return {}
        held_out = self._data.valid
        same = "same text" if held_out.encodes_text else "of the whole text"
        return {"xz -9e": f"{xz_bits_per_byte(held_out.text):.3f} bits per byte, {same}"}

    def sample_lines(self, model, directory):
        """A continuation of the prompt, if one is asked for."""
        if not self._config.run.sample_tokens:
            return []
        return sample_lines(self._config, self._data, model, self._prompt, directory)


def evaluation_figures(nats: float, weight: float, num_bytes: float | None) -> dict[str, float]:
    """The numbers of an evaluation.

    Args:
        nats: weighted sum over the scored tokens.
        weight: how many tokens were scored.
        num_bytes: bytes that those tokens stand for; None where the tokens do not encode the text.

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


def sample_prompt(config: Any, data: Data) -> np.ndarray:
    """The ids of `run.sample_prompt`; asked for before training, so that no run ends on it.

    Raises:
        ValueError: a sample is wanted and its prompt has no ids in this vocabulary.
    """
    prompt = config.run.sample_prompt
    if not config.run.sample_tokens:
        return np.zeros(0, np.int32)
    try:
        ids = data.tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"config.run.sample_prompt {prompt!r}: {error}") from error
    if not len(ids):
        raise ValueError(f"config.run.sample_prompt must hold a token, got {prompt!r}")
    return ids


def sample_lines(
    config: Any, data: Data, model: TransformerLM, prompt: np.ndarray, directory: Path
) -> list[str]:
    """A continuation of `run.sample_prompt` by the model, and the command for more.

    Args:
        config: the checked configuration.
        data: the text and its tokenizer.
        model: the trained model, on one device.
        prompt: the ids that `sample_prompt` gave.
        directory: the run's folder.

    Returns:
        The lines to print.
    """
    drawn = decode.generate(
        model,
        prompt[None],
        max_tokens=config.run.sample_tokens,
        sampling=decode.Sampling(temperature=TEMPERATURE),
        seed=config.run.seed,
    )
    text = config.run.sample_prompt
    return [
        f"{'sample':10} {drawn.shape[1]} tokens after {text!r}, temperature {TEMPERATURE}:",
        text + data.tokenizer.decode(drawn[0]),
        f"{'next':10} {_generate_command(directory, text)}",
    ]


def _generate_command(directory: Path, prompt: str) -> str:
    """The command for more samples, with the interpreter that runs this one."""
    python, script = Path(sys.executable), Path(sys.argv[0]).with_name("generate.py")
    if not script.is_file():  # `train` was called by a program of the user's own
        script = Path("scripts", "generate.py")
    here = Path.cwd()
    words = [
        path.relative_to(here) if path.is_relative_to(here) else path for path in (python, script)
    ]
    words += ["--checkpoint", directory, "--prompt", prompt]
    return shlex.join(map(str, words))


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte that the best preset of xz needs for `text`.

    Example:
        >>> xz_bits_per_byte(b"again and again " * 1000) < 0.1
        True
    """
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def score_text(record: dict[str, Any], held_out: HeldOut) -> str:
    """An evaluation in words.

    Args:
        record: the numbers that `evaluation_figures` gave.
        held_out: the split that was scored.

    Returns:
        Loss and perplexity. Before them the bits per byte, or after them, where the tokens do not
        encode the whole text, the share of `<unk>`.
    """
    text = f"{record['loss']:.4f} nats a token, perplexity {record['perplexity']:.2f}"
    if held_out.encodes_text:
        size = f"over {held_out.num_bytes:,} bytes"
        return f"{record['bits_per_byte']:.3f} bits per byte, {text}, {size}"
    unknown = held_out.num_unknown / held_out.num_tokens
    return (
        f"{text}, over {held_out.num_tokens:,} tokens, {unknown:.1%} of them <unk> "
        "(no bits per byte: the tokens do not encode the whole text)"
    )
