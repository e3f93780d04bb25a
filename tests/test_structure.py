"""The structure of the code: its imports, required docstrings, and lengths of files and functions.

Each checker reads the sources as syntax trees and returns a list of complaints, which must be
empty. Every checker is also tried on something bad.
"""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

from tests import newest, quick

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS = ("race_jax", "pallas_kernels", "configs", "scripts")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# The data flow. A part of race_jax may import the parts on its right, and all parts that these may
# import. Nothing imports reference (for tests and docs) or linen (for users, by name).
SOURCES = {
    "core.shapes": "",
    "core.hashing": "core.shapes",
    "core.masking": "core.shapes",
    "core.scan": "core.shapes",
    "core.state": "core.shapes core.masking core.scan",
    "core.xla": "core.hashing core.masking core.state",
    "core.passes": "core.xla",
    "core.sequence": "core.masking core.shapes",
    "core.dispatch": "",
    "core.implementations": "core.dispatch core.passes",
    "core.chunks": "",
    "core.linear": "core.state core.shards core.chunks",
    "core.matrix_state": "core.state core.shards core.chunks",
    "core.favor": "",
    "core.pairs": "core.state core.shards",
    "core.gated_linear": "core.matrix_state",
    "core.gated_delta": "core.matrix_state",
    "core.rotary": "",
    "core.sliding_window": "core.state core.masking core.shards core.rotary",
    "core.checks": "core.hashing core.masking core.state",
    "core.shards": "",
    "core.attention": "core.implementations core.checks core.sequence core.shards",
    "core.reference": "core.shapes",
    "streaming": "core.state",
    "sparse": "core.hashing core.masking core.dispatch core.shards",
    "diagnostics": "layers.functional layers.race models extras",
    "layers.attention_fn": "core.attention",
    "layers.products": "core.shards",
    "layers.gates": "core.shapes layers.products",
    "layers.short_conv": "core.shapes core.sequence core.shards",
    "layers.parts": "layers.gates layers.short_conv core.masking",
    "layers.hash_options": "core.hashing",
    "layers.planes": "layers.hash_options",
    "layers.race_config": "layers.parts layers.hash_options core.dispatch core.state",
    "layers.projections": "layers.race_config",
    "layers.functional": "core.attention layers.projections layers.attention_fn",
    "layers.serialization": "core.state",
    "layers.race": "layers.functional layers.serialization layers.planes",
    "layers.race_linen": "layers.functional layers.serialization",
    "layers.self_attention": "layers.parts core.state",
    "layers.positions": "layers.self_attention core.rotary",
    "layers.cached": "layers.positions sparse",
    "layers.softmax": "layers.cached",
    "layers.linear": "core.linear layers.self_attention",
    "layers.performer": "core.favor core.linear layers.planes layers.self_attention",
    "layers.sigmoid": "core.pairs layers.cached",
    "layers.angular": "core.pairs layers.cached",
    "layers.linformer": "layers.softmax",
    "layers.gated_linear": "core.gated_linear layers.self_attention",
    "layers.gated_delta": "core.gated_delta layers.self_attention",
    "layers.race_delta": "layers.gated_delta layers.planes",
    "layers.sliding_window": "core.sliding_window layers.positions",
    "layers.registry": "",
    "linen": "layers.race_linen",
    "models": "layers.registry sparse streaming core.masking core.state core.shards core.sequence "
    "core.rotary",
    "extras": "",
    "records": "",
    "data": "records extras",
    "tasks": "data models core.shards",
    "train": "tasks streaming",
}
CORE_LIBRARIES = {"jax", "numpy", "jaxtyping"}
LIBRARIES = {
    "pallas_kernels": {"jax", "numpy"},
    "configs": set(),
    "layers.serialization": CORE_LIBRARIES | {"flax"},
    "layers.planes": CORE_LIBRARIES | {"flax"},
    "layers.race": CORE_LIBRARIES | {"flax"},
    "layers.race_delta": CORE_LIBRARIES | {"flax"},
    "layers.self_attention": CORE_LIBRARIES | {"flax"},
    "layers.performer": CORE_LIBRARIES | {"flax"},
    "layers.linear": CORE_LIBRARIES | {"flax"},
    "layers.race_linen": CORE_LIBRARIES | {"flax"},
    "models": CORE_LIBRARIES | {"flax"},
}
ANY_LIBRARY = {"diagnostics", "data", "tasks", "train", "scripts"}


def left_of(part: str) -> set[str]:
    """Returns all parts that `part` may import, including itself."""
    return {part}.union(*(left_of(source) for source in SOURCES[part].split()))


def modules() -> list[str]:
    files = (file for folder in OURS for file in sorted((ROOT / folder).rglob("*.py")))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


