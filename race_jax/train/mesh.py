"""The devices of a run, what is spread over them, and the folder of compiled programs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from race_jax.train.config import Config

DATA_AXIS = "data"

# How each part of a run is spread over the mesh. Every device holds all parameters.
RULES = {"parameters": P(), "optimizer": P(), "batch": P(DATA_AXIS)}


def prepare_cpu_devices(config: Config) -> None:
    """Gives XLA one CPU device per usable core, as many as divide the batch.

    One device runs most of a step on one core, so two devices are needed to use two cores. JAX
    fixes its devices when it is first used. A later call has no effect, and the run uses the
    devices that there are. Accelerators are not affected.

    Args:
        config: the checked configuration. `mesh.data` overrides the number of cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    wanted = config.mesh.data or _largest_divisor(_sequences(config), cores or 1)
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        return  # JAX is already running


def keep_compiled_programs(config: Config) -> None:
    """Makes JAX keep its compiled programs in the folder that the configuration names, if any.

    A later start of the same run, or of another run with the same shapes, then reads them from
    there. This is JAX's persistent compilation cache, and it applies to the whole process.

    Args:
        config: the checked configuration.
    """
    if config.run.compilation_cache is not None:
        folder = Path(config.run.compilation_cache).expanduser().absolute()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        compilation_cache.reset_cache()  # JAX reads the name of the folder only once


def make_mesh(config: Config) -> Mesh:
    """Makes a mesh with one axis over local devices.

    Args:
        config: the checked configuration. The mesh has `mesh.data` devices; None takes as many as
            divide the sequences of one accumulation part.

    Returns:
        A mesh with the axis "data".

    Raises:
        ValueError: `mesh.data` asks for more devices than there are.
    """
    devices = jax.local_devices()
    count = config.mesh.data or _largest_divisor(_sequences(config), len(devices))
    if count > len(devices):
        raise ValueError(
            f"config.mesh.data must be <= {len(devices)}, the number of {devices[0].platform} "
            f"devices of this process; got {count}"
        )
    return jax.make_mesh(
        (count,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count]
    )


def sharding(mesh: Mesh, kind: str) -> NamedSharding:
    """Returns the sharding of "parameters", "optimizer" or "batch" on `mesh`."""
    return NamedSharding(mesh, RULES[kind])


def put_batch(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """Spreads a batch of host arrays (B, T, ...) over the data axis."""
    return jax.device_put(batch, sharding(mesh, "batch"))


def sum_over_devices(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Runs `function` on every device of `mesh` and adds up what it returns.

    The first argument is a batch, of which each device gets its own share. The other arguments are
    the same on every device. Inside `function` they count as values of the device, so a gradient
    with respect to them is that of the device's share, and is added up with the other results.

    Args:
        function: takes a batch and other pytrees, and returns a pytree of sums over its batch.
        mesh: the mesh whose "data" axis shares the batch.

    Returns:
        A function of the same arguments, whose results are sums over the whole batch.

    Source: beyond the paper.
    """

    def on_device(batch, shared):
        return jax.lax.psum(per_device(function(batch, *per_device(shared))), DATA_AXIS)

    added = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(DATA_AXIS), P()),
        out_specs=P(),
        check_vma=checks_devices(mesh),
    )
    return lambda batch, *shared: added(batch, shared)


def per_device(values: Any) -> Any:
    """Marks arrays, inside `sum_over_devices`, as values that differ between devices.

    Args:
        values: a pytree of arrays. Some of them may be marked already.

    Returns:
        The same values. No data are moved.
    """

    def mark(x: jax.Array) -> jax.Array:
        missing = {DATA_AXIS} - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(missing), to="varying")

    return jax.tree.map(mark, values)


def checks_devices(mesh: Mesh) -> bool:
    """Whether JAX checks over which devices values vary, as it does by default.

    On GPUs it does not. With the check, JAX refuses the pipelined form of the GPU kernels, and
    programs of one warpgroup run instead. At 1M tokens on an H200 the three kernels that have both
    forms took 4.5 ms instead of 2.5 ms (docs/kernels.md). The check decides nothing else.
    """
    return mesh.devices.flat[0].platform != "gpu"


def _sequences(config: Config) -> int:
    """Returns the number of sequences of one accumulation part, which the data axis divides."""
    return config.run.batch_size // config.optimizer.accumulation_steps


def _largest_divisor(number: int, limit: int) -> int:
    return max(count for count in range(1, limit + 1) if number % count == 0)
