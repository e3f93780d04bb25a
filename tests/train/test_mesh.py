"""A run takes the devices that it needs, and says when it cannot have them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from race_jax.train import mesh as meshes
from tests.train.small import small_batch, small_config


@pytest.mark.parametrize(("cores", "batch", "parts", "want"), [
    (2, 32, 1, 2), (3, 32, 1, 2), (8, 12, 1, 6), (8, 12, 4, 3), (4, 7, 1, 1), (16, 7, 1, 7),
])  # fmt: skip
def test_as_many_cores_as_divide_the_batch(cores, batch, parts, want, monkeypatch):
    asked = {}
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    config = small_config()
    config.mesh.data = None
    config.run.batch_size, config.optimizer.accumulation_steps = batch, parts
    meshes.prepare_cpu_devices(config)
    assert asked == {"jax_num_cpu_devices": want}


def test_devices_that_are_already_there_are_taken_as_they_are():
    jax.devices()
    config = small_config()
    config.mesh.data = 16
    meshes.prepare_cpu_devices(config)
    assert len(jax.local_devices()) < 16


def test_more_devices_than_there_are_is_refused():
    config = small_config()
    config.mesh.data = 16
    with pytest.raises(ValueError, match=r"config\.mesh data=16 x seq=1 x fsdp=1 needs 16 devices"):
        meshes.make_mesh(config)


def test_batches_are_spread_and_parameters_are_not():
    mesh = meshes.make_mesh(small_config())
    assert mesh.axis_names == ("data", "seq", "fsdp")
    assert meshes.on_every_device(mesh).spec == P()
    batch = meshes.put_batch(mesh, small_batch())
    assert all(array.sharding.spec == P(("data", "fsdp"), "seq") for array in batch.values())


@pytest.mark.parametrize(("platform", "checks"), [("cpu", True), ("gpu", False), ("tpu", True)])
def test_only_gpus_do_without_the_check_of_devices(platform, checks):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    assert meshes.checks_devices(mesh) is checks


@pytest.mark.parametrize("checks", [True, False])
def test_gradients_and_constants_are_summed(checks, monkeypatch, assert_close):
    """A result need not depend on the batch, and is still added up over devices."""
    monkeypatch.setattr(meshes, "checks_devices", lambda mesh: checks)
    mesh = meshes.make_mesh(small_config())

    def sums(batch, scale):
        return jax.grad(lambda scale: jnp.sum(scale * batch))(scale), jnp.ones(())

    run = meshes.sum_over_devices(sums, mesh, specs=(P(),), out_specs=P())
    got = jax.jit(run)(jnp.arange(4.0)[:, None], jnp.ones(()))
    assert_close("sums", got, (jnp.float32(6.0), jnp.float32(mesh.size)), kind="rerun")
