"""Published large models, cut to layers that fit, with random weights in the bytes they are published in:

    python jobs/bench/large.py [--case deepseek-v3 glm-5 gpt-oss-120b ...] [--layers 8] [-- flags of noria run]

Prints one JSON line a case: seconds of a decode round, bytes over each GPU's link in it, their share of the link's own rate
(as the run itself measured it, and unless --no-link measured by threads of one process just before; each on all GPUs of the
case at once), what was predicted, and what the whole model would take at that rate. Starts mpirun itself; most cases are for
two GPUs of 141 GB and 256 GiB. --tiny runs shapes of the same kinds on the CPU, to try the script.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import lengths
import streamed
from large_shapes import DEEPSEEK_V3, GLM_5, GPT_OSS_120B, QWEN3_235B

from noria.checkpoint.random_weights import random_checkpoint
from noria.output.generations import open_generations
from noria.output.stored_rates import stored_rates
from noria.plan import rates

OPT_175B = streamed.config_of("opt-175b")
INT4 = {"quantization_config": {"quant_method": "int4", "group_size": 64}}
TINY = {  # sizes that stand for those of a published config.json
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 32, "v_head_dim": 32, "n_routed_experts": 16, "num_experts": 16, "num_local_experts": 16,
    "word_embed_proj_dim": 256, "ffn_dim": 256, "n_group": 4, "topk_group": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A shape with some of its layers, ranks, rows of equal length, and flags of noria run."""

    config: dict[str, Any]
    layers: int
    ranks: int
    rows: int
    prompt_tokens: int
    new_tokens: int
    flags: tuple[str, ...] = ()


STREAMED = ("--weights", "cpu=100", "--groups", "2")  # each group decodes a layer's experts again
CASES = {
    "deepseek-v3": Case(DEEPSEEK_V3 | {"first_k_dense_replace": 1}, 8, 2, 512, 512, 16, STREAMED),
    "glm-5": Case(GLM_5, 39, 2, 128, 512, 6),  # the most layers that find room in two GPUs of 141 GB and 256 GiB
    "gpt-oss-120b": Case(GPT_OSS_120B, 36, 1, 512, 512, 64),
    "gpt-oss-120b-streamed": Case(GPT_OSS_120B, 36, 1, 256, 512, 8, ("--gpu-memory", "40GiB")),
    "qwen3-235b": Case(QWEN3_235B, 94, 2, 256, 512, 8, ("--gpu-memory", "72GiB")),
    "opt-175b": Case(OPT_175B | INT4, 96, 2, 64, 256, 16, ("--gpu-memory", "72GiB")),
    "opt-175b-float16": Case(OPT_175B, 96, 2, 64, 256, 6, ("--gpu-memory", "72GiB")),
}


def tiny(case: Case) -> Case:
    """The same kind of model and placement in small, for a CPU."""
    config = case.config | {name: size for name, size in TINY.items() if name in case.config}
    placed = ("--weights", "gpu=40,cpu=60") if "--gpu-memory" in case.flags else case.flags
    return Case(config | {"num_key_value_heads": 2} if "num_key_value_heads" in case.config else config,
                6, case.ranks, 8, 20, 6, ("--device", "cpu", *placed))  # fmt: skip


def config_of(case: Case, layers: int) -> dict[str, Any]:
    dtype = case.config.get("torch_dtype", "bfloat16")
    return case.config | {"num_hidden_layers": layers, "tie_word_embeddings": False, "torch_dtype": dtype}


def run(folder: Path, case: Case, flags: list[str]) -> tuple[dict[str, Any], dict[str, Any], float]:
    """One job: what its ranks measured, its output's plan, and seconds from its start to its end."""
    config = config_of(case, case.layers)
    (folder / "config.json").write_text(json.dumps(config))
    lengths_of = argparse.Namespace(mixed=False, prompt_tokens=case.prompt_tokens, max_new_tokens=case.new_tokens)
    with (folder / "prompts.jsonl").open("w") as file:
        rows = lengths.rows(lengths_of, case.rows, config["vocab_size"], config["max_position_embeddings"])
        file.writelines(json.dumps(row) + "\n" for row in rows)
    files = ["--random-weights", "config.json", "--prompts", "prompts.jsonl", "--output", "run.h5", "--overwrite"]
    noria = [sys.executable, "-m", "noria", "run", *files, "--ignore-eos", *case.flags, *flags]
    launch = ["mpirun", "-n", str(case.ranks)] if case.ranks > 1 else []
    before = time.perf_counter()
    subprocess.run([*launch, *noria], check=True, timeout=560, cwd=folder)
    seconds = time.perf_counter() - before
    known = rates.parse(stored_rates(folder / "run.h5") or "")
    with open_generations(folder / "run.h5") as output:
        bits = str(output.attrs.get("exact_bits", "of a CPU"))
    with h5py.File(folder / "run.h5") as output:
        timing = {name: column[:] for name, column in output["timing"].items()}
        found = {"plan": json.loads(output.attrs["plan"]), "generated": len(output["tokens"]), "exact_bits": bits}
        found["rates"] = known
    return timing, found, seconds


def beside(measured: float, predicted: float) -> dict[str, float]:
    return {"measured": round(measured, 3), "predicted": round(predicted, 3), "off": round(measured / predicted - 1, 3)}


