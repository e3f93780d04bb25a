"""The configuration keeps every value, and refuses bad ones in clear words."""

import ast
import dataclasses
import json
import pathlib
import re
import shlex

import pytest

from race_jax.layers import registry
from race_jax.models.layers import POSITIONS
from race_jax.tasks.registry import task_named
from race_jax.train.config import Config
from race_jax.train.flags import help_lines, parse_config

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
DEFAULT = str(CONFIGS / "lm_default.py")


def is_section(field) -> bool:
    return dataclasses.is_dataclass(field.type)


def set_field(config: Config, name: str, value: object) -> Config:
    *sections, field = name.split(".")
    record = config
    for section in sections:
        record = getattr(record, section)
    setattr(record, field, value)
    return config


def plain_fields(section: type) -> list[dataclasses.Field]:
    """Returns the fields that are not sections."""
    return [f for f in dataclasses.fields(section) if not dataclasses.is_dataclass(f.type)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer.learning_rate", -1.0, r"config\.optimizer\.learning_rate must be > 0, got -1"),
        ("optimizer.learning_rate", float("nan"), r"optimizer\.learning_rate must be finite"),
        ("optimizer.learning_rate", "fast", r"optimizer\.learning_rate must be float, got 'fast'"),
        ("optimizer.end_learning_rate", 1.0, r"end_learning_rate must not exceed learning_rate"),
        ("optimizer.b2", 1.0, r"config\.optimizer\.b2 must lie in \[0, 1\), got 1\.0"),
        ("optimizer.schedule", "step", r"config\.optimizer\.schedule must be one of cosine,"),
        ("optimizer.accumulation_steps", 3, r"batch_size must be divisible by .* 3, got 32"),
        ("optimizer.warmup_steps", 1000, r"warmup_steps must be < config\.run\.steps 1000"),
        ("optimizer.clip_norm", 0, r"config\.optimizer\.clip_norm must be > 0, got 0"),
        ("mesh.data", 3, r"config\.mesh\.data must divide the 32 sequences .*, got 3"),
        ("run.steps", True, r"config\.run\.steps must be int, got True"),
        ("run.steps", 0, r"config\.run\.steps must be >= 1, got 0"),
        ("run.seed", 2**32, r"config\.run\.seed must be < 2\*\*32"),
        ("run.keep_checkpoints", 1, r"config\.run\.keep_checkpoints must be >= 2"),
        ("run.step", 5, r"config\.run\.step does not exist; did you mean steps\?"),
        ("data.source", "files", r"config\.data\.train_files must name a file"),
        ("data.source", "huggingface", r"config\.data\.dataset must be given"),
        ("data.source", "web", r"config\.data\.source must be one of stdlib, files, hugg.*'web'"),
        ("data.tokenizer", "bpe", r"config\.data\.tokenizer_file must name"),
        ("data.train_files", 7, r"config\.data\.train_files must be a tuple of names .*got 7"),
        ("data.valid_fraction", 1.0, r"config\.data\.valid_fraction must lie in \(0, 1\)"),
        ("data.vocab_limit", 1, r"config\.data\.vocab_limit must be >= 2, got 1"),
        ("model.num_layers", 0, r"config\.model\.num_layers=0 must be"),
        ("language_model.sample_length", -1, r"config\.language_model\.sample_length must be >= 0"),
        ("copy.symbols", 2.5, r"config\.copy\.symbols must be int, got 2\.5"),
        ("task", "copying", r"config\.task must be one of language_model, copy, .*; got 'copying'"),
        ("model", 3, r"config\.model must be a ModelConfig, got 3"),
        ("optimiser", 3, r"config\.optimiser does not exist; did you mean optimizer\?"),
    ],
)
def test_a_bad_value_is_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        set_field(Config(), field, value).validate()


def test_windows_longer_than_learned_positions_are_refused():
    config = set_field(Config(), "model.positions", "learned")
    set_field(config, "data.sequence_length", 2048)
    with pytest.raises(ValueError, match=r"sequence_length must not exceed .*max_length 1024"):
        config.validate()


def test_what_stretches_of_sequences_need():
    config = Config()
    config.data.sequence_length, config.mesh.seq = 1001, 3
    config.validate()  # the trainer fills up the length
    config.model.positions, config.model.max_length = "learned", 1002
    config.validate()
    config.model.max_length = 1001
    with pytest.raises(ValueError, match=r"got 1001, which config\.mesh\.seq=3 rounds up to 1002"):
        config.validate()
    config.model.positions, config.optimizer.segment_length = "none", 100
    with pytest.raises(ValueError, match=r"a multiple of config\.mesh\.seq=3, .*got 100; try 102"):
        config.validate()
    for length in (102, 1001, 2000):
        config.optimizer.segment_length = length
        config.validate()
    config.data.packing = "packed"
    config.validate()
    config.task, config.model.race.forget_gate = "masked_lm", None
    with pytest.raises(ValueError, match=r"mesh\.seq must be 1 with .*packing=\"packed\" and"):
        config.validate()


