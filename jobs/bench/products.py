"""Whether products keep their bits whatever the number of rows, for the shapes of published models, on one GPU:

    python jobs/bench/products.py [--dtype bfloat16] [--only llama] [--rows 1-512,1024,...] [--times]

Each product is torch's with the settings of a run (cuBLASLt, no split of the inputs), with and without a bias where the
family has one, at 1 to 512 rows and powers of two to 16,384, beside a kernel that adds along its inputs in one order
(noria/kernels/products.py). Prints a JSON line a product: at how many numbers of rows some number differs, and which they
are; with how many rows a run would take the kernel (`by_kernel`); the last line lists the exceptions of all. --times:
parts of the time by torch's default settings, for a few rows, of torch's and of the kernel.
"""

import argparse
import json
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from noria.checkpoint.random_weights import random_checkpoint
from noria.kernels.in_order import ALL
from noria.kernels.products import product
from noria.launch.choosing import Linear, chosen_products
from noria.launch.exact import products, products_in_one_order
from noria.limits import LOGITS_ROWS

MOST = 16_384
TIMED = (1, 16, 64, 256, 1024)
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
OPT = {"architectures": ["OPTForCausalLM"], "model_type": "opt"}
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
# hidden and inner size, heads, key heads, vocabulary
SIZES = {
    "llama-3.2-1b": (LLAMA, 2048, 8192, 32, 8, 128256),
    "llama-3.2-3b": (LLAMA, 3072, 8192, 24, 8, 128256),
    "llama-2-7b": (LLAMA, 4096, 11008, 32, 32, 32000),
    "llama-2-13b": (LLAMA, 5120, 13824, 40, 40, 32000),
    "llama-3-8b": (LLAMA, 4096, 14336, 32, 8, 128256),
    "llama-3-70b": (LLAMA, 8192, 28672, 64, 8, 128256),
    "llama-3-405b": (LLAMA, 16384, 53248, 128, 8, 128256),
    "mistral-nemo-12b": (LLAMA | {"head_dim": 128}, 5120, 14336, 32, 8, 131072),
    "mistral-large": (LLAMA, 12288, 28672, 96, 8, 32768),
    "qwen2.5-0.5b": (QWEN2, 896, 4864, 14, 2, 151936),
    "qwen2.5-1.5b": (QWEN2, 1536, 8960, 12, 2, 151936),
    "qwen2.5-3b": (QWEN2, 2048, 11008, 16, 2, 151936),
    "qwen2.5-7b": (QWEN2, 3584, 18944, 28, 4, 152064),
    "qwen2.5-14b": (QWEN2, 5120, 13824, 40, 8, 152064),
    "qwen2.5-32b": (QWEN2, 5120, 27648, 40, 8, 152064),
    "qwen2.5-72b": (QWEN2, 8192, 29568, 64, 8, 152064),
    "qwen3-0.6b": (QWEN3, 1024, 3072, 16, 8, 151936),
    "qwen3-1.7b": (QWEN3, 2048, 6144, 16, 8, 151936),
    "qwen3-4b": (QWEN3, 2560, 9728, 32, 8, 151936),
    "qwen3-8b": (QWEN3, 4096, 12288, 32, 8, 151936),
    "qwen3-14b": (QWEN3, 5120, 17408, 40, 8, 151936),
    "qwen3-32b": (QWEN3, 5120, 25600, 64, 8, 151936),
    "phi-3-mini": (LLAMA, 3072, 8192, 32, 32, 32064),
    "phi-3-medium": (LLAMA, 5120, 17920, 40, 10, 32064),
}
ROTARY = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
OPTS = {"125m": (768, 12), "1.3b": (2048, 32), "2.7b": (2560, 32), "6.7b": (4096, 32), "13b": (5120, 40),
        "30b": (7168, 56), "66b": (9216, 72)}  # fmt: skip
