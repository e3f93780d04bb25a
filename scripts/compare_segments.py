"""How far the gradient of a model depends on the segments that it is computed in, and on the dtype.

    .venv/bin/python scripts/compare_segments.py --length 16M --segments 64k,1M
    .venv/bin/python scripts/compare_segments.py --length 4k --segments 512,1000 --dtype float32

The model is a language model of bytes with RACE attention, that of `bench_scaling.py --model small`
unless the flags say otherwise, with random parameters and random bytes. A line gives the relative
distance |a - b| / |b| of two gradients with respect to all parameters, each as one long vector:

* of each length of segments from the longest one;
* of each length from float64, for the first --prefix bytes. The float64 gradient is computed on the
  CPU, over the whole prefix at once.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench_kernels import lengths, one_length, positive
from bench_streaming import random_bytes
from benchmarks.byte_model import ByteModel, shifted
from benchmarks.model_scaling import PLAIN_RACE
from benchmarks.text import length_name
from command_line import main_of
from race_jax import streaming
from race_jax.models import ModelConfig

DTYPES = ("float32", "bfloat16")


class Float64Config(ModelConfig):
    """A model that computes in float64, which `ModelConfig` refuses: states are float32."""

    def validate(self) -> ModelConfig:
        """Returns this record. The float32 model of the same sizes has been checked."""
        return self


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `ModelConfig` that the flags ask for."""
    return {
        "num_layers": options.layers,
        "width": options.width,
        "num_heads": options.heads,
        "positions": "none",
        "race": {"num_tables": 4, "num_planes": 4, **PLAIN_RACE},
    }


def as_vector(gradient: Any) -> np.ndarray:
    """All numbers of a gradient in float64."""
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(gradient)])


def in_segments(options: argparse.Namespace, tokens: np.ndarray, segment: int) -> np.ndarray:
    """The gradient of the sum of the nats, computed in segments."""
    model = ByteModel(ModelConfig(**sizes(options), dtype=options.dtype))
    params, fixed = model.variables()
    run = streaming.value_and_grad(model.step(fixed), segment_length=segment)
    got = jax.jit(run)(params, model.state(params, fixed), shifted(tokens))
    return as_vector(got.d_params)


def exact(options: argparse.Namespace, tokens: np.ndarray) -> np.ndarray:
    """The gradient in float64, of the whole at once, on the CPU: GPUs lack some of its products."""
    params, fixed = jax.device_get(ByteModel(ModelConfig(**sizes(options))).variables())
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        widened = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64 if x.dtype == np.float32 else None),
            (params, fixed),
        )
        own = {"dtype": "float64", "implementation": "xla", "remat": True}
        model = ByteModel(Float64Config(**sizes(options), **own))
        return as_vector(jax.jit(jax.grad(model.nats))(*widened, shifted(tokens)))


def distance(got: np.ndarray, want: np.ndarray) -> str:
    """|got - want| / |want| in words."""
    return f"{np.linalg.norm(got - want) / np.linalg.norm(want):.2e}"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Lengths are given as 4096, 4k or 1M. k is 1024, and M is 1024 k.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, positive(int)
    add("--length", type=one_length, default="16k", help="bytes of the sequence")
    add("--segments", type=lengths, default="1k,4k", help="lengths of segments, by commas")
    add("--prefix", type=one_length, default="4k", help="bytes that float64 computes")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the gradient in segments")
    add("--layers", type=count, default=4, help="blocks of the model")
    add("--width", type=count, default=256, help="width of the model")
    add("--heads", type=count, default=4, help="heads of the model")
    options = parser.parse_args(words)
    if options.prefix > options.length:
        parser.error(f"--prefix {options.prefix} is longer than --length {options.length}")
    if options.width % options.heads:
        parser.error(f"--heads {options.heads} does not divide --width {options.width}")
    return options


def main(words: Sequence[str]) -> None:
    """Prints a line for each distance."""
    options = parse(words)
    tokens = random_bytes(options.length + 1)[None].astype(np.int32)
    *others, longest = options.segments
    if others:
        name = f"segments of {length_name(longest)}"
        compare(options, tokens, others, name, in_segments(options, tokens, longest))
    prefix = tokens[:, : options.prefix + 1]
    compare(options, prefix, options.segments, "float64", exact(options, prefix))


def compare(
    options: argparse.Namespace,
    tokens: np.ndarray,
    segments: Sequence[int],
    name: str,
    want: np.ndarray,
) -> None:
    """Prints how far the gradients in segments are from `want`, which is called `name`."""
    about = f"{options.dtype}, {length_name(tokens.shape[1] - 1)} bytes"
    for segment in segments:
        found = distance(in_segments(options, tokens, segment), want)
        print(
            f"{about}: segments of {length_name(segment)} differ from {name} by {found}", flush=True
        )


if __name__ == "__main__":
    main_of(main)
