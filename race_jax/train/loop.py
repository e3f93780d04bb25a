"""The whole training run: setup, loop, evaluations and checkpoints.

The run directory holds `config.json`, `checkpoints/` and `metrics.jsonl`. At the end of the run
`summary.json` and `loss.png` are added.
"""

import dataclasses
from pathlib import Path

from race_jax.tasks.registry import task_named
from race_jax.train import agreement, processes
from race_jax.train.config import Config
from race_jax.train.console import only_warn
from race_jax.train.files import run_directory
from race_jax.train.interrupt import StopRequest
from race_jax.train.mesh import keep_compiled_programs, prepare_cpu_devices
from race_jax.train.metrics import Record
from race_jax.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: number of optimizer steps that were taken in all.
        stopped: the reason why the run ended early; None if it did not.
        evaluation: the last evaluation, over the whole held-out split; None if the run ended early.
        directory: the run's folder.
    """

    step: int
    stopped: str | None
    evaluation: Record | None
    directory: Path


def train(config: Config, *, exit_at_once: bool = False) -> Result:
    """Trains a task. The same call again continues the run from its last checkpoint.

    SIGTERM, SIGHUP, Ctrl-C and `run.max_seconds` end the run early, with a checkpoint.

    With `mesh.coordinator`, several processes call this function with the same configuration, apart
    from `mesh.process`. One of them that is asked to stop stops all.

    Args:
        config: the configuration of the run. It is checked and copied.
        exit_at_once: whether a second SIGTERM or Ctrl-C, or the loss of another process of the
            run, ends the whole process. Scripts want this; in a notebook it would end the notebook.

    Returns:
        How the run ended.

    Raises:
        ValueError: a field, a file or the run directory cannot be used. This is found before any
            training.
        FloatingPointError: a loss or a gradient is not finite. The last checkpoint is kept.
        RuntimeError: a checkpoint cannot be written, or no checkpoint can be read; or another
            process of the run has died.
        OSError: a file of the run directory cannot be written at the start.

    Source: beyond the paper.
    """
    config = config.validate()
    run = config.run
    processes.join(config)
    prepare_cpu_devices(config)
    keep_compiled_programs(config)
    if not processes.is_first():
        only_warn()
    path = Path(run.directory or f"runs/{config.task}").expanduser()
    with (
        processes.end_with_others(exit_at_once=exit_at_once),
        run_directory(path, is_first=processes.is_first()) as directory,
    ):
        processes.wait("the run directory is there")
        agreement.check_folder(directory)
        task = task_named(config.task)(config)
        agreement.check_same(config, task.digests)
        with (
            StopRequest(run.max_seconds, exit_at_once=exit_at_once) as stop,
            Trainer(config, task, directory) as trainer,
            processes.end_with_others(exit_at_once=exit_at_once),
        ):
            while trainer.step < run.steps and not processes.any_of(stop.reason):
                trainer.take_step()
                stop.start_clock()
                if trainer.is_due(run.log_every):
                    trainer.log()
                if trainer.is_due(run.eval_every):
                    trainer.evaluate()
                if trainer.is_due(run.checkpoint_every):
                    trainer.save()
            trainer.save()
            final = None
            if trainer.step == run.steps:
                final = trainer.finish(lambda: processes.any_of(stop.signalled))
            stopped = None
            if final is None:
                stopped = stop.signalled or stop.reason or "another process was asked to stop"
            if stopped:
                trainer.say_stopped(stopped)
            return Result(trainer.step, stopped, final, directory)
