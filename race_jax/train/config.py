"""The record that describes one training run.

It is filled from a config module, the command line or a stored JSON dict. `Config.validate` checks
it, and every error names the field.
"""

import copy
import dataclasses
import json
from typing import Any

from race_jax.data.config import DataConfig
from race_jax.layers.registry import ATTENTIONS, splits_sequences
from race_jax.models.config import ModelConfig
from race_jax.records import above_zero, at_least, check_fields, fill, one_of
from race_jax.tasks import registry
from race_jax.tasks.task import TaskConfig

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW, its schedule, clipping and accumulation.

    Attributes:
        learning_rate: the highest learning rate, which is reached after `warmup_steps`.
        end_learning_rate: the learning rate at the last step.
        schedule: how the learning rate falls after a linear warm-up: "cosine", "linear"
            or "constant".
        warmup_steps: number of steps of the warm-up.
        b1, b2, eps: the constants of Adam.
        weight_decay: decoupled weight decay, on matrices only (see `optimizer.decay_mask`).
        clip_norm: the largest global norm of the gradient; None does not clip.
        accumulation_steps: number of parts that a batch is split into. They are computed one after
            another, to save memory.
        segment_length: tokens that are read at a time, for sequences that are too long for the
            memory. The state of the model is carried from segment to segment, and the gradient is
            exact. With data.source="tokens" segments come from the disk. None reads sequences
            whole.
        truncate_gradient: whether the gradient stops at the borders of segments. This is faster,
            and not exact.
    """

    learning_rate: float = 1e-3
    end_learning_rate: float = 1e-5
    schedule: str = "cosine"
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    accumulation_steps: int = 1
    segment_length: int | None = None
    truncate_gradient: bool = False

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message names it.
        """
        one_of("config.optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "eps"):
            above_zero(f"config.optimizer.{name}", getattr(self, name))
        if self.clip_norm is not None:
            above_zero("config.optimizer.clip_norm", self.clip_norm)
        for name in ("end_learning_rate", "warmup_steps", "weight_decay"):
            at_least(f"config.optimizer.{name}", getattr(self, name), 0)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"config.optimizer.{name} must lie in [0, 1), got {getattr(self, name)}"
                )
        at_least("config.optimizer.accumulation_steps", self.accumulation_steps, 1)
        if self.segment_length is not None:
            at_least("config.optimizer.segment_length", self.segment_length, 1)
        elif self.truncate_gradient:
            raise ValueError(
                "config.optimizer.truncate_gradient needs config.optimizer.segment_length"
            )
        if self.end_learning_rate > self.learning_rate:
            raise ValueError(
                "config.optimizer.end_learning_rate must not exceed learning_rate "
                f"{self.learning_rate}, got {self.end_learning_rate}"
            )


