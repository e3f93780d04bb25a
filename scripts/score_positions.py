r"""Scores texts token by token, and tells the loss by the position in the text.

    .venv/bin/python scripts/score_positions.py --checkpoint runs/lm_long moby-dick.md.xz \
        --context 0,2048 --json positions.json --per_token nats.npz

Every file is one text. With `--context 0` the state of the model is carried from its first token to
its last, so a token may use all that came before it. With `--context 2048` the text is cut into
windows of 2,048 tokens, and the model starts anew at each. A model without a state of fixed size,
such as softmax, is scored with windows only. The first token of a text is not scored. Positions are
put into buckets whose borders double: 0 to 1,023, then 1,024 to 2,047, 2,048 to 4,095 and so on.
The table has the mean loss of each bucket in bits a token, over all texts. `--per_token` writes the
nats of every token after the first, one array for each context and text, named "0 moby-dick.md.xz".
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.text import progress_bar
from command_line import main_of, why_not_written
from race_jax.data.documents import Document
from race_jax.data.sources import read_file
from race_jax.data.tokenizer import ByteTokenizer, Tokenizer
from race_jax.models import TransformerLM
from race_jax.train.checkpoint import open_for_inference

FIRST = 1024  # positions of the first bucket
CHUNK = 1024  # tokens whose logits are in memory at a time


def token_nats(model: TransformerLM, inputs: jax.Array, targets: jax.Array, state: Any) -> Any:
    """Computes the nats of every target.

    Args:
        model: the model.
        inputs: shape (B, T), integers.
        targets: shape (B, T): the tokens after the inputs.
        state: the state before the inputs, or None.

    Returns:
        The nats (B, T) in float32, and the state after the inputs, or None.
    """
    hidden = model.hidden(inputs, state=state, deterministic=True)
    hidden, state = (hidden, None) if state is None else hidden
    table = model.embedding[...].astype(hidden.dtype)

    def chunk(now: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = now
        logits = jnp.einsum("cd,vd->cv", hidden, table, preferred_element_type=jnp.float32)
        hit = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - hit

    size = math.gcd(CHUNK, targets.size)
    nats = jax.lax.map(
        chunk, (hidden.reshape(-1, size, hidden.shape[-1]), targets.reshape(-1, size))
    )
    return nats.reshape(targets.shape), state


def text_nats(
    model: TransformerLM,
    ids: np.ndarray,
    *,
    segment_length: int,
    context: int,
    tell: Callable[[int], object] = lambda done: None,
) -> Iterator[np.ndarray]:
    """Yields the nats of the tokens of a text after its first one, piece after piece.

    Args:
        model: the model.
        ids: shape (tokens,): the text.
        segment_length: tokens that are computed at a time.
        context: the length of the windows at which the model starts anew; 0 carries its state from
            the first token to the last.
        tell: called with the number of tokens that are done.
    """
    graph, variables = nnx.split(model)
    run = _program(graph)
    state = None if context else model.init_state(1)
    rows = max(1, segment_length // context) if context else 1
    step = rows * context or segment_length
    for first in range(0, len(ids) - 1, step):
        piece = ids[first : first + step + 1].astype(np.int32)
        count = len(piece) - 1
        # The last piece is filled up. A model is causal, so this does not reach its tokens.
        piece = np.pad(piece, (0, step - count))
        shape = rows, context or step
        nats, state = run(variables, piece[:-1].reshape(shape), piece[1:].reshape(shape), state)
        yield np.asarray(nats).reshape(-1)[:count]
        tell(first + count)


@functools.cache
def _program(graph: nnx.GraphDef) -> Callable[..., tuple[jax.Array, Any]]:
    """Returns `token_nats` of a model's variables, compiled once for all texts."""
    return jax.jit(lambda variables, *now: token_nats(nnx.merge(graph, variables), *now))


