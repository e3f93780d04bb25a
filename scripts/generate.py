"""Continues a prompt with a trained language model.

    .venv/bin/python scripts/generate.py --checkpoint runs/lm_default --prompt "def main("

The text is written to standard output token by token, and everything else to standard error. The
model is that of the newest whole checkpoint of a training run (`scripts/train_lm.py`).
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np
from absl import app, flags

from race_jax.models.decode import (
    Sampling,
    check_decodes_sparsely,
    remaining_positions,
    stream,
)
from race_jax.models.heads import TransformerLM
from race_jax.sparse import SCORERS, SparseConfig, kept
from race_jax.sparse.config import SELECTIONS

try:
    from race_jax.data.tokenizer import Tokenizer
    from race_jax.tasks.registry import task_named
    from race_jax.train.checkpoint import SavedModel, open_for_inference
except (
    ImportError
) as error:  # the extra "train" is not installed; the message says how to install it
    sys.exit(f"generate.py: {error}")

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Directory of the training run.", required=True
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Number of tokens to draw.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Positive number that the logits are divided by."
)
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from this many likeliest tokens.")
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Draw from the likeliest tokens that together have this probability."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws, from 0 to 2**32 - 1.")
_STOP = flags.DEFINE_multi_string(
    "stop", [], "Text of one token at which to stop. It is not written. May be repeated."
)
_GREEDY = flags.DEFINE_bool("greedy", False, "Take the likeliest token each time.")

_DECODE_ATTENTION = flags.DEFINE_enum(
    "decode_attention",
    "dense",
    ["dense", "sparse"],
    "What a new token of a softmax model attends to: all tokens, or the best of them.",
)
_SPARSE = {  # of these, only the flags that are given are set; the others have the field's default
    "budget": flags.DEFINE_integer("budget", None, "sparse: number of tokens that are read."),
    "scorer": flags.DEFINE_enum("scorer", None, list(SCORERS), "sparse: how tokens are scored."),
    "sink": flags.DEFINE_integer("sink", None, "sparse: number of first tokens always read."),
    "window": flags.DEFINE_integer("window", None, "sparse: number of last tokens always read."),
    "selection": flags.DEFINE_enum(
        "selection", None, list(SELECTIONS), "sparse: whether heads select alone or as a group."
    ),
    "code_bits": flags.DEFINE_integer("code_bits", None, "sparse: bits a coordinate of a code."),
    "num_rotations": flags.DEFINE_integer("num_rotations", None, "sparse: rotations of a code."),
    "dense_below": flags.DEFINE_integer(
        "dense_below", None, "sparse: attention is dense while there are fewer tokens than this."
    ),
}

_UNFINISHED = "\ufffd"  # a tokenizer decodes an incomplete character as this


def text_pieces(tokenizer, prompt: np.ndarray, tokens: Iterator[int]) -> Iterator[str]:
    """Yields the text that each token adds.

    A character of several tokens is yielded when it is complete. Each token is decoded together
    with the one before it, because some tokenizers put a space between two tokens.

    Args:
        tokenizer: the tokenizer of the model.
        prompt: shape (T,), integers: the tokens before the text.
        tokens: the tokens of the text.

    Yields:
        A text for each token, which may be empty, and at the end what is left.
    """
    window = prompt[-1:].tolist()
    shown = len(tokenizer.decode(window))
    text = ""
    for token in tokens:
        window.append(token)
        text = tokenizer.decode(window)
        whole = len(text) - text.endswith(_UNFINISHED)
        yield text[shown:whole]
        shown = max(shown, whole)
        if whole == len(text):
            window = window[-1:]
            text = tokenizer.decode(window)
            shown = len(text)
    yield text[shown:]


def main(arguments: Sequence[str]) -> None:
    """Checks the flags, loads the model, and writes the continuation and its speed."""
    if len(arguments) > 1:
        _fail(f"unknown arguments {arguments[1:]}; put quotes around a prompt of several words")
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that is not a file, as in a test
            output.reconfigure(errors="backslashreplace")  # for characters its encoding lacks
    if not _PROMPT.value:
        _fail("--prompt is empty; give a text of at least one token, which the model continues")
    try:
        sampling = Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _GREEDY.value)
        with open_for_inference(_CHECKPOINT.value) as saved:
            tokenizer = _tokenizer(saved)
            sparse = _sparse_config(saved.shapes)
            prompt = np.asarray(tokenizer.encode(_PROMPT.value), np.int32)
            count = _count(saved.shapes, len(prompt))
            stops = [_stop_token(tokenizer, text) for text in _STOP.value]
            model = saved.load()
        tokens = stream(
            model,
            prompt[None],
            max_tokens=count,
            sampling=sampling,
            seed=_SEED.value,
            stop_token=stops,
            sparse=sparse,
        )
    except (ValueError, RuntimeError) as error:
        _fail(str(error))
    if sparse is not None:
        _say(_plan(sparse))
    if not model.trunk.carries_state:
        _say("this model carries no state, so every token reads the whole sequence again")
    clock: list[float] = []
    try:
        _write(_PROMPT.value)
        for piece in text_pieces(tokenizer, prompt, _timed(tokens, clock, stops)):
            _write(piece)
        _write("\n")
    except FloatingPointError as error:
        _write("\n")
        _fail(str(error))
    except KeyboardInterrupt:
        _say("\nstopped")
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _say(_speed(clock))
    if sparse is not None:
        _say(_kept(sparse, len(prompt), len(clock)))


def _tokenizer(saved: SavedModel) -> Tokenizer:
    """Returns the tokenizer of a language model."""
    tokenizer, task = saved.companion, saved.config.task
    if not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"{_CHECKPOINT.value} is a run of the task {task!r}, which has no "
            "tokenizer; give the directory of a run that was trained on text"
        )
    if not task_named(task).is_causal:
        raise ValueError(
            f"{_CHECKPOINT.value} is a run of the task {task!r}, whose model does not "
            "continue a text; give the directory of a run of a language model"
        )
    return tokenizer


def _sparse_config(model: TransformerLM) -> SparseConfig | None:
    """Returns what the flags of sparse decoding say, or None for dense attention.

    Before the values of flags, it is checked that there is a model for which they mean something.
    """
    given = {name: flag.value for name, flag in _SPARSE.items() if flag.value is not None}
    is_sparse = _DECODE_ATTENTION.value == "sparse"
    if is_sparse or (given and not model.trunk.keeps_tokens):
        check_decodes_sparsely(model)
    if is_sparse:
        return SparseConfig(**given)
    if given:
        raise ValueError(
            f"--{next(iter(given))} has no effect with --decode_attention=dense; leave it out, or "
            "give --decode_attention=sparse"
        )
    return None


def _plan(sparse: SparseConfig) -> str:
    return (
        f"sparse: at most {sparse.budget:,} tokens a head by {sparse.coding().describe()}, "
        f"{sparse.sink} + {sparse.window} of them forced, dense below {sparse.dense_below:,}; the "
        "prompt is read densely"
    )


def _kept(sparse: SparseConfig, length: int, drawn: int) -> str:
    """Says what the tokens have read that were drawn after the first, which the prompt gives."""
    steps = [kept(sparse, length + i) for i in range(1, drawn)]
    selected = [count for count, is_dense in steps if not is_dense]
    if not selected:
        return f"kept: all tokens in all {len(steps)} steps"
    return (
        f"kept: {selected[-1]:,} of {length + len(steps):,} tokens a head in the last step; "
        f"{len(selected)} of {len(steps)} steps were sparse"
    )


def _count(model: TransformerLM, length: int) -> int:
    """Returns how many tokens to draw: at most as many as learned positions leave room for."""
    if length == 0:
        raise ValueError("the prompt has no token; give a character other than white space")
    room = remaining_positions(model, length)
    if room is None or room >= _MAX_TOKENS.value:
        return _MAX_TOKENS.value
    _say(
        f"the learned positions end at {model.trunk.max_length} tokens, so "
        f"{room} are drawn instead of {_MAX_TOKENS.value}"
    )
    return room


def _stop_token(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text).tolist()
    if len(ids) != 1:
        raise ValueError(
            f"--stop={text!r} is {len(ids)} tokens of this model; give a text of exactly one token"
        )
    return ids[0]


def _timed(tokens: Iterator[np.ndarray], clock: list[float], stops: Sequence[int]) -> Iterator[int]:
    for token in tokens:
        clock.append(time.perf_counter())
        if token[0] in stops:
            return
        yield int(token[0])


def _speed(clock: list[float]) -> str:
    if len(clock) < 3:
        return f"{len(clock)} tokens; too few to measure the speed"
    # The first two tokens include the compilation of the prompt's program and of the step.
    rate = (len(clock) - 2) / (clock[-1] - clock[1])
    return f"{len(clock)} tokens, {rate:.1f} tokens/s (without compilation)"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(reason: str) -> NoReturn:
    _say(f"generate.py: {reason}")
    sys.exit(2)


if __name__ == "__main__":
    app.run(main)
