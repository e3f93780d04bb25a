"""One exact value and gradient of a language model of bytes, as a program for each length.

The program computes the sum of the nats of all tokens, and its gradient with respect to all
parameters. There is no optimizer. The sequence is read at once, or in segments by
`race_jax.streaming`, and both give the same loss and gradient. RACE has a data gate and no other
part. Softmax has rotary positions.

The operations of a program are the matrix products that the model needs, forward and once backward.
What is computed a second time, to save memory, is not counted. With the width D, N heads of
H = D / N, and F = L 2^P, one token needs forward

    in every layer, value, output and MLP     4 D^2 + 16 D^2
    of RACE, hash, gate, and sums             4 D N L P + 2 D N + 4 N F (H + 1)
    of softmax, query, key, and pairs         4 D^2 + 2 T D
    once, logits                              512 D

and backward twice as many.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from benchmarks.arrays import Drawn, Random
from benchmarks.attention import METHODS, Problem, floor_operations
from benchmarks.byte_model import VOCABULARY, ByteModel, shifted
from benchmarks.peak_table import head_mesh
from benchmarks.programs import Inputs, Program
from benchmarks.streamed import bytes_of
from race_jax import streaming
from race_jax.models import ModelConfig
from race_jax.train.programs import compiler_options
from race_jax.train.step import group_size

# What RACE has beside its numbers of tables and planes.
PLAIN_RACE = {
    "use_tanh": True,
    "sharpness": 2.0,
    "short_conv": None,
    "output_norm": None,
    "output_gate": None,
}
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
# The numbers of one hidden state of a segment, in all layers, at most. So a segment takes the same
# memory in every model, which is about 9 GiB in bfloat16 on a GPU.
SEGMENT_NUMBERS = {"cpu": 2**24, "gpu": 2**28}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSetting:
    """What all points of a file about a model have in common but the machine.

    What is not described here is as in `benchmarks.scaling.Setting`.

    Attributes:
      layers: the number of blocks.
      width: D, which must be a multiple of `heads`.
      heads: N.
      tables: L of RACE.
      planes: P of RACE.
      dtype: that of the computation; None leaves it to `completed`.
      segment_length: the tokens of a segment where the sequence is streamed; None leaves it to
        `completed`.
      remat: whether each block is computed again in the backward pass, in place of keeping its
        activations.

    Raises:
      ValueError: the heads do not divide the width.
    """

    FORMS: ClassVar[tuple[str, ...]] = ("causal",)
    parts: ClassVar[int] = 1
    by_kernels: ClassVar[bool] = False

    layers: int = 4
    width: int = 256
    heads: int = 4
    tables: int = 4
    planes: int = 4
    dtype: str | None = None
    segment_length: int | None = None
    remat: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --width {self.width}")

    def completed(self, platform: str) -> "ModelSetting":
        """The setting with what the platform decides, "cpu" or "gpu"."""
        tokens = SEGMENT_NUMBERS[platform] // (self.layers * self.width) or 1
        tokens = 2 ** (tokens.bit_length() - 1)
        return dataclasses.replace(
            self,
            dtype=self.dtype or DTYPES[platform],
            segment_length=self.segment_length or tokens,
        )

    def facts(self) -> dict[str, int]:
        """What a file says of the setting beside its fields: the parameters of RACE."""
        params, _ = jax.eval_shape(self.model("race").variables)
        return {"parameters": sum(x.size for x in jax.tree.leaves(params))}

    def program(self, method: str, length: int, *, causal: bool = True) -> Program:
        """The loss and the gradient by a method of `benchmarks.scaling.GROWTH`."""
        if not causal:
            raise ValueError("a language model is causal")
        attention = method.removesuffix("_streamed")
        model = self.model(attention)

        def at_once(params: Any, fixed: Any, sequence: Any) -> tuple[jax.Array, Any]:
            return jax.value_and_grad(model.nats)(params, fixed, sequence)

        def in_segments(params: Any, fixed: Any, sequence: Any) -> tuple[jax.Array, Any]:
            state = model.state(params, fixed)
            state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
            segments = length // self.segment_length
            found = streaming.value_and_grad(
                model.step(fixed),
                segment_length=self.segment_length,
                group_size=group_size(segments, state_bytes),
            )(params, state, sequence)
            return found.sums[0], found.d_params

        run = at_once if method == attention else in_segments

        def call(inputs: Inputs) -> dict[str, Any]:
            variables = inputs["variables"]
            loss, gradients = run(*variables, shifted(inputs["tokens"]))
            return {"loss": loss, "gradients": gradients}

        return Program(
            f"{method} model",
            call,
            {
                "variables": Drawn(model.variables),
                "tokens": Random((1, length + 1), "uint8", finish=bytes_of),
            },
            floor_operations=self.operations(attention, length),
            options=compiler_options(head_mesh(1)),
        )

    def operations(self, attention: str, length: int) -> float:
        """The operations of one gradient, as the head of this file counts them."""
        head = self.width // self.heads
        sizes = {"heads": self.heads, "head_dim": head, "value_dim": head}
        sizes |= {"tables": self.tables, "planes": self.planes}
        attended = floor_operations(Problem(length, **sizes), METHODS[attention], backward=True)
        projected = 4 * self.width**2
        if attention == "race":
            # A model hashes hidden states, of width D, where the operation hashes a head's queries.
            planes = 4 * self.heads * self.tables * self.planes
            projected = planes * (self.width - head) + 2 * self.width * self.heads
        each = self.layers * (projected + 20 * self.width**2) + 2 * VOCABULARY * self.width
        return self.layers * attended + 3 * length * each

    def model(self, attention: str) -> ByteModel:
        """The model with this attention."""
        implementation = None
        if attention == "softmax" and jax.default_backend() == "gpu":
            implementation = "cudnn"  # XLA, in its place, would need the memory of all pairs
        return ByteModel(
            ModelConfig(
                num_layers=self.layers,
                width=self.width,
                num_heads=self.heads,
                attention=attention,
                positions="rope" if attention == "softmax" else "none",
                dtype=self.dtype,
                remat=self.remat,
                implementation=implementation,
                race={"num_tables": self.tables, "num_planes": self.planes, **PLAIN_RACE},
            )
        )


PRESETS = {
    "small": ModelSetting(),
    "30m": ModelSetting(layers=10, width=512, heads=8),
    "wide": ModelSetting(layers=8, width=1024, heads=16),
}