def test_validation_copies_and_normalizes():
    config = Config()
    config.data.source, config.data.train_files = "files", "one.txt, two.txt.xz,"
    config.model.race.forget_gate = "none"
    config.optimizer.clip_norm = 1
    checked = config.validate()
    assert checked.data.train_files == ("one.txt", "two.txt.xz")
    assert checked.model.race.forget_gate is None
    assert isinstance(checked.optimizer.clip_norm, float)
    config.optimizer.learning_rate = 7.0
    assert checked.optimizer.learning_rate == Config().optimizer.learning_rate


def test_json_and_back():
    config = Config()
    config.data.source, config.data.train_files = "files", ("a", "b")
    config.run.max_seconds = 3.5
    checked = config.validate()
    assert Config.from_dict(json.loads(json.dumps(checked.to_dict()))) == checked


def test_a_record_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"config\.run\.colour does not exist"):
        Config.from_dict({"run": {"colour": "red"}})


def test_every_field_is_documented():
    for section in filter(is_section, dataclasses.fields(Config)):
        documentation = section.type.__doc__ or ""
        for field in plain_fields(section.type):
            assert field.name in documentation, f"{section.name}.{field.name}"


def test_overrides_reach_the_record():
    config = parse_config(
        [
            f"--config={DEFAULT}",
            "--config.model.num_layers=2",
            "--config.model.race.forget_gate=none",
            "--config.model.num_kv_heads=none",
            "--config.data.train_files=a.txt,b.txt",
            "--config.run.max_seconds",
            "60",
        ]
    )
    assert config.model.num_layers == 2
    assert config.model.race.forget_gate is None
    assert config.data.train_files == ("a.txt", "b.txt")
    assert config.run.max_seconds == 60.0


@pytest.mark.parametrize(
    ("words", "directory"),
    [
        ([], "runs/lm_default"),
        (["--config.run.log_every=7", "--config.run.steps=500"], "runs/lm_default"),
        (["--config.run.steps=300"], "runs/lm_default-steps=300"),
        (
            ["--config.model.race.forget_gate=none", "--config.data.valid_files=a.txt,b.txt"],
            "runs/lm_default-valid_files=a.txt,b.txt-forget_gate=none",
        ),
        (
            ["--config.optimizer.schedule=constant", "--config.run.steps", "9"],
            "runs/lm_default-schedule=constant",
        ),
        (["--config.data.text_field=a b"], r"runs/lm_default-text_field=a_b-[0-9a-f]{8}"),
        (["--config.run.directory=none", "--config.run.directory=b"], "b"),
        (["--config.run.directory=~/x", "--config.run.seed=3"], "~/x"),
    ],
)
def test_what_changes_the_result_has_a_folder_of_its_own(words, directory):
    short = ["--config.optimizer.warmup_steps=5"] if "9" in words else []
    found = parse_config([f"--config={DEFAULT}", *words, *short]).run.directory
    assert re.fullmatch(directory.replace("~", "[~]"), found.removesuffix("-warmup_steps=5"))


def test_help_lists_every_field_with_its_meaning():
    text = "\n".join(help_lines([f"--config={DEFAULT}", "--help"]))
    for section in filter(is_section, dataclasses.fields(Config)):
        for field in plain_fields(section.type):
            assert re.search(
                rf"^  --config\.{section.name}\.{field.name}=.* \(.+\)\n      \S",
                text,
                re.MULTILINE,
            ), field.name
    assert "  --config.run.steps=500 (int)\n      number of optimizer steps." in text
    assert "  --config.run.max_seconds=none (float or none)\n      seconds after" in text
    assert "  --config.model.race.num_tables=8 (int)\n      the number of hash tables L." in text
    assert "  --config.model.linear.half_life=none (float or none)\n      the longest" in text
    assert "epsilon" not in help_lines(["--config=nowhere.py"])