def bucket_of(positions: np.ndarray) -> np.ndarray:
    """Returns the bucket of each position.

    Example:
        >>> bucket_of(np.array([0, 1023, 1024, 2047, 2048])).tolist()
        [0, 0, 1, 1, 2]
    """
    return np.log2(np.maximum(positions, FIRST // 2) / (FIRST // 2)).astype(int)


def by_position(nats: np.ndarray) -> dict[int, tuple[float, int]]:
    """Adds up the nats of a text by bucket, and returns them with the number of tokens."""
    buckets = bucket_of(np.arange(1, 1 + len(nats)))  # the first token is not scored
    sums = np.bincount(buckets, weights=nats)
    counts = np.bincount(buckets)
    return {
        bucket: (float(sums[bucket]), int(counts[bucket]))
        for bucket in np.flatnonzero(counts).tolist()
    }


def table_lines(sums: dict[int, dict[int, tuple[float, int]]]) -> list[str]:
    """Returns a table with one row for each bucket and one column for each context."""
    names = ["whole text" if context == 0 else f"{context:,}" for context in sums]
    lines = ["| position | tokens | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for bucket in sorted(next(iter(sums.values()))):
        first = 0 if bucket == 0 else FIRST << (bucket - 1)
        count = next(iter(sums.values()))[bucket][1]
        bits = [found[bucket][0] / found[bucket][1] / math.log(2) for found in sums.values()]
        row = [f"{first:,} to {(FIRST << bucket) - 1:,}", f"{count:,}"]
        lines.append("| " + " | ".join([*row, *(f"{x:.3f}" for x in bits)]) + " |")
    return lines


def score(options: argparse.Namespace) -> dict[tuple[int, Path], np.ndarray]:
    """Returns the nats by context and text."""
    with open_for_inference(options.checkpoint) as saved:
        tokenizer, trunk = saved.companion, saved.shapes.trunk
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(f"{options.checkpoint} is not a run that was trained on text")
        if 0 in options.context and not (trunk.carries_state and not trunk.keeps_tokens):
            raise ValueError(
                "this model has no state of fixed size; give --context without 0, as in 2048"
            )
        model = saved.load()
    found = {}
    for path in options.texts:
        data = read_file(path)
        is_bytes = isinstance(tokenizer, ByteTokenizer)
        ids = tokenizer.encode(data if is_bytes else Document(str(path), data).text())
        for context in options.context:
            name = f"{path.name}, {f'windows of {context:,}' if context else 'as one context'}"
            print(f"{name}: {len(ids):,} tokens", file=sys.stderr, flush=True)
            length = options.segment_length
            with progress_bar(len(ids) - 1) as bar:
                tell = lambda done, bar=bar: bar.update(done - bar.n)  # noqa: E731
                pieces = text_nats(model, ids, segment_length=length, context=context, tell=tell)
                found[context, path] = np.concatenate([np.zeros(0, np.float32), *pieces])
    return found


def sums_of(nats: dict[tuple[int, Path], np.ndarray]) -> dict[int, dict[int, tuple[float, int]]]:
    """Returns the sums over all texts by context and bucket."""
    sums: dict[int, dict[int, tuple[float, int]]] = {}
    for (context, _), values in nats.items():
        totals = sums.setdefault(context, {})
        for bucket, (total, count) in by_position(values).items():
            before = totals.get(bucket, (0.0, 0))
            totals[bucket] = before[0] + total, before[1] + count
    return sums


def contexts(text: str) -> list[int]:
    """0,2048 -> [0, 2048]."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or lengths such as 0,2048")
    return [int(word) for word in words]


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, nargs="+", help="plain or packed text files")
    parser.add_argument("--checkpoint", required=True, help="the directory of a training run")
    parser.add_argument("--context", type=contexts, default=[0], help="0, or lengths of windows")
    parser.add_argument("--segment_length", type=int, default=2**14, help="tokens at a time")
    parser.add_argument("--json", type=Path, help="a file for the sums")
    parser.add_argument("--per_token", type=Path, help="a file .npz for the nats of every token")
    options = parser.parse_args(argv)
    if options.segment_length < 1:
        parser.error("--segment_length must be at least 1")
    for name in ("json", "per_token"):
        path = getattr(options, name)
        if path is not None and (reason := why_not_written(path)):
            parser.error(f"--{name}: {reason}")
    try:
        nats = score(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"score_positions: {error}", file=sys.stderr)
        return 2
    sums = sums_of(nats)
    print("The mean loss in bits a token, by the position in the text and the context:\n")
    print("\n".join(table_lines(sums)))
    try:
        write(options, nats, sums)
    except OSError as error:
        print(f"score_positions: {error}", file=sys.stderr)
        return 1
    return 0


def write(options: argparse.Namespace, nats: Any, sums: Any) -> None:
    """Writes the files that are asked for."""
    if options.json is not None:
        rows = [
            {"context": context, "bucket": bucket, "nats": nats, "tokens": count}
            for context, found in sums.items()
            for bucket, (nats, count) in sorted(found.items())
        ]
        options.json.write_text(json.dumps(rows, indent=1))
    if options.per_token is not None:
        with options.per_token.open("wb") as file:
            np.savez(file, **{f"{context} {path}": x for (context, path), x in nats.items()})


if __name__ == "__main__":
    main_of(main)
