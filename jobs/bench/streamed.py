"""Weights or cache beyond the GPU: an OPT shape with random weights, greedy, every row as long or lengths mixed:

    python jobs/bench/streamed.py --ranks 1 2 [--shape opt-30b] [--prompts 128] [--mixed] [-- flags of noria run]

Prints one JSON line a run: seconds of a decode round and of prefill, bytes over each link in a decode round, and what share
of the link's own rate, measured on all GPUs at once just before, that is; and what all links together carry of what the run
itself has measured of them, all at once, from the same kind of memory (a fresh NORIA_CACHE makes it measure). Starts mpirun
itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import lengths
import xxhash

from noria.output.stored_rates import stored_rates
from noria.plan import rates

SHAPES = {  # hidden size, layers, heads
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
    "opt-175b": (12288, 96, 96),
}
CONTEXT = 2048
NORIA = ("-m", "noria")
LINK = """
import threading, time, torch
def rate(device, found):
    host = torch.empty(2**33, dtype=torch.uint8).fill_(1)
    assert not int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), 0))
    target = torch.empty(2**30, dtype=torch.uint8, device=device)
    ready.wait()
    for repeat in range(4):
        torch.cuda.synchronize(device); before = time.perf_counter()
        for part in host.split(2**30): target.copy_(part, non_blocking=True)
        torch.cuda.synchronize(device); found.append(host.numel() / (time.perf_counter() - before))
