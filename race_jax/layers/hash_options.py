"""The options of the hash of queries and keys, for every attention that is built on it.

    phi_l,r(x) = prod_p sigmoid(2 beta z_l,p c_r,p),   z_l,p = x . w_l,p

With ``use_tanh``, tanh(z) takes the place of z. An attention declares these options by extending
`HashOptions`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import hashing

PLANES = 0x9A7E5  # an arbitrary constant that is folded into the keys of planes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashOptions:
    """Options of the hash.

    Attributes:
        num_tables: the number of hash tables L.
        num_planes: the number of planes per table P, 1 to 10.
        planes_scale: the standard deviation of the planes. None means ``1 / sqrt(head_dim)``.
        learn_planes: whether the planes are trained instead of kept as they were drawn.
        sharpness: the initial sharpness beta, positive.
        learn_sharpness: whether beta is trained, through its logarithm.
        shared_sharpness: whether the layer has one beta, instead of one per key/value head.
        use_tanh: whether hash projections go through tanh before they are sharpened.
    """

    num_tables: int = 4
    num_planes: int = 4
    planes_scale: float | None = None
    learn_planes: bool = False
    sharpness: float = 2.0
    learn_sharpness: bool = True
    shared_sharpness: bool = False
    use_tanh: bool = True

    def complete_hash(self) -> None:
        """Fills in the scale of the planes, and raises ValueError for a value out of range."""
        for name in ("num_tables", "num_planes"):
            check_size(name, getattr(self, name))
        if self.num_planes > hashing.MAX_PLANES:
            raise ValueError(
                f"num_planes must be at most {hashing.MAX_PLANES}, got {self.num_planes}; use more "
                "tables instead"
            )
        if self.planes_scale is None:
            object.__setattr__(self, "planes_scale", self.head_dim**-0.5)
        for name in ("sharpness", "planes_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")

    @property
    def features(self) -> int:
        """The number of features F of one hashed token."""
        return self.num_tables * 2**self.num_planes

    def draw_planes(self, key: jax.Array) -> jax.Array:
        """Draws the hash planes ``(L, P, H)``.

        A constant is folded into the key, so that planes and parameters that are drawn from the
        same seed are made of different numbers.
        """
        return hashing.init_planes(
            jax.random.fold_in(key, PLANES),
            num_tables=self.num_tables,
            num_planes=self.num_planes,
            head_dim=self.head_dim,
            scale=self.planes_scale,
            dtype=self.param_dtype,
        )

    def hash_parameters(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Returns the initializer of ``log_sharpness`` ``(K,)`` or ``()``, if it is learned."""
        if not self.learn_sharpness:
            return {}
        shape = () if self.shared_sharpness else (self.num_kv_heads,)
        start = math.log(self.sharpness)
        return {"log_sharpness": lambda key: jnp.full(shape, start, self.param_dtype)}

    def current_sharpness(self, params: Mapping[str, Any]) -> jax.Array | float:
        """Returns beta, ``(K,)`` or one number, from the parameters of a layer."""
        return jnp.exp(params["log_sharpness"]) if self.learn_sharpness else self.sharpness


def check_size(name: str, size: Any) -> None:
    """Raises ValueError unless a size is an integer and at least 1."""
    if isinstance(size, bool) or not isinstance(size, numbers.Integral) or size < 1:
        raise ValueError(f"{name} must be an integer and at least 1, got {size}")


def warn_of_shared_planes(key_of_parameters: jax.Array, key_of_planes: jax.Array) -> None:
    """Warns if layers that are made together, by a scan or vmap, get one set of planes.

    In that case the key of the parameters is traced and the key of the planes is not. Inside
    ``jax.jit``, and under ``nn.scan`` in some versions of Flax, both keys are traced, and the case
    cannot be detected.
    """
    traced = isinstance(key_of_parameters, jax.core.Tracer)
    if traced and not isinstance(key_of_planes, jax.core.Tracer):
        warnings.warn(
            "several layers are being made with the same hash planes, so their hashing errors add "
            "up; split the stream 'planes' as 'params' is split, or leave it out: in Linen with "
            "nn.scan(..., split_rngs={'params': True, 'planes': True}), in NNX with nnx.split_rngs",
            stacklevel=3,
        )
