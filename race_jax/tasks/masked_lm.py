"""Masked language modeling: to guess the hidden tokens of a text from those on both sides.

In each row a share of the tokens is chosen. Of these, 80 % are replaced by a token that stands for
a gap, 10 % by a random token, and 10 % are left as they are. Only the chosen tokens are scored:
perplexity = exp(sum of their nats / their number).
"""

import dataclasses
import functools

import numpy as np

from race_jax.data.text import build_data
from race_jax.data.tokenizer import from_dict
from race_jax.models import TransformerLM
from race_jax.tasks.language_model import evaluation_figures
from race_jax.tasks.losses import chunked_cross_entropy
from race_jax.tasks.task import Task, TaskConfig, shapes_of

GAPS, RANDOM = 0.8, 0.1  # shares of the chosen tokens
# Held-out tokens are chosen by this seed in every run, so that runs are scored on the same ones.
HELD_OUT_SEED = 0


@dataclasses.dataclass
class MaskedLMConfig(TaskConfig):
    """Masked language modeling.

    Attributes:
        mask_rate: the share of the tokens of each row that are chosen, in (0, 1). At least one
            token is.
    """

    mask_rate: float = 0.15

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field is out of range. The message starts with its name.
        """
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate must lie in (0, 1), got {self.mask_rate}")


class MaskedLM(Task):
    """Masked language modeling on the text that `config.data` describes."""

    config_class = MaskedLMConfig
    is_causal = False
    loss_unit = "nats per hidden token"
    weight_name = "hidden_tokens"

    def __init__(self, config):
        data, rate = config.data, config.task_config().mask_rate
        read = build_data(data, batch_size=config.run.batch_size, seed=config.run.seed)
        hide = functools.partial(hide_tokens, rate=rate, vocab_size=read.vocab_size)
        # Training windows are full, except for packed documents, which have segment ids.
        is_full = data.packing == "contiguous"
        train = functools.partial(hide, padded=False)
        held_out = functools.partial(hide, padded=is_full)
        splits = {"valid": read.valid} | ({} if read.test is None else {"test": read.test})
        self.train = read.train.random_map(train, seed=config.run.seed)
        self.held_out = {
            name: split.batches.random_map(held_out, seed=HELD_OUT_SEED)
            for name, split in splits.items()
        }
        self.digests = read.digests
        self.record = {"tokenizer": read.tokenizer.to_dict()}
        self.batch = {
            name: shape
            for name, shape in shapes_of(next(iter(self.held_out["valid"]))).items()
            if name != "mask"
        }
        self.description = f"{read.description}; {rate:.0%} of the tokens are hidden"

    @staticmethod
    def make_model(config, record, rngs):
        """Makes a transformer over the vocabulary and the gap, which sees all tokens."""
        vocab_size = from_dict(record["tokenizer"]).vocab_size + 1
        return TransformerLM(config.model, vocab_size, is_causal=False, keep_rngs=False, rngs=rngs)

    @staticmethod
    def companion(record):
        """Returns the tokenizer."""
        return from_dict(record["tokenizer"])

    @staticmethod
    def loss_sums(model, batch, rngs):
        """Computes the nats of the chosen tokens, and their number."""
        hidden = model.hidden(
            batch["inputs"],
            segment_ids=batch.get("segment_ids"),
            key_value_mask=batch.get("mask"),
            deterministic=rngs is None,
            rngs=rngs,
        )
        table = model.embedding[...]
        return chunked_cross_entropy(hidden, table, batch["targets"], batch["weights"], sparse=True)

    def metrics(self, split, sums):
        """Computes the loss and the perplexity of the chosen tokens."""
        return evaluation_figures(sums["loss"], sums["weight"], None)


def hide_tokens(
    batch: dict[str, np.ndarray],
    rng: np.random.Generator,
    *,
    rate: float,
    vocab_size: int,
    padded: bool,
) -> dict[str, np.ndarray]:
    """Chooses tokens of each row, and hides most of them.

    Args:
        batch: `inputs` (B, T) int32, `weights` (B, T), which are 0 at padding, and perhaps
            `segment_ids`.
        rng: the generator that chooses.
        rate: the share of the tokens that are chosen. In each row the number is rounded, and is at
            least one.
        vocab_size: the number of tokens. This number itself stands for a gap.
        padded: whether the result has a mask of the tokens that are not padding.

    Returns:
        `inputs` with gaps, `targets`, which are the inputs before, `weights`, which are 1 at the
        chosen tokens and 0 elsewhere, perhaps `mask` (B, T) bool, and the `segment_ids`.

    Example:
        >>> row = {"inputs": np.arange(8)[None], "weights": np.ones((1, 8))}
        >>> out = hide_tokens(
        ...     row, np.random.default_rng(0), rate=0.25, vocab_size=8, padded=False
        ... )
        >>> out["weights"].sum(), (out["inputs"] != out["targets"]).sum() <= 2
        (np.float32(2.0), np.True_)
    """
    tokens, real = batch["inputs"], batch["weights"] > 0
    count = real.sum(axis=1, keepdims=True)
    wanted = np.where(count > 0, np.maximum(1, np.rint(rate * count)), 0)
    # The real tokens with the smallest numbers are chosen.
    order = np.argsort(np.where(real, rng.random(tokens.shape), 2.0), axis=1)
    chosen = np.zeros(tokens.shape, bool)
    np.put_along_axis(chosen, order, np.arange(tokens.shape[1]) < wanted, axis=1)
    fate = rng.random(tokens.shape)
    other = rng.integers(0, vocab_size, tokens.shape, np.int32)
    hidden = np.where(fate < GAPS, vocab_size, np.where(fate < GAPS + RANDOM, other, tokens))
    result = {
        "inputs": np.where(chosen, hidden, tokens).astype(np.int32),
        "targets": tokens.astype(np.int32),
        "weights": chosen.astype(np.float32),
    }
    if padded:
        result["mask"] = real
    if "segment_ids" in batch:
        result["segment_ids"] = batch["segment_ids"]
    return result
