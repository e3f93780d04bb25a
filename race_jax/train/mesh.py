"""The devices of a run, what is spread over them, and the folder of compiled programs."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from race_jax.data.rows import UnreadRows
from race_jax.train.config import Config

DATA, SEQ, FSDP = AXES = ("data", "seq", "fsdp")
SHARES = (DATA, FSDP)  # the axes that share the sequences of a batch
# Parameters with fewer numbers are kept whole on every device.
LEAST_SHARDED = 2**12
WHOLE = P()  # arrays that every device holds whole
TOKENS = P(SHARES, SEQ)  # arrays (B, T, ...) of a batch
MASK = "mask"  # the array (B, T) of a batch that is False where there is no token


def prepare_cpu_devices(config: Config) -> None:
    """Gives XLA one CPU device per usable core, as many as divide the batch.

    One device runs most of a step on one core, so two devices are needed to use two cores. JAX
    fixes its devices when it is first used. A later call has no effect, and the run uses the
    devices that there are. Accelerators are not affected. A run of several processes has the CPU
    devices that JAX_NUM_CPU_DEVICES gives each of them, or one each.

    Args:
        config: the checked configuration. `mesh` overrides the number of cores.
    """
    if config.mesh.coordinator is not None:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        jax.config.update("jax_num_cpu_devices", math.prod(_sizes(config, cores or 1)))
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
    """Makes the mesh of a run, over the devices of all its processes.

    Args:
        config: the checked configuration. `mesh` gives the sizes of the axes. Where `mesh.data` is
            None, the axis takes as many of the devices as divide the sequences of one accumulation
            part.

    Returns:
        A mesh with the axes "data", "seq" and "fsdp".

    Raises:
        ValueError: the mesh needs more devices than there are, or leaves out devices of a run of
            several processes.
    """
    devices = jax.devices()
    sizes = _sizes(config, len(devices))
    wanted = " x ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
    if jax.process_count() > 1 and math.prod(sizes) != len(devices):
        raise ValueError(
            f"config.mesh {wanted} has {math.prod(sizes)} devices, and the {jax.process_count()} "
            f"processes of this run have {len(devices)} ({devices[0].platform}), all of which must "
            "take part; set config.mesh.data, seq or fsdp"
        )
    if math.prod(sizes) > len(devices):
        raise ValueError(
            f"config.mesh {wanted} needs {math.prod(sizes)} devices, and this process has "
            f"{len(devices)} ({devices[0].platform}); lower config.mesh.data, seq or fsdp"
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices[: math.prod(sizes)])


def split_sequences(model: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Returns a model that reads stretches of sequences, if the axis "seq" has several devices."""
    return model if mesh.shape[SEQ] == 1 else nnx.view(model, axis_name=SEQ)


def on_every_device(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device of `mesh` holds whole."""
    return NamedSharding(mesh, WHOLE)


def batch_spec(x: Any) -> P:
    """Returns how an array (B, T, ...) or (B,) of a batch is spread over the devices."""
    return TOKENS if len(x.shape) > 1 else P(SHARES)


def batch_shapes(mesh: Mesh, batch: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and shardings that the arrays of a batch have on the devices."""
    missing = _missing(mesh, batch)
    if missing:
        shape = next(iter(batch.values())).shape[:2]
        batch = {MASK: jax.ShapeDtypeStruct(shape, bool)} | batch

    def on_devices(x: Any) -> jax.ShapeDtypeStruct:
        shape = (x.shape[0], x.shape[1] + missing, *x.shape[2:]) if missing else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, batch_spec(x)))

    return {name: on_devices(x) for name, x in batch.items()}


