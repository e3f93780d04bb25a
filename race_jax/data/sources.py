"""The sources of text: Python's standard library, local files, or a Hugging Face data set.

A `DataConfig` names the source. The text becomes a `Corpus`: named documents as bytes, divided into
the splits train, valid and test.
"""

import codecs
import glob
import hashlib
import importlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from race_jax.data.config import DataConfig
from race_jax.data.documents import Corpus, Document, hold_out
from race_jax.data.unpack import plain_text, unpacked
from race_jax.records import as_names, one_of

ROOT_VARIABLE = "RACE_JAX_DATA"
SPLITS = ("train", "valid", "test")
MOST_PROBLEMS = 10  # files that an error names at most
MOST_COMMAS = 8  # commas in a name of a file that are looked for

# Some files of the standard library are left out: tests and installed packages, bundled programs,
# and generated tables (character maps, the help text, build settings). The tables are long and
# repetitive. A single one among the held-out files would dominate the measured loss.
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
    """Reads the text that `config` names and holds out a part of it.

    Args:
        config: `source` chooses the reader. The fields `root`, `train_files`, `valid_files` and
            `test_files`, or else those of the data set, and `valid_tail` and `valid_fraction` are
            used.

    Returns:
        The splits. If there are no validation files, and no validation split of a data set, the end
        of the training text is held out: its last `valid_tail` characters if that is given, else a
        share `valid_fraction` that begins at the start of a line. For the standard library, whole
        files are held out.

    Raises:
        ValueError: files are missing, empty, unreadable or damaged, or a name is unknown. The
            error names them.
        ImportError: `source` is "huggingface" and `datasets` is not installed.

    Example:
        >>> corpus = load_corpus(DataConfig(source="stdlib"))
        >>> all(len(document.data) > 0 for document in corpus.valid)
        True

    Source: beyond the paper.
    """
    one_of("config.data.source", config.source, tuple(_READERS))
    refuse_other_sources(config)
    return _READERS[config.source](config)


def refuse_other_sources(config: DataConfig) -> None:
    """Raises ValueError if a field is set that belongs to another source."""
    named = dict.fromkeys(("train_files", "valid_files", "test_files"), ("files",))
    hosted = dict.fromkeys(("dataset", "dataset_config"), ("huggingface",))
    refuse_ignored(config, "source", named | hosted | {"valid_tail": ("files", "huggingface")})


def the_file(config: DataConfig, field: str) -> Path:
    """Returns the path of the one token file that a field names.

    Raises:
        ValueError: the field does not name one file.
    """
    paths = named_paths(config, field)
    if len(paths) != 1:
        raise ValueError(
            f'config.data.{field} must name one token file for source="tokens", got '
            f"{getattr(config, field)!r}; scripts/write_tokens.py joins several texts in one"
        )
    return paths[0]


def refuse_ignored(config: DataConfig, choice: str, owners: dict[str, tuple[str, ...]]) -> None:
    """Raises ValueError if a field is set that would be ignored.

    Args:
        config: the record.
        choice: the name of the field that chooses, such as "source".
        owners: by the name of a field, the choices that use that field.
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
    """Returns the text of a file, unpacked and without a byte order mark.

    Raises:
        ValueError: the file cannot be read. The error names it.
    """
    text = plain_text(str(path), _read_bytes(path))
    if not text:
        raise ValueError(f"{path}: the file is empty")
    return text


def read_unpacked(path: Path) -> bytes:
    """Returns the content of a file that may be packed, and need not be text.

    Raises:
        ValueError: the file cannot be read. The error names it.
    """
    data = unpacked(str(path), _read_bytes(path))
    if not data:
        raise ValueError(f"{path}: the file is empty")
    return data


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ValueError:
    known = (reason for kind, reason in _READ_ERRORS if isinstance(error, kind))
    return ValueError(f"{path}: {next(known, str(error))}")


def expand(name: str, field: str) -> Path:
    """Returns the path `name`, with a leading `~` replaced by the folder of the user.

    Raises:
        ValueError: there is no such user. The error names the field.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{field}: {name}: {error}") from error


