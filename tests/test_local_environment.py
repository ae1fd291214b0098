"""What README and the demo tell people to type in a shell of their own does what they say."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE = "source jobs/local/environment.sh"


def test_readme_says_before_use_and_the_demo_at_its_end_how_to_go_on():
    before_use = (ROOT / "README.md").read_text().partition("\n## Use\n")[0].strip().splitlines()
    assert any(LINE in line for line in before_use[-2:])
    assert LINE in (ROOT / "jobs" / "local" / "demo.sh").read_text().strip().splitlines()[-1]


def sourced(shell, line, folder, **variables):
    """What a shell has done that sources environment.sh in this folder and then says what noria_root is."""
    script = f'{line} || exit 1; echo "$noria_root"; case ":$PATH:" in ":$noria_root/.venv/bin:"*) echo first;; esac'
    variables = {"PATH": "/usr/local/bin:/usr/bin:/bin"} | variables
    return subprocess.run([shell, "-uc", script], cwd=folder, env=variables, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("shell", [shell for shell in ("bash", "zsh", "sh") if shutil.which(shell)])
def test_the_shell_that_sources_it_has_this_checkout_s_programs_first(shell, tmp_path):
    (tmp_path / "jobs" / "local").mkdir(parents=True)
    done = sourced(shell, LINE.replace("source jobs", ". ./jobs"), ROOT, CDPATH=str(tmp_path))
    assert (done.returncode, done.stdout.splitlines()) == (0, [str(ROOT), "first"]), done.stderr
    done = sourced(shell, f". {ROOT}/jobs/local/environment.sh", tmp_path)
    if shell != "sh":
        assert (done.returncode, done.stdout.splitlines()) == (0, [str(ROOT), "first"]), done.stderr
    else:
        assert done.returncode == 1 and "cd to the folder that has jobs/" in done.stderr and not done.stdout


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
