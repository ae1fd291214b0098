"""Whole runs on one and two GPUs against the CPU's in float64, and logits in lower precision against transformers'."""

import json
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import world
from bits import LLAMA_1B
from mpirun import describe, mpirun
from noria import attention, kinds
from noria.blocks import layer_name
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.engine.activations import OnDevice
from noria.engine.assembly import weights_of
from noria.engine.batch import Batches, Network
from noria.engine.kv_cache import KvCache
from noria.engine.loading import Loader
from noria.engine.parameters import TORCH_DTYPES
from noria.engine.sampler import Sampler
from noria.engine.stage import Moved, Stage
from noria.engine.timing import Meters, Traffic
from noria.engine.trace import OFF
from noria.output.generations import open_generations
from noria.plan import kept
from noria.step import Admitted, Run, Step
from noria.streams import streams_of

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.world]
ROOT = Path(__file__).parent.parent.parent
RANKS = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]
DEMO = ["--prompts", ROOT / "inputs/demo/prompts.jsonl", "--max-new-tokens", "32", "--seed", "5"]


def generate(num_ranks, output, model, *flags, fresh=False):
    """Runs noria on ranks of the shared world, or on `fresh` ones with all cores; returns (tokens of every row, what it said)."""
    command = ["run", "--model", model, "--output", output, *flags]
    if fresh:
        launch = [sys.executable, "-m", "noria", *command]
        done = mpirun(num_ranks, launch, timeout=240, env={"OMP_NUM_THREADS": None})
    else:
        done = world.command(num_ranks, command, timeout=240)
    assert done.returncode == 0, describe(done)
    with open_generations(output) as file:
        rows = list(file.rows())
    assert all(row.status == "done" for row in rows)
    return [row.token_ids.tolist() for row in rows], done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    convert(ROOT / "inputs/demo/model", folder / "model.h5")
    tokens, _ = generate(1, folder / "cpu.h5", folder / "model.h5", *DEMO, "--dtype", "float64", "--device", "cpu")
    return folder, tokens


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_run_measures_its_rates_in_three_seconds_and_the_next_one_takes_them(demo, tmp_path, num_ranks):
    said = []
    for name in ("a.h5", "b.h5"):
        command = ["run", "--model", demo[0] / "model.h5", "--output", tmp_path / name, *DEMO]
        variables = {"OMP_NUM_THREADS": None, "NORIA_CACHE": str(tmp_path / "kept")}
        done = mpirun(num_ranks, [sys.executable, "-m", "noria", *command], timeout=120, env=variables)
        assert done.returncode == 0, describe(done)
        said.append(re.search(r"rates: .*", done.stderr)[0])
    assert float(re.search(r"measured in (\d+\.\d) s", said[0])[1]) <= 3 and str(tmp_path / "kept") in said[1]
    (one,) = kept.all_kept(tmp_path / "kept")
    left = {"disk_read", "disk_write", *(() if num_ranks > 1 else ("hop", "hop_seconds"))}
    assert {name for name in one.rates.assumed if not name.startswith("matmul.")} == left
    assert one.rates.node.ranks == num_ranks and one.rates.node.driver and one.rates.matmul_rows


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("laps", [1, 3])
def test_the_demo_on_gpus_gives_the_cpus_tokens_in_float64(demo, num_ranks, laps):
    folder, expected = demo
    output = folder / f"gpu{num_ranks}-{laps}.h5"
    flags = [*DEMO, "--dtype", "float64", "--laps", laps]
    tokens, said = generate(num_ranks, output, folder / "model.h5", *flags, fresh=True)
    assert tokens == expected
    if num_ranks == 2:
        assert "transport mpi_device" in said, said  # nothing exported, nothing asked for


PLACEMENTS = {
    "weights": ["--weights", "cpu=100"],
    "some weights, laps": ["--weights", "gpu=40,cpu=60", "--laps", "3"],
    "weights, one after another": ["--weights", "cpu=100", "--schedule", "sequential"],
    "weights on disk": ["--weights", "gpu=30,disk=70"],
    "weights staged": ["--weights", "disk=100", "--stage"],
    "cache": ["--cache", "gpu=30,cpu=70", "--microbatches", "3"],
    "cache on disk": ["--cache", "cpu=50,disk=50"],
    "hidden states": ["--activations", "cpu", "--microbatch-tokens", "64"],
    "all of it, traced": [
        "--weights",
        "cpu=100",
        "--cache",
        "cpu=100",
        "--activations",
        "cpu",
        "--laps",
        "2",
        "--trace",
    ],
}


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", PLACEMENTS)
def test_what_lives_beside_the_gpu_changes_no_token(demo, num_ranks, name):
    folder, expected = demo
    model, output = folder / "model64.h5", folder / f"{name}{num_ranks}.h5"
    if not model.exists():
        convert(ROOT / "inputs/demo/model", model, dtype="float64")  # as the disk tier reads it
    flags = [*PLACEMENTS[name], *([folder / "trace.json"] if "--trace" in PLACEMENTS[name] else [])]
    assert generate(num_ranks, output, model, *DEMO, "--dtype", "float64", "--scratch", folder, *flags)[0] == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("flags", [["--transport", "mpi_host"], ["--blocking"]], ids=["mpi_host", "blocking"])
def test_the_other_ways_round_the_ring_give_the_same(demo, flags):
    folder, expected = demo
    output = folder / f"gpu-{flags[0]}.h5"
    assert generate(2, output, folder / "model.h5", *DEMO, "--dtype", "float64", *flags)[0] == expected


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a random model of 1.1 billion parameters: hf/ and model.h5."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B, tie_word_embeddings=False, initializer_range=0.03)).bfloat16()
    model.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "model.h5")
    return folder


