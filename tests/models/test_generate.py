"""`scripts/generate.py` writes text while it is drawn, and says clearly what is wrong."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import nnx

from race_jax.data.config import DataConfig
from race_jax.data.vocabulary import ByteTokenizer, CharacterTokenizer, WordTokenizer
from race_jax.models.decode import Sampling
from race_jax.models.decode import generate as draw
from race_jax.train.checkpoint import Checkpoints, checkpoint_folder
from race_jax.train.config import Config
from race_jax.train.state import TrainState
from tests.models.small import build, describe

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "generate.py"
WORDS = WordTokenizer(["<eos>", "the", "cat", "sat"], end_of_line=True)


@pytest.fixture(scope="session")
def script():
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    flags.FLAGS.mark_as_parsed()
    return module


def save_run(directory, tokenizer, **changes):
    """A run of no steps, with the model that `build` makes."""
    record, network = {"tokenizer": tokenizer.to_dict()}, build(tokenizer.vocab_size, **changes)
    return save_model(directory, network, record, model=describe(**changes))


def save_model(directory, network, record, **sections):
    config = Config(data=DataConfig(sequence_length=8), **sections).validate()
    params, fixed = nnx.state(network, nnx.Param, ...)
    state = TrainState(params, fixed, opt_state={"none": jnp.zeros(1)}, step=jnp.zeros((), int))
    checkpoints = Checkpoints(checkpoint_folder(directory))
    checkpoints.save(state, {"config": config.to_dict(), "task": record})
    checkpoints.close()
    return str(directory)


@pytest.fixture(scope="session")
def race_run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("race"), ByteTokenizer())


@pytest.fixture(scope="session")
def softmax_run(tmp_path_factory):
    changes = {"attention": "softmax", "positions": "learned", "max_length": 8}
    return save_run(tmp_path_factory.mktemp("softmax"), WORDS, **changes)


def run(script, **options):
    with flagsaver.flagsaver(**options):
        script.main(["generate.py"])


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment of the commands, which share their compiled programs."""
    return {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def test_the_command_line_writes_the_model_s_own_continuation(race_run, environment):
    arguments = [f"--checkpoint={race_run}", "--prompt=é", "--max_tokens=9", "--greedy"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    prompt = ByteTokenizer().encode("é")
    drawn = draw(build(256), prompt[None], max_tokens=9, sampling=Sampling(greedy=True))[0]
    want = ByteTokenizer().decode([*prompt, *drawn]) + "\n"
    assert done.stdout.decode() == want
    assert b"9 tokens, " in done.stderr
    assert b" tokens/s" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(race_run, environment):
    command = [sys.executable, SCRIPT, f"--checkpoint={race_run}", "--prompt=ab"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe) as run:
        assert run.stdout.read(2) == b"ab"
        run.stdout.close()
        said = run.stderr.read().decode()
    assert run.returncode == 0, said
    assert "Traceback" not in said


def test_learned_positions_say_where_they_end(script, softmax_run, capsys):
    run(script, checkpoint=softmax_run, prompt="the cat", max_tokens=20, seed=3)
    out, err = capsys.readouterr()
    assert out.startswith("the cat ")
    assert len(WORDS.encode(out.removesuffix("\n"))) == 2 + 7
    assert "the learned positions end at 8 tokens, so 7 are drawn instead of 20" in err


def test_sparse_decoding_says_what_it_kept(script, softmax_run, capsys):
    options = {"checkpoint": softmax_run, "prompt": "the cat", "max_tokens": 5, "greedy": True}
    run(script, **options)
    dense, _ = capsys.readouterr()
    sparse = {"decode_attention": "sparse", "scorer": "quantized", "budget": 4, "sink": 1}
    run(script, **options, **sparse, window=1, dense_below=5)
    _, err = capsys.readouterr()
    assert "sparse: at most 4 tokens a head by scorer='quantized'" in err
    assert "1 + 1 of them forced, dense below 5" in err
    assert "kept: 4 of 6 tokens a head in the last step; 2 of 4 steps were sparse" in err
    run(script, **options, decode_attention="sparse")
    whole, err = capsys.readouterr()
    assert whole == dense
    assert "kept: all tokens in all 4 steps" in err


def test_a_stop_ends_the_text_and_is_not_written(script, race_run, capsys):
    options = {"checkpoint": race_run, "prompt": "a", "max_tokens": 9, "greedy": True}
    run(script, **options)
    whole, _ = capsys.readouterr()
    prompt = ByteTokenizer().encode("a")
    drawn = draw(build(256), prompt[None], max_tokens=9, sampling=Sampling(greedy=True))[0]
    index = next(i for i, token in enumerate(drawn) if token < 128)  # a byte that is a character
    first = drawn.tolist().index(drawn[index])
    run(script, **options, stop=[chr(drawn[index])])
    stopped, _ = capsys.readouterr()
    assert stopped == ByteTokenizer().decode([*prompt, *drawn[:first]]) + "\n"
    assert len(stopped) < len(whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": ["the cat"], "max_tokens": 1}, "--stop='the cat' is 2 tokens"),
        ({"seed": 2**40, "max_tokens": 1}, r"seed=1099511627776 must lie from 0 to 2\*\*32 - 1"),
        ({"seed": -1, "max_tokens": 1}, "seed=-1 must lie from 0"),
        ({"checkpoint": "nowhere"}, "no checkpoints in nowhere"),
        ({"prompt": ""}, "--prompt is empty"),
        ({"prompt": " "}, "has no token"),
        ({"prompt": "the dog"}, "the word 'dog' does not occur in the training text"),
        ({"prompt": "the cat " * 5}, "does not fit the learned positions"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"budget": 9}, "--budget has no effect with --decode_attention=dense"),
        ({"decode_attention": "sparse", "budget": 9}, "budget=9 must hold sink=16 and window=128"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_in_one_line(script, softmax_run, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        run(script, **{"checkpoint": softmax_run, "prompt": "the cat"} | options)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("generate.py: ")
    assert err.count("\n") == 1
    assert re.search(words, err)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decode_attention": "sparse", "budget": 9}, "budget=9 must hold sink=16"),
        ({"budget": 9}, "--budget has no effect"),
        ({"stop": ["the cat"]}, "is 2 tokens"),
        ({"prompt": "the dog"}, "the word 'dog' does not occur"),
        ({"prompt": "the cat " * 5}, "does not fit the learned positions"),
    ],
    ids=str,
)
def test_flags_are_checked_before_parameters_are_read(
    script, softmax_run, capsys, monkeypatch, options, words
):
    monkeypatch.setattr(Checkpoints, "model", lambda *_: pytest.fail("the parameters are read"))
    with pytest.raises(SystemExit):
        run(script, **{"checkpoint": softmax_run, "prompt": "the cat"} | options)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"decode_attention": "sparse"},
        {"decode_attention": "sparse", "budget": 9},
        {"decode_attention": "sparse", "code_bits": 77},
        {"budget": 9},
    ],
    ids=str,
)
def test_a_model_without_keys_is_named_before_wrong_options(script, race_run, capsys, options):
    with pytest.raises(SystemExit):
        run(script, checkpoint=race_run, prompt="a", **options)
    assert "this model keeps no keys, so there is nothing to select" in capsys.readouterr().err