def path_of(module: str) -> pathlib.Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def part_of(name: str) -> str:
    """Returns `models` for `race_jax.models.config.ModelConfig`, and `race_jax` for a root name."""
    top, *rest = name.split(".")
    if top != "race_jax":
        return top
    prefixes = [".".join(rest[:depth]) for depth in (2, 1)]
    return next((prefix for prefix in prefixes if prefix in SOURCES), "race_jax")


def absolute(name: str, level: int, package: list[str]) -> str:
    """Returns the full name of an import with `level` leading dots in a module of `package`."""
    above = package[: len(package) - level + 1] if level else []
    return ".".join([*above, name]).rstrip(".")


def imported_names(node: ast.AST, package: list[str]) -> list[str]:
    """Returns the dotted names that one node imports. Relative imports start at `package`."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            return [f"{absolute(module or '', level, package)}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            stripped = name.lstrip(".")
            return [absolute(stripped, len(name) - len(stripped), package)]
    return []


def imports(tree: ast.AST, package: list[str], lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Yields every import in `tree`, and whether it is inside a function."""
    for node in ast.iter_child_nodes(tree):
        yield from ((name, lazy) for name in imported_names(node, package))
        inside = isinstance(node, (*FUNCTIONS, ast.Lambda))
        yield from imports(node, package, lazy or inside)


def library_complaint(importer: str, library: str) -> str | None:
    part = part_of(importer)
    allowed = LIBRARIES.get(part, CORE_LIBRARIES)
    if library in sys.stdlib_module_names or part in ANY_LIBRARY or library in allowed:
        return None
    return f"{importer} imports {library}; it may import {', '.join(sorted(allowed)) or 'nothing'}"


def direction_complaint(importer: str, name: str, lazy: bool) -> str | None:
    """Returns what is wrong if module `importer` imports `name`, or None if it may."""
    top = name.split(".")[0]
    source, target = part_of(importer), part_of(name)
    if top not in OURS:
        return library_complaint(importer, top)
    if source == "pallas_kernels":
        allowed = target == "pallas_kernels"
    elif target == "pallas_kernels":
        allowed = source == "core.dispatch" and lazy
    elif source == "configs":
        allowed = name.startswith("race_jax.train.config.")
    elif source == "scripts":
        allowed = target != "core.reference"
    elif source == "race_jax":
        allowed = target not in {"core.reference", "models", "train", "configs", "scripts"}
    else:
        allowed = target in left_of(source)
    return None if allowed else f"{importer} imports {name}{' (lazily)' * lazy}"


def direction_complaints(importer: str, source: str, is_package: bool = False) -> list[str]:
    package = importer.split(".") if is_package else importer.split(".")[:-1]
    found = imports(ast.parse(source), package)
    return [text for name, lazy in found if (text := direction_complaint(importer, name, lazy))]


def module_name(module: str) -> tuple[str, bool]:
    return module.removesuffix(".__init__"), module.endswith(".__init__")


def code_lines(function: ast.AST) -> int:
    """Returns the number of lines of a function's body, without docstrings."""
    docstrings = (
        node.body[0]
        for node in ast.walk(function)
        if isinstance(node, FUNCTIONS) and ast.get_docstring(node)
    )
    documented = sum(text.end_lineno - text.lineno + 1 for text in docstrings)
    return function.end_lineno - function.body[0].lineno + 1 - documented


def length_complaints(label: str, source: str) -> list[str]:
    lines = source.count("\n")
    found = [f"{label} has {lines} lines; {MAX_FILE_LINES} are allowed"] * (lines > MAX_FILE_LINES)
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, FUNCTIONS))
    return found + [
        f"{label}: {node.name} has {code_lines(node)} lines; {MAX_FUNCTION_LINES} are allowed"
        for node in functions
        if code_lines(node) > MAX_FUNCTION_LINES
    ]


def own_methods(kind: type) -> dict[str, object]:
    """Returns the public methods and properties that a class defines itself."""
    members = {
        name: member.__func__ if isinstance(member, classmethod | staticmethod) else member
        for name, member in vars(kind).items()
        if not name.startswith("_")
    }
    return {
        name: member
        for name, member in members.items()
        if isinstance(member, property)
        or (inspect.isfunction(member) and member.__qualname__.startswith(kind.__qualname__))
    }


