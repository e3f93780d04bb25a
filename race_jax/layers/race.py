"""RACEAttention for Flax NNX. It holds parameters and planes, and calls `layers.functional`.

The layer maps hidden states (B, T, D) to hidden states (B, T, D). If a state is passed in, it also
returns a state. For every head, with planes W and projections A,

    out = race(W x A_q, W x A_k, x A_v) A_out
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import race_jax.layers.serialization  # noqa: F401  (flax.serialization of states)
from race_jax.core.shapes import Axis
from race_jax.layers.functional import LayerState, check_static, init_state, race_layer
from race_jax.layers.planes import make_planes
from race_jax.layers.race_config import PAPER, RACEConfig

_log = logging.getLogger("race_jax")
default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()


class RACEAttention(nnx.Module):
    """Multi-head RACE attention, a replacement for ``nnx.MultiHeadAttention``.

    For every head, with hash planes W, sharpness beta and projections A,

        out_t = sum_s w_ts (x_s A_v) / sum_s w_ts
        w_ts = visible(t, s) exp(G_t - G_s) phi(W x_t A_q) . phi(W x_s A_k)

    The cost is linear in the length. The heads are concatenated and go through ``out``. Sums are
    kept in float32 or wider.

    Parameters have Flax's names and shapes. The kernels are ``query`` ``(D, N, H)``, ``key``
    ``(D, K, H)``, ``value`` ``(D, K, V)`` and ``out`` ``(N, V, D)``, each with its bias. The
    options add ``log_sharpness``, ``gate_bias``, ``gate_kernel``, ``conv_kernel``,
    ``out_gate_kernel``, ``out_norm_scale`` and ``query_conv_kernel`` (and those of keys and values)
    where they need them. ``planes`` ``(L, P, H)`` is a `HashPlanes` variable,
    or a parameter if the planes are learned. ``config`` is the checked record of the options, whose
    fields can also be read from the layer itself.

    The projections are modules that the layer calls, so that each of them can be replaced or
    wrapped, for instance by a low-rank adapter, a quantized module, or another projection
    (``layer.key = layer.query``). A replacement takes ``(B, T, D)`` and returns heads
    ``(B, T, N, H)`` or ``(B, T, N * H)``. A replacement for ``out`` takes ``(B, T, N, V)``, and an
    ``nnx.Linear``, such as ``nnx.LoRALinear``, takes ``(B, T, N * V)``.

    Args:
      num_heads: N, the number of query heads.
      in_features: D, the width of the queries' inputs.
      qkv_features: N * H. It is `in_features` if neither it nor `head_dim` is given.
      out_features: the width of the output, which is `in_features` if None.
      num_kv_heads: K, the number of key/value heads, which must divide N. It is N if None.
      in_kv_features: the width of the keys' and values' inputs, which is `in_features` if None.
      head_dim: H, the width of a query or key, which is ``qkv_features / num_heads`` if None.
      value_dim: V, the width of a value, which is `head_dim` if None.
      dtype: the dtype of the computation. If None, it is promoted from inputs and parameters.
      param_dtype: the dtype of parameters and planes.
      dropout_rate: the share of the output's entries that are dropped, in [0, 1).
      deterministic: whether dropout is off. The argument of the call overrides it.
      is_causal: whether a token sees only itself and earlier tokens. The argument of the call
        overrides it. Set it here if the call is transformed, because ``nnx.remat`` and similar
        transforms turn the arguments of a call into arrays.
      decode: exists for Flax's signature only. RACE decodes with ``state=``.
      precision: the precision of the projections.
      kernel_init: the initializer of the projections' kernels.
      out_kernel_init: the initializer of the kernel of ``out``, which is `kernel_init` if None.
      bias_init: the initializer of the projections' biases.
      out_bias_init: the initializer of the bias of ``out``, which is `bias_init` if None.
      use_bias: whether the projections have biases.
      normalize_qk: whether queries and keys go through a LayerNorm, as in Flax.
      num_tables: L, the number of hash tables. More tables give less noise.
      num_planes: P, the number of planes of a table, 1..10. A table has 2**P buckets. More planes
        give a sharper kernel.
      planes_scale: the standard deviation of the planes' entries, which is ``head_dim**-0.5`` if
        None. The paper uses 1, with which queries and keys receive hardly any gradient.
      learn_planes: whether the planes are a parameter.
      sharpness: the initial beta, > 0.
      learn_sharpness: whether beta is trained, through its logarithm.
      shared_sharpness: whether the layer has one beta, instead of one per key/value head.
      use_tanh: whether hash projections go through tanh before they are sharpened.
      forget_gate: how old tokens decay. None is the paper, without a gate. ``"fixed"`` is a
        constant per head, and ``"learned"`` is a trained constant per head. ``"data"`` is
        ``sigmoid(x w + b)``, a value per token and head. A gate needs causal calls.
      half_life: the longest initial half-life in tokens. The half-lives of the heads form a
        geometric series from 2 to it. A fixed gate needs it. For other gates it may be None, and
        then the biases b are spaced evenly from 1 to 6.
      short_conv: where each token is mixed with the three tokens before it in its segment. None is
        nowhere, ``"before"`` is before the projections, and ``"qkv"`` is on queries, keys and
        values, each with a kernel of its own. The mixing is the identity at first. It needs
        self-attention.
      qkv_activation: None, or ``"silu"`` for queries, keys and values after their projections and
        convolutions.
      output_norm: None, or ``"rms"`` to divide each head's output by its root mean square.
      output_gate: None, or ``"silu"`` or ``"sigmoid"`` of ``x W_g``, by which each head's output is
        multiplied before ``out``, after the norm.
      fold_planes: whether to compute ``x (A W)`` instead of ``(x A) W``. The results are equal up
        to rounding, and take less work and memory. It excludes `normalize_qk`, and has no effect if
        a convolution or an activation stands between A and W. If a query or key projection is not
        the ``nnx.LinearGeneral`` made here, it is called without folding, and a message is logged
        once.
      normalization: ``"global"`` (the paper) or ``"bucket"`` (its released code).
      implementation: None (the best that works), ``"xla"`` or ``"pallas"``.
      axis_name: inside ``jax.shard_map``, the mesh axis over whose devices the sequence is split.
        Every device then calls the layer with its own stretch of tokens, in the order of the axis.
        On an Explicit mesh, leave it out: the sharding of the inputs says it.
      keep_rngs: whether the module keeps a fork of the dropout stream, as in Flax.
      rngs: random streams. ``params`` and, with dropout, ``dropout`` are needed, or a default
        stream. Planes are drawn from the stream ``planes`` if there is one, else from the default,
        else from ``params``. With a stream of their own, planes depend on no other seed. They
        differ from layer to layer.

    Raises:
      ValueError: if sizes do not divide, a value is not allowed, two options exclude each other, or
        a stream is missing.

    Example:
      >>> import jax, jax.numpy as jnp, race_jax
      >>> from flax import nnx
      >>> layer = race_jax.RACEAttention(
      ...     num_heads=4, in_features=32, num_kv_heads=2, forget_gate="data", rngs=nnx.Rngs(0)
      ... )
      >>> x = jax.random.normal(jax.random.key(1), (2, 10, 32))
      >>> whole = layer(x, is_causal=True)
      >>> first, state = layer(x[:, :5], is_causal=True, state=layer.init_state(batch=2))
      >>> second, state = layer(x[:, 5:], is_causal=True, state=state)
      >>> bool(jnp.allclose(whole, jnp.concatenate([first, second], axis=1), atol=1e-5))
      True

      With ``is_causal`` in the constructor, the call can be recomputed in the backward pass:

      >>> layer = race_jax.RACEAttention(4, 32, is_causal=True, rngs=nnx.Rngs(0))
      >>> nnx.remat(race_jax.RACEAttention.__call__)(layer, x).shape
      (2, 10, 32)

    Source: arXiv 2510.04008, Algorithms 1 and 2 (`RACEAttention.paper`). The forget gate, the
    convolution, the output gate, the scale of the planes, a sharpness per head and folding go
    beyond the paper.
    """

    config_class = RACEConfig

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        is_causal: bool = False,
        decode: bool | None = None,
        precision: Any = None,
        kernel_init: nnx.Initializer = default_kernel_init,
        out_kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer = default_bias_init,
        out_bias_init: nnx.Initializer | None = None,
        use_bias: bool = True,
        normalize_qk: bool = False,
        num_tables: int = 4,
        num_planes: int = 4,
        planes_scale: float | None = None,
        learn_planes: bool = False,
        sharpness: float = 2.0,
        learn_sharpness: bool = True,
        shared_sharpness: bool = False,
        use_tanh: bool = True,
        forget_gate: str | None = None,
        half_life: float | None = None,
        short_conv: str | None = None,
        qkv_activation: str | None = None,
        output_norm: str | None = None,
        output_gate: str | None = None,
        fold_planes: bool = False,
        normalization: str = "global",
        implementation: str | None = None,
        axis_name: Axis | None = None,
        keep_rngs: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        given = locals()  # the fields of RACEConfig are arguments of the same names
        self.config = config = RACEConfig(**{name: given[name] for name in RACEConfig.names()})
        self.deterministic = deterministic
        self.is_causal = is_causal
        self.axis_name = axis_name
        keep_rngs = keep_rngs and dropout_rate > 0
        _check_streams(rngs, "params", *["dropout"] * keep_rngs)

        linear = functools.partial(
            nnx.LinearGeneral,
            kernel_init=kernel_init,
            bias_init=bias_init,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        self.query = linear(in_features, (num_heads, config.head_dim))
        self.key = linear(config.in_kv_features, (config.num_kv_heads, config.head_dim))
        self.value = linear(config.in_kv_features, (config.num_kv_heads, config.value_dim))
        self.out = linear(
            (num_heads, config.value_dim),
            config.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
        )
        if normalize_qk:
            norm = functools.partial(
                nnx.LayerNorm,
                use_bias=False,
                use_fast_variance=False,  # the fast form loses digits if heads have a mean
                dtype=dtype,
                param_dtype=param_dtype,
            )
            self.query_ln = norm(config.head_dim, rngs=rngs)
            self.key_ln = norm(config.head_dim, rngs=rngs)
        for name, init in config.own_parameters().items():
            setattr(self, name, nnx.Param(init(rngs.params())))
        self.planes = make_planes(config, rngs)
        self.rngs = rngs.dropout.fork() if keep_rngs else None

    @classmethod
    def paper(
        cls, num_heads: int, in_features: int, *, rngs: nnx.Rngs, **options: Any
    ) -> RACEAttention:
        """Makes exactly the paper's layer: Algorithm 1, or Algorithm 2 if calls are causal.

        The layer has one trained sharpness, initially 1, planes of scale 1, no gate and no
        convolution.

        Args:
          num_heads: N.
          in_features: D.
          rngs: as for the class.
          **options: the options that the paper leaves open, which are sizes, tables and planes,
            initializers, dtypes, dropout, `fold_planes` and `implementation`.

        Returns:
          The layer.

        Raises:
          TypeError: if an option is given that the paper fixes.

        Example:
          >>> import race_jax
          >>> from flax import nnx
          >>> layer = race_jax.RACEAttention.paper(2, 16, num_tables=3, rngs=nnx.Rngs(0))
          >>> layer.planes.shape, layer.log_sharpness.shape
          ((3, 4, 8), ())
        """
        return cls(num_heads, in_features, rngs=rngs, **PAPER, **options)

    @classmethod
    def from_config(
        cls,
        config: RACEConfig,
        *,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **initializers: Any,
    ) -> RACEAttention:
        """Makes the layer that a record describes.

        Args:
          config: the sizes and options.
          is_causal: as for the class.
          rngs: as for the class.
          **initializers: `kernel_init`, `out_kernel_init`, `bias_init`, `out_bias_init`.

        Returns:
          The layer.

        Raises:
          ValueError: if the record has a forget gate and the layer is not causal.
        """
        config.check_direction(is_causal)
        options = {name: getattr(config, name) for name in RACEConfig.names()}
        return cls(is_causal=is_causal, rngs=rngs, **options, **initializers)

    def init_state(self, batch: int) -> LayerState:
        """Returns the state before any token, to be passed as ``state=``.

        Args:
          batch: B.

        Returns:
          A pytree whose size does not depend on the length of the sequence.

        Example:
          >>> import race_jax
          >>> from flax import nnx
          >>> layer = race_jax.RACEAttention(2, 16, short_conv="before", rngs=nnx.Rngs(0))
          >>> state = layer.init_state(batch=3)
          >>> state.race.numerator.shape, state.taps.shape
          ((3, 2, 64, 8), (3, 3, 16))
        """
        return init_state(self.config, batch)

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        is_causal: bool | None = None,
        state: LayerState | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, LayerState]:
        """Applies the layer.

        Args:
          inputs_q: ``(B, T, D)``.
          inputs_k: ``(B, S, D)``, or None for self-attention. With `short_conv` it must be None or
            the very array `inputs_q`, and so must `inputs_v`. Equal arrays are not enough, because
            their values are unknown inside ``nnx.jit``. A transform also makes three arrays of one
            that is passed to it three times.
          inputs_v: ``(B, S, D)``, or None to use `inputs_k`.
          mask: key padding, ``(B, S)`` or ``(B, 1, 1, S)``, nonzero where there is a token. In
            causal calls, the output of a padded slot is the bias of ``out``, whatever the slot
            holds.
          segment_ids: ``(B, T)`` int >= 0, one contiguous run per document. A token sees only its
            own document.
          is_causal: whether a token sees only itself and earlier tokens. This needs T == S. The
            value of the constructor is used if None.
          state: the state from `init_state` or an earlier call, for any T. It serves prefill,
            decoding by one or many tokens, and resuming. It needs `is_causal`.
          deterministic: whether dropout is off. The value of the constructor is used if None.
          rngs: the random stream for dropout. The stream of the module is used if None.
          positions: unused. It is accepted because all attentions of the models take it.

        Returns:
          ``(B, T, D)`` in `dtype`, or that and the state after the call if a `state` is given.

        Raises:
          ValueError: if shapes do not fit, two arguments exclude each other, or dropout lacks
            `deterministic` or a random stream.
          TypeError: if the state is of another type, or a flag is not a Python bool.
        """
        del positions
        return race_layer(
            self.parameters(),
            self.planes[...],
            inputs_q,
            inputs_k,
            inputs_v,
            settings=self.config,
            mask=mask,
            segment_ids=segment_ids,
            is_causal=self.is_causal if is_causal is None else is_causal,
            state=state,
            dropout_key=self._dropout_key(deterministic, rngs),
            kernel_dtype=getattr(getattr(self.query, "kernel", None), "dtype", None),
            axis_name=self.axis_name,
        )

    def set_view(self, deterministic: bool | None = None, axis_name: Axis | None = None) -> None:
        """Sets what ``nnx.view`` changes.

        Args:
          deterministic: whether dropout is off, or None to leave it as it is.
          axis_name: the mesh axis over whose devices the sequence is split, or None to leave it.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if axis_name is not None:
            self.axis_name = axis_name

    def parameters(self) -> dict[str, Any]:
        """Returns the weights and projections, as `functional.race_layer` takes them."""
        parameters = {name: getattr(self, name)[...] for name in self.config.own_parameters()}
        for name in ("query", "key"):
            module = getattr(self, name)
            if self.config.folds:
                module = _foldable(name, module)
            parameters[name] = module
            if self.config.normalize_qk:
                parameters[f"{name}_ln"] = getattr(self, f"{name}_ln")
        value, heads = _plain_weights(self.value), (self.num_kv_heads, self.value_dim)
        if value is None or value["kernel"].shape[1:] != heads:
            value = self.value
        return parameters | {"value": value, "out": _of_heads(self.out)}

    def _dropout_key(
        self, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | None
    ) -> jax.Array | None:
        if self.config.dropout_rate == 0:
            return None
        deterministic = self.deterministic if deterministic is None else deterministic
        check_static(deterministic=deterministic)
        if deterministic is None:
            raise ValueError(
                f"dropout_rate={self.config.dropout_rate} needs deterministic=True or False, in "
                "the call or in the constructor; model.train() and model.eval() set it too"
            )
        if deterministic:
            return None
        rngs = self.rngs if rngs is None else rngs
        if rngs is None:
            raise ValueError(
                "dropout needs random numbers, and keep_rngs=False keeps none in the layer; pass "
                "rngs= in the call"
            )
        return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()


