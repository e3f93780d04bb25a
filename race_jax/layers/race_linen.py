"""RACEAttention for Flax Linen, with the same parameter tree as the NNX layer of `layers.race`.

The layer maps hidden states (B, T, D) to hidden states (B, T, D). If a state is passed in, it also
returns a state. For every head, with planes W and projections A,

    out = race(W x A_q, W x A_k, x A_v) A_out
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import race_jax.layers.serialization  # noqa: F401  (flax.serialization of states)
from race_jax.core.shapes import Axis
from race_jax.layers.functional import LayerState, check_static, init_state, race_layer
from race_jax.layers.hash_options import warn_of_shared_planes
from race_jax.layers.race_config import PAPER, RACEConfig

Initializer = Callable[..., Any]


class RACEAttention(nn.Module):
    """Multi-head RACE attention, a replacement for ``nn.MultiHeadDotProductAttention``.

        out_t = sum_s w_ts (x_s A_v) / sum_s w_ts
        w_ts = visible(t, s) exp(G_t - G_s) phi(W x_t A_q) . phi(W x_s A_k)

    This is the same layer as the NNX `race_jax.RACEAttention`, whose documentation explains each
    option. The collection ``params`` has the same tree of parameters. Fixed planes are ``planes``
    in the collection ``hash_planes``, which `apply` needs together with ``params``. The widths of
    the inputs are taken from the inputs. Sums are kept in float32 or wider. Projections are
    ``nn.DenseGeneral`` submodules that `nn.intercept_methods` sees. If planes are folded into
    ``query`` and ``key``, these two are plain parameters.

    Transforms over layers (``nn.scan``, ``nn.vmap``) must carry the collection ``hash_planes`` as
    they carry ``params``, and must split the stream ``planes`` as they split ``params``, as the
    second example shows. If the stream is not split, all layers get the same planes, and their
    hashing errors add up instead of averaging out. The layer warns of this where it can detect it,
    which is under ``nn.vmap`` and under the ``nn.scan`` of some versions of Flax, unless the
    transform runs inside ``jax.jit``.

    Attributes:
      num_heads: N, the number of query heads.
      qkv_features: N * H. It is the inputs' width if neither it nor `head_dim` is given.
      out_features: the width of the output, which is that of the inputs if None.
      num_kv_heads: K, the number of key/value heads, which must divide N. It is N if None.
      head_dim: H, which is ``qkv_features / num_heads`` if None.
      value_dim: V, which is `head_dim` if None.
      dtype: the dtype of the computation. If None, it is promoted from inputs and parameters.
      param_dtype: the dtype of parameters and planes.
      dropout_rate: the share of the output's entries that are dropped, in [0, 1).
      deterministic: whether dropout is off. Set it here or in the call, but not in both.
      is_causal: whether a token sees only itself and earlier tokens. The argument of the call
        overrides it. Set it here if the call is transformed, because ``nn.remat`` and similar
        transforms turn the arguments of a call into arrays.
      decode: exists for Flax's signature only. RACE decodes with ``state=``.
      precision: the precision of the projections.
      kernel_init: the initializer of the projections' kernels.
      out_kernel_init: the initializer of the kernel of ``out``, which is `kernel_init` if None.
      bias_init: the initializer of the projections' biases.
      out_bias_init: the initializer of the bias of ``out``, which is `bias_init` if None.
      use_bias: whether the projections have biases.
      normalize_qk: whether queries and keys go through a LayerNorm.
      num_tables: L, the number of hash tables.
      num_planes: P, the number of planes of a table, 1..10.
      planes_scale: the standard deviation of the planes' entries, which is ``head_dim**-0.5`` if
        None.
      learn_planes: whether the planes are a parameter.
      sharpness: the initial beta, > 0.
      learn_sharpness: whether beta is trained, through its logarithm.
      shared_sharpness: whether the layer has one beta, instead of one per key/value head.
      use_tanh: whether hash projections go through tanh before they are sharpened.
      forget_gate: None, ``"fixed"``, ``"learned"`` or ``"data"``.
      half_life: the longest initial half-life of the gate, in tokens.
      short_conv: None, ``"before"`` (one convolution before the projections) or ``"qkv"`` (three
        after them).
      qkv_activation: None or ``"silu"``, which queries, keys and values go through.
      output_norm: None, or ``"rms"`` to normalize the heads' outputs.
      output_gate: None, ``"silu"`` or ``"sigmoid"``, which the heads' outputs are multiplied by.
      fold_planes: whether to compute ``x (A W)`` instead of ``(x A) W``.
      normalization: ``"global"`` or ``"bucket"``.
      implementation: None, ``"xla"`` or ``"pallas"``.
      axis_name: inside ``jax.shard_map``, the mesh axis over whose devices the sequence is split.
        Every device then calls the layer with its own stretch of tokens, in the order of the axis.
        On an Explicit mesh, leave it out: the sharding of the inputs says it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from race_jax.linen import RACEAttention
      >>> layer = RACEAttention(num_heads=4, forget_gate="data")
      >>> x = jax.random.normal(jax.random.key(1), (2, 10, 32))
      >>> streams = {"params": jax.random.key(0), "planes": jax.random.key(1)}
      >>> variables = layer.init(streams, x, is_causal=True)
      >>> variables["params"]["query"]["kernel"].shape, variables["hash_planes"]["planes"].shape
      ((32, 4, 8), (4, 4, 8))
      >>> layer.apply(variables, x, is_causal=True).shape
      (2, 10, 32)

      Four layers that are compiled once, and recomputed in the backward pass:

      >>> class Layers(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         layer = nn.remat(RACEAttention)(num_heads=4, is_causal=True)
      ...         scan = nn.scan(
      ...             lambda layer, x, _: (x + layer(x), None),
      ...             variable_axes={"params": 0, "hash_planes": 0},
      ...             split_rngs={"params": True, "planes": True},
      ...             length=4,
      ...         )
      ...         return scan(layer, x, None)[0]
      >>> variables = Layers().init(streams, x)
      >>> planes = jax.tree.leaves(variables["hash_planes"])[0]
      >>> planes.shape, bool((planes[0] == planes[1]).all())
      ((4, 4, 4, 8), False)
      >>> Layers().apply(variables, x).shape
      (2, 10, 32)

    Source: arXiv 2510.04008, Algorithms 1 and 2 (`RACEAttention.paper`). The rest goes beyond the
    paper.
    """

    num_heads: int
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    is_causal: bool = False
    decode: bool | None = None
    precision: Any = None
    kernel_init: Initializer = nn.initializers.lecun_normal()
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    use_bias: bool = True
    normalize_qk: bool = False
    num_tables: int = 4
    num_planes: int = 4
    planes_scale: float | None = None
    learn_planes: bool = False
    sharpness: float = 2.0
    learn_sharpness: bool = True
    shared_sharpness: bool = False
    use_tanh: bool = True
    forget_gate: str | None = None
    half_life: float | None = None
    short_conv: str | None = None
    qkv_activation: str | None = None
    output_norm: str | None = None
    output_gate: str | None = None
    fold_planes: bool = False
    normalization: str = "global"
    implementation: str | None = None
    axis_name: Axis | None = None

    @classmethod
    def paper(cls, num_heads: int, **options: Any) -> RACEAttention:
        """Makes exactly the paper's layer, as the NNX `race_jax.RACEAttention.paper` does.

        Args:
          num_heads: N.
          **options: the options that the paper leaves open, and Linen's `name` and `parent`.

        Returns:
          The layer.

        Raises:
          TypeError: if an option is given that the paper fixes.
        """
        return cls(num_heads, **PAPER, **options)

    def init_state(self, batch: int, in_features: int) -> LayerState:
        """Returns the state before any token, to be passed as ``state=``.

        Args:
          batch: B.
          in_features: D, the width of the inputs.

        Returns:
          A pytree whose size does not depend on the length of the sequence.
        """
        return init_state(self._settings(in_features, in_features), batch)

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        is_causal: bool | None = None,
        state: LayerState | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, LayerState]:
        """Applies the layer. Arguments and results are those of `race_jax.RACEAttention`.

        Args:
          inputs_q: ``(B, T, D)``.
          inputs_k: ``(B, S, D)``, or None for self-attention. With `short_conv` it must be None or
            the very array `inputs_q`, and so must `inputs_v`.
          inputs_v: ``(B, S, D)``, or None to use `inputs_k`.
          mask: key padding, ``(B, S)`` or ``(B, 1, 1, S)``, nonzero where there is a token.
          segment_ids: ``(B, T)`` int >= 0, one contiguous run per document.
          is_causal: whether a token sees only itself and earlier tokens. This needs T == S. The
            value of the field is used if None.
          state: the state from `init_state` or an earlier call. It needs `is_causal`.
          deterministic: whether dropout is off.
          dropout_rng: the key for dropout. The stream ``dropout`` is used if None.

        Returns:
          ``(B, T, D)`` in `dtype`, or that and the state after the call if a `state` is given.

        Raises:
          ValueError: if shapes do not fit, or two arguments exclude each other.
          TypeError: if the state is of another type, or a flag is not a Python bool.
        """
        keys_from = inputs_q if inputs_k is None else inputs_k
        settings = self._settings(inputs_q.shape[-1], keys_from.shape[-1])
        return race_layer(
            self._parameters(settings),
            self._planes(settings),
            inputs_q,
            inputs_k,
            inputs_v,
            settings=settings,
            mask=mask,
            segment_ids=segment_ids,
            is_causal=self.is_causal if is_causal is None else is_causal,
            state=state,
            dropout_key=self._dropout_key(deterministic, dropout_rng),
            kernel_dtype=self._kernel_dtype(),
            # Parameters may be made outside of `jax.shard_map`, as in Flax's BatchNorm.
            axis_name=None if self.is_initializing() else self.axis_name,
        )

    def _settings(self, in_features: int, in_kv_features: int) -> RACEConfig:
        return RACEConfig.of(self, in_features=in_features, in_kv_features=in_kv_features)

    def _parameters(self, settings: RACEConfig) -> dict[str, Any]:
        heads, kv_heads = settings.num_heads, settings.num_kv_heads
        head_dim, value_dim = settings.head_dim, settings.value_dim
        shapes = {"query": (heads, head_dim), "key": (kv_heads, head_dim)}
        widths = {"query": settings.in_features, "key": settings.in_kv_features}
        parameters: dict[str, Any] = {}
        for name, shape in shapes.items():
            if settings.folds:
                parameters[name] = self._weights(name, widths[name], shape)
            else:
                parameters[name] = self._dense(name, shape)
        parameters["value"] = self._dense("value", (kv_heads, value_dim))
        parameters["out"] = self._dense(
            "out",
            (settings.out_features,),
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
        )
        if self.normalize_qk:
            for name in ("query_ln", "key_ln"):
                parameters[name] = nn.LayerNorm(
                    use_bias=False,
                    use_fast_variance=False,
                    dtype=self.dtype,
                    param_dtype=self.param_dtype,
                    name=name,
                )
        for name, init in settings.own_parameters().items():
            parameters[name] = self.param(name, init)
        return parameters

    def _dense(self, name: str, features: tuple[int, ...], **options: Any) -> nn.DenseGeneral:
        defaults = {"axis": -1, "kernel_init": self.kernel_init, "bias_init": self.bias_init}
        return nn.DenseGeneral(
            features=features,
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            name=name,
            **defaults | options,
        )

    def _weights(self, name: str, width: int, shape: tuple[int, int]) -> dict[str, jax.Array]:
        inits = {"kernel": _flat(self.kernel_init, (width,), shape)}
        if self.use_bias:
            inits["bias"] = _flat(self.bias_init, (), shape)
        return ParameterGroup(inits, self.param_dtype, name=name)()

    def _kernel_dtype(self) -> Any:
        """Returns the dtype of the query projection's kernel, which may have been cast."""
        kernel = self.variables.get("params", {}).get("query", {}).get("kernel")
        return None if kernel is None else nn.unbox(kernel).dtype

    def _planes(self, settings: RACEConfig) -> jax.Array:
        if not self.learn_planes:
            return self.variable("hash_planes", "planes", self._draw_planes, settings).value
        # Flax also runs the initializer of an existing parameter, to compare shapes. There is no
        # stream to draw from then.
        if not self.is_initializing():
            return self.param("planes", settings.draw_planes)
        return self.param("planes", lambda key: self._draw_planes(settings))

    def _draw_planes(self, settings: RACEConfig) -> jax.Array:
        key = self.make_rng("planes")
        warn_of_shared_planes(self.make_rng("params"), key)
        return settings.draw_planes(key)

    def _dropout_key(
        self, deterministic: bool | None, dropout_rng: jax.Array | None
    ) -> jax.Array | None:
        if self.dropout_rate == 0:
            return None
        check_static(deterministic=deterministic)
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return None
        return self.make_rng("dropout") if dropout_rng is None else dropout_rng


class ParameterGroup(nn.Module):
    """Parameters under one name, with which `race_jax.layers.functional` computes.

    Attributes:
      inits: ``init(key, dtype)`` of every parameter, by name.
      param_dtype: the dtype of the parameters.
    """

    inits: Mapping[str, Initializer]
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        """Returns the parameters by name."""
        return {name: self.param(name, init, self.param_dtype) for name, init in self.inits.items()}


def _flat(init: Initializer, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Initializer:
    """Initializes a kernel as a matrix and a bias as a vector, as Flax does, for equal fans."""
    flat = (math.prod(inputs), math.prod(outputs)) if inputs else (math.prod(outputs),)

    def shaped(key: jax.Array, dtype: Any) -> Any:
        # This is a tree map because an initializer with partitioning returns a box with the array.
        return jax.tree.map(lambda array: array.reshape(*inputs, *outputs), init(key, flat, dtype))

    return shaped
