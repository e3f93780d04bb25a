"""ListOps: nested lists of digits with an operator, and the digit that each of them comes to.

An expression such as "[MAX 2 9 [MIN 4 7 ] 0 ]" comes to 9. The operators are minimum, maximum,
median (of an even number: the mean of the middle two, rounded down) and sum modulo 10. There are 15
tokens: the digits 0 to 9, the operators and the closing bracket.
"""

import dataclasses
import itertools
import statistics
from pathlib import Path

import numpy as np

from race_jax.data.documents import Document
from race_jax.data.examples import Examples
from race_jax.data.sources import read_file

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = 14
TOKENS = (*map(str, range(10)), *OPERATORS, "]")
VOCAB_SIZE = len(TOKENS)
# LRA's own files write the closing bracket as it is here, and its reader turns it into "X".
_IDS = {token: number for number, token in enumerate(TOKENS)} | {"X": CLOSE}
_BLOCK = 2048  # trees that are drawn at a time


def parse(expression: str) -> np.ndarray:
    """Returns the token ids of an expression, uint8. Round brackets mean nothing and are dropped.

    Raises:
        ValueError: a word is no token. The message shows it.

    Example:
        >>> parse("( [SM 7 ) 5 ) ]").tolist()
        [13, 7, 5, 14]
    """
    words = [word for word in expression.split() if word not in ("(", ")")]
    unknown = next((word for word in words if word not in _IDS), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is none of the tokens {' '.join(TOKENS)}")
    return np.array([_IDS[word] for word in words], np.uint8)


def evaluate(ids: np.ndarray) -> int:
    """Returns the digit that an expression comes to.

    Args:
        ids: the token ids of one expression.

    Raises:
        ValueError: the ids are not one complete expression.

    Example:
        >>> evaluate(parse("[MAX 2 [MED 4 7 1 2 ] [SM 9 9 ] ]"))
        8
    """
    lists: list[list[int]] = [[]]
    operators: list[int] = []
    for number in map(int, ids):
        if number < 10:
            lists[-1].append(number)
        elif number < CLOSE:
            operators.append(number - 10)
            lists.append([])
        else:
            arguments = lists.pop()
            if not operators or not arguments:
                raise ValueError("a list is closed that was not opened, or is empty")
            lists[-1].append(_apply(operators.pop(), arguments))
    if operators or len(lists[0]) != 1:
        raise ValueError(f"{len(operators)} lists stay open, around {len(lists[0])} values")
    return lists[0][0]


def _apply(operator: int, arguments: list[int]) -> int:
    match OPERATORS[operator]:
        case "[MIN":
            return min(arguments)
        case "[MAX":
            return max(arguments)
        case "[MED":
            return int(statistics.median(arguments))
    return sum(arguments) % 10


@dataclasses.dataclass(frozen=True)
class Trees:
    """How random expressions are drawn. The defaults are those of LRA's ListOps.

    Attributes:
        max_depth: the depth at which all nodes are digits; the root has depth 1.
        operator_share: the probability that a node above that depth is an operator.
        max_arguments: an operator takes from 2 to this number of arguments, each equally likely.
        longer_than, shorter_than: bounds of the number of tokens. Other expressions are thrown
            away.
    """

    max_depth: int = 10
    operator_share: float = 0.25
    max_arguments: int = 10
    longer_than: int = 500
    shorter_than: int = 2000


def draw_examples(count: int, *, seed: int, split: int, trees: Trees) -> Examples:
    """Draws expressions and their values.

    Args:
        count: the number of examples.
        seed: the seed of the data.
        split: a number for each split. Splits share no random numbers.
        trees: how expressions are drawn. A root that is a digit is too short to be kept, so roots
            are operators.

    Returns:
        The examples, with inputs of uint8. They depend on the arguments only.

    Raises:
        ValueError: hardly any expression has an allowed length.

    Example:
        >>> trees = Trees(max_depth=3, longer_than=3, shorter_than=30)
        >>> examples = draw_examples(5, seed=0, split=0, trees=trees)
        >>> [evaluate(ids) for ids in examples.inputs] == examples.labels.tolist()
        True
    """
    inputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for block in itertools.count():
        ids, values = draw_block(np.random.default_rng((seed, split, block)), trees)
        inputs += ids
        labels.append(values)
        if len(inputs) >= count:
            break
        if block >= 9 and len(inputs) < block:
            raise ValueError(
                f"of {(block + 1) * _BLOCK:,} random expressions, {len(inputs)} have more than "
                f"{trees.longer_than} and fewer than {trees.shorter_than} tokens; allow more "
                "lengths, or another depth"
            )
    return Examples(inputs[:count], np.concatenate(labels)[:count].astype(np.int32))


class _Level:
    """All nodes of one depth, those of one parent beside each other.

    Attributes:
        is_operator: shape (nodes,) bool.
        counts: shape (operators,), the number of arguments of each operator.
        length: shape (nodes,), the number of tokens of the expression at each node.
    """

    def __init__(self, is_operator: np.ndarray, counts: np.ndarray):
        self.is_operator, self.counts = is_operator, counts
        self.length = np.ones(len(is_operator), np.int64)

    @property
    def first(self) -> np.ndarray:
        """The first argument of each operator, as an index into the level below."""
        return np.cumsum(self.counts) - self.counts

    def keep(self, nodes: np.ndarray) -> np.ndarray:
        """Keeps some nodes, and returns which nodes of the level below belong to them."""
        operators = nodes[self.is_operator]
        below = np.repeat(operators, self.counts)
        self.is_operator, self.length = self.is_operator[nodes], self.length[nodes]
        self.counts = self.counts[operators]
        return below


def draw_block(rng: np.random.Generator, trees: Trees) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws many trees at once, depth by depth, and returns those of an allowed length.

    Returns:
        The token ids of each tree, uint8, and the values (trees,) int64.
    """
    levels, is_operator = [], np.ones(_BLOCK, bool)
    while len(is_operator):
        counts = rng.integers(2, trees.max_arguments + 1, np.sum(is_operator))
        levels.append(_Level(is_operator, counts))
        is_operator = rng.random(counts.sum()) < trees.operator_share
        is_operator &= len(levels) + 1 < trees.max_depth
    for level, below in zip(levels[-2::-1], levels[:0:-1], strict=True):
        level.length[level.is_operator] += 1 + np.add.reduceat(below.length, level.first)
    length = levels[0].length
    kept = (length > trees.longer_than) & (length < trees.shorter_than)
    for level in levels:
        kept = level.keep(kept)
    levels = [level for level in levels if len(level.length)]
    return _written(rng, levels) if levels else ([], np.zeros(0, np.int64))


def _written(rng: np.random.Generator, levels: list[_Level]) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws digits and operators, and returns the tokens and the value of each tree."""
    tokens = [rng.integers(0, 10, len(level.length)) for level in levels]
    for level, drawn in zip(levels, tokens, strict=True):
        drawn[level.is_operator] = rng.integers(10, CLOSE, len(level.counts))
    values = tokens[-1]
    for level, drawn in zip(levels[-2::-1], tokens[-2::-1], strict=True):
        arguments, values = values, drawn.copy()
        operators = drawn[level.is_operator] - 10
        values[level.is_operator] = _apply_all(operators, arguments, level.first, level.counts)
    lengths = levels[0].length
    ids = np.zeros(lengths.sum(), np.uint8)
    start = np.cumsum(lengths) - lengths
    for level, drawn, below in zip(levels, tokens, [*levels[1:], None], strict=True):
        ids[start + level.length - 1] = CLOSE  # of a digit, it is overwritten
        ids[start] = drawn
        if below is not None:
            before = np.cumsum(below.length) - below.length  # of all arguments of this depth
            start = before + np.repeat(
                start[level.is_operator] + 1 - before[level.first], level.counts
            )
    return np.split(ids, np.cumsum(lengths)[:-1]), values


def _apply_all(
    operators: np.ndarray, arguments: np.ndarray, first: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Returns the value of each operator, of the arguments that begin at its `first`."""
    owner = np.repeat(np.arange(len(counts)), counts)
    in_order = arguments[np.lexsort((arguments, owner))]
    middle = in_order[first + (counts - 1) // 2] + in_order[first + counts // 2]
    values = (
        in_order[first],
        in_order[first + counts - 1],
        middle // 2,
        np.add.reduceat(arguments, first) % 10,
    )
    return np.choose(operators, values)


def read_examples(path: Path, most_tokens: int | None = None) -> Examples:
    """Reads labeled expressions, one a line, from a file that may be packed.

    A line has the label, a tab and the expression, as in the files of Nangia and Bowman (2018), or,
    after a header "Source Target", the expression, a tab and the label, as in LRA's.

    Args:
        path: the file.
        most_tokens: the most tokens that an expression may have. None allows any number.

    Raises:
        ValueError: the file cannot be read or has no expression, or a line is not such a line, or a
            label is not what its expression comes to, or an expression is too long. The message
            names the file and the line.
    """
    text = Document(str(path), read_file(path)).text()
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    has_header = lines[0].split("\t") == ["Source", "Target"]
    inputs, labels = [], []
    for number, line in enumerate(lines[has_header:], start=1 + has_header):
        try:
            label, expression = line.split("\t")[:: -1 if has_header else 1]
            ids = parse(expression)
            value = evaluate(ids)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no labeled expression: {error}") from None
        if label.strip() != str(value):
            raise ValueError(
                f"{path}, line {number}: the expression comes to {value}, but its label is "
                f"{label!r}"
            )
        inputs.append(ids)
        labels.append(value)
    if not inputs:
        raise ValueError(f"{path}, line 1: the file has a header only; add labeled expressions")
    examples = Examples(inputs, np.array(labels, np.int32))
    longest = int(examples.lengths.argmax())
    if most_tokens is not None and (size := examples.lengths[longest]) > most_tokens:
        raise ValueError(
            f"{path}, line {longest + 1 + has_header}: the longest expression has {size} tokens, "
            f"and config.data.sequence_length={most_tokens} allows fewer; raise it to {size}, or "
            "leave long expressions out"
        )
    return examples
