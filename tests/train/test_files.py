"""A run's folder has one process, one configuration and enough space, and no half-written file."""

import errno
import os

import pytest

from race_jax.train.files import check_space, claim, is_free, run_directory, write_whole
from tests.train.small import small_config


def test_a_second_process_is_refused(tmp_path):
    with (
        run_directory(tmp_path / "run"),
        pytest.raises(ValueError, match=r"config\.run\.directory .* is in use by another process"),
        run_directory(tmp_path / "run"),
    ):
        pass
    with run_directory(tmp_path / "run") as directory:
        assert directory.is_dir()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"config\.run\.directory .*file/run cannot be written"),
        run_directory(tmp_path / "file" / "run"),
    ):
        pass


def test_a_new_folder_in_which_nothing_was_written_is_removed(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    for path in (new, old):
        with pytest.raises(ValueError, match="refused"), run_directory(path):
            raise ValueError("refused")
    assert not new.exists()
    assert old.exists()
    with run_directory(new):
        (new / "config.json").write_text("{}")
    assert (new / "config.json").exists()


def lock_error(number):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    return flock


def test_a_file_system_without_locks_is_used_with_a_word(tmp_path, monkeypatch, capsys):
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        monkeypatch.setattr("race_jax.train.files.fcntl.flock", lock_error(number))
        with run_directory(tmp_path / "run"):
            assert "has no locks" in capsys.readouterr().out


def test_a_damaged_record_of_the_run_is_named(tmp_path):
    start(tmp_path, resuming=False)
    for damage in (b"\0" * 40, b"\xff", b"[]", b'{"half'):
        (tmp_path / "config.json").write_bytes(damage)
        with pytest.raises(ValueError, match=r"config\.json, which .* cannot be read .* remove it"):
            start(tmp_path)
    (tmp_path / "config.json").unlink()
    start(tmp_path)


def test_too_little_space_is_refused_before_training(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(ValueError, match=r"MB of disk left; .* need about 1000000000000 MB"):
        check_space(tmp_path, 10**18)


def start(path, *, digest="a", resuming=True, **changes):
    config = small_config()
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    claim(path, config.validate(), {"the training text": digest}, resuming=resuming)


def test_another_configuration_is_refused_by_name(tmp_path):
    start(tmp_path, resuming=False)
    start(tmp_path)
    with pytest.raises(ValueError, match=r"config\.model\.width was 16 and is now 32\. Give the"):
        start(tmp_path, model__width=32)
    with pytest.raises(ValueError, match=r"b1 was 0\.9 and is now 0\.8; .*seed was 0 and is now 1"):
        start(tmp_path, optimizer__b1=0.8, run__seed=1)
    changed = r"the training text has changed \(sha256 a then, b now\)\. .*directory=.*-2 to the"
    with pytest.raises(ValueError, match=changed):
        start(tmp_path, digest="b")
    start(tmp_path)


def test_what_does_not_touch_the_result_may_change(tmp_path):
    start(tmp_path, resuming=False)
    start(
        tmp_path,
        mesh__data=2,
        run__log_every=1,
        run__checkpoint_every=7,
        model__remat=True,
        data__root="elsewhere",
    )


def test_options_of_another_attention_do_not_count():
    """Otherwise a new option of one attention would end the runs of all others."""
    config = small_config()
    values = config.to_dict()
    assert values["model"].keys() & {"race", "softmax", "linear"} == {"race"}
    assert values.keys() & {"language_model", "copy"} == {"language_model"}
    assert is_free("config.model.linear.any_option", config)
    assert is_free("config.model.softmax", config)
    assert not is_free("config.model.race.num_tables", config)
    config.model.attention = "linear"
    assert is_free("config.model.race.num_tables", config)
    assert not is_free("config.model.attention", config)


def test_only_a_run_at_a_constant_rate_may_be_extended(tmp_path):
    start(tmp_path, resuming=False)
    with pytest.raises(ValueError, match=r"config\.run\.steps was 40 and is now 50"):
        start(tmp_path, run__steps=50)
    start(tmp_path, resuming=False, optimizer__schedule="constant")
    start(tmp_path, optimizer__schedule="constant", run__steps=50)


def test_without_a_checkpoint_nothing_is_refused(tmp_path):
    start(tmp_path, resuming=False)
    start(tmp_path, resuming=False, model__width=32)
    start(tmp_path, model__width=32)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda stream: stream.write(b"old"))

    def fail(stream):
        stream.write(b"half of the n")
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