def test_a_list_of_files_written_as_text_can_be_overridden(tmp_path):
    file = tmp_path / "written.py"
    file.write_text(
        "from race_jax.train.config import Config\n"
        "def get_config():\n"
        "    config = Config()\n"
        "    config.data.source, config.data.train_files = 'files', 'a.txt,b.txt'\n"
        "    return config\n"
    )
    assert parse_config([f"--config={file}"]).data.train_files == ("a.txt", "b.txt")
    words = [f"--config={file}", "--config.data.train_files=c.txt"]
    assert parse_config(words).data.train_files == ("c.txt",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"no configuration given; pass --config configs/NAME\.py"),
        (["--config"], r"[Mm]issing value for flag --config"),
        (["--config=nowhere.py"], r"a file that does not exist: nowhere\.py"),
        (["--config=default.yaml"], r"must name a \.py file .*default\.yaml"),
        ([f"--config={__file__}"], r"must have a get_config\(\)"),
        ([f"--config={DEFAULT}", "--config.model.num_layer=2"], r"did you mean num_layers\?"),
        ([f"--config={DEFAULT}", "--config.modle.width=2"], r"config\.modle .* did you mean model"),
        ([f"--config={DEFAULT}", "--config.model=2"], r"config\.model is a section"),
        ([f"--config={DEFAULT}", "--config.run.steps=2.5"], r"run\.steps must be int, got '2\.5'"),
        ([f"--config={DEFAULT}", "--config.run.steps=none"], r"run\.steps must be int, got 'none'"),
        ([f"--config={DEFAULT}", "--config.model.remat=yes"], r"remat must be bool, got 'yes'"),
        ([f"--config={DEFAULT}", "--config.optimizer.b1=-1"], r"b1 must lie in \[0, 1\)"),
        ([f"--config={DEFAULT}", "--colour=red"], r"Unknown command line flag 'colour'"),
        ([f"--config={DEFAULT}", "red"], r"arguments not understood: red"),
    ],
)
def test_a_bad_command_line_is_refused_in_one_sentence(words, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_config(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_the_command_of_every_config_is_right(file, monkeypatch):
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))).replace("\\\n", "")
    command = re.search(r"^Command: +(.*)$", text, re.MULTILINE)[1]
    script = {"mlm": "train_mlm", "cls": "train_classifier"}.get(file.stem[:3], "train_lm")
    start = rf"(RACE_JAX_DATA=FOLDER )?\.venv/bin/python scripts/{script}\.py "
    monkeypatch.chdir(CONFIGS.parent)
    config = parse_config(shlex.split(re.sub(start, "", command)))
    assert re.match(start, command)
    assert config.run.directory.startswith(f"runs/{file.stem}")


# They read tokens in their order.
GATED = ("gated_linear", "gated_delta", "race_delta", "sliding_window")
ENCODERS = ("linformer",)  # it mixes all tokens


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
@pytest.mark.parametrize("name", registry.ATTENTIONS)
def test_every_config_also_trains_the_other_attentions(file, name):
    words = [f"--config={file}", f"--config.model.attention={name}"]
    given = parse_config(words[:1])
    if given.model.positions not in POSITIONS:  # those of the config's own attention
        words.append("--config.model.positions=none")
    is_causal = task_named(given.task).is_causal
    if name in (ENCODERS if is_causal else GATED):
        with pytest.raises(
            ValueError, match=rf"config\.model\.{name} does not go with config\.task"
        ):
            parse_config(words)
    else:
        assert parse_config(words).model.attention == name


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["=my corpus/part one.txt"], ("my corpus/part one.txt",)),
        (["=my corpus/a b.txt, c.txt,"], ("my corpus/a b.txt", "c.txt")),
        (["", "part one.txt"], ("part one.txt",)),
        (["=('a,b.txt', ' c')"], ("a,b.txt", " c")),
        (["=['a.txt']"], ("a.txt",)),
        (["=(draft) part.txt"], ("(draft) part.txt",)),
        (["=2024"], ("2024",)),
        (["=it's.txt"], ("it's.txt",)),
        (["=~/a=b.txt"], ("~/a=b.txt",)),
        (["="], ()),
    ],
)
def test_file_names_are_taken_as_they_are(words, names):
    first, *rest = words
    config = parse_config([f"--config={DEFAULT}", f"--config.data.valid_files{first}", *rest])
    assert config.data.valid_files == names
    assert config.validate().data.valid_files == names
    assert Config.from_dict(config.to_dict()).data.valid_files == names


@pytest.mark.parametrize("value", ["('a', 1)", "[1]"])
def test_names_that_are_no_text_are_refused(value):
    with pytest.raises(ValueError, match=r"config\.data\.train_files must be a tuple of names"):
        parse_config([f"--config={DEFAULT}", f"--config.data.train_files={value}"])
    with pytest.raises(ValueError, match=r"config\.data\.train_files needs a value"):
        parse_config([f"--config={DEFAULT}", "--config.data.train_files"])


def test_other_text_may_hold_spaces_and_the_config_file_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my config.py").write_text(
        "from race_jax.train.config import Config as get_config\n"
    )
    fields = {
        "data.root": "my corpus",
        "run.directory": "my runs/one",
        "language_model.sample_prompt": "a b",
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = parse_config(["--config=~/my config.py", *overrides])
    assert config.data.root == "my corpus"
    assert config.run.directory == "my runs/one"
    assert config.language_model.sample_prompt == "a b"


def test_only_some_tasks_read_token_files():
    words = ["--config.data.source=tokens", "--config.data.train_files=t.npy"]
    words.append("--config.optimizer.segment_length=16")
    with pytest.raises(ValueError, match="which makes its batches in memory"):
        parse_config([f"--config={DEFAULT}", "--config.task=copy", *words])
