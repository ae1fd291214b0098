"""When the job must be over: its --walltime, or what SLURM or PBS say. PBS sends no notice before it kills.

Reads the environment and asks the scheduler's own commands; knows nothing of the run.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from noria.errors import InputError
from noria.tools.values import parse_walltime

ASK_SECONDS = 15.0  # a scheduler that does not answer by then has not been asked
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID")


@dataclass(frozen=True)
class Deadline:
    """`at` (time.time()) the job is killed; `source` says who told. `at` is infinite without a limit."""

    at: float
    source: str

    @property
    def seconds_left(self) -> float:
        return self.at - time.time()


NONE = Deadline(float("inf"), "no walltime known")


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """The scheduler's name of this job, with an array's index as the scheduler writes it; "" outside of one."""
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return next((environment[name] for name in JOB_VARIABLES if environment.get(name)), "")


def find(
    walltime: str | int | None,
    started: float,
    environment: Mapping[str, str] = os.environ,
    ask: Callable[[list[str]], str] | None = None,
) -> Deadline:
    """The earliest end that is known: `walltime` counts from `started`, a scheduler's limit from the job's own start.

    Raises InputError for a walltime that is no time, and in a shell that outlived its job.
    """
    ask = ask or _ask
    found = [NONE]
    if walltime is not None:
        found.append(Deadline(started + parse_walltime(walltime), f"walltime {walltime}"))
    if environment.get("SLURM_JOB_END_TIME", "").isdigit() or environment.get("SLURM_JOB_ID"):
        found += _of_slurm(environment, started, ask)
    elif environment.get("PBS_JOBID"):
        found += _of_pbs(ask(["qstat", "-f", environment["PBS_JOBID"]]), started)
    return min(found, key=lambda deadline: deadline.at)


def _of_slurm(environment: Mapping[str, str], started: float, ask: Callable[[list[str]], str]) -> list[Deadline]:
    """By the job's variable; where that is of a time before this run `started`, or not set, by what squeue says."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    at = float(text) if text.isdigit() else None
    if at is not None and at > started:
        return [Deadline(at, "SLURM_JOB_END_TIME")]
    job = job_id(environment)
    # A line for each task of an array and each component of a heterogeneous job: the first to end ends the run.
    said = ask(["squeue", "-h", "-j", job, "-o", "%L"]).splitlines() if job else []
    left = [seconds for line in said if (seconds := seconds_of(line)) is not None]
    if left:
        return [Deadline(time.time() + min(left), "squeue")]
    if at is not None and not any(line.strip() == "UNLIMITED" for line in said):
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
        raise InputError(
            f"SLURM_JOB_END_TIME says that job {job or '?'} was over at {when}, {started - at:,.0f} s before this run began:"
            " this shell outlived its job (tmux, screen). Start the run in a new job, or first: unset ${!SLURM_@}"
        )
    return []


def _of_pbs(said: str, started: float) -> list[Deadline]:
    """From the attributes of a job: its limit, and when it began (else the time that it has used)."""
    said = re.sub(r"\n\t", "", said)  # qstat folds long values
    attributes = dict(re.findall(r"^\s*([\w.]+) = (.*)$", said, re.MULTILINE))
    limit = seconds_of(attributes.get("Resource_List.walltime", ""))
    if limit is None:
        return []
    try:
        began = time.mktime(time.strptime(attributes.get("stime", ""), "%a %b %d %H:%M:%S %Y"))
    except ValueError:
        used = seconds_of(attributes.get("resources_used.walltime", ""))
        began = started if used is None else time.time() - used
    return [Deadline(began + limit, "qstat")]


def seconds_of(text: str) -> int | None:
    """Seconds of `[DAYS-][[HH:]MM:]SS` as schedulers write it; None for words such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?((?:\d+:){0,2}\d+)", text.strip())
    if match is None:
        return None
    seconds = 0
    for part in match[2].split(":"):
        seconds = seconds * 60 + int(part)
    return seconds + int(match[1] or 0) * 86400


def _ask(command: list[str]) -> str:
    """What the scheduler's command prints; nothing if there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
