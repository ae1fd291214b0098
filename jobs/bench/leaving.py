"""How fast is a rank gone after SIGTERM whose weights are page-locked in CPU memory? A run of random weights:

    python jobs/bench/leaving.py [--gib 100] [--device cuda]

The run is sent SIGTERM in the middle of a step, once its first row is sealed. Prints one JSON line: seconds from there to
the line that says the rows are sealed and to the end of the process, rows sealed, what the run says about its memory, and
`bare`: seconds to touch, lock and let go of some memory, as one piece and in pieces by several threads (a CPU locks none).
"""

import argparse
import json
import math
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from noria.output.sealed import parts_folder, scan

LAYERS, HEAD, CONTEXT, ROWS = 64, 128, 2048, 32
START_SECONDS, GONE_SECONDS = 240.0, 60.0
BARE = """
import json, sys, time, torch
from noria.tools import pinned
gib, device, piece, pinned._THREADS = float(sys.argv[1]), torch.device(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if device.type == "cuda":
    torch.zeros(1, device=device)
memory, found, began = pinned.HostMemory(int(gib * 2**30), piece or None), {}, time.perf_counter()
for name in ("touch", "register", "close"):
    getattr(memory, name)(*[device] * (name == "register"))
    found[name], began = round(time.perf_counter() - began, 2), time.perf_counter()
print(json.dumps(found))
"""


def config_of(gib: float) -> dict:
    """An OPT shape whose layers are about so many GiB in float16: 12 h x h matrices of 2 bytes a layer."""
    hidden = max(1, round(math.sqrt(gib * 2**30 / (24 * LAYERS)) / HEAD)) * HEAD
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // HEAD,
        "ffn_dim": 4 * hidden,
        "vocab_size": 1024,
        "max_position_embeddings": CONTEXT,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "torch_dtype": "float16",
    }


def bare(gib: float, device: str) -> dict:
    """Seconds to touch, lock and let go of so much memory: as one piece, and as the CPU tier does."""
    found = {"gib": gib}
    for name, piece, threads in (
        ("one piece", 0, 1),
        ("pieces of 1 GiB, 4 threads", 2**30, 4),
        ("as the tier", 2**30, 16),
    ):
        command = [sys.executable, "-c", BARE, str(gib), device, str(piece), str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=GONE_SECONDS * 2)
        found[name] = json.loads(done.stdout)
    return found


def start(folder: Path, gib: float, device: str) -> subprocess.Popen:
    """The run; its first row ends at once, the others never."""
    (folder / "config.json").write_text(json.dumps(config_of(gib)))
    rows = [{"token_ids": [5 + row, 6, 7], "max_new_tokens": CONTEXT - 8 if row else 1} for row in range(ROWS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [
        "--random-weights",
        folder / "config.json",
        "--prompts",
        folder / "prompts.jsonl",
        "--output",
        folder / "run.h5",
    ]
    keys = f"--device {device} --dtype float16 --weights cpu=100 --ignore-eos --seal-seconds 0".split()
    command = [sys.executable, "-m", "noria", "run", *map(str, files), *keys]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def measure(folder: Path, gib: float, device: str) -> dict:
    began, lines = time.monotonic(), []
    run = start(folder, gib, device)

    def listen() -> None:
        for line in run.stderr:
            sys.stderr.write(line)
            lines.append((time.monotonic(), line.rstrip()))

    listener = threading.Thread(target=listen)
    listener.start()
    parts = parts_folder(folder / "run.h5")
    while not list(parts.glob("part-*")) and run.poll() is None and time.monotonic() < began + START_SECONDS:
        time.sleep(0.05)
    started = time.monotonic() - began
    memory = memory_of(run.pid)
    sent = time.monotonic()
    run.send_signal(signal.SIGTERM)
    try:
        code = run.wait(GONE_SECONDS)
    except subprocess.TimeoutExpired:
        run.kill()
        code = run.wait()
    gone = time.monotonic() - sent
    listener.join(5.0)
    heard = next((at - sent for at, line in lines if "stopping (SIGTERM)" in line), None)
    status = np.concatenate([part.status for part in scan(parts)] or [np.zeros(0)])
    return {
        "resident_gib": round(memory / 2**30, 1),
        "seconds_to_first_row": round(started, 1),
        "seconds_to_sealed": heard and round(heard, 2),
        "seconds_to_gone": round(gone, 2),
        "exit_code": code,
        "rows_sealed": len(status),
        "said": [re.sub(r"^\S+ \S+ ", "", line) for _, line in lines if "stopping (" in line or "page-locked" in line],
    }


def memory_of(process: int) -> int:
    """Bytes that the process has in memory."""
    try:
        words = Path(f"/proc/{process}/status").read_text().split("VmRSS:")[1].split()
    except (OSError, IndexError):
        return 0
    return int(words[0]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=100.0)
    parser.add_argument("--bare-gib", type=float, default=24.0, help="of the measurement without a run; 0: none")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    alone = bare(arguments.bare_gib, arguments.device) if arguments.bare_gib else None
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.gib, arguments.device)
    asked = {"gib": arguments.gib, "device": arguments.device}
    print(json.dumps({"bench": "leaving", **asked, **figures, "bare": alone}), flush=True)
    return int(figures["exit_code"] != 75)


if __name__ == "__main__":
    sys.exit(main())
