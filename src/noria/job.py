"""The keys of [job]: how a job runs and ends. Knows nothing of the other sections."""

from dataclasses import dataclass
from typing import Any

from noria.errors import InputError, require
from noria.tools.keys import check_path, key, nearest
from noria.tools.values import parse_shard, parse_walltime

OPENAI = "openai:"  # before the name of an export: it is written as OpenAI's batch responses

MOST = 2**63  # of a number in job.planned
NUMBER, TEXT, NUMBERS = "a number", "a text", "a list of numbers"
PLANNED = {  # what a plan came to, and what that is
    **dict.fromkeys(("ranks", "laps", "groups", "step_tokens", "microbatch_tokens"), NUMBER),
    "schedule": TEXT,
    "activations": TEXT,
    "partition": NUMBERS,
    **dict.fromkeys(("gpu_blocks", "cpu_blocks", "disk_blocks", "gpu_pages", "cpu_pages", "disk_pages"), NUMBER),
    **dict.fromkeys(("weight_slots", "cache_slots", "cache_slot_pages", "tokens_per_second"), NUMBER),
}


@dataclass(frozen=True)
class Job:
    """How the job runs and ends."""

    seal_seconds: float = key("seconds between two seals: finished rows are written to disk this often", 10.0)
    walltime: str | int | None = key(
        "time that this command may take, as [D-]HH:MM:SS, seconds or UNLIMITED: the run stops before it is over, seals its"
        " rows and exits with 75; the same command continues (default: what SLURM or PBS say)",
        text=True,
    )
    retry_errors: bool = key("generate rows with status error again; their prompts alone may be others now", False)
    extend: bool = key("accept a longer file of prompts that begins with the old one, unchanged", False)
    fail_on_errors: bool = key(
        "exit with 65 if any row of the output is an error; without it only if all rows are", False
    )
    overwrite: bool = key("move an existing output aside and start again", False)
    allow_gpu_sharing: bool = key("allow two ranks to use one GPU", False)
    random_weights: str | None = key(
        "a config.json: run a model of its shape with random weights, without a checkpoint"
    )
    shard: str | None = key(
        "i/n: generate only every n-th row, starting at row i (1/4, 2/4, 3/4, 4/4: counted from 1, as in job arrays);"
        " each shard is a job with its own output, and noria merge joins the outputs"
    )
    export: list[str] | None = key(
        "file to export the output to when it is whole, as noria export does: .jsonl, .jsonl.gz, .csv or .parquet;"
        " openai:FILE writes OpenAI's batch responses; the flag may be given several times, and in a run file it is a list"
    )
    trace: str | None = key("file for a trace of all ranks, for Perfetto: compute, copies, messages and waits (JSON)")
    strict_keys: bool = key(
        "a row with a sampling key of another program that Noria does not have is an error; without it such a key is"
        " reported once and carried as a column",
        False,
    )
    strict: bool = key(
        "exit with 1, after the output is written, if the run differed from its plan: in memory, and with --machine in a"
        " GPU's speed",
        False,
    )
    planned: dict[str, Any] | None = key(
        "what noria plan --write planned, which writes this key: the run says in a line where its own plan is another"
    )
    machine: str | None = key(
        "rates to plan with: a file of noria probe, or a card such as H100 (default: measured; where none were, assumed)"
    )

    def __post_init__(self) -> None:
        require(self.seal_seconds >= 0, f"job.seal_seconds is {self.seal_seconds}: it must be 0 or more")
        if self.shard is not None:
            parse_shard(self.shard)
        for name, value in (self.planned or {}).items():
            require(name in PLANNED, f"unknown name {name[:50]!r} in job.planned{nearest(name[:50], PLANNED)}")
            if not _is(PLANNED[name], value):
                large = isinstance(value, int) and abs(value) >= MOST
                said = f"{MOST:,} or more" if large else repr(str(value)[:50])
                raise InputError(f"job.planned.{name} is {said}: it must be {PLANNED[name]}")
        if self.walltime is not None:
            parse_walltime(self.walltime)
        for name in ("retry_errors", "extend"):
            clash = self.overwrite and getattr(self, name)
            require(not clash, f"job.overwrite and job.{name} contradict each other: give one of them")
        names = self.export or []
        wrong = next((name for name in names if not isinstance(name, str) or not name.removeprefix(OPENAI)), None)
        require(wrong is None, f"job.export has {wrong!r}: it must be names of files")
        for name in names:
            check_path(name.removeprefix(OPENAI), "job.export")


def _is(kind: str, value: object) -> bool:
    """Whether a value is of this kind: NUMBER, TEXT or NUMBERS."""
    if kind == TEXT:
        return isinstance(value, str)
    numbers = value if kind == NUMBERS else [value]
    return isinstance(numbers, list) and all(map(_is_number, numbers))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST < value < MOST