@dataclasses.dataclass
class MeshConfig:
    """The device mesh. It has data * seq * fsdp devices, of one process or of several.

    Attributes:
        data: number of devices that share the sequences of a batch. None takes as many local
            devices (on a CPU, usable cores) as divide the batch.
        seq: number of devices that share every sequence. Each gets a stretch of its tokens. If
            they do not divide the length, tokens that count for nothing are added at the end.
        fsdp: number of devices that share the parameters and the state of the optimizer. They share
            the sequences of a batch too.
        coordinator: for a run of several processes, HOST:PORT of the first one, which all of them
            must reach; "auto" asks the launcher (Slurm, Open MPI and others that JAX knows). None
            is a run of one process.
        processes: the number of processes, with HOST:PORT.
        process: the number of this process, from 0, with HOST:PORT.
    """

    data: int | None = None
    seq: int = 1
    fsdp: int = 1
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message names it.
        """
        if self.data is not None:
            at_least("config.mesh.data", self.data, 1)
        at_least("config.mesh.seq", self.seq, 1)
        at_least("config.mesh.fsdp", self.fsdp, 1)
        self._validate_processes()

    def _validate_processes(self) -> None:
        """Raises ValueError if the fields of several processes do not go together."""
        given = self.processes, self.process
        if self.coordinator in (None, "auto"):
            if given != (None, None):
                raise ValueError(
                    "config.mesh.processes and config.mesh.process need config.mesh.coordinator="
                    f"HOST:PORT, got {self.coordinator!r}"
                )
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(
                f'config.mesh.coordinator must be HOST:PORT or "auto", got {self.coordinator!r}'
            )
        if None in given or not 0 <= self.process < self.processes:
            raise ValueError(
                "config.mesh.coordinator=HOST:PORT needs config.mesh.processes and "
                f"config.mesh.process, with 0 <= process < processes; got {self.processes} and "
                f"{self.process}"
            )


@dataclasses.dataclass
class RunConfig:
    """The length of the run, and the files that it writes.

    Attributes:
        directory: folder of checkpoints, metrics and plots; it may start with `~`. None is
            `runs/NAME`, where NAME is the name of the config file with the overrides that change
            what is learned.
        start_from: folder of another run, whose parameters and hash planes this run starts with; it
            may start with `~`. The models must have the same shapes, and the same tokenizer or
            classes. Texts, lengths, losses and the optimizer may differ, so a model can be trained
            on short sequences first and on long ones later. None draws parameters from the seed.
        steps: number of optimizer steps.
        batch_size: sequences per optimizer step, over all devices and accumulation parts.
        seed: seed of parameters, planes, data order and dropout.
        max_seconds: seconds after which the run saves a checkpoint and stops; the same command
            continues it. They are counted from the first step, when everything is compiled.
            None sets no limit.
        log_every: steps between two lines of metrics.
        eval_every: steps between two evaluations; 0 evaluates at the end only.
        eval_batches: number of batches of an evaluation during training; None takes the whole
            split. The evaluation at the end always takes the whole split.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: number of checkpoints that are kept, the newest ones.
        tensorboard: also write TensorBoard events, if `tensorboardX` is installed.
        compilation_cache: folder in which JAX keeps compiled programs from one start to the next;
            it may start with `~`. None leaves JAX's own setting, JAX_COMPILATION_CACHE_DIR.
    """

    directory: str | None = None
    start_from: str | None = None
    steps: int = 1000
    batch_size: int = 32
    seed: int = 0
    max_seconds: float | None = None
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    tensorboard: bool = True
    compilation_cache: str | None = None

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message names it.
        """
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            at_least(f"config.run.{name}", getattr(self, name), 1)
        # At least two: if the newest one is damaged, the one before it is used.
        at_least("config.run.keep_checkpoints", self.keep_checkpoints, 2)
        for name in ("seed", "eval_every"):
            at_least(f"config.run.{name}", getattr(self, name), 0)
        if self.seed >= 2**32:
            raise ValueError(f"config.run.seed must be < 2**32, got {self.seed}")
        if self.eval_batches is not None:
            at_least("config.run.eval_batches", self.eval_batches, 1)
        if self.max_seconds is not None:
            above_zero("config.run.max_seconds", self.max_seconds)


