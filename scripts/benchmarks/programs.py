"""What a benchmark times: a function, its inputs, and the least work it could do."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from benchmarks.arrays import REPLICATED, Drawn, Random

Inputs = dict[str, Any]  # arrays, or pytrees of them


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One program to time.

    Attributes:
      name: what tables and messages call it.
      call: a function of the inputs by name.
      inputs: how each input is drawn.
      floor_bytes: the fewest bytes that it could read and write; 0 where nobody counted.
      floor_operations: the fewest additions and multiplications; 0 where nobody counted.
      split: how its outputs are spread over the devices of a mesh: one spec for all of them, or a
        tree of specs.
      options: XLA's options for it, or None.
    """

    name: str
    call: Callable[[Inputs], object]
    inputs: Mapping[str, Random | Drawn]
    floor_bytes: int = 0
    floor_operations: float = 0.0
    split: PartitionSpec | Mapping[str, PartitionSpec] = REPLICATED
    options: Mapping[str, Any] | None = None

    def compile(self, mesh: Mesh | None = None) -> jax.stages.Compiled:
        """Compiles the program, and what draws its inputs, for a mesh or for one device."""
        for random in self.inputs.values():
            random.prepare(mesh)
        call = self.call
        if mesh and mesh.size > 1:
            splits = {name: random.split for name, random in self.inputs.items()}
            # With the check, the GPU kernels would run in their slower form (docs/kernels.md).
            call = jax.shard_map(
                call, mesh=mesh, in_specs=(splits,), out_specs=self.split, check_vma=False
            )
        structs = {name: random.struct(mesh) for name, random in self.inputs.items()}
        return jax.jit(call).lower(structs).compile(compiler_options=self.options)

    def draw(self, shared: Inputs, mesh: Mesh | None = None) -> Inputs:
        """The program's inputs, taken from `shared`, to which those that it lacks are added."""
        for name, random in self.inputs.items():
            if name not in shared:
                shared[name] = random.draw(name, mesh)
        return {name: shared[name] for name in self.inputs}
