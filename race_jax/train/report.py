"""What a run says of itself at its start and at its end, as lines of text."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from race_jax.tasks.task import Task
from race_jax.train.config import Config
from race_jax.train.metrics import Record
from race_jax.train.state import TrainState


def start_lines(
    config: Config,
    task: Task,
    mesh: Mesh,
    state: TrainState,
    directory: Path,
) -> list[str]:
    """The lines that say what is about to run.

    Args:
        config: the checked configuration.
        task: what is trained.
        mesh: the devices.
        state: the state at the start.
        directory: the run's folder.

    Returns:
        One line a fact, its name first.
    """
    run, model = config.run, config.model
    device = mesh.devices.flat[0]
    attention, reason = _attention(config, mesh)
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
    """The lines that say what the compilation of the training step gave.

    Args:
        compiled: the compiled training step.
        seconds: how long it took.
        cache: the folder of compiled programs, if there is one.

    Returns:
        One line a fact, its name first.
    """
    kept = "" if cache is None else f" (programs are kept in {cache})"
    return [
        f"{'memory':10} {_memory(compiled)}",
        f"{'compiled':10} the training step in {seconds:.1f} s{kept}",
    ]


def end_lines(task: Task, final: Record, test: Record | None) -> list[str]:
    """The lines that say what came out.

    Args:
        task: what is trained.
        final: the last evaluation, over the whole validation split.
        test: the same over the test split, if there is one.

    Returns:
        One line a fact, its name first.
    """
    facts = {"held out": task.score_text("valid", final), **task.end_facts()}
    if test is not None:
        facts["test"] = task.score_text("test", test)
    return [f"{name:10} {text}" for name, text in facts.items()]


def _attention(config: Config, mesh: Mesh) -> tuple[str, str]:
    """Name of the attention, and which implementation runs it and why."""
    batch = config.run.batch_size // config.optimizer.accumulation_steps // mesh.size
    is_packed = config.data.packing != "contiguous"
    return config.model.attention_config().describe(batch, config.data.sequence_length, is_packed)


def _memory(compiled: jax.stages.Compiled) -> str:
    """XLA's own estimate for one device."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return "no estimate on this platform"
    state, work = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    return (
        f"{(state + work) / 1e6:,.0f} MB a device: state and batch {state / 1e6:,.0f}, "
        f"step {work / 1e6:,.0f}"
    )
