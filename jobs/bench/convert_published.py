"""Is `noria convert` of a published FP8 model as fast as copying it, in little memory?

    python jobs/bench/convert_published.py [--gigabytes 11] [--folder FOLDER] [--repeat 1]

Makes a directory in the shape of Qwen3-30B-A3B-FP8 (128 experts of 2048 x 768 a layer, e4m3 codes with a float32 scale for 128 x
128) with as many layers as the gigabytes hold. Then, in turn: `cp --reflink=never` of it and `sync`, and `noria convert` of it,
each from a dropped page cache. Prints one JSON line: seconds of both, and those that processors were busy for them, which other
jobs of the machine change least; the peak of convert's resident memory in GiB; and the ratio of their rates (1 is as fast as
copying). Needs three times the gigabytes on the disk of FOLDER (Linux alone).
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, INNER, EXPERTS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, BLOCK = 2048, 768, 128, 32, 4, 128, 151936, 128
INTERVAL = 0.1  # seconds between two looks at the memory
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 6144,
    "moe_intermediate_size": INNER,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
    },
}


def matrix(random, outputs, inputs):
    """Codes that are numbers, and scales."""
    codes = random.integers(0, 127, (outputs, inputs), np.uint8)
    scales = random.random((-(-outputs // BLOCK), -(-inputs // BLOCK)), np.float32)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)


def layer_tensors(random, layer):
    top, tensors = f"model.layers.{layer}", {}
    shapes = {"q_proj": (HEADS * HEAD_DIM, HIDDEN), "k_proj": (KV_HEADS * HEAD_DIM, HIDDEN)}
    shapes |= {"v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "o_proj": (HIDDEN, HEADS * HEAD_DIM)}
    modules = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    for expert in range(EXPERTS):
        place = f"mlp.experts.{expert}"
        modules |= {f"{place}.gate_proj": (INNER, HIDDEN), f"{place}.up_proj": (INNER, HIDDEN)}
        modules[f"{place}.down_proj"] = (HIDDEN, INNER)
    for name, shape in modules.items():
        tensors[f"{top}.{name}.weight"], tensors[f"{top}.{name}.weight_scale_inv"] = matrix(random, *shape)
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    norms |= {"self_attn.q_norm": HEAD_DIM, "self_attn.k_norm": HEAD_DIM}
    tensors |= {f"{top}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
    tensors[f"{top}.mlp.gate.weight"] = torch.ones(EXPERTS, HIDDEN, dtype=torch.bfloat16)
    return tensors


def write_directory(folder, gigabytes):
    """A file a layer, and one of the embedding and the head."""
    random, weight_map, written = np.random.default_rng(0), {}, 0
    folder.mkdir()
    ends = {
        name: torch.ones(VOCAB, HIDDEN, dtype=torch.bfloat16)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    ends["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    shards, layers = {"ends.safetensors": ends}, 0
    while shards:
        name, tensors = shards.popitem()
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        written += (folder / name).stat().st_size
        if written < gigabytes * 1e9:
            shards[f"layer-{layers:03d}.safetensors"] = layer_tensors(random, layers)
            layers += 1
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return written, layers


def drop_cache(folder):
    """Writes out what the cache has of the files, and forgets it."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(command):
    """Seconds, those of processors, and the most bytes of resident memory that a look found."""
    started, before, most = time.perf_counter(), busy(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError, IndexError, ValueError):  # it is over
            text = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, int(text.split("VmHWM:")[1].split()[0]) * 1024)
        time.sleep(INTERVAL)
    assert process.returncode == 0, command
    return time.perf_counter() - started, busy() - before, most


def busy():
    """Seconds that processors were busy for the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=11.0)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, copy, model = Path(name) / "hf", Path(name) / "copy", Path(name) / "model.h5"
        nbytes, layers = write_directory(source, arguments.gigabytes)
        runs, peak = [], 0
        for _ in range(arguments.repeat):
            drop_cache(Path(name))
            copied, copy_busy, _ = timed(["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync "$1"/*', source, copy])
            shutil.rmtree(copy)
            drop_cache(Path(name))
            converted, convert_busy, most = timed([sys.executable, "-m", "noria", "convert", source, model])
            model.unlink()
            runs.append(tuple(round(one, 2) for one in (copied, converted, copy_busy, convert_busy)))
            peak = max(peak, most)
        copied, converted, copy_busy, convert_busy = (min(seconds) for seconds in zip(*runs, strict=True))
        found = {
            "gigabytes": round(nbytes / 1e9, 2),
            "layers": layers,
            "copy_seconds": copied,
            "convert_seconds": converted,
            "convert_GB_per_s": round(nbytes / 1e9 / converted, 2),
            "copy_busy_seconds": copy_busy,
            "convert_busy_seconds": convert_busy,
            "rate_beside_copy": round(copied / converted, 3),
            "peak_GiB": round(peak / 2**30, 2),
            "runs": runs,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
