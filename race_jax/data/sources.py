"""Where text comes from: the standard library, local files, or a Hugging Face data set.

In: a `DataConfig`. Out: a `Corpus` of named documents, still bytes, cut into train, valid and
test. Equation: none.
"""

import codecs
import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from race_jax.data.config import DataConfig
from race_jax.data.documents import Corpus, Document, hold_out
from race_jax.data.unpack import plain_text
from race_jax.records import as_names, one_of

ROOT_VARIABLE = "RACE_JAX_DATA"

# Left out of the standard library: tests and installed packages; bundled programs; and tables
# made by machine (character maps, the help text, build settings), which are long and repeat
# themselves, so that one of them among the held-out files would decide the figure.
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    | {"idlelib", "ensurepip", "lib2to3", "turtledemo"}
    | {"encodings", "pydoc_data"}
)
STDLIB_SKIPPED_PREFIX = "_sysconfigdata"

_READ_ERRORS = (
    (FileNotFoundError, "no such file"),
    (IsADirectoryError, "is a folder; name the files in it"),
    (PermissionError, "may not be read by this user"),
)


def load_corpus(config: DataConfig) -> Corpus:
    """Reads the text that `config` names and holds a part of it out.

    Args:
        config: `source` chooses the reader; `root` and the three file lists (else the data set's
            names), `valid_tail` and `valid_fraction` are used here.

    Returns:
        The splits. Without validation files, or a validation split, the end of the training text
        is held out: its last `valid_tail` characters if given, else a share `valid_fraction`,
        cut at a line's start. Of the standard library whole files are held out.

    Raises:
        ValueError: a file is missing, empty, a folder, unreadable or damaged, or a name is
            unknown; the message names it.
        ImportError: `source` is "huggingface" and `datasets` is not installed.

    Example:
        >>> corpus = load_corpus(DataConfig(source="stdlib"))
        >>> all(len(document.data) > 0 for document in corpus.valid)
        True

    Source: beyond the paper.
    """
    one_of("config.data.source", config.source, tuple(_READERS))
    named = dict.fromkeys(("train_files", "valid_files", "test_files"), ("files",))
    hosted = dict.fromkeys(("dataset", "dataset_config"), ("huggingface",))
    refuse_ignored(config, "source", named | hosted | {"valid_tail": ("files", "huggingface")})
    return _READERS[config.source](config)