@dataclasses.dataclass
@registry.add_sections
class Config:
    """Everything that determines a run.

    Each task of `race_jax.tasks.registry` has a section of its own, by its name:
    `language_model`, `copy` and so on. Only that of the chosen task counts.

    Attributes:
        task: the name of the task.
        model: the transformer.
        data: the text, and how it is cut into sequences.
        optimizer: AdamW and its schedule.
        mesh: the devices.
        run: the length of the run, and the files that it writes.

    Example:
        >>> config = Config()
        >>> config.optimizer.learning_rate = -1.0
        >>> config.validate()
        Traceback (most recent call last):
            ...
        ValueError: config.optimizer.learning_rate must be > 0, got -1.0
    """

    task: str = registry.DEFAULT
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def validate(self) -> "Config":
        """Returns a checked copy, in which every value has its proper type.

        Raises:
            ValueError: a field is unknown, has the wrong type, is out of range, or does not go
                with another one. The message names it.
        """
        config = copy.deepcopy(self)
        check_fields(config, "config")
        registry.task_named(config.task)
        for path, record in (("model", config.model), (config.task, config.task_config())):
            try:
                record.validate()
            except ValueError as error:
                raise ValueError(f"config.{path}.{error}") from None
        for section in (config.data, config.optimizer, config.mesh, config.run):
            section.validate()
        config._validate_together()
        return config

    def task_config(self) -> TaskConfig:
        """Returns the record of the chosen task."""
        return getattr(self, self.task)

    def reads_from_disk(self) -> bool:
        """Whether sequences are read from a token file, segment by segment, and not held whole."""
        return self.data.is_on_disk and self.optimizer.segment_length is not None

    def _validate_stretches(self) -> None:
        """Checks what a mesh needs whose axis "seq" splits the sequences."""
        seq, segment = self.mesh.seq, self.optimizer.segment_length
        if segment is not None and segment < self.data.sequence_length and segment % seq:
            raise ValueError(
                f"config.optimizer.segment_length must be a multiple of config.mesh.seq={seq}, or "
                f"at least config.data.sequence_length, got {segment}; try "
                f"{-(-segment // seq) * seq}"
            )
        if not registry.task_named(self.task).splits_sequences:
            raise ValueError(
                f"config.mesh.seq must be 1 with config.task={self.task!r}, whose loss needs whole "
                f"sequences; got {seq}. Share the sequences of a batch by config.mesh.data instead"
            )
        if self.data.packing == "packed" and not registry.task_named(self.task).is_causal:
            raise ValueError(
                f'config.mesh.seq must be 1 with config.data.packing="packed" and config.task='
                f"{self.task!r}, whose model reads documents in both directions; got {seq}. Share "
                "the sequences of a batch by config.mesh.data instead"
            )
        for attention in self.model.attentions:
            if not splits_sequences(attention):
                raise ValueError(
                    f"config.mesh.seq must be 1 with {attention!r} attention, which reads whole "
                    f"sequences; got {seq}"
                )

    def _validate_positions(self) -> None:
        """Checks that there is a learned position for every token, if positions are learned."""
        length, seq = self.data.sequence_length, self.mesh.seq
        filled = -(-length // seq) * seq
        if self.model.positions == "learned" and filled > self.model.max_length:
            rounded = (
                f", which config.mesh.seq={seq} rounds up to {filled}; raise "
                "config.model.max_length, or take a config.mesh.seq that divides the length"
            )
            raise ValueError(
                "config.data.sequence_length must not exceed config.model.max_length "
                f"{self.model.max_length} with learned positions, got {length}"
                f"{rounded if filled > length else ''}"
            )

    def _validate_direction(self) -> None:
        """Checks that the attention reads tokens in the direction of the task's model."""
        is_causal = registry.task_named(self.task).is_causal
        for name in self.model.attentions:
            try:
                self.model.attention_config(name).check_direction(is_causal)
            except ValueError as error:
                reads = "reads in one direction" if is_causal else "reads in both directions"
                raise ValueError(
                    f"config.model.{name} does not go with config.task={self.task!r}, "
                    f"whose model {reads}: {error}"
                ) from None

    def _validate_together(self) -> None:
        self._validate_direction()
        if self.reads_from_disk() and not registry.task_named(self.task).reads_token_files:
            raise ValueError(
                f"config.data.source={self.data.source!r} with config.optimizer.segment_length "
                f"does not go with config.task={self.task!r}, which makes its batches in memory; "
                "leave segment_length out, or choose another source"
            )
        run, parts = self.run, self.optimizer.accumulation_steps
        if run.start_from is not None and self.mesh.coordinator is not None:
            raise ValueError(
                "config.run.start_from is read by one process; leave out config.mesh.coordinator, "
                "stop the run after its first checkpoint, and go on with several processes"
            )
        if run.batch_size * self.data.sequence_length >= 2**31 and not self.reads_from_disk():
            raise ValueError(
                "config.run.batch_size times config.data.sequence_length must be < 2**31, "
                f"got {run.batch_size} x {self.data.sequence_length}; docs/streaming.md says how "
                "longer sequences are read from the disk"
            )
        if run.batch_size % parts:
            raise ValueError(
                f"config.run.batch_size must be divisible by accumulation_steps {parts}, "
                f"got {run.batch_size}"
            )
        data, fsdp = self.mesh.data or 1, self.mesh.fsdp
        if (run.batch_size // parts) % (data * fsdp):
            name, got = ("data", data) if fsdp == 1 else ("data * fsdp", f"{data} * {fsdp}")
            raise ValueError(
                f"config.mesh.{name} must divide the {run.batch_size // parts} sequences of one "
                f"accumulation part, got {got}"
            )
        if self.mesh.seq > 1:
            self._validate_stretches()
        if self.optimizer.warmup_steps >= run.steps:
            raise ValueError(
                f"config.optimizer.warmup_steps must be < config.run.steps {run.steps}, got "
                f"{self.optimizer.warmup_steps}; add --config.optimizer.warmup_steps="
                f"{run.steps // 4}"
            )
        self._validate_positions()

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as nested dicts of JSON values. Tuples become lists.

        The sections of tasks and attentions that were not chosen are left out. So a run does not
        depend on what else is registered.
        """
        values = dataclasses.asdict(self)
        for name in set(registry.TASKS) - {self.task}:
            del values[name]
        for name in set(ATTENTIONS) - set(self.model.attentions):
            del values["model"][name]
        if self.model.hybrid is None:
            del values["model"]["hybrid"], values["model"]["hybrid_every"]
        if self.model.positions != "rope":
            del values["model"]["rope_base"]
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Returns the checked record that `to_dict` turned into a dict.

        Raises:
            ValueError: a field is unknown or cannot be used. The message names it.
        """
        config = cls()
        fill(config, values, "config")
        return config.validate()
