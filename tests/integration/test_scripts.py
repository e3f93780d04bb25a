"""Every training script trains the tasks that it is named after, and sends others away."""

import os
import pathlib
import subprocess
import sys

import pytest

import train_classifier
import train_lm
import train_mlm

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("script", "config", "said"),
    [
        (train_mlm, "lm_default", 'which trains config.task="masked_lm"; scripts/train_lm.py'),
        (train_classifier, "mlm_wikitext2", "trains classifiers: config.task must be text_class"),
    ],
)
def test_another_task_is_refused_in_one_sentence(script, config, said, capsys):
    assert script.main([f"--config={CONFIGS / config}.py"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{script.__name__}: config.task=")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("script", [train_lm, train_mlm, train_classifier])
def test_help_names_the_script_and_the_exit_status(script, capsys):
    assert script.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert f"scripts/{script.__name__}.py --config configs/" in out
    assert "75   the run was stopped early" in out
    assert "  --config.masked_lm.mask_rate=0.15 (float)" in out


def test_the_right_task_reaches_the_data(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for script, config in ((train_mlm, "mlm_wikitext2"), (train_classifier, "cls_sst2")):
        words = [f"--config={CONFIGS / config}.py", f"--config.data.root={tmp_path}"]
        assert script.main(words) == 2
        assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", "line 1: SyntaxError: "),
        ("\ndef get_config():\n    return nothing\n", "line 3: NameError: name 'nothing' is not"),
    ],
)
def test_a_configuration_file_that_fails_is_named_with_its_line(text, said, capsys, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(text)
    assert train_lm.main([f"--config={file}"]) == 2
    assert capsys.readouterr().err.startswith(f"train_lm: {file}, {said}")


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [(KeyboardInterrupt, 130, "stopped by Ctrl-C"), (BrokenPipeError, 141, "")],
)
def test_scripts_end_in_words_on_ctrl_c_and_where_nobody_reads(raised, status, said):
    raises = f"def main(words):\n    raise {raised.__name__}\n"
    script = f"import command_line\n{raises}command_line.main_of(main)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(CONFIGS.parent / "scripts")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert said in done.stderr
    assert done.stderr.count("\n") == bool(said)  # one sentence, or silence
