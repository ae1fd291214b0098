"""Loses a job anything when its ranks are killed? Kills it again and again, by `kill -9` of a random rank at a random moment:

    python jobs/bench/kill.py [--kills 100] [--seconds 3600] [--seed 1] [--folder FOLDER]

One output, sampled, float64, random weights; every attempt has another number of ranks (1 to 4). After the last kill one
more job ends the run. Prints one JSON line; `lost`, `twice` and `different` (from the undisturbed run) must be 0. Needs
an mpirun; works on Linux alone (it reads /proc).
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from noria.output.export import export

MARK = "NORIA_KILL_MARK"
RANKS = (1, 2, 3, 4)
NUM_ROWS = 64
GRACE = 60.0  # seconds in which a job must be over after one of its ranks was killed
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def write_files(folder: Path) -> None:
    """The model's shape and prompts of many lengths, so that rows end all the time."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rows = [
        {"id": f"row {row}", "token_ids": [row % 500, 3, 5 + row % 7], "max_new_tokens": 8 + 37 * row % 120}
        for row in range(NUM_ROWS)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(folder: Path, output: Path, ranks: int) -> list[str]:
    files = ["--random-weights", folder / "config.json", "--prompts", folder / "prompts.jsonl", "--output", output]
    keys = "--device cpu --dtype float64 --temperature 1 --seed 7 --ignore-eos --seal-seconds 0.05 --step-tokens 32"
    return ["mpirun", "-n", str(ranks), sys.executable, "-m", "noria", "run", *map(str, files), *keys.split()]


def ranks_of(mark: str) -> list[int]:
    """Process ids of the job's ranks."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in variables and b"noria" in arguments and b"-n" not in arguments:
            found.append(int(process.name))
    return sorted(found)


def start(folder: Path, output: Path, ranks: int, mark: str, log) -> subprocess.Popen:
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(folder, output, ranks), env=environment, stdout=log, stderr=log)


def kill_one(folder: Path, output: Path, ranks: int, after: float, chance: random.Random, log) -> bool:
    """Starts a job and kills one of its ranks so many seconds later. Returns whether it was still there."""
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    job = start(folder, output, ranks, mark, log)
    try:
        job.wait(after)
        return False
    except subprocess.TimeoutExpired:
        pass
    alive = ranks_of(mark)
    if alive:
        os.kill(chance.choice(alive), signal.SIGKILL)
    try:
        job.wait(GRACE)
    except subprocess.TimeoutExpired:
        sys.exit(f"a job of {ranks} ranks was still there {GRACE:.0f} s after one was killed")
    finally:
        for process in ranks_of(mark):
            os.kill(process, signal.SIGKILL)
    return bool(alive)


def rows_of(folder: Path, output: Path) -> list[tuple]:
    target = folder / "rows.jsonl"
    export(output, target)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    return [(row["id"], row["sample"], row["status"], tuple(row["token_ids"])) for row in rows]


def measure(folder: Path, kills: int, seconds: float, seed: int) -> dict:
    write_files(folder)
    chance, began = random.Random(seed), time.monotonic()
    with open(folder / "log.txt", "w") as log:
        whole, output = folder / "undisturbed.h5", folder / "killed.h5"
        assert start(folder, whole, 1, "", log).wait() == 0, (folder / "log.txt").read_text()
        usual = time.monotonic() - began
        killed = Counter()
        finished = 0
        while killed.total() < kills and time.monotonic() - began < seconds:
            ranks = chance.choice(RANKS)
            if kill_one(folder, output, ranks, chance.uniform(0.1, 1.5) * usual, chance, log):
                killed[ranks] += 1
            elif output.exists():  # the job was faster than its killer: begin again
                finished += rows_of(folder, output) == rows_of(folder, whole)
                output.unlink()
        assert start(folder, output, 2, "", log).wait() == 0, (folder / "log.txt").read_text()
    wanted, found = rows_of(folder, whole), rows_of(folder, output)
    names = Counter(row[:2] for row in found)
    return {
        "bench": "kill",
        "kills": killed.total(),
        "by_ranks": {str(ranks): killed[ranks] for ranks in RANKS},
        "outputs_finished_on_the_way": finished,
        "rows": len(wanted),
        "lost": sum(row[:2] not in names for row in wanted),
        "twice": sum(count > 1 for count in names.values()),
        "different": sum(one != other for one, other in zip(wanted, found, strict=False)),
        "left_behind": sorted(path.name for path in folder.glob("killed.h5*") if path != output),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no more kills after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the files here (default: a temporary folder)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="noria-kill-"))
    folder.mkdir(exist_ok=True, parents=True)
    result = measure(folder, arguments.kills, arguments.seconds, arguments.seed)
    if arguments.folder is None:
        shutil.rmtree(folder)
    print(json.dumps(result))
    return int(any(result[name] for name in ("lost", "twice", "different", "left_behind")))


if __name__ == "__main__":
    sys.exit(main())
