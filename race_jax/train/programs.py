"""How the programs of a run are compiled and started.

XLA has its options for GPUs. Several programs are compiled at once. A program that runs for the
first time has the devices for itself.
"""

import concurrent.futures
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

# Products of matrices by cuBLASLt take biases, GELUs and sums with them. XLA's own products leave
# each of these to a pass over memory, and are compiled in dozens of forms to find the fastest.
# The parts of a program are compiled by 16 threads. Kernels are recorded as CUDA graphs even where
# only a few follow each other, which shortens the gaps between them.
GPU_OPTIONS = {
    "xla_gpu_enable_cublaslt": True,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_force_compilation_parallelism": 16,
    "xla_gpu_graph_min_graph_size": 1,
}


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Returns XLA's options for programs on the devices of `mesh`, or None for its defaults."""
    device = mesh.devices.flat[0]
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return dict(GPU_OPTIONS) if is_cuda else None


def compile_together(
    lowered: Sequence[jax.stages.Lowered], mesh: Mesh
) -> list[jax.stages.Compiled]:
    """Compiles programs at the same time, each by a thread of its own.

    Args:
        lowered: the programs.
        mesh: the mesh that they run on.

    Returns:
        The compiled programs, in the same order.
    """
    options = compiler_options(mesh)
    with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
        return list(pool.map(lambda one: one.compile(compiler_options=options), lowered))


class PerLength:
    """A program that is compiled once for each length of a segment, which is its fifth argument.

    Args:
        mesh: the mesh of the run.
        function: the function.
        donated: which arguments give their memory away.
    """

    def __init__(self, mesh: Mesh, function: Callable, donated: tuple[int, ...] = ()):
        self._mesh, self._function = mesh, jax.jit(function, donate_argnums=donated)
        self._compiled: dict[int, jax.stages.Compiled] = {}

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Returns the program for arguments of these shapes, before it is compiled."""
        return self._function.lower(*arguments)

    def keep(self, length: int, compiled: jax.stages.Compiled) -> None:
        """Takes a program that was compiled elsewhere."""
        self._compiled[length] = compiled

    def __call__(self, *arguments: Any) -> Any:
        length = jax.tree.leaves(arguments[4])[0].shape[1]
        if length not in self._compiled:
            self.keep(length, *compile_together([self.lower(*arguments)], self._mesh))
        return self._compiled[length](*arguments)


class FirstRuns:
    """Keeps other threads from the devices while a program runs for the first time.

    A program with cuDNN's attention loads it in its first run. Many of these runs on an H100 failed
    with "capturing stream has unjoined work" (jax 0.11.2, freshly compiled programs). The likely
    cause is that another thread moved the next batch to the GPU meanwhile.

    Example:
        >>> first = FirstRuns()
        >>> first.run("double", lambda: 2 * 21)
        42
    """

    def __init__(self):
        self._devices = threading.Lock()
        self._known: set[Hashable] = set()

    def run(self, program: Hashable, call: Callable[[], Any]) -> Any:
        """Returns `call()`, which runs a program. The first time, it waits for the result."""
        if program in self._known:
            return call()
        with self._devices:
            result = jax.block_until_ready(call())
        self._known.add(program)
        return result

    def move(self, call: Callable[[], Any]) -> Any:
        """Returns `call()`, which uses the devices in another thread, when no first run goes on."""
        with self._devices:
            return jax.block_until_ready(call())