def whole_stretches(mesh: Mesh, length: int) -> int:
    """Returns the least length from `length` on that the devices of the axis "seq" divide."""
    return -(-length // mesh.shape[SEQ]) * mesh.shape[SEQ]


def _missing(mesh: Mesh, batch: dict[str, Any]) -> int:
    """Returns how many tokens a batch needs more, so that the devices divide its sequences."""
    if mesh.shape[SEQ] == 1:
        return 0
    length = next(iter(batch.values())).shape[1]
    return whole_stretches(mesh, length) - length


def _spans(mesh: Mesh, length: int, stretch: int | None) -> list[tuple[int, int]]:
    """Returns the first token of each segment, and how many tokens each device has of it."""
    devices = mesh.shape[SEQ]
    segment = length if stretch is None else devices * stretch
    return [
        (first, -(-min(segment, length - first) // devices)) for first in range(0, length, segment)
    ]


def parameter_specs(parameters: Any, mesh: Mesh) -> Any:
    """Returns how parameters, or the optimizer's sums of them, are spread over the axis "fsdp".

    The largest axis of an array that the devices divide is split. A small array is kept whole.

    Args:
        parameters: a pytree of arrays, or of their shapes.
        mesh: the mesh of the run.

    Returns:
        A pytree of `PartitionSpec`.
    """
    devices = mesh.shape[FSDP]

    def spec(x: Any) -> P:
        fitting = [axis for axis, size in enumerate(x.shape) if size % devices == 0]
        if devices == 1 or math.prod(x.shape) < LEAST_SHARDED or not fitting:
            return WHOLE
        axis = max(fitting, key=lambda axis: x.shape[axis])
        return P(*[None] * axis, FSDP)

    return jax.tree.map(spec, parameters)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Spreads an array, which every process has whole, over the devices of a mesh."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def put_whole(mesh: Mesh, values: Any) -> Any:
    """Copies arrays to every device."""
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, WHOLE)), values)


def put_parameters(mesh: Mesh, parameters: Any) -> Any:
    """Spreads parameters, or the optimizer's state, over the devices."""
    place = lambda x, spec: put(x, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, parameters, parameter_specs(parameters, mesh))


def get_whole(mesh: Mesh, values: Any) -> Any:
    """Returns arrays, which may be spread over devices of several processes, as NumPy arrays."""
    if mesh.is_multi_process:
        whole = jax.tree.map(lambda x: NamedSharding(mesh, WHOLE), values)
        values = jax.jit(lambda x: x, out_shardings=whole)(values)
    return jax.tree.map(np.asarray, values)


def put_batch(
    mesh: Mesh, batch: dict[str, Any], stretch: int | None = None
) -> dict[str, jax.Array]:
    """Spreads a batch of host arrays (B, T, ...) or (B,) over the devices.

    If sequences are read segment by segment, every device of the axis "seq" gets its stretch of
    every segment, one after the other.

    If these devices do not divide T, zeros are added at the end, and a "mask" (B, T) that is False
    there, unless the batch has one. The weights of these tokens are 0. They come after all others,
    so they change nothing in a causal model, and other models are given the mask.

    Args:
        mesh: the mesh of the run.
        batch: the arrays.
        stretch: number of tokens of a segment on one device, or None if sequences are read whole.
    """
    devices, missing = mesh.shape[SEQ], _missing(mesh, batch)
    if missing:
        batch = {MASK: np.ones(next(iter(batch.values())).shape[:2], bool)} | batch
        add = lambda x: np.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
        batch = jax.tree.map(add, batch)
    if stretch is not None and devices > 1:

        def by_device(x: np.ndarray) -> np.ndarray:
            parts = [
                x[:, first : first + devices * size].reshape(len(x), devices, size, *x.shape[2:])
                for first, size in _spans(mesh, x.shape[1], stretch)
            ]
            return np.concatenate(parts, axis=2).reshape(x.shape)

        batch = jax.tree.map(by_device, batch)
    return jax.tree.map(lambda x: put(x, NamedSharding(mesh, batch_spec(x))), batch)


def put_rows(mesh: Mesh, batch: UnreadRows, stretch: int | None = None) -> dict[str, jax.Array]:
    """Reads the rows that the devices of this process need, and spreads them as `put_batch` does.

    Args:
        mesh: the mesh of the run.
        batch: the rows.
        stretch: as for `put_batch`.
    """

    def read(rows: slice, time: slice) -> dict[str, np.ndarray]:
        chosen, pieces = range(len(batch))[rows], []
        device = time.start // (time.stop - time.start)
        for first, size in spans:
            start = first + device * size
            piece = batch.piece(start, start + size, chosen)
            if length > batch.length:
                is_real = np.arange(start, start + size) < batch.length
                piece[MASK] = np.broadcast_to(is_real, (len(chosen), size))
            pieces.append(piece)
        if len(pieces) == 1:
            return pieces[0]
        return {name: np.concatenate([p[name] for p in pieces], axis=1) for name in pieces[0]}

    length = whole_stretches(mesh, batch.length)
    spans = _spans(mesh, batch.length, None if mesh.shape[SEQ] == 1 else stretch)
    blocks = local_blocks(mesh, len(batch), length)
    return put_blocks(mesh, len(batch), length, [read(*block) for block in blocks])


