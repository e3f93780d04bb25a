"""The record that describes a transformer.

In: the choices of a run (sizes, attention, positions, hashing, gate, dtype). Out: checked values.
No equation: the fields are those of the modules that they configure.
"""

import dataclasses
import math

ATTENTIONS = ("race", "softmax")
POSITIONS = ("none", "learned", "rope", "alibi")
FORGET_GATES = (None, "fixed", "learned", "data")
NORMALIZATIONS = ("global", "bucket")
DTYPES = ("float32", "bfloat16")
IMPLEMENTATIONS = {"race": (None, "xla", "pallas"), "softmax": (None, "xla", "cudnn")}


@dataclasses.dataclass
class ModelConfig:
    """Sizes and choices of a transformer; the defaults make a small RACE language model.

    Mutable, so that command-line flags can override it; `validate` checks the whole record.

    Attributes:
        num_layers: number of blocks, at least 1.
        width: width D of the hidden state.
        num_heads: query heads N.
        num_kv_heads: key/value heads K, a divisor of ``num_heads``; None means ``num_heads``.
        head_dim: width H of a head; None means ``width // num_heads``.
        mlp_ratio: hidden width of the MLP over ``width``.
        dropout_rate: dropout on the embedding and on what each branch adds, in [0, 1).
        attention: "race" or "softmax".
        positions: "none", "learned" (added to the embedding), or, with softmax only, "rope" or
            "alibi".
        max_length: length of the table of learned positions; other positions ignore it.
        num_tables: hash tables L (race).
        num_planes: planes per table P (race), 1 to 10.
        planes_scale: standard deviation of the planes; None means ``1 / sqrt(head_dim)`` (race).
        learn_planes: train the planes instead of keeping them as drawn (race).
        sharpness: first value of the sharpness beta, positive (race).
        learn_sharpness: train beta, one per key/value head, through its logarithm (race).
        forget_gate: None, "fixed", "learned" or "data"; the string "none" counts as None (race).
        half_life: longest half-life in tokens at the start, at least 2; needed for "fixed", else
            None starts the gates' logits at 1 to 6 (race with a gate).
        short_conv: depthwise causal convolution over 4 tokens before the projections (race).
        output_gate: normalise each head's output and multiply it by a gate (race).
        fold_planes: hash straight from the hidden state, queries and keys never made (race).
        normalization: "global" or "bucket" (race).
        dtype: dtype of the computation, "float32" or "bfloat16"; parameters, the sums of RACE
            and the logits are float32 either way.
        remat: recompute each block in the backward pass instead of keeping its activations.
        implementation: None chooses; race also takes "xla" or "pallas", softmax "xla" or "cudnn".

    Example:
        >>> from race_jax.models import ModelConfig
        >>> ModelConfig(num_layers=2, attention="softmax", positions="rope").validate().head_size
        64
    """

    num_layers: int = 4
    width: int = 256
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_ratio: int = 4
    dropout_rate: float = 0.0
    attention: str = "race"
    positions: str = "none"
    max_length: int = 1024
    num_tables: int = 8
    num_planes: int = 3
    planes_scale: float | None = None
    learn_planes: bool = False
    sharpness: float = 2.0
    learn_sharpness: bool = True
    forget_gate: str | None = "data"
    half_life: float | None = None
    short_conv: bool = False
    output_gate: bool = False
    fold_planes: bool = True
    normalization: str = "global"
    dtype: str = "float32"
    remat: bool = False
    implementation: str | None = None

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Width H of one head."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def gate(self) -> str | None:
        """The forgetting gate, with "none" (what a command line can say) read as None."""
        return None if self.forget_gate == "none" else self.forget_gate

    def validate(self) -> "ModelConfig":
        """Check every field and the fields against each other.

        Returns:
            This record, unchanged.

        Raises:
            ValueError: a field is out of range or does not go with another; the message names
                the field, its value and what is allowed.
        """
        self._validate_sizes()
        self._validate_choices()
        if self.attention == "race":
            self._validate_race()
        return self

    def _validate_sizes(self) -> None:
        for name in ("num_layers", "width", "num_heads", "mlp_ratio", "max_length"):
            _require_positive_integer(name, getattr(self, name))
        for name in ("num_kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                _require_positive_integer(name, getattr(self, name))
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}."
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must divide width={self.width}; "
                "or give head_dim for heads of another width."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate={self.dropout_rate} must lie in [0, 1).")

    def _validate_choices(self) -> None:
        _require_choice("attention", self.attention, ATTENTIONS)
        _require_choice("positions", self.positions, POSITIONS)
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("implementation", self.implementation, IMPLEMENTATIONS[self.attention])
        if self.attention == "race" and self.positions in ("rope", "alibi"):
            raise ValueError(
                f"positions={self.positions!r} needs attention='softmax': RACE keeps sums over "
                "past tokens, which cannot be rotated or biased by distance; take 'none' or "
                "'learned', and forget_gate for recency."
            )
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(
                f"positions='rope' rotates pairs and needs an even head_dim; got {self.head_size}."
            )

    def _validate_race(self) -> None:
        _require_choice("forget_gate", self.gate, FORGET_GATES)
        _require_choice("normalization", self.normalization, NORMALIZATIONS)
        _require_positive_integer("num_tables", self.num_tables)
        _require_positive_integer("num_planes", self.num_planes)
        if self.num_planes > 10:
            raise ValueError(
                f"num_planes={self.num_planes} must be at most 10: a table has 2**num_planes "
                "buckets; raise num_tables instead."
            )
        _require_positive("sharpness", self.sharpness)
        if self.planes_scale is not None:
            _require_positive("planes_scale", self.planes_scale)
        self._validate_half_life()

    def _validate_half_life(self) -> None:
        if self.half_life is None:
            if self.gate == "fixed":
                raise ValueError(
                    "half_life=None: forget_gate='fixed' needs the longest half-life in tokens, "
                    "such as 1024."
                )
        elif self.gate is None:
            raise ValueError(f"half_life={self.half_life} has no effect with forget_gate=None.")
        elif not 2 <= self.half_life < math.inf:
            raise ValueError(f"half_life={self.half_life} must be finite and at least 2 tokens.")


def _require_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(choices)}.")


def _require_positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value} must be positive and finite.")
