"""The man page and the table of keys are what the help texts make now, and the wheel installs the page."""

import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from noria.__main__ import COMMANDS
from noria.commands import keys

ROOT = Path(__file__).parent.parent
MANUALS = "write it again: python jobs/local/manuals.py"


@pytest.fixture(scope="module")
def manuals():
    spec = importlib.util.spec_from_file_location("manuals", ROOT / "jobs" / "local" / "manuals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_man_page_is_that_of_the_help_texts(manuals):
    page = manuals.MAN_PAGE.read_text()
    assert page == manuals.man_page(), MANUALS
    plain = page.replace("\\-", "-")
    assert all(f".SS noria {name}\n" in plain for name in COMMANDS)
    assert all(plain.count(f".TP\n\\fB{key.flag}\\fR") >= 1 for key in keys.table())


def test_the_table_of_the_prompts_manual_is_that_of_the_help_texts(manuals):
    (table,) = manuals.TABLE.findall(manuals.PROMPTS.read_text())
    assert table == manuals.row_table(), MANUALS
    assert {line.split("`")[1] for line in table.splitlines()[2:]} == {
        key.name for key in keys.table() if key.row == "yes"
    }


def test_the_wheel_installs_the_man_page(manuals):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shared = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    assert {ROOT / path: where for path, where in shared.items()} == {manuals.MAN_PAGE: "share/man/man1/noria.1"}


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("man"), reason="needs man")
def test_man_shows_every_flag(manuals):
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(manuals.MAN_PAGE)], capture_output=True, text=True, timeout=60,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "MAN_KEEP_FORMATTING": "", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = re.sub(r".\x08", "", done.stdout)
    assert all(f"{key.flag}" in text for key in keys.table()) and "shares in %, gpu=60,cpu=40" in " ".join(text.split())
