"""What a run says of itself at its start and at its end, as lines of text.

The bits per byte of a compressor are 8 · compressed bytes / bytes.
"""

import lzma
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from race_jax.core import dispatch
from race_jax.data.text import Data, HeldOut
from race_jax.models import TransformerLM, decode
from race_jax.train.config import Config
from race_jax.train.metrics import Record
from race_jax.train.state import TrainState

TEMPERATURE = 0.7  # of the sample: short samples of a small model read better a little below 1


def start_lines(
    config: Config,
    data: Data,
    mesh: Mesh,
    state: TrainState,
    directory: Path,
) -> list[str]:
    """The lines that say what is about to run.

    Args:
        config: the checked configuration.
        data: the text and its tokenizer.
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
        "step": f"{run.batch_size} x {config.data.sequence_length} = "
        f"{run.batch_size * config.data.sequence_length:,} tokens, {parts} part(s)",
        "data": data.description,
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


def end_lines(config: Config, data: Data, final: Record, test: Record | None) -> list[str]:
    """The lines that say what came out.

    Args:
        config: the checked configuration.
        data: the text and its tokenizer.
        final: the last evaluation, over the whole validation split.
        test: the same over the test split, if there is one.

    Returns:
        One line a fact, its name first.
    """
    facts = {"held out": score_text(final, data.valid)}
    if config.run.compare_xz:
        same = "same text" if data.valid.encodes_text else "of the whole text"
        facts["xz -9e"] = f"{xz_bits_per_byte(data.valid.text):.3f} bits per byte, {same}"
    if test is not None and data.test is not None:
        facts["test"] = score_text(test, data.test)
    return [f"{name:10} {text}" for name, text in facts.items()]


def sample_prompt(config: Config, data: Data) -> np.ndarray:
    """The ids of `run.sample_prompt`; asked for before training, so that no run ends on it.

    Raises:
        ValueError: a sample is wanted and its prompt has no ids in this vocabulary.
    """
    prompt = config.run.sample_prompt
    if not config.run.sample_tokens:
        return np.zeros(0, np.int32)
    try:
        ids = data.tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"config.run.sample_prompt {prompt!r}: {error}") from error
    if not len(ids):
        raise ValueError(f"config.run.sample_prompt must hold a token, got {prompt!r}")
    return ids


def sample_lines(
    config: Config, data: Data, model: TransformerLM, prompt: np.ndarray, directory: Path
) -> list[str]:
    """A continuation of `run.sample_prompt` by the model, and the command for more.

    Args:
        config: the checked configuration.
        data: the text and its tokenizer.
        model: the trained model, on one device.
        prompt: the ids that `sample_prompt` gave.
        directory: the run's folder.

    Returns:
        The lines to print.
    """
    drawn = decode.generate(
        model,
        prompt[None],
        max_tokens=config.run.sample_tokens,
        sampling=decode.Sampling(temperature=TEMPERATURE),
        seed=config.run.seed,
    )
    text = config.run.sample_prompt
    return [
        f"{'sample':10} {drawn.shape[1]} tokens after {text!r}, temperature {TEMPERATURE}:",
        text + data.tokenizer.decode(drawn[0]),
        f"{'next':10} {_generate_command(directory, text)}",
    ]


def _generate_command(directory: Path, prompt: str) -> str:
    """The command for more samples, with the interpreter that runs this one."""
    python, script = Path(sys.executable), Path(sys.argv[0]).with_name("generate.py")
    if not script.is_file():  # `train` was called by a program of the user's own
        script = Path("scripts", "generate.py")
    here = Path.cwd()
    words = [
        path.relative_to(here) if path.is_relative_to(here) else path for path in (python, script)
    ]
    words += ["--checkpoint", directory, "--prompt", prompt]
    return shlex.join(map(str, words))


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte that the best preset of xz needs for `text`.

    Example:
        >>> xz_bits_per_byte(b"again and again " * 1000) < 0.1
        True
    """
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def score_text(record: Record, held_out: HeldOut) -> str:
    """An evaluation in words.

    Args:
        record: what `evaluation_record` made.
        held_out: the split that was scored.

    Returns:
        Loss and perplexity. Before them the bits per byte, or after them, where the tokens do not
        encode the whole text, the share of `<unk>`.
    """
    text = f"{record['loss']:.4f} nats a token, perplexity {record['perplexity']:.2f}"
    if held_out.encodes_text:
        size = f"over {held_out.num_bytes:,} bytes"
        return f"{record['bits_per_byte']:.3f} bits per byte, {text}, {size}"
    unknown = held_out.num_unknown / held_out.num_tokens
    return (
        f"{text}, over {held_out.num_tokens:,} tokens, {unknown:.1%} of them <unk> "
        "(no bits per byte: the tokens do not encode the whole text)"
    )


def _attention(config: Config, mesh: Mesh) -> tuple[str, str]:
    """Name of the attention, and which implementation runs it and why."""
    model = config.model
    if model.attention == "softmax":
        return "softmax", f"implementation {model.implementation or 'xla'}"
    batch = config.run.batch_size // config.optimizer.accumulation_steps // mesh.size
    dtype = jnp.dtype(model.dtype)

    def heads(count: int) -> jax.ShapeDtypeStruct:
        shape = (batch, config.data.sequence_length, count, model.head_size)
        return jax.ShapeDtypeStruct(shape, dtype)

    choice = dispatch.explain(
        heads(model.num_heads),
        heads(model.kv_heads),
        heads(model.kv_heads),
        jax.ShapeDtypeStruct((model.num_tables, model.num_planes, model.head_size), dtype),
        is_causal=True,
        log_decay=None if model.gate is None else heads(model.kv_heads),
        segment_ids=None if config.data.packing == "contiguous" else heads(1),
        normalization=model.normalization,
        implementation=model.implementation,
    )
    return f"race, implementation {choice.implementation}", choice.reason


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
