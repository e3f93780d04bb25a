"""The training run on one page: set-up, loop, evaluation, checkpoint.

In: a `Config`. Out: a run directory with checkpoints, metrics and a picture, and a `Result`.
Equation: state <- step(state, batch), once per batch in the data's order.
"""

import dataclasses
from pathlib import Path

from race_jax.train.config import Config
from race_jax.train.data import build_data
from race_jax.train.files import run_directory
from race_jax.train.interrupt import StopRequest
from race_jax.train.mesh import prepare_cpu_devices
from race_jax.train.metrics import Record
from race_jax.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: optimizer steps taken in all.
        stopped: why it ended before its last step; None if it did not.
        evaluation: the last evaluation, over the whole held-out split; None if it was stopped.
        directory: the run's folder.
    """

    step: int
    stopped: str | None
    evaluation: Record | None
    directory: Path


def train(config: Config) -> Result:
    """Trains a language model; the same call again goes on where the last one ended.

    Args:
        config: the whole run; checked and copied here.

    Returns:
        How it ended. SIGTERM, Ctrl-C and `run.max_seconds` end it early, with a checkpoint.

    Raises:
        ValueError: a field, a file or the run directory cannot be used; said before any training.
        FloatingPointError: a loss or gradient is not finite; the last good checkpoint stands.
        RuntimeError: a checkpoint cannot be written, or none can be read.

    Source: beyond the paper.
    """
    config = config.validate()
    run = config.run
    prepare_cpu_devices(config)
    with run_directory(Path(run.directory or "runs/lm")) as directory:
        data = build_data(config.data, batch_size=run.batch_size, seed=run.seed)
        with StopRequest(run.max_seconds) as stop, Trainer(config, data, directory) as trainer:
            while trainer.step < run.steps and stop.reason is None:
                trainer.take_step()
                if trainer.is_due(run.log_every):
                    trainer.log()
                if trainer.is_due(run.eval_every):
                    trainer.evaluate()
                if trainer.is_due(run.checkpoint_every):
                    trainer.save()
            trainer.save()
            if trainer.step < run.steps:
                trainer.say_stopped(stop.reason)
                return Result(trainer.step, stop.reason, None, directory)
            return Result(trainer.step, None, trainer.finish(), directory)
