"""What README and the demo tell people to type in a shell of their own does what they say."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE = "source jobs/local/environment.sh"


def test_readme_says_before_use_and_the_demo_at_its_end_how_to_go_on():
    before_use = (ROOT / "README.md").read_text().partition("\n## Use\n")[0].strip().splitlines()
    assert any(LINE in line for line in before_use[-2:])
    assert LINE in (ROOT / "jobs" / "local" / "demo.sh").read_text().strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "mpirun").exists(), reason="this checkout has no .venv with an mpirun"
)
def test_a_shell_that_was_told_so_finds_noria_and_starts_more_ranks_than_cores_as_this_user():
    ranks = len(os.sched_getaffinity(0)) + 1
    script = f"{LINE} && command -v noria && mpirun -n {ranks} echo rank"
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/tmp")}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{ROOT}/.venv/bin/noria", *["rank"] * ranks]