def refuse_ignored(config: DataConfig, choice: str, owners: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError where a field is set that the choice made would silently ignore.

    Args:
        config: the record.
        choice: name of the field that chooses, such as "source".
        owners: for each field that only some choices look at, those choices.
    """
    chosen = getattr(config, choice)
    for field, needs in owners.items():
        value = getattr(config, field)
        if value and chosen not in needs:
            raise ValueError(
                f"config.data.{field}={value!r} is used with config.data.{choice}="
                f"{' or '.join(needs)} only, got {chosen!r}"
            )


def read_file(path: Path) -> bytes:
    """The text of a file, unpacked and without a byte order mark. Raises ValueError naming it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        known = (reason for kind, reason in _READ_ERRORS if isinstance(error, kind))
        raise ValueError(f"{path}: {next(known, str(error))}") from error
    text = plain_text(str(path), data)
    if not text:
        raise ValueError(f"{path}: is empty")
    return text


def expand(name: str, field: str) -> Path:
    """The path that `name` stands for, a leading `~` replaced by the user's folder.

    Raises:
        ValueError: there is no such user; names the field.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{field}: {name}: {error}") from error


def _read_stdlib(config: DataConfig) -> Corpus:
    """The standard library's own source; a hash of a file's path decides whether it is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    splits: dict[bool, list[Document]] = {False: [], True: []}
    for path in _stdlib_paths(folder):
        data = (folder / path).read_bytes().removeprefix(codecs.BOM_UTF8)
        if data and _is_utf8(data):
            held_out = _unit_hash(path) < config.valid_fraction
            splits[held_out].append(Document(f"{folder}/{path}", data))
    if not splits[False] or not splits[True]:
        raise ValueError(
            f"{folder}: found {len(splits[False])} training and {len(splits[True])} held-out "
            "standard-library files (.py); name text files with --config.data.source=files"
        )
    return Corpus(tuple(splits[False]), tuple(splits[True]))


def _stdlib_paths(folder: Path) -> list[str]:
    """Sorted relative paths, "/" between the parts on every system."""
    paths = []
    for parent, children, names in os.walk(folder):
        children[:] = [child for child in children if child not in STDLIB_SKIPPED_FOLDERS]
        for name in names:
            path = Path(parent) / name
            wanted = path.suffix == ".py" and not name.startswith(STDLIB_SKIPPED_PREFIX)
            if wanted and path.is_file():  # a link may lead nowhere
                paths.append(path.relative_to(folder).as_posix())
    return sorted(paths)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _read_files(config: DataConfig) -> Corpus:
    """Local files, given by name under a root."""
    train, valid, test = (
        [
            Document(str(path), read_file(path))
            for path in _resolve(config, field, getattr(config, field))
        ]
        for field in ("train_files", "valid_files", "test_files")
    )
    if not train:
        raise ValueError(
            "config.data.train_files: no file is named; give --config.data.train_files=FILE[,FILE]"
        )
    return _corpus(config, train, valid, test)


def _resolve(config: DataConfig, field: str, names: str | Sequence[str]) -> Iterator[Path]:
    """The paths that the names of one field stand for."""
    root = config.root or os.environ.get(ROOT_VARIABLE)
    for name in as_names(names, f"config.data.{field}"):
        path = expand(name, f"config.data.{field}")
        if not path.is_absolute():
            path = _root_folder(root, config, field, name) / path
        yield path


def _root_folder(root: str | None, config: DataConfig, field: str, name: str) -> Path:
    """The folder that relative names start from."""
    ways = f"--config.data.root=FOLDER or the environment variable {ROOT_VARIABLE}"
    if not root:
        raise ValueError(
            f"config.data.{field}: {name} is a relative name and no root is set; give {ways}"
        )
    origin = "--config.data.root" if config.root else ROOT_VARIABLE
    folder = expand(root, origin)
    if not folder.is_dir():
        raise ValueError(f"{origin}: {folder} is not a folder; set the root by {ways}")
    return folder


def _read_huggingface(config: DataConfig) -> Corpus:
    """A data set by name: one document a row when packed, else one document a split."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            "config.data.source='huggingface' needs the package `datasets`; "
            "install it with: pip install 'race-jax[datasets]'"
        ) from error
    if not config.dataset:
        raise ValueError("config.data.dataset: no name is given for source='huggingface'")
    try:
        splits = datasets.load_dataset(config.dataset, config.dataset_config or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"config.data.dataset: {config.dataset!r} (dataset_config {config.dataset_config!r}) "
            f"cannot be loaded: {error}"
        ) from error
    if "train" not in splits:
        raise ValueError(
            f"config.data.dataset: {config.dataset!r} has no split 'train'; it has {list(splits)}"
        )
    train, valid, test = (
        _row_documents(config, name, splits[name]) if name in splits else []
        for name in ("train", "validation", "test")
    )
    return _corpus(config, train, valid, test)


def _row_documents(config: DataConfig, split: str, rows: Any) -> list[Document]:
    """The documents of one Hugging Face split, at least one."""
    name, field = f"{config.dataset}/{split}", config.text_field
    if field not in rows.column_names:
        raise ValueError(
            f"config.data.text_field: {name} has no column {field!r}; it has {rows.column_names}"
        )
    texts = [text.removeprefix("\ufeff") if isinstance(text, str) else text for text in rows[field]]
    strange = next((text for text in texts if not isinstance(text, str)), "")
    if strange != "" or not any(texts):
        raise ValueError(
            f"config.data.text_field: column {field!r} of {name} must hold text, "
            f"got {strange!r} among {len(texts)} rows"
        )
    if config.packing == "packed":
        return [Document(f"{name}[{i}]", text.encode()) for i, text in enumerate(texts) if text]
    # A row is a line in line-by-line sets, with or without its line break.
    lines = (text if text.endswith("\n") else text + "\n" for text in texts)
    return [Document(name, "".join(lines).encode())]


def _corpus(
    config: DataConfig, train: list[Document], valid: list[Document], test: list[Document]
) -> Corpus:
    """The corpus, with the end of the training text held out where no `valid` is given."""
    if not valid:
        train, valid = hold_out(train, characters=config.valid_tail, fraction=config.valid_fraction)
    return Corpus(tuple(train), tuple(valid), tuple(test))


_READERS: dict[str, Callable[[DataConfig], Corpus]] = {
    "stdlib": _read_stdlib,
    "files": _read_files,
    "huggingface": _read_huggingface,
}
