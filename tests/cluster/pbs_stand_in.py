"""Stands in for a PBS of one node, called by one of its names: qsub, qstat or qrerun. Knows nothing of Noria.

It checks what the real one checks of a script (directives, resource keys), sets what a job sees there, numbers, runs, reruns
and ends jobs. A job is a folder in $PBS_STAND_IN: the script, its settings, its state. No queue: every job starts at once.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

CHUNK_KEYS = {"ncpus", "mpiprocs", "ngpus", "mem", "ompthreads", "host"}
JOB_KEYS = {"select", "place", "walltime", "filesystems"}
HOME = Path(os.environ["PBS_STAND_IN"])
HOST = os.uname().nodename
GRACE = 20  # seconds over its walltime that a job is left: OpenPBS has 1, in which a busy test machine ends nothing in order


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qsub", add_help=False, allow_abbrev=False)
    for flag in ("-N", "-j", "-r", "-A", "-q", "-J", "-W", "-v"):
        parser.add_argument(flag)
    parser.add_argument("-l", action="append", default=[])
    return parser


def resources(texts: list[str]) -> dict[str, str]:
    """The job's resources by key, the last of each. Ends with qsub's own message for one that is unknown."""
    found = {}
    for text in texts:
        parts = [text] if text.startswith("select=") else text.split(",")
        for key, _, value in (part.partition("=") for part in parts):
            if key not in JOB_KEYS or not value:
                sys.exit(f"qsub: Unknown resource: {key}")
            found[key] = value
    return found


def chunks(select: str) -> list[dict[str, str]]:
    """`2:ncpus=4:mpiprocs=2` -> two chunks."""
    result = []
    for part in select.split("+"):
        count, *keys = part.split(":")
        if not count.isdigit():
            keys, count = [count, *keys], "1"
        chunk = dict(key.partition("=")[::2] for key in keys)
        for key in chunk.keys() - CHUNK_KEYS:
            sys.exit(f"qsub: Unknown resource: {key}")
        result += [chunk] * int(count)
    return result


def variables(text: str) -> dict[str, str]:
    """Of `-v A=b,C=d,e`: a comma separates variables only where a name and = follow it."""
    return dict(part.partition("=")[::2] for part in re.split(r",(?=\w+=)", text) if part)


def qsub(arguments: list[str]) -> None:
    parser = options()
    parser.add_argument("script", type=Path)
    given = parser.parse_args(arguments)
    text = given.script.read_text()
    # PBS reads directives up to the first line that is neither one nor a comment.
    head = re.match(r"(?:[ \t]*(?:#.*)?\n)*", text)[0]
    words = [shlex.split(line[len("#PBS") :]) for line in head.splitlines() if line.startswith("#PBS")]
    asked = options().parse_args([word for line in words for word in line])
    wanted = {name: getattr(given, name) or getattr(asked, name) for name in vars(asked) if name != "l"}
    needs = resources(asked.l) | resources(given.l)
    number = 1 + max((int(path.name.split("[")[0]) for path in HOME.glob("[0-9]*")), default=-1)
    first, last, step = (
        int(one or 1) for one in re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?", wanted["J"] or "0-0").groups()
    )
    if wanted["J"] and first >= last:  # as OpenPBS has it
        sys.exit("qsub: illegal -J value")
    for index in range(first, last + 1, step):
        job = f"{number}[{index}]" if wanted["J"] else str(number)
        settings = {
            "name": wanted["N"] or given.script.name,
            "rerunnable": (wanted["r"] or "y") == "y",
            "walltime": needs.get("walltime", "01:00:00"),
            "chunks": chunks(needs.get("select", "1:ncpus=1")),
            "variables": variables(wanted["v"] or ""),
            "directory": os.getcwd(),
            "index": index if wanted["J"] else None,
            "log": f"{wanted['N']}.o{number}" + (f".{index}" if wanted["J"] else ""),
        }
        folder = HOME / job
        folder.mkdir()
        (folder / "script").write_text(text)
        (folder / "settings").write_text(json.dumps(settings))
        (folder / "run_count").write_text("0")
        start(job)
    print(f"{number}[].stand-in" if wanted["J"] else f"{number}.stand-in")


def start(job: str) -> None:
    """A process of its own watches the job, as pbs_mom does."""
    subprocess.Popen(
        [sys.executable, __file__, "watch", job],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def watch(job: str) -> None:
    folder = HOME / job
    settings = json.loads((folder / "settings").read_text())
    (folder / "run_count").write_text(str(int((folder / "run_count").read_text()) + 1))
    (folder / "stime").write_text(time.strftime("%a %b %d %H:%M:%S %Y"))
    limit = 0
    for part in settings["walltime"].split(":"):
        limit = limit * 60 + int(part)
    # One line a rank, the cores of a chunk as threads of each of them: as measured of OpenPBS.
    lines = [HOST for chunk in settings["chunks"] for _ in range(int(chunk.get("mpiprocs", "1")))]
    (folder / "nodefile").write_text("".join(line + "\n" for line in lines))
    cores = settings["chunks"][0].get("ncpus", "1")
    kept = ("PATH", "HOME", "USER", "LANG", "PBS_STAND_IN", *os.environ.get("PBS_STAND_IN_KEEP", "").split())
    environment = {name: os.environ[name] for name in kept if name in os.environ} | settings["variables"]
    environment |= {
        "PBS_STAND_IN_KEEP": " ".join(kept),
        "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_JOBID": f"{job}.stand-in",
        "PBS_JOBNAME": settings["name"],
        "PBS_NODEFILE": str(folder / "nodefile"),
        "PBS_O_WORKDIR": settings["directory"],
        "NCPUS": cores,
        "OMP_NUM_THREADS": cores,
    }
    if settings["index"] is not None:
        environment["PBS_ARRAY_INDEX"] = str(settings["index"])
    # -j oe, and PBS begins a job's log anew at a rerun.
    with open(Path(settings["directory"], settings["log"]), "w") as log:
        command = ["bash", str(folder / "script")]
        process = subprocess.Popen(command, env=environment, cwd="/", stdout=log, stderr=log, start_new_session=True)
        (folder / "pid").write_text(str(process.pid))
        try:
            code = process.wait(limit + GRACE)
        except subprocess.TimeoutExpired:
            log.write(f"=>> PBS: job killed: walltime {limit + GRACE} exceeded limit {limit}\n")
            log.flush()
            end(process.pid)
            code = process.wait()
    if (folder / "rerun").exists():
        (folder / "rerun").unlink()
        watch(job)
    else:
        (folder / "exit").write_text(str(code))


def end(session: int) -> None:
    """TERM to every process of the job, KILL to what is left 3 s later."""
    for number, seconds in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 0.0)):
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, ProcessLookupError):
                if int(path.read_text().rpartition(")")[2].split()[3]) == session:
                    os.kill(int(path.parent.name), number)
        time.sleep(seconds)


def folder_of(name: str) -> Path:
    folder = HOME / name.removesuffix(".stand-in")
    if not folder.is_dir():
        sys.exit(f"{Path(sys.argv[0]).name}: Unknown Job Id {name}")
    return folder


def qrerun(arguments: list[str]) -> None:
    folder = folder_of(arguments[-1])
    if not json.loads((folder / "settings").read_text())["rerunnable"]:
        sys.exit(f"qrerun: Job is not rerunnable {arguments[-1]}")
    (folder / "rerun").touch()
    end(int((folder / "pid").read_text()))


def qstat(arguments: list[str]) -> None:
    """`qstat -f JOB`: the attributes that a job can ask for."""
    folder = folder_of(arguments[-1])
    settings = json.loads((folder / "settings").read_text())
    finished = (folder / "exit").exists()
    print(f"Job Id: {arguments[-1]}\n    Job_Name = {settings['name']}\n    job_state = {'F' if finished else 'R'}")
    print(f"    Resource_List.walltime = {settings['walltime']}\n    stime = {(folder / 'stime').read_text()}")
    print(f"    run_count = {(folder / 'run_count').read_text()}")
    if finished:
        print(f"    Exit_status = {(folder / 'exit').read_text()}")


if __name__ == "__main__":
    name, *rest = sys.argv if Path(sys.argv[0]).name.startswith("q") else sys.argv[1:]
    {"qsub": qsub, "qstat": qstat, "qrerun": qrerun, "watch": lambda words: watch(*words)}[Path(name).name](rest)
