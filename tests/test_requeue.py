"""What the scripts of SLURM queue up again when a run stops before its end: their own job, of an array their own task."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARRAY = {"SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "3"}


def program(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("script", "variables", "asked"),
    [
        ("array", ARRAY, "requeue 36_1"),  # the last task of an array has the array's own id as SLURM_JOB_ID
        ("single_node", {}, "requeue 36"),
        ("single_node", ARRAY, "requeue 36_1"),
        ("several_nodes", {}, "requeue 36"),
        ("several_nodes", ARRAY, "requeue 36_1"),
    ],
)
def test_a_script_queues_up_its_own_job_alone(tmp_path, script, variables, asked):
    (tmp_path / "activate").touch()
    program(tmp_path, "launch", "exit 75")
    program(tmp_path, "noria", "exit 1")
    program(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked; exit 1')
    settings = {"NORIA_ENVIRONMENT": str(tmp_path / "activate"), "NORIA_LAUNCH": "launch"}
    settings |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "36", "SLURM_JOB_NODELIST": "n1"}
    settings |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    command = ["bash", ROOT / f"jobs/slurm/{script}.sbatch", "run.toml", "--output", "o.h5"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "asked").read_text().splitlines()[-1] == asked
