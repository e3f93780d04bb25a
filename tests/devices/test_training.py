"""Training steps on meshes of several axes equal those on one device."""

import contextlib
import functools
import signal

import jax
import numpy as np
import pytest

from race_jax.data.rows import UnreadRows
from race_jax.tasks.language_model import LanguageModel
from race_jax.tasks.task import shapes_of
from race_jax.train import mesh, trainer
from race_jax.train.disk_step import DiskStep, make_disk_eval_step
from race_jax.train.loop import train
from race_jax.train.mesh import put_batch
from race_jax.train.metrics import read_records
from race_jax.train.optimizer import make_schedule
from race_jax.train.step import Segments, make_eval_step, make_train_step
from race_jax.train.trainer import Trainer
from tests.train.small import small_batch, small_config, small_parts

pytestmark = pytest.mark.once

# Sizes of the axes, the length of segments of the sequences of 24 tokens, and whether rows are
# read from the disk. Seven devices do not divide 24, nor do segments of 21: whole sequences are
# filled up with 4 tokens, which are all that the last device has, and so are last segments of 3.
MESHES = {
    "data x seq x fsdp": ((2, 2, 2), None, False),
    "streamed, data x seq x fsdp": ((2, 2, 2), 8, False),
    "from the disk, data x seq x fsdp": ((2, 2, 2), 8, True),
    "uneven": ((1, 7, 1), None, False),
    "streamed, uneven": ((1, 7, 1), 21, False),
    "from the disk, uneven": ((1, 7, 1), 21, True),
}


def on_disk():
    """The tokens of `small_batch` that have weight, as rows on the disk."""
    batch = small_batch()
    rows = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)
    counts = batch["weights"].sum(1).astype(int)
    return UnreadRows([ids[: n + 1] for ids, n in zip(rows, counts, strict=True)], 24)