def docstring_complaints(name: str, value: object) -> list[str]:
    """Public functions and classes need a docstring with a doctest, and methods a docstring."""
    text = value.__doc__ or ""
    found = [f"{name} has no docstring"] * (not text)
    found += [f"{name} has no doctest"] * (">>>" not in text)
    methods = own_methods(value) if inspect.isclass(value) else {}
    return found + [
        f"{name}.{method} has no docstring"
        for method, member in methods.items()
        if not member.__doc__
    ]


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("race_jax.core.hashing", "from race_jax.core import attention"),
        ("race_jax.core.hashing", "from race_jax import race_attention"),
        ("race_jax.core.hashing", "from . import state"),
        ("race_jax.core.attention", "def f():\n  from race_jax.core.reference import all_pairs"),
        ("race_jax.core.attention", "import flax"),
        ("race_jax.layers.functional", "import race_jax.layers.race"),
        ("race_jax.models.heads", "from race_jax.train import losses"),
        ("race_jax.data.text", "from race_jax.models import ModelConfig"),
        ("race_jax.data.text", "from race_jax.train.config import Config"),
        ("race_jax.models.heads", "from ..linen import RACEAttention"),
        ("race_jax.models.heads", "import optax"),
        ("race_jax.core.attention", "def f():\n  import pallas_kernels"),
        ("race_jax.core.dispatch", "import pallas_kernels"),
        (
            "race_jax.layers.functional",
            "__import__('race_jax.models')",
        ),
        ("pallas_kernels.causal", "from race_jax import shapes"),
        ("pallas_kernels.causal", "import jaxtyping"),
        ("configs.lm_default", "from race_jax.train import loop"),
        ("configs.lm_default", "import jax"),
        ("scripts.train_lm", "import race_jax.core.reference"),
    ],
)
def test_a_forbidden_import_is_found(importer, line):
    assert len(direction_complaints(importer, line)) == 1


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("race_jax.core.attention", "import math, jax\nfrom race_jax.core import dispatch"),
        ("race_jax.core.dispatch", "def f():\n  import pallas_kernels"),
        ("race_jax.models.heads", "from race_jax.models.layers import MLP\nfrom flax import nnx"),
        ("race_jax.train.loop", "import optax\nfrom race_jax.models import TransformerLM"),
        ("pallas_kernels.causal", "from pallas_kernels import features\nimport numpy"),
        ("configs.lm_default", "import dataclasses\nfrom race_jax.train.config import Config"),
    ],
)
def test_an_allowed_import_passes(importer, line):
    assert direction_complaints(importer, line) == []


def test_imports_follow_the_data_flow():
    complaints = []
    for module in modules():
        name, is_package = module_name(module)
        complaints += direction_complaints(name, path_of(module).read_text("utf-8"), is_package)
    assert not complaints, "\n".join(complaints)


def test_every_part_of_the_library_has_its_place_in_the_table():
    parts = {part_of(name) for name, is_package in map(module_name, modules()) if not is_package}
    assert "race_jax" not in parts, "a module of race_jax has no place in SOURCES"


def test_an_oversized_function_or_file_is_found():
    long_function = "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES + 1)
    assert len(length_complaints("m", long_function)) == 1
    assert len(length_complaints("m", "x = 1\n" * (MAX_FILE_LINES + 1))) == 1
    documented = 'def f():\n    """' + "words\n" * MAX_FUNCTION_LINES + '"""\n    return 1\n'
    assert length_complaints("m", documented) == []


def test_files_and_functions_stay_short():
    files = [path_of(module) for module in modules()] + sorted((ROOT / "tests").rglob("*.py"))
    complaints = [
        text
        for file in files
        for text in length_complaints(str(file.relative_to(ROOT)), file.read_text("utf-8"))
    ]
    assert not complaints, "\n".join(complaints)


def test_a_missing_docstring_or_doctest_is_found():
    class Undocumented:
        def method(self): ...

    assert len(docstring_complaints("Undocumented", Undocumented)) == 3


def test_every_public_name_is_documented_with_a_doctest():
    race_jax = importlib.import_module("race_jax")
    public = {f"race_jax.{name}": getattr(race_jax, name) for name in race_jax.__all__}
    public["race_jax.linen.RACEAttention"] = importlib.import_module("race_jax.linen").RACEAttention
    complaints = [
        text
        for name, value in public.items()
        if not (inspect.ismodule(value) or isinstance(value, str))
        for text in docstring_complaints(name, value)
    ]
    assert not complaints, "\n".join(complaints)


def test_places_that_the_tests_name_exist():
    for place in (*quick.PLACES, *newest.PLACES):
        path, _, test = place.partition("::")
        assert (newest.TESTS / path).exists(), place
        assert not test or f"def {test}(" in (newest.TESTS / path).read_text(), place


def test_the_version_stands_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert importlib.import_module("race_jax").__version__ == project["version"]


def test_importing_the_library_does_no_work():
    """Neither Flax, the kernels nor a device is touched before it is needed."""
    program = (
        "import sys, jax, race_jax\n"
        "jax.config.update('jax_num_cpu_devices', 2)  # refused once a device has been used\n"
        "race_jax.race_attention, race_jax.RACEState\n"
        "print(sorted({'flax', 'optax', 'orbax', 'pallas_kernels'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("[!_]*.py")), ids=lambda file: file.stem
)
def test_config_is_valid_and_tells_its_command(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.get_config().validate()
    assert f"configs/{file.name}" in module.__doc__