def token_rows(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(3, LLAMA_1B["vocab_size"], length).tolist() for length in lengths]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_1b_llama_gives_the_cpus_tokens_in_float64(llama, num_ranks):
    folder = llama
    prompts = folder / "prompts.jsonl"
    rows = [{"token_ids": ids, "temperature": row % 2} for row, ids in enumerate(token_rows([5, 80, 33, 1, 60, 17]))]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts", prompts, "--max-new-tokens", "12", "--seed", "3", "--ignore-eos", "--dtype", "float64"]
    if not (folder / "cpu.h5").exists():
        generate(1, folder / "cpu.h5", folder / "model.h5", *flags, "--device", "cpu", fresh=True)
    with open_generations(folder / "cpu.h5") as file:
        expected = [row.token_ids.tolist() for row in file.rows()]
    assert generate(num_ranks, folder / f"gpu{num_ranks}.h5", folder / "model.h5", *flags)[0] == expected


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_rank_holds_its_own_layers_and_keeps_to_its_plan(llama, num_ranks):
    prompts = llama / "short.jsonl"
    prompts.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in token_rows([100] * 6)))
    output = llama / f"memory{num_ranks}.h5"
    flags = ["--prompts", prompts, "--max-new-tokens", "8", "--ignore-eos"]
    generate(num_ranks, output, llama / "model.h5", *flags, fresh=True)  # its peak is that of a process
    with h5py.File(output) as file:
        planned, peaks = json.loads(file.attrs["plan"])["memory"], file["timing/peak_device_nbytes"][:].tolist()
    for rank, (memory, peak) in enumerate(zip(planned, peaks, strict=True)):
        print(f"{num_ranks} ranks, rank {rank}: peak {peak / 2**20:.0f} MiB, planned {memory}")
        assert memory["gpu"]["weights"] + memory["gpu"]["cache"] <= peak <= sum(memory["gpu"].values())
    with open_checkpoint(llama / "model.h5") as checkpoint:
        assert sum(memory["gpu"]["weights"] for memory in planned) == checkpoint.nbytes


def logits_of(checkpoint, dtype, rows):
    """Noria's logits [tokens of all rows, V] on the GPU: all rows in one step, teacher-forced."""
    device, shape = torch.device("cuda", 0), checkpoint.shape
    layers = list(range(shape.num_layers))
    names = ["embed", *map(layer_name, layers), "head"]
    kind, _ = attention.fitting(device, TORCH_DTYPES[dtype], shape)
    model = kinds.load("models", shape.family)
    streams = streams_of(device)
    placed = Loader(checkpoint, dict.fromkeys(names, "gpu"), dtype, streams).load()
    weights = weights_of(placed, [layers], 1, 0, streams, Traffic())
    cache = KvCache(shape, layers, (64, len(rows)), dtype, streams)
    schedule = kinds.load("schedules", "single_batch")
    network = Network(model, kind, shape)
    batches, moved = Batches(network, TORCH_DTYPES[dtype], device), Moved(weights, cache, OnDevice())
    stage = Stage(network, batches, moved, Sampler(device), schedule, streams, Meters(Traffic(), OFF, print))
    settings = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    pages = [-(-len(row) // 16) for row in rows]
    admitted = [Admitted(i, (Run(sum(pages[:i]), pages[i]),), settings) for i in range(len(rows))]
    ids, counts = np.concatenate(rows), [len(row) for row in rows]
    empty = np.zeros(len(rows), np.int32)
    step = Step(0, 0, admitted=tuple(admitted), slots=np.arange(len(rows)), counts=np.array(counts), positions=empty,
                token_ids=ids.astype(np.int32), borders=np.array([0, len(rows)]))  # fmt: skip
    with torch.inference_mode():
        prepared = stage.prepare(step)
        hidden = stage.forward(prepared, range(shape.num_layers), stage.embed(prepared))
        return model.head(shape, weights.wait("head"), hidden.arrays[0]).double().cpu()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precisions_err_no_more_than_transformers_and_flip_only_near_ties(llama, dtype):
    from transformers import LlamaForCausalLM

    folder = llama
    rows = token_rows([120, 7, 64, 200, 31], seed=4)
    torch.backends.cuda.matmul.allow_tf32 = False

    def of_transformers(kind):
        module = LlamaForCausalLM.from_pretrained(folder / "hf", dtype=kind, device_map="cuda")
        with torch.inference_mode():
            found = [module(torch.tensor([row], device="cuda")).logits[0].double().cpu() for row in rows]
        return torch.cat(found)

    exact, peers = of_transformers(torch.float64), of_transformers(TORCH_DTYPES[dtype])
    with open_checkpoint(folder / "model.h5") as checkpoint:
        ours = logits_of(checkpoint, dtype, rows)
    error, peers_error = (ours - exact).abs().max(), (peers - exact).abs().max()
    print(f"{dtype}: largest error {error:.2e}, transformers' {peers_error:.2e}")
    assert error <= 1.5 * peers_error + 1e-9
    top = exact.topk(2, dim=-1).values
    flipped = ours.argmax(-1) != exact.argmax(-1)
    assert ((top[:, 0] - top[:, 1])[flipped] < 2 * error).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_bare_mpirun_line_moves_gpu_memory_at_the_rate_of_plain_send_and_recv():
    done = mpirun(2, [sys.executable, ROOT / "jobs/bench/transport.py", "--device", "cuda"], timeout=120)
    assert done.returncode == 0, describe(done)
    print(done.stdout)
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    assert measured["ratio"]["256"] >= 0.9, measured