def test_an_attention_without_sparse_scores_is_named_before_wrong_options(script, tmp_path, capsys):
    directory = save_run(tmp_path / "sigmoid", WORDS, attention="sigmoid")
    with pytest.raises(SystemExit):
        run(script, checkpoint=directory, prompt="the", decode_attention="sparse", budget=9)
    assert "sparse scores know nothing of weights other than" in capsys.readouterr().err


def test_a_run_of_another_task_is_refused(script, tmp_path, capsys):
    directory = save_model(tmp_path / "copies", build(9), {}, model=describe(), task="copy")
    with pytest.raises(SystemExit) as stop:
        run(script, checkpoint=directory, prompt="a")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err == (
        f"generate.py: {directory} is a run of the task 'copy', which has no tokenizer; give the "
        "directory of a run that was trained on text\n"
    )


def test_a_model_that_sees_later_tokens_is_refused(script, tmp_path, capsys):
    network = build(5, forget_gate=None)
    model, record = describe(forget_gate=None), {"tokenizer": WORDS.to_dict()}
    directory = save_model(tmp_path / "gaps", network, record, model=model, task="masked_lm")
    with pytest.raises(SystemExit) as stop:
        run(script, checkpoint=directory, prompt="the")
    assert stop.value.code == 2
    assert "the task 'masked_lm', whose model does not continue a text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "text"),
    [
        (ByteTokenizer(), "a", "ä€😀 plain \ufffd"),
        (ByteTokenizer(), "é", "\n"),
        (CharacterTokenizer("abä "), "ab", "b äa"),
        (WORDS, "the", "cat sat \n the"),
    ],
    ids=["bytes", "bytes after two", "characters", "words"],
)
def test_text_comes_piece_by_piece_and_whole(script, tokenizer, prompt, text):
    before = tokenizer.encode(prompt)
    tokens = tokenizer.encode(text).tolist()
    pieces = list(script.text_pieces(tokenizer, before, iter(tokens)))
    whole = tokenizer.decode([*before, *tokens])
    assert tokenizer.decode(before) + "".join(pieces) == whole
    assert len(pieces) == len(tokens) + 1
    if len(tokens) == len(text):
        assert all(pieces[:-1])


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_are_no_text_come_out_as_the_tokenizer_shows_them(script, seed):
    tokens = np.random.default_rng(seed).choice([65, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF], 40)
    tokenizer, before = ByteTokenizer(), ByteTokenizer().encode("a")
    pieces = script.text_pieces(tokenizer, before, iter(tokens.tolist()))
    assert "".join(pieces) == tokenizer.decode(tokens)
