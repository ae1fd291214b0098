"""Case C: everything resident. A Llama-8B shape with random weights, all prompts submitted at once, greedy:

    python jobs/bench/resident.py --ranks 1 2 --prompts 256 1024 [--mixed] [--shape shape.json] [-- flags of noria run]

Prints one JSON line a run: generated tokens per second from the first step to the last, prefill included, and the share of
the ranks' time that they waited for the ring. Starts mpirun itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import h5py
import lengths

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def write_inputs(folder: Path, shape: dict, rows: Iterable[dict]) -> None:
    (folder / "config.json").write_text(json.dumps(shape))
    with (folder / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def run(folder: Path, ranks: int, flags: list[str]) -> dict:
    """One job; what its output measured."""
    noria = [
        sys.executable,
        "-m",
        "noria",
        "run",
        "--random-weights",
        folder / "config.json",
        "--ignore-eos",
        "--overwrite",
    ]
    files = ["--prompts", folder / "prompts.jsonl", "--output", folder / "run.h5"]
    launch = ["mpirun", "-n", str(ranks)] if ranks > 1 else []
    subprocess.run([*launch, *noria, *files, *flags], check=True, timeout=560)
    with h5py.File(folder / "run.h5") as output:
        generated = len(output["tokens"])
        seconds, waited = output["timing/seconds"][:], output["timing/waited"][:]
        device = json.loads(output.attrs["devices"])[0]
        rounds = {phase: milliseconds(output["timing"], phase) for phase in ("prefill", "decode")}
    return {
        "device": device,
        "generated_tokens": generated,
        "seconds": round(float(seconds.max()), 2),
        "tokens_per_second": round(generated / float(seconds.max()), 1),
        "waited_share": [round(float(share), 3) for share in waited / seconds],
        "ms_of_a_round": rounds,
    }


def milliseconds(timing: h5py.Group, phase: str) -> dict[str, list[float]]:
    """Of a round that was looked at, a value a rank: what the device and the host did, and what they waited for."""
    names = [name for name in timing if name.startswith(f"{phase}_") and name.endswith("_seconds")]
    names.remove(f"{phase}_seconds")  # of all rounds
    rounds = timing[f"{phase}_watched_rounds"][:].clip(1)
    found = {name.removeprefix(f"{phase}_").removesuffix("_seconds"): timing[name][:] / rounds for name in names}
    return {name: [round(1e3 * float(one), 2) for one in ranks] for name, ranks in found.items() if ranks.any()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    lengths.add_arguments(parser, prompts=[256], max_new_tokens=128)
    parser.add_argument("--shape", type=Path, help="a config.json (default: Llama-8B)")
    parser.add_argument("flags", nargs="*", help="flags of noria run, after --")
    arguments = parser.parse_args()
    shape = json.loads(arguments.shape.read_text()) if arguments.shape else LLAMA_8B
    for num_prompts in arguments.prompts:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(
                Path(folder),
                shape,
                lengths.rows(arguments, num_prompts, shape["vocab_size"], shape["max_position_embeddings"]),
            )
            for ranks in arguments.ranks:
                measured = run(Path(folder), ranks, arguments.flags)
                length = "mixed" if arguments.mixed else arguments.prompt_tokens
                asked = {"ranks": ranks, "prompts": num_prompts, "prompt_tokens": length}
                print(json.dumps({"bench": "resident", **asked, **measured, "flags": arguments.flags}), flush=True)


if __name__ == "__main__":
    main()
