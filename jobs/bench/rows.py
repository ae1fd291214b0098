"""Does memory grow with the number of rows? A whole run of very many short rows on one CPU rank, watched from outside:

    python jobs/bench/rows.py [--rows 1000000] [--folder FOLDER]

A model of one small layer with random weights generates one token a row, so that reading, admission, sealing and merging
are the work. Resident memory of the rank is read from /proc (Linux alone) while it generates and while it merges. Then the
output is read back: every id in order, once. Prints one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
INTERVAL = 0.25  # seconds between two looks at the rank's memory
MIB = 2**20


def write_files(folder: Path, num_rows: int) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with (folder / "prompts.jsonl").open("w") as file:
        for row in range(num_rows):
            file.write(f'{{"id": "row {row}", "token_ids": [{5 + row % 90}, 6, 7], "label": {row}}}\n')


def resident_nbytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def watch(process: subprocess.Popen, output: Path) -> tuple[list, list]:
    """(seconds, resident bytes) while the job generates, and while it merges its parts."""
    generating, merging = [], []
    parts, merged, started = Path(f"{output}.parts"), Path(f"{output}.tmp"), time.perf_counter()
    while process.poll() is None:
        time.sleep(INTERVAL)
        begun, merges = parts.exists(), merged.exists()
        try:
            look = (time.perf_counter() - started, resident_nbytes(process.pid))
        except (OSError, IndexError):  # it is over
            break
        if look[1] and (merges or merging):
            merging.append(look)
        elif begun:
            generating.append(look)
    return generating, merging


def check(output: Path, num_rows: int) -> int:
    """How many rows have another id than their number says, or no token."""
    wrong, step = 0, 2**16
    with h5py.File(output) as file:
        assert len(file["id"]) == num_rows, f"{len(file['id'])} rows of {num_rows}"
        for first in range(0, num_rows, step):
            ids = file["id"].asstr()[first : first + step]
            ends = file["offsets"][first : first + len(ids) + 1]
            wrong += sum(id != f"row {row}" for row, id in enumerate(ids, first)) + int(
                (ends[1:] - ends[:-1] != 1).sum()
            )
    return wrong


def measure(folder: Path, num_rows: int) -> dict:
    write_files(folder, num_rows)
    output = folder / "run.h5"
    files = ["--random-weights", folder / "config.json", "--prompts", folder / "prompts.jsonl", "--output", output]
    keys = "--device cpu --max-new-tokens 1 --ignore-eos".split()
    process = subprocess.Popen([sys.executable, "-m", "noria", "run", *map(str, files), *keys])
    try:
        generating, merging = watch(process, output)
    finally:
        process.terminate()
        code = process.wait()
    assert code == 0, f"noria run ended with {code}"
    assert len(generating) > 10 and merging, "over too soon to see anything: take more --rows"
    early, late = generating[len(generating) // 10], generating[-1]
    with h5py.File(output) as file:
        seconds = float(file["timing/seconds"][0])
    return {
        "bench": "rows",
        "rows": num_rows,
        "rows_per_second": round(num_rows / seconds),
        "generating_seconds": round(seconds, 1),
        "merging_seconds": round(merging[-1][0] - merging[0][0], 1),
        "rss_mib_after_a_tenth": round(early[1] / MIB, 1),
        "rss_mib_at_the_end": round(late[1] / MIB, 1),
        "rss_mib_most_while_merging": round(max(rss for _, rss in merging) / MIB, 1),
        "grown_bytes_a_row": round((late[1] - early[1]) / (0.9 * num_rows), 1),
        "rss_mib": [
            round(rss / MIB) for looks in (generating, merging) for _, rss in looks[:: max(1, len(looks) // 10)]
        ],
        "prompts_mib": round((folder / "prompts.jsonl").stat().st_size / MIB, 1),
        "output_mib": round(output.stat().st_size / MIB, 1),
        "rows_wrong": check(output, num_rows),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the prompts and the output go (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        print(json.dumps(measure(Path(name), arguments.rows)))


if __name__ == "__main__":
    main()
