"""The record that describes a transformer.

It holds the sizes, the attention with its options, the positions and the dtype, and checks them.
"""

import dataclasses
from typing import Any

from race_jax.core.rotary import ROPE_BASE
from race_jax.layers import registry
from race_jax.models.layers import POSITIONS

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass
@registry.add_options
class ModelConfig:
    """Sizes and options of a transformer. The defaults describe a small RACE language model.

    The record is mutable, so that command-line flags can override it, and `validate` checks it as a
    whole. Every attention of `race_jax.layers.registry` has a field for its own options, under its
    name, for instance ``race`` or ``softmax``. The field also accepts a dict of some of the
    options. Only the options of the chosen attention have an effect.

    Attributes:
        num_layers: the number of blocks, at least 1.
        width: the width D of the hidden state.
        num_heads: the number of query heads N.
        num_kv_heads: the number of key/value heads K, which must divide ``num_heads``. None means
            ``num_heads``.
        head_dim: the width H of a head. None means ``width // num_heads``.
        mlp_ratio: the hidden width of the MLP, divided by ``width``.
        dropout_rate: the dropout rate of the embedding and of the output of each branch, in [0, 1).
        attention: the name of an attention in `race_jax.layers.registry`.
        hybrid: the name of a second attention, which stands in the last of every
            ``hybrid_every`` blocks, or None for one attention in all blocks.
        hybrid_every: how many blocks there are for each block of the second attention, at least 2.
            A model of fewer blocks has the second attention in its last block.
        positions: "none", "learned" (added to the embedding), or a scheme of an attention of the
            model, such as "rope" or "alibi" of softmax. Only attentions that know a scheme use it.
        rope_base: the base of the positions "rope". Long texts want a larger one.
        max_length: the length of the table of learned positions, and the largest length for
            linformer. Other positions and attentions ignore it.
        dtype: the dtype of the computation, "float32" or "bfloat16". Parameters, the sums of
            linear-time attention and the logits are always float32.
        remat: whether each block is recomputed in the backward pass, instead of keeping its
            activations.
        implementation: the implementation of the attention, such as "xla", or None to choose the
            best one.

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
    hybrid: str | None = None
    hybrid_every: int = 4
    positions: str = "none"
    rope_base: float = ROPE_BASE
    max_length: int = 1024
    dtype: str = "float32"
    remat: bool = False
    implementation: str | None = None

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """The width H of one head."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    def __post_init__(self) -> None:
        for name in registry.ATTENTIONS:
            if not hasattr(self, name):
                raise ValueError(
                    f"the attention {name!r} has been added to race_jax.layers.registry.ATTENTIONS "
                    "too late: ModelConfig has a field for every attention that was there when "
                    "race_jax.models was imported; add it before that import."
                )
            options = getattr(self, name)
            if isinstance(options, dict):
                setattr(self, name, registry.options_class(name)(**options))

    @property
    def attentions(self) -> tuple[str, ...]:
        """The names of the attentions that the blocks have, each once."""
        return tuple(dict.fromkeys(self.attention_of(block) for block in range(self.num_layers)))

    def attention_of(self, block: int) -> str:
        """Returns the name of the attention of a block.

        Example:
            >>> from race_jax.models import ModelConfig
            >>> config = ModelConfig(hybrid="sliding_window", hybrid_every=2)
            >>> [config.attention_of(block) for block in range(4)]
            ['race', 'sliding_window', 'race', 'sliding_window']
        """
        every = min(self.hybrid_every, self.num_layers)
        is_second = self.hybrid is not None and (block + 1) % every == 0
        return self.hybrid if is_second else self.attention

    def attention_config(self, name: str | None = None) -> Any:
        """Returns the checked record of an attention, with this model's sizes.

        Args:
            name: the name of the attention, or None for ``attention``.

        Raises:
            ValueError: if an option of the attention is not allowed. The message names it.
        """
        shared = {
            "num_heads": self.num_heads,
            "in_features": self.width,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_size,
            "dtype": self.dtype,
            "positions": self.positions,
            "rope_base": self.rope_base,
            "max_length": self.max_length,
            "implementation": self.implementation,
        }
        name = self.attention if name is None else name
        if self.positions not in registry.find(name).config_class.POSITIONS:
            shared["positions"] = "none"  # those of another attention of the model, or "learned"
        return registry.make_config(name, getattr(self, name), shared)

    def validate(self) -> "ModelConfig":
        """Checks every field, and the fields against each other.

        Returns:
            This record, unchanged.

        Raises:
            ValueError: if a field is out of range or does not go with another. The message names
                the field, its value and what is allowed.
        """
        self._validate_sizes()
        self._validate_choices()
        for name in self.attentions:
            self.attention_config(name)
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
                "or set head_dim, the width of a head."
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate={self.dropout_rate} must lie in [0, 1).")

    def _validate_choices(self) -> None:
        _require_choice("attention", self.attention, tuple(registry.ATTENTIONS))
        _require_choice("dtype", self.dtype, DTYPES)
        if self.hybrid is not None:
            _require_choice("hybrid", self.hybrid, tuple(registry.ATTENTIONS))
            _require_positive_integer("hybrid_every", self.hybrid_every)
            if self.hybrid == self.attention:
                raise ValueError(
                    f"hybrid={self.hybrid!r} is the attention of all other blocks as well; leave "
                    "it out, or choose another one."
                )
            if min(self.hybrid_every, self.num_layers) < 2:
                raise ValueError(
                    f"hybrid={self.hybrid!r} needs hybrid_every and num_layers of at least 2, so "
                    "that both attentions have a block; got "
                    f"hybrid_every={self.hybrid_every}, num_layers={self.num_layers}."
                )
        if self.rope_base != ROPE_BASE and self.positions != "rope":
            raise ValueError(
                f"rope_base={self.rope_base} has no effect with positions={self.positions!r}; "
                "leave it out, or choose positions='rope'."
            )
        takes = dict.fromkeys(POSITIONS)
        for name in self.attentions:
            takes |= dict.fromkeys(registry.find(name).config_class.POSITIONS)
        if self.positions not in takes:
            raise ValueError(
                f"positions={self.positions!r} does not go with attention="
                f"{' and '.join(map(repr, self.attentions))}, which takes "
                f"{', '.join(map(repr, takes))}."
            )


def _require_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {list(choices)}.")


def _require_positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
