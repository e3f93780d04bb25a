"""The statements of README and docs are true: examples run, and links and file names exist.

Each checker returns a list of complaints, which must be empty.
"""

import doctest
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXT_SUFFIXES = {".md", ".py", ".toml", ".yml", ".yaml", ".txt", ".cfg", ".json", ""}
FILE_NAME = re.compile(
    r"(?<![\w./-])((?:race_jax|pallas_kernels|configs|scripts|tests|docs)/[\w./-]+\.(?:py|md))"
)
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(work|farm|root|home|Users|tmp)/[\w.-]")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)


def run_blocks(blocks: list[str], name: str) -> list[str]:
    """Runs the examples of one page in order, in one namespace. Returns those that failed."""
    scope: dict[str, object] = {}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    complaints: list[str] = []
    for number, block in enumerate(blocks, start=1):
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, scope, f"{name}:{number}", name, 0)
            doctest.DocTestRunner(optionflags=flags).run(
                test, out=complaints.append, clear_globs=False
            )
            scope = test.globs
        else:
            exec(compile(block, f"{name}:{number}", "exec"), scope)
    return complaints


def link_complaints(text: str, folder: pathlib.Path) -> list[str]:
    """Relative links must lead to something inside the repository."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path = (folder / target.split("#")[0]).resolve()
        if re.match(r"[a-z]+:", target):
            continue
        if target.startswith("../../actions/workflows/"):  # GitHub's page of the CI, from README
            target = ".github/workflows/" + target.split("/")[4]
            path = (folder / target).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            found.append(f"the link {target} leads to nothing inside the repository")
    if "../shared" in text:
        found.append("../shared lies outside the repository")
    return found


def name_complaints(text: str) -> list[str]:
    """Files that a text names must exist. A name in capitals (configs/NAME.py) is a placeholder."""
    names = {name for name in FILE_NAME.findall(text) if not pathlib.Path(name).stem.isupper()}
    return [f"{name} does not exist" for name in sorted(names) if not (ROOT / name).exists()]


def tracked_files() -> list[pathlib.Path]:
    """Returns files under version control and new ones; without git, all that are not hidden."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        files = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        files = [
            f for f in ROOT.rglob("*") if not any(p[0] == "." for p in f.relative_to(ROOT).parts)
        ]
    return [file for file in files if file.is_file() and file.suffix in TEXT_SUFFIXES]


def test_a_wrong_example_link_name_or_path_is_found(tmp_path):
    page = "```python\n>>> 1 + 1\n3\n```\n\n```python\nx = 1\n```\n\n```python\n>>> x\n1\n```\n"
    assert len(python_blocks(page)) == 3
    assert len(run_blocks(python_blocks(page), "page")) == 1
    assert len(link_complaints("[a](missing.md) [b](../..) [c](LICENSE)", ROOT)) == 2
    assert len(link_complaints("the data under ../shared/data", ROOT)) == 1
    assert name_complaints("race_jax/missing.py, configs/NAME.py, x/race_jax/other.py") == [
        "race_jax/missing.py does not exist"
    ]
    assert MACHINE_PATH.search("see " + "/work" + "/main")
    assert not MACHINE_PATH.search("https://site.org" + "/home" + "/page")


@pytest.mark.once
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_is_true(page, tmp_path, monkeypatch):
    text = page.read_text("utf-8")
    complaints = link_complaints(text, page.parent) + name_complaints(text)
    assert not complaints, "\n".join(complaints)
    monkeypatch.chdir(tmp_path)
    failures = run_blocks(python_blocks(text), page.name)
    assert not failures, "\n".join(failures)


def test_no_file_names_a_path_of_one_machine():
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in tracked_files()
        for match in MACHINE_PATH.finditer(file.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)