for _name in RACEConfig.names():
    setattr(RACEAttention, _name, property(operator.attrgetter(f"config.{_name}")))


def _check_streams(rngs: nnx.Rngs, *names: str) -> None:
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be nnx.Rngs, for instance nnx.Rngs(0); got {type(rngs)}")
    missing = [name for name in names if name not in rngs and "default" not in rngs]
    if missing:
        raise ValueError(
            f"rngs lacks the stream {missing[0]!r} and has only {sorted(rngs)}; pass "
            "nnx.Rngs(0), or nnx.Rngs(params=0, planes=1, dropout=2)"
        )


def _foldable(name: str, module: Callable) -> Mapping[str, jax.Array] | Callable:
    """Returns the weights of a plain projection, to fold planes into, or else the module."""
    weights = _plain_weights(module)
    if weights is None:
        _say_unfolded(name, type(module).__name__)
        return module
    return weights


def _plain_weights(module: Callable) -> dict[str, jax.Array] | None:
    """Returns the weights of a projection as the layer makes it, or None for any other."""
    plain = (
        type(module) is nnx.LinearGeneral
        and (module.axis, dict(module.batch_axis)) == ((-1,), {})
        and module.dot_general is None
        and module.dot_general_cls is None
        and module.preferred_element_type is None
    )
    if not plain:
        return None
    weights = {"kernel": module.kernel, "bias": module.bias}
    return {part: array[...] for part, array in weights.items() if array is not None}


@functools.cache
def _say_unfolded(name: str, kind: str) -> None:
    _log.warning(
        "fold_planes=True has no effect on the %s projection, because it is a %s and not the plain "
        "nnx.LinearGeneral that the layer made",
        name,
        kind,
    )


def _of_heads(out: Callable) -> Callable:
    """Returns `out` as a function of heads (B, T, N, V), which an nnx.Linear takes concatenated."""
    if not isinstance(out, nnx.Linear):
        return out
    return lambda heads: out(heads.reshape(*heads.shape[:2], heads.shape[2] * heads.shape[3]))