def figures(case: Case, timing: dict[str, Any], found: dict[str, Any], link: float | None) -> dict[str, Any]:
    """Of each speed what was measured and predicted; of each rank's link the share of its own rate."""
    plan, predicted = found["plan"], found["plan"]["predicted"]
    rounds, seconds = int(timing["decode_rounds"].max()), float(timing["decode_seconds"].max())
    prefill = float(timing["prefill_tokens"].max()) / float(timing["prefill_seconds"].max())
    to_gpu = timing["decode_host_to_gpu_nbytes"] / max(rounds, 1)
    links = [float(nbytes) * rounds / seconds for nbytes in to_gpu]
    line = {
        "plan": {name: plan[name] for name in ("laps", "groups", "step_tokens", "microbatch_tokens", "schedule")},
        "resident": [sum(tier == "gpu" for tier in held.values()) for held in plan["weight_tiers"]],
        "tokens_per_second": beside(found["generated"] / float(timing["seconds"].max()), predicted["tokens_per_second"]),
        "prefill": beside(prefill, predicted["prefill"]["tokens_per_second"]),
        "decode": beside(
            float(timing["decode_tokens"].max()) / seconds, predicted["decode"]["tokens_per_second"]
        ),
        "decode_rounds": rounds,
        "seconds_a_round": round(seconds / max(rounds, 1), 4),
        "gb_a_round": [round(float(nbytes) / 1e9, 2) for nbytes in to_gpu],
        "link_gb_s": [round(one / 1e9, 2) for one in links],
        "peak_device_gib": [round(float(value) / 2**30, 1) for value in timing["peak_device_nbytes"]],
        "peak_host_gib": [round(float(value) / 2**30, 1) for value in timing["peak_host_nbytes"]],
        "exact_bits": found["exact_bits"],
    }  # fmt: skip
    own = found["rates"].host_to_device
    if own:
        line |= {"own_link": round(own / 1e9, 2), "share_of_own_links": [round(one / own, 3) for one in links]}
    if link:
        line |= {"link": round(link / 1e9, 2), "share_of_links": [round(one / link, 3) for one in links]}
    return line | whole(case, sum(links))


def whole(case: Case, links: float) -> dict[str, Any]:
    """The bytes of its layers; and where weights stream, how long the model with all its layers would take a round, if all
    of them came over these links at this rate."""
    config = config_of(case, case.config["num_hidden_layers"])
    blocks = random_checkpoint(config, config["torch_dtype"]).blocks
    layers = [block.nbytes for name, block in blocks.items() if name.startswith("layers/")]
    found = {"gb_a_layer": round(max(layers) / 1e9, 3)}
    if links:
        seconds = sum(layers) / links
        found["seconds_a_layer"] = round(max(layers) / links * case.ranks, 4)
        found["whole"] = {
            "layers": len(layers), "gb": round(sum(layers) / 1e9, 1), "seconds_a_round": round(seconds, 3),
            "decode_tokens_per_second": round(case.rows / seconds, 2),
        }  # fmt: skip
    return found


def bound(case: Case, line: dict[str, Any], rate: float) -> dict[str, Any]:
    """Of a resident model: how much of a decode round its weights would take at the rate at which the device copies."""
    config = config_of(case, case.layers)
    nbytes = sum(
        block.nbytes
        for name, block in random_checkpoint(config, config["torch_dtype"]).blocks.items()
        if name != "embed"
    )
    return {"copy_tb_s": round(rate / 1e12, 2), "share_of_copy": round(nbytes / rate / line["seconds_a_round"], 3)}


def tell(name: str, case: Case, arguments: argparse.Namespace) -> None:
    link = None if arguments.tiny or not arguments.link else streamed.link_rate(case.ranks)
    with tempfile.TemporaryDirectory() as folder:
        timing, found, seconds = run(Path(folder), case, arguments.flags)
    line = figures(case, timing, found, link)
    if not (arguments.tiny or any(line["gb_a_round"])):
        line |= bound(case, line, found["rates"].device_memory)
    asked = {"bench": "large", "case": name, "layers": case.layers, "ranks": case.ranks, "rows": case.rows}
    asked |= {"tokens": [case.prompt_tokens, case.new_tokens], "seconds": round(seconds, 1)}
    asked |= {
        "start_seconds": round(seconds - float(timing["seconds"].max()), 1),
        "flags": [*case.flags, *arguments.flags],
    }
    print(json.dumps(asked | line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--tiny", action="store_true", help="small shapes of the same kinds, on the CPU")
    parser.add_argument("--no-link", dest="link", action="store_false", help="do not measure the link")
    for name, what in (("layers", "layers"), ("ranks", "ranks"), ("rows", "rows"), ("new_tokens", "new tokens")):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=argparse.SUPPRESS, help=f"so many {what} instead of the case's own")
    parser.add_argument("flags", nargs="*", help="flags of noria run, after --")
    arguments = parser.parse_args()
    given = {
        name: value for name, value in vars(arguments).items() if name in ("layers", "ranks", "rows", "new_tokens")
    }
    for name in arguments.case:
        case = replace(CASES[name], **given)
        tell(name, tiny(case) if arguments.tiny else case, arguments)


if __name__ == "__main__":
    main()
