"""Hosted CI and the hooks of pre-commit run what `.ci/run` runs: their files are read and name scripts that are there."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
HOOKS = [
    hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repo["hooks"]
]
STYLE = (ROOT / "tests/style.sh").read_text()
JOBS = WORKFLOW["jobs"]
STEPS = [step for job in JOBS.values() for step in job["steps"]]


def scripts(text):
    """The files that lines `bash FILE ...` of a script run."""
    return re.findall(r"^\s*bash (\S+)", text, re.MULTILINE)


@pytest.mark.parametrize("command", [step["run"] for step in STEPS if "run" in step])
def test_a_step_of_the_workflow_runs_a_script_that_is_there(command):
    assert scripts(command) and all((ROOT / name).is_file() for name in scripts(command))


def test_the_workflow_runs_what_has_to_pass_here_and_the_floors():
    commands = [step["run"] for step in STEPS if "run" in step]
    assert "bash .ci/run" in commands and "bash tests/run.sh --floors" in commands


def test_what_has_to_pass_begins_with_style_and_runs_scripts_that_are_there():
    names = scripts((ROOT / ".ci/run").read_text())
    assert names[0] == "tests/style.sh" and "tests/run.sh" in names
    assert all((ROOT / name).is_file() for name in names)


def test_the_workflow_reads_only_and_every_job_of_it_ends():
    assert WORKFLOW["permissions"] == {"contents": "read"} and "concurrency" in WORKFLOW
    assert all(0 < job["timeout-minutes"] <= 90 and "permissions" not in job for job in JOBS.values())
    assert "secrets" not in (ROOT / ".github/workflows/ci.yml").read_text()


def test_the_actions_of_the_workflow_have_a_major_version():
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in STEPS if "uses" in step)


def test_the_workflow_tests_the_oldest_python_that_the_package_accepts_and_a_newer_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=")
    versions = JOBS["tests"]["strategy"]["matrix"]["python"]
    assert versions[0] == oldest and len(versions) > 1


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_a_hook_runs_a_tool_of_the_test_extra_that_style_runs_too(hook):
    tool, *words = shlex.split(hook["entry"])
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    name = tool.removeprefix(".venv/bin/")
    assert name in {Requirement(line).name for line in extra}
    assert re.search(rf"^{name} {words[0] if name == 'ruff' else ''}", STYLE, re.MULTILINE)
