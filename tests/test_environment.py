"""environment.yml and pyproject.toml name the same packages, and name every package that the program imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_LINES = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]

# Where conda-forge has another name than PyPI.
CONDA_NAMES = {"torch": "pytorch-gpu", "xxhash": "python-xxhash"}
# Where a package is imported under another name than it is installed by.
IMPORT_NAMES = {"py-rattler": "rattler", "pyyaml": "yaml", "libucx-cu12": "libucx", "libucx-cu13": "libucx"}


def python_bounds():
    """The lower bound of each dependency of the program in pyproject.toml."""
    return {r.name: lower_bound(str(r.specifier)) for r in map(Requirement, PROJECT["dependencies"])}


def conda_bounds():
    """The lower bound, or None, of each conda package in environment.yml."""
    names_and_versions = (re.fullmatch(r"([\w.-]+?)((?:[<>=!~].*)?)", line) for line in CONDA_LINES)
    return {match[1]: lower_bound(match[2]) for match in names_and_versions}


def lower_bound(specifier):
    bounds = re.findall(r">=?([\w.]+)|(?<![<!])==?([\w.]+)", specifier)
    return max((Version(a or b) for a, b in bounds), default=None)


def imported_names():
    """The top-level modules that src/noria imports, wherever in a file, and that Python itself does not have."""
    names = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"noria"}


@pytest.mark.parametrize("line", CONDA_LINES)
def test_conda_reads_every_line_of_environment_yml(line):
    rattler = pytest.importorskip("rattler")
    rattler.MatchSpec(line, strict=True)


def test_environment_yml_has_only_keys_that_conda_knows():
    assert set(ENVIRONMENT) == {"name", "channels", "dependencies", "variables"}
    assert ENVIRONMENT["channels"] == ["conda-forge", "nodefaults"]
    assert [line for line in ENVIRONMENT["dependencies"] if not isinstance(line, str)] == [{"pip": ["-e ."]}]
    assert all(isinstance(value, str) for value in ENVIRONMENT["variables"].values())


def test_no_package_stands_twice_in_environment_yml():
    assert len(conda_bounds()) == len(CONDA_LINES)


@pytest.mark.parametrize("name", python_bounds())
def test_every_dependency_is_in_environment_yml_and_no_older(name):
    conda_name = CONDA_NAMES.get(name, name)
    assert conda_name in conda_bounds(), f"environment.yml lacks {conda_name} for {name} of pyproject.toml"
    assert conda_bounds()[conda_name] >= python_bounds()[name]


def test_the_python_of_environment_yml_is_one_that_the_package_accepts():
    assert conda_bounds()["python"] >= lower_bound(PROJECT["requires-python"])


def test_the_program_imports_only_what_pyproject_names():
    extras = PROJECT["optional-dependencies"]
    optional = [line for extra in extras if extra not in ("test", "published") for line in extras[extra]]
    named = {Requirement(line).name for line in PROJECT["dependencies"] + optional}
    allowed = {IMPORT_NAMES.get(name, name) for name in named} | {"triton"}  # triton: torch brings it
    assert imported_names() <= allowed


def test_the_program_imports_everything_that_pyproject_asks_for():
    needed = {IMPORT_NAMES.get(name, name) for name in python_bounds()}
    assert needed <= imported_names()


def test_the_citation_and_the_changelog_name_the_version_of_the_program():
    version = re.search(r'__version__ = "(.+)"', (ROOT / "src/noria/__init__.py").read_text())[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("specifier", "expected"),
    [(">=4.0,<5", "4.0"), ("=3.12", "3.12"), ("==2.1", "2.1"), (">1", "1"), ("<5", None), ("", None)],
)
def test_lower_bounds_are_read_from_specifiers(specifier, expected):
    assert lower_bound(specifier) == (expected and Version(expected))