def _read_stdlib(config: DataConfig) -> Corpus:
    """Reads the source of the standard library. A hash of a file's path says if it is held out."""
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
    """Returns sorted relative paths. The separator is "/" on every system."""
    paths = []
    for parent, children, names in os.walk(folder):
        children[:] = [child for child in children if child not in STDLIB_SKIPPED_FOLDERS]
        for name in names:
            path = Path(parent) / name
            wanted = path.suffix == ".py" and not name.startswith(STDLIB_SKIPPED_PREFIX)
            if wanted and path.is_file():  # False for a broken link
                paths.append(path.relative_to(folder).as_posix())
    return sorted(paths)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _unit_hash(text: str) -> float:
    """Returns a number in [0, 1) that depends on `text` only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _read_files(config: DataConfig) -> Corpus:
    """Reads local files by their names."""
    return _corpus(config, **read_documents(config))


def read_documents(config: DataConfig) -> dict[str, list[Document]]:
    """Reads the files of all splits. Training files must be named.

    Args:
        config: `root` is the folder of relative names.

    Returns:
        For "train", "valid" and "test", one document for each file.

    Raises:
        ValueError: files cannot be read, or there is no training file. The error names them.
    """
    if not config.train_files:
        raise ValueError(
            "config.data.train_files: no file is named; give --config.data.train_files=FILE[,FILE]"
        )
    documents: dict[str, list[Document]] = {name: [] for name in SPLITS}
    problems = []
    for name in SPLITS:
        for path in named_paths(config, f"{name}_files"):
            try:
                documents[name].append(Document(str(path), read_file(path)))
            except ValueError as error:
                problems.append(str(error))
    if problems:
        more = len(problems) - MOST_PROBLEMS
        rest = [f"and {more} other files cannot be read"] if more > 0 else []
        raise ValueError("; ".join([*problems[:MOST_PROBLEMS], *rest]))
    return documents


def named_paths(config: DataConfig, field: str) -> list[Path]:
    """Returns the paths of the files that a field such as "train_files" names.

    A folder stands for the files in it, and a pattern for those that match it, in sorted order.
    Hidden files and the folders in a folder are left out.

    Raises:
        ValueError: a folder or a pattern has no files, or a name was cut at its comma.
    """
    names = as_names(getattr(config, field), f"config.data.{field}")
    paths = []
    for index, name in enumerate(names):
        path = _placed(config, field, name)
        if not os.path.exists(path):
            _check_commas(config, field, names, index)
        paths += _files_of(path, f"config.data.{field}")
    return paths


def _placed(config: DataConfig, field: str, name: str) -> Path:
    """Returns the path of a name, which may be relative to the root."""
    path = expand(name, f"config.data.{field}")
    return path if path.is_absolute() else _root_folder(config, field, name) / path


def _files_of(path: Path, field: str) -> list[Path]:
    """Returns the files that one path stands for, which may be a folder or a pattern."""
    # Other than those of Path, the tests of os.path are False where a user may not look.
    if os.path.isdir(path):
        try:
            found = [path / name for name in os.listdir(path) if not name.startswith(".")]
        except OSError as error:
            raise _unreadable(path, error) from error
        none = f"the folder {path} holds no file; hidden files and the folders in it do not count"
    elif os.path.exists(path) or not {"*", "?"} & set(str(path)):
        return [path]
    else:
        found = [Path(file) for file in glob.glob(str(path).replace("[", "[[]"))]
        none = f"no file matches the pattern {path}; correct it, or name a file or a folder"
    files = sorted(file for file in found if os.path.isfile(file))
    if not files:
        raise ValueError(f"{field}: {none}")
    return files


def _check_commas(config: DataConfig, field: str, names: Sequence[str], index: int) -> None:
    """Raises ValueError if a name and those after it are one name that was cut at its commas."""
    for end in range(index + 2, min(len(names), index + MOST_COMMAS + 1) + 1):
        for comma in (", ", ","):
            name = comma.join(names[index:end])
            if os.path.exists(_placed(config, field, name)):
                written = (*names[:index], name, *names[end:])
                raise ValueError(
                    f"config.data.{field}: the name of the file {name!r} was cut at its comma; "
                    f'write --config.data.{field}="{written}"'
                )


def _root_folder(config: DataConfig, field: str, name: str) -> Path:
    """Returns the folder that relative names start from."""
    root = config.root or os.environ.get(ROOT_VARIABLE)
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
    """Reads a data set by name. With packing, each row is a document; else each split is one."""
    splits = load_data_set(config)
    train, valid, test = (
        _row_documents(config, name, splits[name]) if name in splits else []
        for name in ("train", "validation", "test")
    )
    return _corpus(config, train, valid, test)


def load_data_set(config: DataConfig) -> Any:
    """Returns the splits of the Hugging Face data set that `config` names, by their names.

    Raises:
        ValueError: there is no such data set, or it has no training split.
        ImportError: the package `datasets` is not installed.
    """
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
    return splits


def _row_documents(config: DataConfig, split: str, rows: Any) -> list[Document]:
    """Returns the documents of one Hugging Face split, at least one."""
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
    # In many data sets each row is one line of text, with or without its line break.
    lines = (text if text.endswith("\n") else text + "\n" for text in texts)
    return [Document(name, "".join(lines).encode())]


def _corpus(
    config: DataConfig, train: list[Document], valid: list[Document], test: list[Document]
) -> Corpus:
    """Returns the corpus. If `valid` is empty, the end of the training text is held out."""
    if not valid:
        train, valid = hold_out(train, characters=config.valid_tail, fraction=config.valid_fraction)
    return Corpus(tuple(train), tuple(valid), tuple(test))


_READERS: dict[str, Callable[[DataConfig], Corpus]] = {
    "stdlib": _read_stdlib,
    "files": _read_files,
    "huggingface": _read_huggingface,
}