ready, rates = threading.Barrier(RANKS), [[] for _ in range(RANKS)]
threads = [threading.Thread(target=rate, args=(f"cuda:{i}", rates[i])) for i in range(RANKS)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(min(sorted(its)[len(its) // 2] for its in rates))
"""


DISK = """
import mmap, os, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
nbytes, block, folder = 8 << 30, 16 << 20, sys.argv[1]
buffers = [mmap.mmap(-1, block) for _ in range(4)]
file, name = tempfile.mkstemp(dir=folder)
for _ in range(nbytes // block): os.write(file, os.urandom(4096) * (block // 4096))
os.fsync(file)
direct = os.open(name, os.O_RDONLY | os.O_DIRECT); os.unlink(name)
def read(thread):
    for at in range(thread * block, nbytes, len(buffers) * block): os.preadv(direct, [buffers[thread]], at)
rates = []
for repeat in range(2):
    before = time.perf_counter()
    with ThreadPoolExecutor(len(buffers)) as pool: list(pool.map(read, range(len(buffers))))
    rates.append(nbytes / (time.perf_counter() - before))
print(max(rates))
"""


def config_of(shape: str, constant: bool = False, cut: int | None = None) -> dict:
    """The config of a shape, `cut` to so many layers."""
    hidden, layers, heads = SHAPES[shape]
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": cut or layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden,
        "vocab_size": 50272,
        "max_position_embeddings": CONTEXT,
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "torch_dtype": "float16",
        "init_std": 1e-9 if constant else 0.006,  # in float16 that is 0: all weights the same, as the peer's are
    }


def link_rate(ranks: int) -> float:
    """Bytes a second from page-locked memory to each of so many GPUs at once, the slowest one's."""
    done = subprocess.run(
        [sys.executable, "-c", LINK.replace("RANKS", str(ranks))], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def disk_rate(folder: str) -> float:
    """Bytes a second of direct reads by four threads in turn of a new file of 8 GiB."""
    done = subprocess.run([sys.executable, "-c", DISK, folder], check=True, capture_output=True, text=True)
    return float(done.stdout)


def run(
    folder: Path, arguments: argparse.Namespace, ranks: int, link: float | None, program: tuple[str, str] = NORIA
) -> dict:
    """One job; what its output measured, beside a link of so many bytes a second. program: how Python starts Noria."""
    (folder / "config.json").write_text(json.dumps(config_of(arguments.shape, arguments.constant, arguments.layers)))
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in lengths.rows(arguments, arguments.prompts, 50000, CONTEXT))
    disk = disk_rate(arguments.disk) if arguments.disk else None
    files = ["--random-weights", "config.json", "--prompts", "prompts.jsonl", "--output", "run.h5", "--overwrite"]
    noria = [sys.executable, *program, "run", *files, "--dtype", "float16", "--ignore-eos", *arguments.flags]
    launch = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
    subprocess.run([*launch, *noria], check=True, timeout=560, cwd=folder)
    with h5py.File(folder / "run.h5") as output:
        timing = {name: column[:] for name, column in output["timing"].items()}
        plan = json.loads(output.attrs["plan"])
        figures = {"tokens": xxhash.xxh3_64_hexdigest(output["tokens"][:].tobytes())}
    figures |= of_all_links(timing, rates.parse(stored_rates(folder / "run.h5") or ""))
    found = figures | measured(timing, plan, link, disk, arguments.prompts)
    if arguments.mixed:  # rows end one after another: few rounds are full
        del found["full_round_tokens_per_second"]
    return found


def of_all_links(timing: dict, known: rates.Rates) -> dict:
    """Bytes a second over the links of all ranks in decode, and of what they gave together when the run began."""
    together = float(timing["decode_host_to_gpu_nbytes"].sum()) / max(float(timing["decode_seconds"].max()), 1e-9)
    own = len(timing["decode_seconds"]) * known.host_to_device
    return {"own_links": round(own / 1e9, 2), "share_of_own_links": round(together / own, 4)}


def measured(timing: dict, plan: dict, link: float | None, disk: float | None, prompts: int) -> dict:
    """The figures of a run, of its slowest rank."""
    rounds = int(timing["decode_rounds"].max())
    seconds = float(timing["decode_seconds"].max()) / max(rounds, 1)
    to_gpu = float(timing["decode_host_to_gpu_nbytes"].max()) / max(rounds, 1)
    figures = {
        "plan": {name: plan[name] for name in ("laps", "groups", "step_tokens", "microbatch_tokens", "schedule")},
        "resident": [sum(tier == "gpu" for tier in held.values()) for held in plan["weight_tiers"]],
        "predicted": plan.get("predicted"),
        "decode_rounds": rounds,
        "decode_seconds_a_round": round(seconds, 4),
        "decode_tokens_per_second": round(
            float(timing["decode_tokens"].max()) / float(timing["decode_seconds"].max()), 1
        ),
        "full_round_tokens_per_second": round(prompts / seconds, 1),
        "prefill_rounds": int(timing["prefill_rounds"].max()),
        "prefill_seconds": round(float(timing["prefill_seconds"].max()), 2),
        "prefill_tokens_per_second": round(
            float(timing["prefill_tokens"].max()) / float(timing["prefill_seconds"].max()), 1
        ),
        "bytes_a_decode_round": {
            link_name: [round(float(value) / max(rounds, 1)) for value in timing[f"decode_{link_name}_nbytes"]]
            for link_name in ("disk_to_host", "host_to_gpu", "gpu_to_host", "host_to_disk", "rank_to_rank")
        },
        "weights_unused": [int(value) for value in timing["weights_unused_nbytes"]],
        "waited_share": [round(float(share), 3) for share in timing["waited"] / timing["seconds"]],
        "peak_device_gib": [round(float(value) / 2**30, 1) for value in timing["peak_device_nbytes"]],
        "peak_host_gib": [round(float(value) / 2**30, 1) for value in timing["peak_host_nbytes"]],
    }
    if link:
        figures |= {"link": round(link / 1e9, 2), "share_of_the_link": round(to_gpu / seconds / link, 4)}
    if disk:
        read = float(timing["decode_disk_to_host_nbytes"].max()) / max(rounds, 1)
        figures |= {"disk": round(disk / 1e9, 2), "share_of_the_disk": round(read / seconds / disk, 4)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--shape", choices=SHAPES, default="opt-30b")
    lengths.add_arguments(parser, prompts=128, max_new_tokens=32)
    parser.add_argument("--no-link", dest="link", action="store_false", help="do not measure the link")
    parser.add_argument("--layers", type=int, default=None, help="so many layers of the shape")
    parser.add_argument("--constant", action="store_true", help="weights that are all the same")
    parser.add_argument("--disk", metavar="FOLDER", help="measure direct reads in this folder too")
    parser.add_argument("flags", nargs="*", help="flags of noria run, after --")
    arguments = parser.parse_args()
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            figures = run(Path(folder), arguments, ranks, link_rate(ranks) if arguments.link else None)
        asked = {"ranks": ranks, "shape": arguments.shape, "prompts": arguments.prompts, "mixed": arguments.mixed}
        asked |= {"flags": arguments.flags}
        print(json.dumps({"bench": "streamed", **asked, **figures}), flush=True)


if __name__ == "__main__":
    main()
