"""What a plan predicts beside what its run measures, and plans that differ in one choice beside it, with random weights:

    python jobs/bench/planned.py [--case NAME ...] [--times 3] [--rivals 4] [--seconds 500]
    mpirun -n 2 python jobs/bench/planned.py ...

All runs in one process a rank, which loads a model of few layers each time; a first, short one builds what the process
builds once. Prints a JSON line a case: tokens/s predicted and measured, overall and of each phase (the median of several
runs), and the share by which the measured one is off; milliseconds of a round by term, planned and measured; rounds, planned
and measured; tokens/s of each run. With --rivals also other plans, those that are expected to be the fastest: tokens/s,
predicted and measured; of the plan itself once more; and how many times as fast the best of them is. Cases need a GPU, or
--device cpu. The first line has the machine's rates.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import lengths
import streamed
from resident import LLAMA_8B

from noria import config
from noria.checkpoint.random_weights import random_checkpoint
from noria.communicator import Communicator
from noria.errors import InputError
from noria.launch import mpi
from noria.output.stored_rates import stored_rates
from noria.plan import planner, rates
from noria.plan.kept import all_kept, folder_of
from noria.plan.problem import Machine, Problem
from noria.plan.rounds import Workload
from noria.report.busy import measured_seconds, planned_seconds
from noria.run import run

PHASES = ("prefill", "decode")

QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
OPT_30B = streamed.config_of("opt-30b")
LLAMA_SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 16000}
LLAMA_TINY = LLAMA_8B | LLAMA_SMALL


@dataclass(frozen=True)
class Case:
    """A shape cut to so many layers, rows of equal length, and flags of noria run."""

    shape: dict
    layers: int
    rows: int
    prompt_tokens: int
    new_tokens: int
    flags: dict[str, Any] = field(default_factory=dict)


ON_CPU = {"weights": {"cpu": 100.0}}
CASES = {
    "dense, resident": Case(LLAMA_8B, 16, 1024, 512, 64),
    "dense, few rows": Case(LLAMA_8B, 16, 16, 512, 256),
    "dense, short rows": Case(LLAMA_8B, 16, 4096, 64, 32),
    "dense, long prompts": Case(LLAMA_8B, 16, 48, 6000, 64),
    "mixture, resident": Case(QWEN3_30B, 16, 512, 512, 64),
    "mixture, few rows": Case(QWEN3_30B, 16, 16, 512, 128),
    "dense, streamed": Case(OPT_30B, 8, 192, 512, 12, ON_CPU | {"compress_weights": "off"}),
    "dense, streamed and coded": Case(LLAMA_8B, 8, 192, 512, 12, ON_CPU),
    "dense, half of it resident": Case(OPT_30B, 8, 96, 512, 12, {"gpu_memory": "12GiB"}),
    "mixture, streamed": Case(QWEN3_30B, 8, 192, 512, 12, ON_CPU | {"compress_weights": "off"}),
    "dense, cache in CPU memory": Case(OPT_30B, 8, 64, 1024, 12, {"cache": {"cpu": 100.0}}),
    "dense, on disk": Case(OPT_30B, 2, 192, 512, 4, {"weights": {"disk": 100.0}, "stage": True}),
}
CPU_CASES = {
    "few rows": Case(LLAMA_TINY, 8, 16, 64, 64),
    "many rows": Case(LLAMA_TINY, 8, 256, 64, 32),
    "long prompts": Case(LLAMA_TINY, 8, 12, 1024, 32),
    "float64": Case(LLAMA_TINY, 4, 64, 64, 32, {"dtype": "float64"}),
    "long answers": Case(LLAMA_TINY, 4, 64, 16, 256),
    "one row": Case(LLAMA_TINY, 8, 1, 64, 128),
}


def measure(comm: Communicator, folder: Path, case: Case, flags: dict[str, Any]) -> dict[str, Any]:
    """One run: its plan, tokens/s overall, of prefill and of decode, of the slowest rank; seconds by term, and rounds."""
    files = {"random_weights": str(folder / "config.json"), "prompts": str(folder / "prompts.jsonl")}
    more = {"output": str(folder / "run.h5"), "overwrite": True, "ignore_eos": True}
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        code = run(config.load(None, files | more | case.flags | flags), comm)
    assert code == 0, code
    with h5py.File(folder / "run.h5") as output:
        timing = {name: column[:] for name, column in output["timing"].items()}
        plan, generated = json.loads(output.attrs["plan"]), len(output["tokens"])
    found = {"overall": generated / float(timing["seconds"].max())}
    for phase in PHASES:
        seconds = float(timing[f"{phase}_seconds"].max())
        found[phase] = float(timing[f"{phase}_tokens"].max()) / seconds if seconds else 0.0
    busy = {phase: measured_seconds(timing, phase, plan) for phase in PHASES}
    rounds = {
        phase: [int(timing[f"{phase}_rounds"].max()), float(timing[f"{phase}_seconds"].max())] for phase in PHASES
    }
    return {"plan": plan, "measured": found, "busy": busy, "rounds": rounds}


def repeated(comm: Communicator, folder: Path, case: Case, flags: dict[str, Any], times: int) -> dict[str, Any]:
    """Several runs of one plan: the medians."""
    runs = [measure(comm, folder, case, flags) for _ in range(times)]
    measured = {key: statistics.median(one["measured"][key] for one in runs) for key in runs[0]["measured"]}
    return runs[-1] | {"measured": measured, "each": [round(one["measured"]["overall"], 1) for one in runs]}


def beside(predicted: dict[str, Any], measured: dict[str, float]) -> dict[str, list[float]]:
    """Of each speed: predicted, measured, and the share by which the measured one is off."""
    planned = {"overall": predicted["tokens_per_second"]}
    planned |= {phase: predicted[phase]["tokens_per_second"] for phase in ("prefill", "decode")}
    return {
        name: [round(value, 1), round(measured[name], 1), round(measured[name] / value - 1, 3)]
        for name, value in planned.items()
    }


def by_term(found: dict[str, Any]) -> dict[str, Any]:
    """Of each phase milliseconds of a round, planned and measured by term, and rounds and their seconds."""
    told: dict[str, Any] = {}
    for phase in PHASES:
        predicted = found["plan"]["predicted"]
        planned, measured = planned_seconds(predicted, phase), found["busy"][phase]
        names = dict.fromkeys((*planned, *measured))
        terms = {name: [round(1e3 * one.get(name, 0.0), 3) for one in (planned, measured)] for name in names}
        parts = {name: round(1e3 * seconds, 3) for name, seconds in predicted["terms"][phase].items() if seconds}
        count, seconds = found["rounds"][phase]
        rounds = [round(predicted["rounds"][phase], 1), count]
        whole = [round(1e3 * predicted[phase]["round_seconds"], 3), round(1e3 * seconds / max(count, 1), 3)]
        told[phase] = {"rounds": rounds, "a round": whole, "terms": terms, "planned": parts}
    return told


def others(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Flags of plans that differ from this one in a choice: the step, the microbatch, groups, laps, the cache's tier."""
    step, micro, groups, laps = (plan[name] for name in ("step_tokens", "microbatch_tokens", "groups", "laps"))
    whole = {"step_tokens": step, "microbatch_tokens": micro, "groups": groups, "laps": laps}
    yield whole | {"step_tokens": max(step // 2, 1), "microbatch_tokens": min(micro, max(step // 2, 1))}
    yield whole | {"step_tokens": 2 * step}
    yield whole | {"microbatch_tokens": max(micro // 2, 1)}
    yield whole | {"microbatch_tokens": min(2 * micro, step)}
    yield {"groups": groups + 1, "laps": laps}
    if groups > plan["num_ranks"]:
        yield {"groups": groups - 1, "laps": laps}
    if plan["num_ranks"] > 1:
        yield {"laps": 1 if laps > 1 else 2}


def problem_of(folder: Path, case: Case, num_ranks: int, device: str) -> tuple[Problem, rates.Rates]:
    """What a run of the case is planned for, and the rates of the run before."""
    known = rates.parse(stored_rates(folder / "run.h5") or "")
    config_json = json.loads((folder / "config.json").read_text())
    made = random_checkpoint(config_json, config_json["torch_dtype"])
    dtype = case.flags.get("dtype", "float32" if device == "cpu" else config_json["torch_dtype"])
    memory = int(known.device_capacity), int(known.host_capacity)
    machine = Machine(device, *memory, int(1e12) if case.flags.get("stage") else None)
    files = {"random_weights": "config.json", "prompts": "prompts.jsonl", "output": "run.h5", "device": device}
    load = Workload(case.rows, case.prompt_tokens, case.new_tokens, whole=True)
    run_of_case = config.load(None, files | case.flags)
    return Problem(run_of_case, made.shape, made.blocks, dtype, num_ranks, machine, case.rows, load), known


def expected(problem: Problem, known: rates.Rates, flags: dict[str, Any]) -> float:
    """The tokens/s that the plan with these flags is predicted to reach; 0: it does not fit."""
    asked = replace(problem.config, pipeline=replace(problem.config.pipeline, **flags))
    try:
        return float(planner.make(replace(problem, config=asked), known).predicted["tokens_per_second"])
    except InputError:
        return 0.0


def measured_rivals(
    comm: Communicator, folder: Path, case: Case, plan: dict[str, Any], device: str, count: int
) -> list[dict[str, Any]]:
    """The tokens/s of so many other plans, those that are expected to be the fastest: predicted and measured."""

    def best() -> list[tuple[float, dict[str, Any]]]:
        problem, known = problem_of(folder, case, comm.Get_size(), device)
        unlike = [flags for flags in others(plan) if any(plan[name] != value for name, value in flags.items())]
        speeds = [(expected(problem, known, flags), flags) for flags in unlike]
        return sorted(speeds, key=lambda one: -one[0])[:count]

    rivals: list[dict[str, Any]] = []
    for predicted, flags in mpi.on_first_rank(comm, best):
        with contextlib.suppress(mpi.Refused):
            speed = measure(comm, folder, case, flags | {"device": device})["measured"]["overall"]
            rivals.append({"flags": flags, "tokens_per_second": [round(predicted, 1), round(speed, 1)]})
    return rivals


@contextlib.contextmanager
def inputs(comm: Communicator, case: Case) -> Iterator[Path]:
    """A folder with the model's config and the prompts, for all ranks."""
    with tempfile.TemporaryDirectory() as own:
        folder = Path(comm.bcast(own)) if comm.Get_size() > 1 else Path(own)
        if comm.Get_rank() == 0:
            shape = case.shape | {"num_hidden_layers": case.layers}
            (folder / "config.json").write_text(json.dumps(shape))
            asked = argparse.Namespace(mixed=False, prompt_tokens=case.prompt_tokens, max_new_tokens=case.new_tokens)
            with (folder / "prompts.jsonl").open("w") as file:
                rows = lengths.rows(asked, case.rows, shape["vocab_size"], shape["max_position_embeddings"])
                file.writelines(json.dumps(row) + "\n" for row in rows)
        comm.Barrier()
        yield folder
        comm.Barrier()


def tell(comm: Communicator, name: str, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    with inputs(comm, case) as folder:
        found = repeated(comm, folder, case, {"device": arguments.device}, arguments.times)
        line: dict[str, Any] = {"off": beside(found["plan"]["predicted"], found["measured"])}
        line["terms"], line["each"] = by_term(found), found["each"]
        line["plan"] = {key: found["plan"][key] for key in ("laps", "groups", "step_tokens", "microbatch_tokens")}
        if arguments.rivals:
            rivals = measured_rivals(comm, folder, case, found["plan"], arguments.device, arguments.rivals)
            again = measure(comm, folder, case, {"device": arguments.device})["measured"]["overall"]
            best, own = max((one["tokens_per_second"][1] for one in rivals), default=0.0), found["measured"]["overall"]
            line |= {"rivals": rivals, "again": round(again, 1), "best_rival": round(best / max(own, again), 3)}
    return {"bench": "planned", "case": name, "ranks": comm.Get_size(), "times": arguments.times} | line


def warm(comm: Communicator, arguments: argparse.Namespace, cases: Iterable[Case]) -> None:
    """Runs of few rows: kernels are built and the machine is measured once a process."""
    shapes = {case.shape["model_type"]: Case(case.shape, 2, 8, 64, 4) for case in cases}
    for case in shapes.values():
        with inputs(comm, case) as folder:
            measure(comm, folder, case, {"device": arguments.device})
            found = all_kept(folder_of(folder / "run.h5"))
    if comm.Get_rank() == 0:
        print(json.dumps({"bench": "planned", "rates": found[0].rates.to_toml() if found else None}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=[*CASES, *CPU_CASES])
    parser.add_argument("--times", type=int, default=3, help="runs of a case, of which the median counts")
    parser.add_argument("--rivals", type=int, default=0, help="other plans that are measured too, once each")
    parser.add_argument("--layers", type=int, default=None, help="fewer layers than the cases have")
    parser.add_argument("--seconds", type=float, default=500.0, help="no new case begins after these")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    cases, comm, began = CPU_CASES if arguments.device == "cpu" else CASES, mpi.start(), time.perf_counter()
    if arguments.layers:
        cases = {name: replace(case, layers=min(case.layers, arguments.layers)) for name, case in cases.items()}
    names = arguments.case or [*cases]
    warm(comm, arguments, [cases[name] for name in names])
    for name in names:
        if comm.bcast(time.perf_counter() - began) < arguments.seconds:
            line = tell(comm, name, cases[name], arguments)
            if comm.Get_rank() == 0:
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
