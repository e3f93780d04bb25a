"""The options of sparse decoding: how many tokens a query reads, and how they are chosen.

A query attends to its first `sink` tokens, to its last `window` ones, and to those of the others
that score best, `budget` in all.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from typing import Any, NamedTuple

from race_jax.core.hashing import MAX_PLANES

SELECTIONS = ("head", "group")


class Defaults(NamedTuple):
    """The default of each option that a scorer has. A scorer ignores all others."""

    num_rotations: int | None = None
    code_bits: int | None = None
    num_tables: int | None = None
    num_planes: int | None = None
    temperature: float | None = None
    value_weighting: bool | None = None
    page_size: int | None = None


SCORERS = {
    "socket": Defaults(num_tables=60, num_planes=10, temperature=0.4, value_weighting=False),
    "socket_unit": Defaults(num_tables=60, num_planes=10, temperature=1.0),
    "sign_linear": Defaults(num_rotations=2, code_bits=1),
    "quantized": Defaults(num_rotations=1, code_bits=4),
    "hamming": Defaults(num_rotations=2),
    "quest": Defaults(page_size=16),
    "oracle": Defaults(),
    "random": Defaults(),
}
CODE_BITS = {"sign_linear": (1,), "quantized": (2, 4)}


class Coding(NamedTuple):
    """What a cache stores for a scorer, which cannot be changed afterwards."""

    scorer: str
    num_rotations: int | None
    code_bits: int | None
    num_tables: int | None
    num_planes: int | None
    value_weighting: bool | None
    page_size: int | None

    def describe(self) -> str:
        """Names the scorer and the sizes that it has."""
        sizes = self._asdict()
        scorer = sizes.pop("scorer")
        given = (f"{name}={value}" for name, value in sizes.items() if value is not None)
        return ", ".join([f"scorer={scorer!r}", *given])


def socket_sharpness(temperature: float, head_dim: int) -> float:
    """Converts a temperature of SOCKET to the sharpness of `soft_hash`, 1 / (temperature sqrt(H)).

    Example:
      >>> from race_jax.sparse import socket_sharpness
      >>> round(socket_sharpness(0.4, 128), 3)
      0.221

    Source: arXiv 2602.06283 divides tanh by sqrt(H) and the logits by the temperature.
    """
    if not _is_positive(temperature):
        raise ValueError(f"{temperature=} must be a finite number above 0.")
    if head_dim < 1:
        raise ValueError(f"{head_dim=} must be at least 1.")
    return 1.0 / (temperature * math.sqrt(head_dim))


def _is_positive(value: Any) -> bool:
    return isinstance(value, numbers.Real) and 0 < value < math.inf


def budget_for(context: int, ratio: float) -> int:
    """Returns the budget that reads one token in ``ratio`` of a context.

    Example:
      >>> from race_jax.sparse import budget_for
      >>> budget_for(131072, 33)
      3971
    """
    if context < 1 or not ratio >= 1:
        raise ValueError(f"{context=} and {ratio=} must be at least 1.")
    return max(1, int(context / ratio))


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """Options of sparse decoding. The record is hashable, and static under ``jax.jit``.

    None stands for the scorer's own default. What a scorer does not use must stay None.

    Attributes:
      budget: the number of tokens that a query reads, with the sink, the window and its own token.
      scorer: a name of `race_jax.sparse.SCORERS`. With one token in 20 read, the default
        lost least of all that store codes, on one trained model (docs/decoding.md).
      sink: the number of first tokens that are always read.
      window: the number of last tokens that are always read, with the query's own, at least 1.
      selection: "head", or "group": all query heads of a key/value head read the same tokens, those
        with the largest of their scores.
      num_rotations: for "sign_linear", "quantized" and "hamming", the number of random rotations.
      code_bits: for "quantized", 2 or 4 bits a coordinate; 1 for "sign_linear".
      num_tables: for "socket" and "socket_unit", the number of hash tables L.
      num_planes: for these, the number of planes of a table P, at most 10.
      sharpness: for these, the sharpness of the soft hash (`socket_sharpness`).
      value_weighting: for "socket", whether scores are multiplied by the norm of the value.
      page_size: for "quest", the number of tokens of a page, at most ``window``.
      dense_below: attention is dense while every sequence is shorter than this.

    Raises:
      ValueError: if an option is out of range, unknown, or has no effect.

    Example:
      >>> import race_jax
      >>> race_jax.SparseConfig(budget=512, scorer="quantized").coding().code_bits
      4

    Source: arXiv 2602.06283. The scorers besides "socket" and "quest" go beyond it.
    """

    budget: int = 1024
    scorer: str = "quantized"
    sink: int = 16
    window: int = 128
    selection: str = "head"
    num_rotations: int | None = None
    code_bits: int | None = None
    num_tables: int | None = None
    num_planes: int | None = None
    sharpness: float | None = None
    value_weighting: bool | None = None
    page_size: int | None = None
    dense_below: int = 4096

    @classmethod
    def paper(cls, *, budget: int, head_dim: int = 128, temperature: float = 0.4) -> SparseConfig:
        """Returns the setting of the SOCKET paper: 600 bits a token, and values weighted.

        Example:
          >>> import race_jax
          >>> race_jax.SparseConfig.paper(budget=1024).scorer
          'socket'
        """
        return cls(
            budget=budget,
            scorer="socket",
            sink=128,
            window=128,
            num_tables=60,
            num_planes=10,
            sharpness=socket_sharpness(temperature, head_dim),
            value_weighting=True,
            dense_below=0,
        )

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, str) or self.scorer not in SCORERS:
            raise ValueError(f"scorer={self.scorer!r} is unknown; choose one of {list(SCORERS)}.")
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"selection={self.selection!r} is unknown; choose one of {list(SELECTIONS)}."
            )
        self._check_sizes()
        self._check_scorer()

    def coding(self) -> Coding:
        """Returns what a cache stores for this configuration, with the defaults filled in."""
        defaults = SCORERS[self.scorer]
        values = {name: self._filled(name, defaults) for name in Coding._fields[1:]}
        return Coding(self.scorer, **values)

    def sharpness_for(self, head_dim: int) -> float:
        """Returns the sharpness of the soft hash for heads of this width."""
        if self.sharpness is not None:
            return self.sharpness
        return socket_sharpness(SCORERS[self.scorer].temperature, head_dim)

    def _filled(self, name: str, defaults: Defaults) -> Any:
        value = getattr(self, name)
        return getattr(defaults, name) if value is None else value

    def _check_sizes(self) -> None:
        for name, least in (("budget", 1), ("window", 1), ("sink", 0), ("dense_below", 0)):
            self._make_integer(name, least)
        if self.sink + self.window > self.budget:
            raise ValueError(
                f"budget={self.budget} must hold sink={self.sink} and window={self.window}; give "
                f"at least {self.sink + self.window}, or smaller ones."
            )

    def _make_integer(self, name: str, least: int) -> None:
        """Replaces an integer of any kind by one of Python."""
        value = getattr(self, name)
        try:
            number = least - 1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            number = least - 1
        if number < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
        object.__setattr__(self, name, number)

    def _check_scorer(self) -> None:
        defaults = SCORERS[self.scorer]
        uses = {name for name, value in defaults._asdict().items() if value is not None}
        uses |= {"sharpness"} if "temperature" in uses else set()
        for name in (*Coding._fields[1:], "sharpness"):
            value = getattr(self, name)
            if value is not None and name not in uses:
                raise ValueError(
                    f"{name}={value} has no effect with scorer={self.scorer!r}; leave it out."
                )
        for name in ("num_rotations", "code_bits", "num_tables", "num_planes", "page_size"):
            if getattr(self, name) is not None:
                self._make_integer(name, 1)
        if not isinstance(self.value_weighting, bool | None):
            raise ValueError(f"value_weighting={self.value_weighting!r} must be True or False.")
        coding = self.coding()
        allowed = CODE_BITS.get(self.scorer)
        if allowed and coding.code_bits not in allowed:
            raise ValueError(
                f"code_bits={coding.code_bits} is not supported by scorer={self.scorer!r}; "
                f"it takes {' or '.join(map(str, allowed))}."
            )
        if coding.num_planes is not None and coding.num_planes > MAX_PLANES:
            raise ValueError(f"num_planes={coding.num_planes} must be at most {MAX_PLANES}.")
        if self.sharpness is not None and not _is_positive(self.sharpness):
            raise ValueError(f"sharpness={self.sharpness!r} must be a finite number above 0.")
        if coding.page_size is not None and coding.page_size > self.window:
            raise ValueError(
                f"page_size={coding.page_size} must be at most window={self.window}, so that "
                "every page that is scored is full."
            )