def run_steps(sizes, segment_length=None, from_disk=False, steps=3):
    """The metrics of a few steps and of an evaluation, and the parameters after them."""
    config = small_config()
    config.run.batch_size = 4
    config.model.race.short_conv = "before"
    config.model.race.forget_gate = "data"
    config.model.positions, config.model.max_length = "learned", 28
    config.mesh.data, config.mesh.seq, config.mesh.fsdp = sizes
    config.optimizer.segment_length = segment_length
    devices, optimizer, graph, state, batch = small_parts(config)
    segments = None
    if segment_length is not None:
        segments = Segments(segment_length // sizes[1])
        batch = put_batch(devices, small_batch(), segments.length)
    schedule = make_schedule(config.optimizer, config.run.steps)
    makes = LanguageModel, graph, optimizer, schedule, devices
    if from_disk:
        batch = on_disk()
        about = state.params, shapes_of(batch), segments
        step = DiskStep(*makes, *about)
        evaluate = make_disk_eval_step(LanguageModel, graph, devices, *about)
    else:
        step = make_train_step(*makes, segments=segments)
        evaluate = make_eval_step(LanguageModel, graph, devices, segments)
    metrics = []
    for _ in range(steps):
        state, measured = step(state, batch, jax.random.key(0))
        metrics.append(jax.device_get(measured))
    scores = evaluate(state.params, state.fixed, batch)
    return metrics, jax.tree.map(np.float32, jax.device_get(scores)), state


@functools.cache
def one_device():
    return run_steps((1, 1, 1))


@pytest.mark.parametrize("name", MESHES)
def test_steps_are_those_of_one_device(name, monkeypatch, assert_close):
    monkeypatch.setattr(mesh, "LEAST_SHARDED", 64)
    metrics, scores, state = run_steps(*MESHES[name])
    wanted, wanted_scores, one = one_device()
    # The optimizer's means of gradients are linear in them. Parameters are not: Adam divides.
    got, want = jax.device_get((state.opt_state, one.opt_state))
    assert_close("metrics", metrics, wanted, kind="gradients")
    assert_close("scores", scores, wanted_scores, kind="outputs")
    assert_close("optimizer", got, want, kind="gradients")
    spread = [x for x in jax.tree.leaves(state.params) if not x.sharding.is_fully_replicated]
    assert bool(spread) == (MESHES[name][0][2] > 1)


@pytest.mark.parametrize(("segment_length", "from_disk"), [(None, False), (8, False), (8, True)])
def test_steps_without_the_check_of_devices_are_the_same(
    segment_length, from_disk, monkeypatch, assert_close
):
    """On GPUs the trainer turns JAX's check off, which changes how JAX differentiates sums."""
    monkeypatch.setattr(mesh, "LEAST_SHARDED", 64)
    monkeypatch.setattr(mesh, "checks_devices", lambda mesh: False)
    metrics, scores, state = run_steps((2, 2, 2), segment_length, from_disk)
    wanted, wanted_scores, one = one_device()
    got, want = jax.device_get((state.opt_state, one.opt_state))
    assert_close("metrics", metrics, wanted, kind="gradients")
    assert_close("scores", scores, wanted_scores, kind="outputs")
    assert_close("optimizer", got, want, kind="gradients")


def averaged_steps(devices):
    """Metrics, scores and parameters after three steps of two parts, by devices that split rows."""
    config = small_config()
    config.model.attention = "softmax"  # it compiles fastest
    config.run.batch_size, config.optimizer.accumulation_steps = 8, 2
    config.mesh.data = devices
    config.optimizer.eps = 1e-2  # else Adam makes large steps of gradients that are rounding
    mesh, optimizer, graph, state, batch = small_parts(config)
    step = make_train_step(
        LanguageModel, graph, optimizer, lambda step: 1.0, mesh, accumulation_steps=2
    )
    compiled = step.lower(state, batch, jax.random.key(0)).compile()
    assert "all-gather" not in compiled.as_text()
    assert len(batch["inputs"].sharding.device_set) == devices
    for _ in range(3):
        state, metrics = compiled(state, batch, jax.random.key(0))
    scores = make_eval_step(LanguageModel, graph, mesh)(state.params, state.fixed, batch)
    return jax.device_get((metrics, scores, state.params))


def test_devices_that_split_rows_equal_one_with_and_without_the_check(monkeypatch, assert_close):
    monkeypatch.setattr(mesh, "checks_devices", lambda mesh: mesh.size != 2)  # two are as GPUs are
    one, two, four = map(averaged_steps, (1, 2, 4))
    assert_close("2 devices, not checked", two, one, kind="gradients")
    assert_close("4 devices, checked", four, one, kind="gradients")


@pytest.mark.parametrize(
    ("sizes", "stretch"), [((2, 2, 2), None), ((2, 2, 2), 4), ((1, 7, 1), None), ((1, 7, 1), 3)]
)
def test_rows_that_are_read_where_they_are_needed_are_the_batch(sizes, stretch):
    config = small_config()
    config.mesh.data, config.mesh.seq, config.mesh.fsdp = sizes
    devices, rows = mesh.make_mesh(config), on_disk()
    want = put_batch(devices, rows.piece(0, 24), stretch)
    found = mesh.put_rows(devices, rows, stretch)
    assert found.keys() == want.keys()
    for name, got in found.items():
        assert got.sharding == want[name].sharding
        np.testing.assert_array_equal(got, want[name])


def test_a_segment_may_be_longer_than_the_sequence(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("the cat sees the dog\n" * 99)
    config = small_config()
    config.data.source, config.data.train_files = "files", (str(tmp_path / "t.txt"),)
    config.run.directory, config.run.steps, config.run.tensorboard = str(tmp_path / "r"), 3, False
    config.data.sequence_length, config.optimizer.segment_length, config.mesh.seq = 23, 100, 2
    compiled, compile_together = [], trainer.compile_together
    monkeypatch.setattr(
        trainer, "compile_together", lambda *given: compiled.append(0) or compile_together(*given)
    )
    assert train(config).step == 3
    assert len(compiled) == 1  # at the start, for the length that batches have on the devices


def test_a_run_goes_on_on_another_mesh(tmp_path, assert_close):
    """Half of a run on eight devices and half on one gives the losses of one device."""

    def losses(directory, *parts):
        for steps, sizes in parts:
            config = small_config()
            config.task, config.run.directory = "copy", str(tmp_path / directory)
            config.run.steps, config.run.tensorboard, config.run.log_every = 8, False, 1
            config.mesh.data, config.mesh.seq, config.mesh.fsdp = sizes
            config.data.sequence_length = 23
            with stop_after(steps):
                train(config)
        records = read_records(tmp_path / directory / "metrics.jsonl")
        return np.array([record["loss"] for record in records if record["kind"] == "train"])

    one = losses("one", (8, (1, 1, 1)))
    assert len(one) == 8
    moved = losses("moved", (4, (2, 2, 2)), (8, (1, 1, 1)))
    assert_close("losses", moved, one, kind="gradients")


@contextlib.contextmanager
def stop_after(steps):
    """Stops a run, as a signal would, after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        take = Trainer.take_step

        def take_step(trainer):
            take(trainer)
            if trainer.step == steps:
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(Trainer, "take_step", take_step)
        yield


def test_a_run_with_split_sequences_shows_its_sample(tmp_path, capsys):
    """The sample is drawn on one device, by the model as it is without a mesh."""
    config = small_config()
    config.data.sequence_length, config.model.positions = 23, "learned"
    config.run.directory, config.run.tensorboard = str(tmp_path / "run"), False
    config.run.steps, config.optimizer.warmup_steps, config.run.batch_size = 2, 1, 32
    config.language_model.sample_length = 3
    config.mesh.seq = 2
    train(config)
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "3 tokens after" in text
    assert "left out" not in text
