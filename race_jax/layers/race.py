"""RACEAttention for Flax NNX: holds parameters and planes, and calls `layers.functional`.

Comes in: hidden states (B, T, D). Goes out: hidden states (B, T, D), and a state where one came in.
For every head, with planes W and projections A,

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
from race_jax.core.sequence import Axis
from race_jax.layers import gates
from race_jax.layers.functional import LayerState, check_static, init_state, race_layer
from race_jax.layers.race_config import PAPER, RACEConfig, warn_of_shared_planes

_log = logging.getLogger("race_jax")
default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()


class HashPlanes(nnx.Variable):
    """Fixed hash planes: saved and restored with a model, but not trained.

    ``nnx.state(model, HashPlanes)`` selects them; ``nnx.state(model, nnx.Param)`` leaves them out.

    Example:
      >>> import race_jax
      >>> from flax import nnx
      >>> layer = race_jax.RACEAttention(2, 16, rngs=nnx.Rngs(0))
      >>> list(nnx.state(layer, race_jax.HashPlanes))
      ['planes']
    """


class RACEAttention(nnx.Module):
    """Multi-head RACE attention, in the place of ``nnx.MultiHeadAttention``.

    For every head, with hash planes W, sharpness beta and projections A,

        out_t = sum_s w_ts (x_s A_v) / sum_s w_ts
        w_ts = visible(t, s) exp(G_t - G_s) phi(W x_t A_q) . phi(W x_s A_k)

    at a cost linear in the length, and concatenated heads go through ``out``. Parameters have
    Flax's names and shapes: ``query`` ``(D, N, H)``, ``key`` ``(D, K, H)``, ``value`` ``(D, K, V)``
    and ``out`` ``(N, V, D)`` kernels with their biases. Beside them stand ``log_sharpness``,
    ``gate_bias``, ``gate_kernel``, ``conv_kernel`` and ``out_gate_kernel``, as far as the options
    need them, and ``planes`` ``(L, P, H)``: a `HashPlanes` variable, a parameter only if learned.
    Sums are kept in float32 at least.

    The projections are modules that the layer calls, so each may be replaced or wrapped: by a
    low-rank adapter, a quantised module, or another projection (``layer.key = layer.query``). A
    replacement takes ``(B, T, D)`` and gives heads ``(B, T, N, H)``, or ``(B, T, N * H)``; that of
    ``out`` takes ``(B, T, N, V)``, an ``nnx.Linear`` (``nnx.LoRALinear`` is one) ``(B, T, N * V)``.

    Args:
      num_heads: N, query heads.
      in_features: D, the width of the queries' inputs.
      qkv_features: N * H; `in_features` if neither it nor `head_dim` is given.
      out_features: the width of the output; `in_features` if None.
      num_kv_heads: K, dividing N; N if None.
      in_kv_features: the width of the keys' and values' inputs; `in_features` if None.
      head_dim: H, the width of a query or key; ``qkv_features / num_heads`` if None.
      value_dim: V, the width of a value; `head_dim` if None.
      dtype: dtype of the computation; promoted from inputs and parameters if None.
      param_dtype: dtype of parameters and planes.
      dropout_rate: share of the output's entries that are dropped, in [0, 1).
      deterministic: turns dropout off; overridden by the call's argument.
      is_causal: whether a token sees only itself and what stands before it; overridden by the
        call's argument. Say it here where the call is transformed: ``nnx.remat`` and its like turn
        the arguments of a call into arrays.
      decode: only for Flax's signature: RACE decodes with ``state=``.
      precision: of the projections.
      kernel_init: of the projections' kernels.
      out_kernel_init: of the kernel of ``out``; `kernel_init` if None.
      bias_init: of the projections' biases.
      out_bias_init: of the bias of ``out``; `bias_init` if None.
      use_bias: whether the projections have biases.
      normalize_qk: LayerNorm on queries and keys, as in Flax.
      num_tables: L, hash tables. More tables, less noise.
      num_planes: P, 1..10, planes of a table, which has 2**P buckets. More planes, a sharper
        kernel.
      planes_scale: standard deviation of the planes' entries; ``head_dim**-0.5`` if None. The
        paper has 1, which starves queries and keys of gradients.
      learn_planes: makes the planes a parameter.
      sharpness: beta at the start, > 0.
      learn_sharpness: trains beta, through its logarithm.
      shared_sharpness: one beta for the layer instead of one a key/value head.
      forget_gate: what old tokens fade by. None, the paper; ``"fixed"``, a constant a head;
        ``"learned"``, a trained constant a head; ``"data"``, ``sigmoid(x w + b)`` a token and head.
        Causal calls only.
      half_life: the longest half-life in tokens at the start. The heads spread geometrically from
        2 to it. Needed for a fixed gate; else b spreads evenly from 1 to 6 if None.
      short_conv: before everything else, mixes each token with the three before it in its segment;
        the identity at the start. Self-attention only.
      output_gate: normalises each head (RMS) and multiplies it by ``silu(x W_g)`` before ``out``.
      fold_planes: computes ``x (A W)`` instead of ``(x A) W``: the same to rounding, with less work
        and memory. Not with `normalize_qk`. A query or key projection that is not the
        ``nnx.LinearGeneral`` made here is called instead, and a log line says so once.
      normalization: ``"global"`` (the paper) or ``"bucket"`` (its released code).
      implementation: None (the best that works), ``"xla"`` or ``"pallas"``.
      axis_name: inside ``jax.shard_map``, the mesh axis over whose devices the sequence is split.
        Every device then calls the layer with its own stretch of tokens, in the order of the axis.
        On an Explicit mesh, leave it out: the sharding of the inputs says it.
      keep_rngs: keeps a fork of the dropout stream in the module, as in Flax.
      rngs: streams ``params``, with dropout ``dropout``, or a default for them. Planes are drawn
        from the stream ``planes`` if there is one, else from the default, else from ``params``.
        With a stream of their own, they depend on no other seed and differ from layer to layer.

    Raises:
      ValueError: sizes that do not divide, a value that is not allowed, options that exclude each
        other, or a missing stream.

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

      Causal from the start, for a call that is computed again in the backward pass:

      >>> layer = race_jax.RACEAttention(4, 32, is_causal=True, rngs=nnx.Rngs(0))
      >>> nnx.remat(race_jax.RACEAttention.__call__)(layer, x).shape
      (2, 10, 32)

    Source: arXiv 2510.04008, Algorithms 1 and 2 (`RACEAttention.paper`); the forget gate, the
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
        forget_gate: str | None = None,
        half_life: float | None = None,
        short_conv: bool = False,
        output_gate: bool = False,
        fold_planes: bool = False,
        normalization: str = "global",
        implementation: str | None = None,
        axis_name: Axis | None = None,
        keep_rngs: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        given = locals()  # the settings are arguments by name; RACEConfig holds the one list
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
                use_fast_variance=False,  # it would lose digits of heads that have a mean
                dtype=dtype,
                param_dtype=param_dtype,
            )
            self.query_ln = norm(config.head_dim, rngs=rngs)
            self.key_ln = norm(config.head_dim, rngs=rngs)
        for name, init in config.own_parameters().items():
            setattr(self, name, nnx.Param(init(rngs.params())))
        key = _planes_stream(rngs)()
        warn_of_shared_planes(rngs.params.key[...], key)
        planes = config.draw_planes(key)
        self.planes = nnx.Param(planes) if learn_planes else HashPlanes(planes)
        self.rngs = rngs.dropout.fork() if keep_rngs else None

    @classmethod
    def paper(
        cls, num_heads: int, in_features: int, *, rngs: nnx.Rngs, **options: Any
    ) -> RACEAttention:
        """The paper's layer, exactly: Algorithm 1, and Algorithm 2 where calls are causal.

        One trained sharpness from 1, planes of scale 1, no gate, no convolution.

        Args:
          num_heads: N.
          in_features: D.
          rngs: as for the class.
          **options: what the paper leaves open: sizes, tables and planes, initialisers, dtypes,
            dropout, `fold_planes`, `implementation`.

        Returns:
          The layer.

        Raises:
          TypeError: an option that the paper fixes.

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
        """The layer that a record describes.

        Args:
          config: sizes and options.
          is_causal: as for the class.
          rngs: as for the class.
          **initializers: `kernel_init`, `out_kernel_init`, `bias_init`, `out_bias_init`.

        Returns:
          The layer.

        Raises:
          ValueError: the record has a forget gate, and the layer is not causal.
        """
        gates.check_direction(config.forget_gate, is_causal)
        options = {name: getattr(config, name) for name in RACEConfig.names()}
        return cls(is_causal=is_causal, rngs=rngs, **options, **initializers)

    def init_state(self, batch: int) -> LayerState:
        """The state before any token, to be passed as ``state=``.

        Args:
          batch: B.

        Returns:
          A pytree of one size, whatever the length to come.

        Example:
          >>> import race_jax
          >>> from flax import nnx
          >>> layer = race_jax.RACEAttention(2, 16, short_conv=True, rngs=nnx.Rngs(0))
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
        """Attends.

        Args:
          inputs_q: ``(B, T, D)``.
          inputs_k: ``(B, S, D)``; None for self-attention.
          inputs_v: ``(B, S, D)``; None for `inputs_k`.
          mask: key padding, ``(B, S)`` or ``(B, 1, 1, S)``, nonzero where there is a token. In
            causal calls a padded slot gives the bias of ``out``, whatever stands in it.
          segment_ids: ``(B, T)`` int >= 0, one contiguous run a document: tokens see only theirs.
          is_causal: whether a token sees only itself and what stands before it; needs T == S. The
            constructor's if None.
          state: from `init_state` or an earlier call, for any T: prefill, decoding by one or many
            tokens, and resuming are this one argument. Needs `is_causal`.
          deterministic: turns dropout off; the constructor's if None.
          rngs: for dropout; the constructor's if None.
          positions: accepted because all attentions of the models take it; unused.

        Returns:
          ``(B, T, D)`` in `dtype`; with a `state` also the state after the call.

        Raises:
          ValueError: shapes that do not fit, arguments that exclude each other, or dropout without
            `deterministic` or a random stream.
          TypeError: a state of another kind, or a flag that is no Python bool.
        """
        del positions
        return race_layer(
            self._parameters(),
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
        """Serves ``nnx.view``.

        Args:
          deterministic: if given, whether dropout is off.
          axis_name: if given, the mesh axis over whose devices the sequence is split.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if axis_name is not None:
            self.axis_name = axis_name

    def _parameters(self) -> dict[str, Any]:
        parameters = {name: getattr(self, name)[...] for name in self.config.own_parameters()}
        for name in ("query", "key"):
            module = getattr(self, name)
            if self.config.fold_planes:
                module = _foldable(name, module)
            parameters[name] = module
            if self.config.normalize_qk:
                parameters[f"{name}_ln"] = getattr(self, f"{name}_ln")
        return parameters | {"value": self.value, "out": _of_heads(self.out)}

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
                "the call or the constructor"
            )
        if deterministic:
            return None
        rngs = self.rngs if rngs is None else rngs
        if rngs is None:
            raise ValueError("dropout needs rngs= in the call, since keep_rngs=False")
        return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()


for _name in RACEConfig.names():
    setattr(RACEAttention, _name, property(operator.attrgetter(f"config.{_name}")))


def _check_streams(rngs: nnx.Rngs, *names: str) -> None:
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be nnx.Rngs, such as nnx.Rngs(0); got {type(rngs)}")
    missing = [name for name in names if name not in rngs and "default" not in rngs]
    if missing:
        raise ValueError(
            f"rngs lacks the stream {missing[0]!r}, it has {sorted(rngs)}; pass nnx.Rngs(0), or "
            "nnx.Rngs(params=0, planes=1, dropout=2)"
        )


def _planes_stream(rngs: nnx.Rngs) -> nnx.RngStream:
    return rngs.planes if "planes" in rngs or "default" in rngs else rngs.params


def _foldable(name: str, module: Callable) -> Mapping[str, jax.Array] | Callable:
    """The weights of a plain projection, into which planes can be folded; else the module."""
    plain = (
        type(module) is nnx.LinearGeneral
        and (module.axis, dict(module.batch_axis)) == ((-1,), {})
        and module.dot_general is None
        and module.dot_general_cls is None
        and module.preferred_element_type is None
    )
    if not plain:
        _say_unfolded(name, type(module).__name__)
        return module
    weights = {"kernel": module.kernel, "bias": module.bias}
    return {part: array[...] for part, array in weights.items() if array is not None}


@functools.cache
def _say_unfolded(name: str, kind: str) -> None:
    _log.warning(
        "fold_planes=True: the %s projection is a %s, not the plain nnx.LinearGeneral that the "
        "layer made, so it is called and nothing is folded into it",
        name,
        kind,
    )


def _of_heads(out: Callable) -> Callable:
    """`out` as a function of heads (B, T, N, V); an nnx.Linear takes them side by side."""
    if not isinstance(out, nnx.Linear):
        return out
    return lambda heads: out(heads.reshape(*heads.shape[:2], -1))
