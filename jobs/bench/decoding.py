"""How fast each encoding of weights is decoded, beside a copy's rate, and what it costs in bits and in error:

    python jobs/bench/decoding.py [--only int4] [--numbers 268435456] [--device cpu]

Prints a JSON line a case. `kernel_gb_s`, `torch_gb_s`: bytes of bfloat16 that are made a second; `share`: bytes that the
kernel reads and writes a second, of those of a copy, measured first. `encode_mb_s`: bytes of bfloat16 that one core encodes a
second. `error`: of normal weights, and of Student's t with 4 degrees of freedom, relative, by Frobenius norms. The last line
is FlexGen's way, ranges of 64 in 4.5 bits. With --device cpu torch's rate of one core.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from noria import kinds
from noria.encodings import _kernels

OUTPUTS, INPUTS = 1024, 8192  # of a piece
CASES: list[tuple[str, dict[str, Any]]] = [
    ("exponent", {}),
    ("fp8_block", {}),
    ("fp8_channel", {}),
    ("int8", {}),
    ("int4", {}),
    ("int4", {"group_size": 32, "symmetric": True}),
    ("int4", {"group_size": 128}),
    ("int4", {"permuted": True}),
    ("mxfp4", {}),
    ("nvfp4", {}),
]


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 9) -> float:
    """Of the device, the median."""
    function()
    found = []
    for _ in range(repeats):
        if device.type == "cpu":
            began = time.perf_counter()
            function()
            found.append(time.perf_counter() - began)
            continue
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # a millisecond, in which the host launches what is timed
        before.record()
        function()
        after.record()
        after.synchronize()
        found.append(before.elapsed_time(after) / 1e3)
    return sorted(found)[repeats // 2]


def copy_rate(device: torch.device, numbers: int) -> float:
    """Bytes a second, those read and those written."""
    source = torch.ones(numbers, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return round(float((found.double() - wanted.double()).norm() / wanted.double().norm()), 5)


def weights() -> list[torch.Tensor]:
    """Normal ones, and ones with long tails."""
    torch.manual_seed(0)
    long_tails = torch.distributions.StudentT(4.0).sample((OUTPUTS, INPUTS))
    return [(its * 0.02).bfloat16() for its in (torch.randn(OUTPUTS, INPUTS), long_tails)]


def decoded(encoding: str, settings: dict[str, Any], numbers: torch.Tensor) -> torch.Tensor:
    kind, into = kinds.load("encodings", encoding), torch.empty(1, *numbers.shape)
    kind.decode({name: its[None] for name, its in kind.encode(numbers, settings).items()}, settings, into)
    return into[0]


def encode_rate(encoding: str, settings: dict[str, Any], numbers: torch.Tensor) -> int:
    """MB of bfloat16 that a core encodes a second."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()
    kinds.load("encodings", encoding).encode(numbers, settings)
    torch.set_num_threads(threads)
    return round(numbers.nbytes / (time.process_time() - began) / 1e6)


def device_rate(numbers: torch.Tensor, device: torch.device) -> dict[str, float]:
    """GB of bfloat16 that the device codes by `exponent` a second, as a run does while it loads."""
    if device.type == "cpu":
        return {}
    its = numbers.to(device).repeat(16, 1)
    took = seconds(lambda: kinds.load("encodings", "exponent").encode(its, {}), device, repeats=3)
    return {"encode_on_device_gb_s": round(its.nbytes / took / 1e9, 1)}


def decode_rates(
    encoding: str, settings: dict[str, Any], device: torch.device, numbers: int, copy: float
) -> dict[str, Any]:
    """The rates of torch and of the kernel, which must give the same bits, and bits a number."""
    kind, pieces = kinds.load("encodings", encoding), max(numbers // (OUTPUTS * INPUTS), 1)
    made = kind.encode(weights()[0], settings)
    fields = {name: its[None].to(device).expand(pieces, *its.shape).contiguous() for name, its in made.items()}
    into = torch.empty(pieces, OUTPUTS, INPUTS, dtype=torch.bfloat16, device=device)
    stored = sum(its.nbytes for its in fields.values())
    by_torch = seconds(lambda: kind.decode(fields, settings, into), device, repeats=3)
    found: dict[str, Any] = {
        "bits": round(stored * 8 / into.numel(), 3),
        "torch_gb_s": round(into.nbytes / by_torch / 1e9, 2),
    }
    its_decode, why = _kernels.decoder(encoding, device, into.dtype)
    if why or its_decode is kind.decode:
        return found | ({"no_kernel": why} if why else {})
    wanted = into.clone()
    into.zero_()
    by_kernel = seconds(lambda: its_decode(fields, settings, into), device)
    same, share = (
        torch.equal(into.view(torch.int16), wanted.view(torch.int16)),
        (into.nbytes + stored) / by_kernel / copy,
    )
    return found | {"kernel_gb_s": round(into.nbytes / by_kernel / 1e9, 1), "share": round(share, 3), "same_bits": same}


def measure(encoding: str, said: dict[str, Any], device: torch.device, numbers: int, copy: float) -> None:
    settings, (normal, student) = kinds.load("encodings", encoding).DEFAULTS | said, weights()
    rates = decode_rates(encoding, settings, device, numbers, copy)
    rates |= device_rate(normal, device) if encoding == "exponent" else {}
    errors = {
        name: error(decoded(encoding, settings, its), its) for name, its in (("normal", normal), ("student", student))
    }
    say(encoding=encoding, settings=said, **rates, encode_mb_s=encode_rate(encoding, settings, normal), error=errors)


def by_ranges(numbers: torch.Tensor, group: int = 64, bits: int = 4) -> torch.Tensor:
    """Codes between the least and the largest number of a group, both in float16."""
    groups = numbers.float().unflatten(1, (-1, group))
    least, most = (edge(2, keepdim=True).half().float() for edge in (groups.amin, groups.amax))
    steps = (2**bits - 1) / (most - least)
    return (((groups - least) * steps).round().clamp(0, 2**bits - 1) / steps + least).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one encoding")
    parser.add_argument("--numbers", type=int, default=1 << 28, help="that are decoded at once")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    numbers = arguments.numbers if device.type == "cuda" else OUTPUTS * INPUTS
    copy = copy_rate(device, numbers)
    say(copy_tb_s=round(copy / 1e12, 3), numbers=numbers)
    for encoding, said in CASES:
        if arguments.only in (None, encoding):
            measure(encoding, said, device, numbers, copy)
    found = {name: error(by_ranges(its), its) for name, its in zip(("normal", "student"), weights(), strict=True)}
    say(encoding="ranges of 64 (FlexGen's)", bits=4.5, error=found)


if __name__ == "__main__":
    main()