def local_blocks(mesh: Mesh, rows: int, length: int) -> list[tuple[slice, slice]]:
    """Returns the blocks of an array (B, T) that the devices of this process hold, each once."""
    found = NamedSharding(mesh, TOKENS).addressable_devices_indices_map((rows, length))
    blocks = {_bounds(index, (rows, length)) for index in found.values()}
    return [(slice(*row), slice(*time)) for row, time in sorted(blocks)]


def put_blocks(mesh: Mesh, rows: int, length: int, blocks: list[dict[str, np.ndarray]]) -> Any:
    """Makes a batch (B, T, ...) of the blocks of `local_blocks`, on the devices that hold them."""
    shape = rows, length
    where = [_bounds(index, shape) for index in local_blocks(mesh, rows, length)]
    at = dict(zip(where, blocks, strict=True))

    def array(name: str, x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(
            shape + x.shape[2:],
            NamedSharding(mesh, TOKENS),
            lambda index: at[_bounds(index[:2], shape)][name],
        )

    return {name: array(name, x) for name, x in blocks[0].items()}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def gather(parameters: Any, specs: Any) -> Any:
    """Returns whole parameters, inside `sum_over_devices`, from the part of each device.

    The gradient of a part is the sum of what the devices of the axis "fsdp" add to it.
    """

    def whole(x: jax.Array, spec: P) -> jax.Array:
        if FSDP not in spec:
            return x
        return jax.lax.all_gather(x, FSDP, axis=spec.index(FSDP), tiled=True)

    return jax.tree.map(whole, parameters, specs)


def sum_over_devices(
    function: Callable[..., Any], mesh: Mesh, *, specs: tuple, out_specs: Any
) -> Callable[..., Any]:
    """Runs `function` on every device of `mesh` and adds up what it returns.

    The first argument is a batch, of which each device gets its own share. Inside `function` the
    other arguments count as values of the device, so a gradient with respect to them is that of the
    device's share, and is added up with the other results.

    Args:
        function: takes a batch and other pytrees, and returns a pytree of sums over its batch.
        mesh: the mesh of the run.
        specs: how each of the other arguments is spread over the devices, as pytrees of
            `PartitionSpec`; WHOLE for those that every device holds whole.
        out_specs: the same for what `function` returns. Results are added over all axes of the mesh
            that their spec does not name.

    Returns:
        A function of the same arguments, whose results are sums over the whole batch.

    Source: beyond the paper.
    """

    def on_device(batch, *others):
        return add_over_axes(out_specs, function(batch, *per_device(others)))

    def run(batch, *others):
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(jax.tree.map(batch_spec, batch), *specs),
            out_specs=out_specs,
            check_vma=checks_devices(mesh),
        )(batch, *others)

    return run


def add_over_axes(specs: Any, values: Any) -> Any:
    """Adds values of the devices, inside `jax.shard_map`, over all axes that a spec does not name.

    Args:
        specs: a pytree of `PartitionSpec`, one for each value or for a part of the tree of values.
        values: what every device has.
    """

    def add(spec: P, part: Any) -> Any:
        names = [name for entry in spec for name in (entry if type(entry) is tuple else [entry])]
        return jax.lax.psum(per_device(part), tuple(name for name in AXES if name not in names))

    return jax.tree.map(add, specs, values, is_leaf=lambda x: isinstance(x, P))


def per_device(values: Any) -> Any:
    """Marks arrays, inside `sum_over_devices`, as values that differ between devices.

    Args:
        values: a pytree of arrays. Some of them may be marked already.

    Returns:
        The same values. No data are moved.
    """

    def mark(x: jax.Array) -> jax.Array:
        missing = set(AXES) - jax.typeof(x).manual_axis_type.varying
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying")

    return jax.tree.map(mark, values)


def checks_devices(mesh: Mesh) -> bool:
    """Whether JAX checks over which devices values vary, as it does by default.

    On GPUs it does not. With the check, JAX refuses the pipelined form of the GPU kernels, and
    programs of one warpgroup run instead. At 1M tokens on an H200 the three kernels that have both
    forms took 4.5 ms instead of 2.5 ms (docs/kernels.md). The check decides nothing else.
    """
    return mesh.devices.flat[0].platform != "gpu"


def _sizes(config: Config, devices: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes of the mesh, for so many devices."""
    mesh = config.mesh
    data = mesh.data
    if data is None:
        sequences = config.run.batch_size // config.optimizer.accumulation_steps // mesh.fsdp
        data = _largest_divisor(sequences, max(1, devices // (mesh.seq * mesh.fsdp)))
    return data, mesh.seq, mesh.fsdp


def _largest_divisor(number: int, limit: int) -> int:
    return max(count for count in range(1, limit + 1) if number % count == 0)
