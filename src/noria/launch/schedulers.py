"""What SLURM and PBS say to a job: a record each. By variables of the environment, and by the scheduler's own commands.

Knows nothing of ranks, devices or the run.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from noria.errors import InputError

ASK_SECONDS = 15.0  # a scheduler that does not answer by then has not been asked
Environment: TypeAlias = Mapping[str, str]
End: TypeAlias = tuple[float, str]  # when (time.time()) the job is killed, and who says so
Ask: TypeAlias = Callable[[list[str]], str]  # a command -> what it prints, nothing if it fails


@dataclass(frozen=True)
class Scheduler:
    """Names of its variables, and two things that it tells.

    `job`: of the job, in the order in which they tell it apart; they alone are stored with an output. `size`, `rank`: of the
    processes that it started itself. `gpus`: those that it gave, last how many. `scratch`: a folder on a disk of the node.
    `job_id(environment)`: the job as the scheduler writes it. `ends(environment, started, ask)`: when it ends the job, if
    that is known to it; `started` is when this run began.
    """

    job: tuple[str, ...]
    job_id: Callable[[Environment], str]
    ends: Callable[[Environment, float, Ask], End | None]
    size: tuple[str, ...] = ()
    rank: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()

    def gave_no_gpu(self, environment: Environment) -> str:
        """`SLURM_GPUS_ON_NODE = 0`, where a count of GPUs is 0 and none is named; "" elsewhere."""
        *names, count = self.gpus or ("",)
        no = environment.get(count) == "0" and not any(environment.get(name) for name in names)
        return f"{count} = 0" if no else ""


def job_id(environment: Environment = os.environ) -> str:
    """The scheduler's name of this job, with an array's index as the scheduler writes it; "" outside of one."""
    return next((name for one in SCHEDULERS if (name := one.job_id(environment))), "")


def job_ids(environment: Environment = os.environ) -> dict[str, str]:
    """The schedulers' names of this job, by their variables; nothing else of the environment."""
    return {name: environment[name] for one in SCHEDULERS for name in one.job if environment.get(name)}


def ask(command: list[str]) -> str:
    """What the scheduler's command prints; nothing if there is none, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=ASK_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    # qstat shows a job's variables, of any bytes
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


def _slurm_job(environment: Environment) -> str:
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def _slurm_ends(environment: Environment, started: float, ask: Ask) -> End | None:
    """By the job's variable; where that is of a time before this run `started`, or not set, by what squeue says."""
    text = environment.get("SLURM_JOB_END_TIME", "")
    at = float(text) if text.isdigit() else None
    if at is not None and at > started:
        return at, "SLURM_JOB_END_TIME"
    job = _slurm_job(environment)
    # A line for each task of an array and each component of a heterogeneous job: the first to end ends the run.
    said = ask(["squeue", "-h", "-j", job, "-o", "%L"]).splitlines() if job else []
    left = [seconds for line in said if (seconds := seconds_of(line)) is not None]
    if left:
        return time.time() + min(left), "squeue"
    if at is not None and not any(line.strip() == "UNLIMITED" for line in said):
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
        raise InputError(
            f"SLURM_JOB_END_TIME says that job {job or '?'} was over at {when}, {started - at:,.0f} s before this run began:"
            " this shell outlived its job (tmux, screen). Start the run in a new job, or first: unset ${!SLURM_@}"
        )
    return None


def _pbs_ends(environment: Environment, started: float, ask: Ask) -> End | None:
    """From the attributes of a job: its limit, and when it began (else the time that it has used)."""
    said = ask(["qstat", "-f", environment["PBS_JOBID"]]) if environment.get("PBS_JOBID") else ""
    said = re.sub(r"\n\t", "", said)  # qstat folds long values
    attributes = dict(re.findall(r"^\s*([\w.]+) = (.*)$", said, re.MULTILINE))
    limit = seconds_of(attributes.get("Resource_List.walltime", ""))
    if limit is None:
        return None
    try:
        began = time.mktime(time.strptime(attributes.get("stime", ""), "%a %b %d %H:%M:%S %Y"))
    except ValueError:
        used = seconds_of(attributes.get("resources_used.walltime", ""))
        began = started if used is None else time.time() - used
    return began + limit, "qstat"


def seconds_of(text: str) -> int | None:
    """Seconds of `[DAYS-][[HH:]MM:]SS` as schedulers write it; None for words such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?((?:\d+:){0,2}\d+)", text.strip())
    if match is None:
        return None
    seconds = 0
    for part in match[2].split(":"):
        seconds = seconds * 60 + int(part)
    return seconds + int(match[1] or 0) * 86400


SLURM = Scheduler(
    job=("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"),
    job_id=_slurm_job,
    ends=_slurm_ends,
    size=("SLURM_STEP_NUM_TASKS",),
    rank=("SLURM_PROCID",),
    gpus=("SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE"),
    scratch=("SLURM_TMPDIR",),
)
PBS = Scheduler(
    job=("PBS_JOBID", "PBS_ARRAY_ID", "PBS_ARRAY_INDEX"),
    job_id=lambda environment: environment.get("PBS_JOBID", ""),
    ends=_pbs_ends,
)
SCHEDULERS = (SLURM, PBS)