GPT2S = {"small": (768, 12), "medium": (1024, 16), "large": (1280, 20), "xl": (1600, 25)}
DENSE = {"num_hidden_layers": 1, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"}


def configs() -> Iterator[tuple[str, dict]]:
    """(name, config.json) of each model, with one layer."""
    for name, (family, *sizes) in SIZES.items():
        yield name, DENSE | {"tie_word_embeddings": False} | family | dict(zip(ROTARY, sizes, strict=True))
    for name, (size, heads) in OPTS.items():
        own = {"hidden_size": size, "ffn_dim": 4 * size, "num_attention_heads": heads, "word_embed_proj_dim": size}
        shape = {"vocab_size": 50272, "max_position_embeddings": 2048, "num_hidden_layers": 1}
        yield f"opt-{name}", OPT | own | shape | {"do_layer_norm_before": True, "activation_function": "relu"}
    for name, (size, heads) in GPT2S.items():
        yield f"gpt2-{name}", GPT2 | {"n_embd": size, "n_head": heads, "n_layer": 1}


def shapes(only: str) -> dict[tuple[int, int, bool, int], list[str]]:
    """The different products of the models whose name has `only` in it, and which have them."""
    found: dict[tuple[int, int, bool, int], list[str]] = {}
    for name, config in configs():
        if only in name:
            for outputs, inputs, has_bias, most in products(random_checkpoint(config, "bfloat16").blocks):
                rows = LOGITS_ROWS if most == LOGITS_ROWS else MOST
                found.setdefault((outputs, inputs, has_bias, rows), []).append(name)
    return found


def tensors(
    outputs: int, inputs: int, has_bias: bool, rows: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    draw = torch.Generator(device).manual_seed(0)
    hidden, weight, bias = (
        torch.empty(size, dtype=dtype, device=device).normal_(std=std, generator=draw)
        for size, std in (((rows, inputs), 1.0), ((outputs, inputs), inputs**-0.5), ((outputs,), 1.0))
    )
    return hidden, weight, bias if has_bias else None


def differing(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: list[int]
) -> tuple[list[int], list[int]]:
    """The numbers of rows at which some number is not that of the ordered product; and not that of most rows."""
    expected, most = product(hidden, weight, bias), F.linear(hidden, weight, bias)
    found = torch.empty(2, len(rows), dtype=torch.bool, device=hidden.device)
    for place, number in enumerate(rows):
        some = F.linear(hidden[:number], weight, bias)
        for kind, other in enumerate((expected, most)):
            found[kind, place] = (some != other[:number]).any()
    return tuple([number for number, bad in zip(rows, of_kind, strict=True) if bad] for of_kind in found.tolist())


def timed(function: Callable[[], object], repeats: int = 9) -> float:
    """Milliseconds of the device, the median."""
    found = []
    for _ in range(repeats + 2):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)
        before.record()
        function()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after))
    return sorted(found[2:])[repeats // 2]


def times(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, linear: Linear = F.linear
) -> dict[int, float]:
    return {rows: timed(lambda rows=rows: linear(hidden[:rows], weight, bias)) for rows in TIMED if rows <= len(hidden)}


def spans(numbers: list[int]) -> str:
    """`1-7 12` of sorted numbers."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and pieces[-1][-1] == number - 1:
            pieces[-1][1:] = [number]
        else:
            pieces.append([number])
    return " ".join("-".join(map(str, piece)) for piece in pieces)


def numbers_of(text: str) -> list[int]:
    """Those of `1-512,1024`."""
    pieces = (list(map(int, piece.split("-"))) for piece in text.split(","))
    return sorted({number for piece in pieces for number in range(piece[0], piece[-1] + 1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float16"], choices=["bfloat16", "float16"])
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--rows", default="1-512,1024,2048,4096,8192,16384")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    its_device = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    print(json.dumps({"bench": "products", "device": its_device, "torch": torch.__version__}), flush=True)
    exceptions, tried = [], 0
    for (outputs, inputs, has_bias, most), names in shapes(given.only).items():
        rows = [number for number in numbers_of(given.rows) if number <= most]
        for dtype in given.dtype:
            its = tensors(outputs, inputs, has_bias, rows[-1], getattr(torch, dtype), given.device)
            line = {"outputs": outputs, "inputs": inputs, "bias": has_bias, "dtype": dtype}
            usual = times(*its) if given.times else {}
            with products_in_one_order(getattr(torch, dtype)) as can:
                differ, from_most = differing(*its, rows)
                exact, ours = (times(*its, linear) if given.times else {} for linear in (F.linear, product))
                this = [(outputs, inputs, has_bias, most)] if its[0].is_cuda else []
                chosen = chosen_products(this, its[0].device, its[0].dtype)
            found = {"can": can, "rows": len(rows), "differ": spans(differ), "differ_from_most": spans(from_most)}
            by_kernel = next(iter(chosen.values()), ())
            found["by_kernel"] = (
                "all" if by_kernel == ALL else spans([number for number in rows if number in by_kernel])
            )
            ratio = {
                name: {number: round(its_times[number] / usual[number], 3) for number in usual}
                for name, its_times in (("times_default", exact), ("kernel_times_default", ours))
            }
            print(json.dumps(line | found | (ratio if usual else {}) | {"models": names}), flush=True)
            exceptions += [line | {"differ": spans(differ)}] if differ else []
            tried += len(rows)
    print(json.dumps({"products": tried, "exceptions": exceptions}), flush=True)


if __name__ == "__main__":
    main()
