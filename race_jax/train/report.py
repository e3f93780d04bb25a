"""The lines of text that a run prints at its start and at its end."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from race_jax.tasks.task import Task
from race_jax.train.config import Config
from race_jax.train.mesh import SEQ, whole_stretches
from race_jax.train.metrics import Record
from race_jax.train.state import TrainState


def start_lines(
    config: Config,
    task: Task,
    mesh: Mesh,
    state: TrainState,
    directory: Path,
) -> list[str]:
    """Describes the run that is about to start.

    Args:
        config: the checked configuration.
        task: the task that is trained.
        mesh: the devices.
        state: the state at the start.
        directory: the run's folder.

    Returns:
        The lines. Each one starts with the name of what it describes.
    """
    run, model = config.run, config.model
    device = mesh.devices.flat[0]
    attention, reason = _attention(config, mesh, task.is_causal)
    parts = config.optimizer.accumulation_steps
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    facts = {
        "attention": f"{attention} ({reason})",
        "model": f"{parameters:,} parameters, {model.num_layers} layers, width {model.width}, "
        f"{model.num_heads} heads, positions {model.positions}, compute dtype {model.dtype}",
        "devices": f"{mesh.size} x {device.device_kind} ({device.platform}), mesh "
        + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()),
        "step": f"{run.batch_size} sequences of {config.data.sequence_length}, {parts} part(s)",
        "data": task.description,
        "steps": f"{run.steps:,}, a checkpoint every {run.checkpoint_every:,}",
        "directory": str(directory),
    }
    return [f"{name:10} {text}" for name, text in facts.items()]


def compiled_lines(compiled: jax.stages.Compiled, seconds: float, cache: str | None) -> list[str]:
    """Describes the compiled training step.

    Args:
        compiled: the compiled training step.
        seconds: the time that the compilation took.
        cache: the folder of compiled programs, if there is one.

    Returns:
        The lines. Each one starts with the name of what it describes.
    """
    kept = "" if cache is None else f" (programs are kept in {cache})"
    return [
        f"{'memory':10} {_memory(compiled)}",
        f"{'compiled':10} the training step in {seconds:.1f} s{kept}",
    ]


def end_lines(task: Task, final: Record, test: Record | None) -> list[str]:
    """Describes the result of a run.

    Args:
        task: the task that was trained.
        final: the last evaluation, over the whole validation split.
        test: the evaluation over the whole test split, if there is one.

    Returns:
        The lines. Each one starts with the name of what it describes.
    """
    facts = {"held out": task.score_text("valid", final), **task.end_facts()}
    if test is not None:
        facts["test"] = task.score_text("test", test)
    return [f"{name:10} {text}" for name, text in facts.items()]


def _attention(config: Config, mesh: Mesh, is_causal: bool) -> tuple[str, str]:
    """Returns the name of the attention, and which implementation runs it and why."""
    shares = mesh.size // mesh.shape[SEQ]
    batch = config.run.batch_size // config.optimizer.accumulation_steps // shares
    is_packed = config.data.packing != "contiguous"
    length = whole_stretches(mesh, config.data.sequence_length) // mesh.shape[SEQ]
    described = [
        config.model.attention_config(name).describe(batch, length, is_packed, is_causal)
        for name in config.model.attentions
    ]
    names, reasons = (list(dict.fromkeys(texts)) for texts in zip(*described, strict=True))
    every = min(config.model.hybrid_every, config.model.num_layers)
    name = f"; in one block of {every}, ".join(names)
    return name, "; ".join(reasons)


def planned_memory(compiled: jax.stages.Compiled) -> tuple[int, int] | None:
    """Returns the bytes that XLA plans for a device: those of the arguments and the temporary ones.

    Args:
        compiled: the compiled training step. Its results take the place of its arguments.

    Returns:
        The two numbers, or None on a platform that does not say.
    """
    sizes = compiled.memory_analysis()
    return None if sizes is None else (sizes.argument_size_in_bytes, sizes.temp_size_in_bytes)


def _memory(compiled: jax.stages.Compiled) -> str:
    """Says how much memory a device needs, as XLA estimates it."""
    planned = planned_memory(compiled)
    if planned is None:
        return "no estimate on this platform"
    state, work = planned
    return (
        f"{(state + work) / 1e6:,.0f} MB a device: state and batch {state / 1e6:,.0f}, "
        f"step {work / 1e6:,.0f}"
    )
