"""Checkpoints are restored, pruned, found damaged, and used without the training code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.data.tokenizer import CharacterTokenizer
from race_jax.train import processes
from race_jax.train.checkpoint import Checkpoints, checkpoint_folder, load_for_inference
from tests.train.small import VOCAB, small_config, small_parts

ALPHABET = "".join(chr(ord("A") + i) for i in range(VOCAB))


@pytest.fixture(scope="module")
def parts():
    """The graph and the state of the small run."""
    _, _, graph, state, _ = small_parts(small_config())
    return graph, state


def at_step(state, step: int):
    """Returns the state at another step, with parameters that depend on the step."""
    params = jax.tree.map(lambda leaf: leaf + step, state.params)
    return type(state)(params, state.fixed, state.opt_state, jnp.int32(step))


def about(step: int) -> dict:
    tokenizer = CharacterTokenizer(ALPHABET)
    config = small_config().validate()
    return {
        "data": {"step": step},
        "config": config.to_dict(),
        "task": {"tokenizer": tokenizer.to_dict()},
    }


def saved(folder, state, steps, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(at_step(state, step), about(step))
    return checkpoints


def largest_file(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def test_what_is_saved_comes_back_and_the_oldest_go(tmp_path, parts, assert_close):
    _, state = parts
    checkpoints = saved(tmp_path, state, (1, 2, 3), keep=2)
    assert checkpoints.steps() == [2, 3]
    restored = checkpoints.restore(state)
    checkpoints.close()
    assert_close("state", restored.state, at_step(state, 3), kind="rerun")
    assert restored.about == about(3)


def test_nothing_to_restore_is_none(tmp_path, parts):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore(parts[1]) is None
    checkpoints.close()


def test_what_a_killed_save_left_is_removed(tmp_path, parts):
    directory = tmp_path / "checkpoints"
    left = directory / "4.orbax-checkpoint-tmp-12"
    (left / "model").mkdir(parents=True)
    Checkpoints(directory, read_only=True).close()
    assert left.is_dir()
    Checkpoints(directory).close()
    assert not left.exists()


def test_saving_a_step_again_changes_nothing(tmp_path, parts):
    checkpoints = saved(tmp_path, parts[1], (4, 4))
    assert checkpoints.steps() == [4]
    checkpoints.close()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, remove])
@pytest.mark.parametrize("victim", ["largest", "digests.json"])
def test_a_damaged_one_is_reported_and_the_one_before_is_used(
    tmp_path, parts, assert_close, harm, victim
):
    _, state = parts
    folder = tmp_path / "checkpoints"
    saved(folder, state, (5, 6)).close()
    damaged = folder / "6"
    harm(largest_file(damaged) if victim == "largest" else damaged / victim)

    heard = []
    checkpoints = Checkpoints(folder, say=heard.append)
    restored = checkpoints.restore(state)
    assert_close("state", restored.state, at_step(state, 5), kind="rerun")
    assert len(heard) == 1
    assert heard[0].startswith("the checkpoint of step 6 is damaged (")
    assert (tmp_path / "checkpoints-damaged" / "6-0").is_dir()

    checkpoints.save(at_step(state, 6), about(6))
    assert_close("again", checkpoints.restore(state).state, at_step(state, 6), kind="rerun")
    checkpoints.close()


def test_only_damaged_ones_are_an_error_at_every_start_not_a_fresh_one(tmp_path, parts):
    _, state = parts
    folder = tmp_path / "checkpoints"
    saved(folder, state, (6, 7)).close()
    for step in (6, 7):
        remove(largest_file(folder / str(step)))
    for _ in range(2):
        checkpoints = Checkpoints(folder, say=lambda text: None)
        wrong = r"no whole checkpoint in .*checkpoints \(step 7: .* missing .*directory=.*-2, or"
        with pytest.raises(RuntimeError, match=wrong):
            checkpoints.restore(state)
        checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["6", "7"]


def test_a_first_save_that_a_kill_cut_off_is_no_loss(tmp_path, parts, monkeypatch):
    _, state = parts
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    with monkeypatch.context() as patch:
        patch.setattr("race_jax.train.checkpoint.write_text", lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="step 3 could not be written"):
            checkpoints.save(at_step(state, 3), about(3))
    checkpoints.close()
    heard = []
    checkpoints = Checkpoints(folder, say=heard.append)
    assert checkpoints.restore(state) is None
    assert "step 3 is damaged (it was not written completely)" in heard[0]
    checkpoints.save(at_step(state, 3), about(3))
    assert checkpoints.newest_whole() == 3
    checkpoints.close()


def test_a_failed_write_leaves_the_one_before(tmp_path, parts, monkeypatch, assert_close):
    _, state = parts
    checkpoints = saved(tmp_path, state, (1,))

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("race_jax.train.checkpoint.write_text", disk_full)
    with pytest.raises(RuntimeError, match=r"step 2 could not .* steps \[1\] are .* No space left"):
        checkpoints.save(at_step(state, 2), about(2))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, say=lambda text: None)
    assert_close("state", checkpoints.restore(state).state, at_step(state, 1), kind="rerun")
    checkpoints.close()


def test_the_death_of_another_process_is_not_taken_for_a_full_disk(tmp_path, parts, monkeypatch):
    def fails(*args, **options):
        raise jax.errors.JaxRuntimeError("Gloo AllGather failed")

    checkpoints = saved(tmp_path, parts[1], [1])
    monkeypatch.setattr(checkpoints._manager, "save", fails)
    with pytest.raises(RuntimeError, match="the checkpoint of step 2 could not be written"):
        checkpoints.save(at_step(parts[1], 2), about(2))
    monkeypatch.setattr(processes, "are_several", lambda: True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
        checkpoints.save(at_step(parts[1], 2), about(2))
    checkpoints.close()


def test_inference_gets_model_tokenizer_and_config(tmp_path, parts, assert_close):
    graph, state = parts
    saved(checkpoint_folder(tmp_path), state, (1, 2)).close()
    # Half of the newest checkpoint is missing, as it is while a run writes it. Reading changes
    # nothing.
    remove(checkpoint_folder(tmp_path) / "2" / "digests.json")
    model, tokenizer, config = load_for_inference(tmp_path)
    assert (checkpoint_folder(tmp_path) / "2").is_dir()
    assert tokenizer.decode(tokenizer.encode("CAB")) == "CAB"
    assert config == small_config().validate()
    expected = nnx.merge(graph, at_step(state, 1).params, state.fixed)
    tokens = np.arange(12)[None]
    assert_close("logits", model(tokens), expected(tokens), kind="rerun")


def test_inference_from_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoints in .*; give the directory of a training"):
        load_for_inference(tmp_path)
