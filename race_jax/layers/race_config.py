"""RACEConfig, the checked record of the sizes and options of a RACE layer.

It takes the arguments that both Flax modules share, and resolves every default. It also makes the
initial values of the parameters that Flax's own attention does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from race_jax.core import dispatch, state
from race_jax.layers import gates
from race_jax.layers.hash_options import HashOptions, check_size
from race_jax.layers.parts import Parts

# These options give exactly the paper's Algorithms 1 and 2, with one trained sharpness.
PAPER = {
    "planes_scale": 1.0,
    "learn_planes": False,
    "sharpness": 1.0,
    "learn_sharpness": True,
    "shared_sharpness": True,
    "use_tanh": True,
    "normalize_qk": False,
    "forget_gate": None,
    "short_conv": None,
    "qkv_activation": None,
    "output_norm": None,
    "output_gate": None,
    "normalization": "global",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RACEConfig(HashOptions, Parts):
    """Options of RACE attention, and the sizes of a layer.

    The NNX layer, the Linen layer and the models use this one record. The fields have the names of
    the layers' arguments. Sizes that are None are filled in as Flax fills them in. The parts that
    every attention can take are those of `race_jax.layers.parts.Parts`, and the options of the hash
    are those of `race_jax.layers.hash_options.HashOptions`.

    Attributes:
        num_heads: the number of query heads N.
        in_features: the width D of the queries' inputs.
        qkv_features: N * H. It is ``in_features`` if neither it nor ``head_dim`` is given.
        out_features: the width of the output, which is ``in_features`` if None.
        num_kv_heads: the number of key/value heads K, which must divide N. It is N if None.
        in_kv_features: the width of the keys' and values' inputs, ``in_features`` if None.
        head_dim: the width H of a query or key, which is ``qkv_features / num_heads`` if None.
        value_dim: the width V of a value, which is ``head_dim`` if None.
        dtype: the dtype of the computation. If None, it is promoted from inputs and parameters.
        param_dtype: the dtype of parameters and planes.
        dropout_rate: the share of the output's entries that are dropped, in [0, 1).
        decode: exists for Flax's signature only.
        precision: the precision of the projections.
        use_bias: whether the projections have biases.
        normalize_qk: whether queries and keys go through a LayerNorm. It excludes ``fold_planes``.
        fold_planes: whether the hash is computed straight from the hidden state, without queries
            and keys. It has no effect if a convolution or an activation stands between the two.
        normalization: "global" or "bucket".
        implementation: None (the best that works), "xla" or "pallas".

    Raises:
        ValueError: if a value is not allowed, or two values exclude each other.
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ()
    LAYER_ONLY: ClassVar[tuple[str, ...]] = (
        *("qkv_features", "out_features", "in_kv_features", "value_dim"),
        *("param_dtype", "dropout_rate", "decode", "precision"),
    )
    MODEL_DEFAULTS: ClassVar[dict[str, Any]] = {
        "num_tables": 16,
        "num_planes": 2,
        "use_tanh": False,
        "sharpness": 1.0,
        "fold_planes": True,
        "forget_gate": "data",
        "short_conv": "qkv",
        "output_norm": "rms",
        "output_gate": "sigmoid",
    }

    num_heads: int
    in_features: int
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    in_kv_features: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    decode: bool | None = None
    precision: Any = None
    use_bias: bool = True
    normalize_qk: bool = False
    fold_planes: bool = False
    normalization: str = "global"
    implementation: str | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Returns the names of all fields."""
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def of(cls, module: Any, **sizes: int) -> RACEConfig:
        """Makes the record of a module's attributes, except for `sizes`, which are given."""
        return cls(
            **{name: getattr(module, name) for name in cls.names() if name not in sizes}, **sizes
        )

    def __post_init__(self) -> None:
        self._fill("num_kv_heads", self.num_heads)
        self._fill("in_kv_features", self.in_features)
        self._fill("out_features", self.in_features)
        self._check_sizes()
        self._fill_head_dim()
        self._fill("value_dim", self.head_dim)
        self.complete_hash()
        self._check_choices()

    def _fill_head_dim(self) -> None:
        if self.head_dim is not None:
            self._fill("qkv_features", self.num_heads * self.head_dim)
            if self.qkv_features != self.num_heads * self.head_dim:
                raise ValueError(
                    f"qkv_features={self.qkv_features} is not num_heads={self.num_heads} times "
                    f"head_dim={self.head_dim}; leave one of the two out"
                )
            return
        given = "qkv_features" if self.qkv_features is not None else "in_features"
        self._fill("qkv_features", self.in_features)
        if self.qkv_features % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide {given}={self.qkv_features}, the "
                "width that the heads share; choose another number of heads or another "
                "qkv_features, or give head_dim, the width of one head"
            )
        self._fill("head_dim", self.qkv_features // self.num_heads)

    def _fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        for name in (
            *("num_heads", "num_kv_heads", "in_features", "in_kv_features", "out_features"),
            *("qkv_features", "head_dim", "value_dim"),
        ):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be divisible by num_kv_heads={self.num_kv_heads}"
            )

    def _check_choices(self) -> None:
        self.check_parts()
        _check_among("implementation", self.implementation, dispatch.IMPLEMENTATIONS)
        state.check_normalization(self.normalization)
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate must lie in [0, 1), got {self.dropout_rate}")
        if self.decode:
            raise NotImplementedError(
                "decode=True asks for Flax's growing cache, but RACE has a state of fixed size; "
                "pass state=module.init_state(batch) in the call, and keep the state it returns"
            )
        if self.fold_planes and self.normalize_qk:
            raise ValueError(
                "fold_planes=True never makes the queries and keys that normalize_qk=True would "
                "normalize; turn one of the two off"
            )

    def check_direction(self, is_causal: bool) -> None:
        """Raises ValueError if the gate does not go with the direction."""
        gates.check_direction(self.forget_gate, is_causal)

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as JSON values, with dtypes as their names."""
        values = dataclasses.asdict(self)
        for name in ("dtype", "param_dtype"):
            if values[name] is not None:
                values[name] = jnp.dtype(values[name]).name
        return values

    def describe(
        self, batch: int, length: int, is_packed: bool, is_causal: bool = True
    ) -> tuple[str, str]:
        """Returns which implementation a training step would run, and why."""
        dtype = jnp.dtype(self.dtype or self.param_dtype)

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        heads = batch, length, self.num_kv_heads
        choice = dispatch.explain(
            array(batch, length, self.num_heads, self.head_dim),
            array(*heads, self.head_dim),
            array(*heads, self.value_dim),
            array(self.num_tables, self.num_planes, self.head_dim),
            is_causal=is_causal,
            log_decay=None if self.forget_gate is None else array(*heads),
            segment_ids=array(batch, length) if is_packed else None,
            normalization=self.normalization,
            implementation=self.implementation,
        )
        return f"race, implementation {choice.implementation}", choice.reason

    @property
    def folds(self) -> bool:
        """Whether the planes are folded into the projections."""
        return self.fold_planes and not self.changes_heads

    def own_parameters(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Returns the initializers of the parameters that Flax's own attention does not have.

        They are ``log_sharpness`` ``(K,)`` or ``()``, if it is learned, and those of the parts.
        """
        return self.hash_parameters() | self.part_parameters()


def _check_among(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
