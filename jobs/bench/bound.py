"""How far a resident run of one GPU is from what its products and its memory allow:

    python jobs/bench/bound.py --prompts 1024 16 [--shape shape.json] [-- flags of noria run]

Starts the run, as resident.py does, and times the same products alone afterwards: torch's F.linear on weights of all layers, with
as many rows as a pass of the run has on average, in a CUDA graph. Everything else is bytes by the rate of a copy: what a layer
reads and writes between products, keys and values once a pass for each row that looks at them, the logits that are sampled.
Prints one JSON line a run: generated tokens per second, their bound, and both by phase. Decoders of dense models alone.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import lengths
import resident
import torch
import torch.nn.functional as F

from noria import models
from noria.model import ModelShape

NBYTES = 2  # of a number
COPIED = 2 << 30  # bytes
REPEATS = 7


class Device:
    """What is timed, and how: by events where there is a GPU."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()
        self.name = "cuda" if self.cuda else "cpu"

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of several calls, each captured as a graph on a GPU: launches cost nothing."""
        call()
        if not self.cuda:
            return statistics.median(self._by_clock(call) for _ in range(REPEATS))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        return statistics.median(self._by_events(graph.replay) for _ in range(REPEATS))

    def _by_clock(self, call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def _by_events(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def copy_rate(self) -> float:
        """Bytes a second that a copy reads and writes, together. Not within a graph, where it takes 1.6 times as long."""
        source = torch.empty(COPIED if self.cuda else COPIED >> 6, dtype=torch.uint8, device=self.name).random_()
        target = torch.empty_like(source)
        timed = self._by_events if self.cuda else self._by_clock
        return 2 * source.nbytes / statistics.median(timed(lambda: target.copy_(source)) for _ in range(REPEATS))


class Products:
    """The matrices of a model, random as those of a run, and how long products with them take."""

    def __init__(self, config: dict, device: Device):
        family = models.for_config(config)
        self.shape: ModelShape = family.shape(config)
        self._device = device
        self._layers = [self._matrices(family.layer_parameters(self.shape, n)) for n in range(self.shape.num_layers)]
        self._head = self._matrices(family.head_parameters(self.shape))

    def _matrices(self, parameters: dict) -> list[torch.Tensor]:
        return [self._random(*size) for size in parameters.values() if len(size) == 2]

    def _random(self, *size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=self._device.name).normal_(std=size[-1] ** -0.5)

    def layers(self, rows: int) -> float:
        """Seconds of the products of all layers with so many rows."""
        return self._seconds([matrix for layer in self._layers for matrix in layer], rows)

    def head(self, rows: int) -> float:
        return self._seconds(self._head, rows)

    def _seconds(self, matrices: list[torch.Tensor], rows: int) -> float:
        hidden = {inputs: self._random(rows, inputs) for inputs in {matrix.shape[1] for matrix in matrices}}
        return self._device.seconds(lambda: [F.linear(hidden[matrix.shape[1]], matrix) for matrix in matrices][-1])

    def between(self, tokens: int) -> int:
        """Bytes that a pass of so many tokens reads and writes between products: two sums with their norms, rotary positions with
        the write of keys and values, queries and what attention gives, the gate; and the embedding."""
        shape = self.shape
        heads, keys = (shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim)
        inner = max(matrix.shape[1] for matrix in self._layers[0])
        layer = 2 * 4 * shape.hidden_size + 2 * (heads + keys) + 2 * heads + 3 * inner
        return tokens * NBYTES * (shape.num_layers * layer + 2 * shape.hidden_size)

    def cached(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens, in all layers."""
        return tokens * NBYTES * self.shape.num_layers * 2 * self.shape.num_kv_heads * self.shape.head_dim


def bound(products: Products, timing: dict[str, float], phase: str, rate: float) -> dict[str, float]:
    """Seconds of a phase: what bounds it, and what it took."""
    tokens, passes, sampled, rounds, seen = (
        int(timing[f"{phase}_{name}"]) for name in ("tokens", "passes", "sampled", "rounds", "seen")
    )
    if not rounds:
        return {"products": 0.0, "head": 0.0, "bytes": 0.0, "measured": 0.0}
    nbytes = products.between(tokens) + products.cached(seen) + sampled * NBYTES * products.shape.vocab_size
    return {
        "products": passes * products.layers(round(tokens / passes)),
        "head": rounds * products.head(max(round(sampled / rounds), 1)),
        "bytes": nbytes / rate,
        "measured": timing[f"{phase}_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths.add_arguments(parser, prompts=[1024], max_new_tokens=128)
    parser.add_argument("--shape", type=Path, help="a config.json (default: Llama-8B)")
    parser.add_argument("flags", nargs="*", help="flags of noria run, after --")
    arguments = parser.parse_args()
    config = json.loads(arguments.shape.read_text()) if arguments.shape else resident.LLAMA_8B
    runs = []
    for num_prompts in arguments.prompts:
        with tempfile.TemporaryDirectory() as name:
            rows = lengths.rows(arguments, num_prompts, config["vocab_size"], config["max_position_embeddings"])
            resident.write_inputs(Path(name), config, rows)
            measured = resident.run(Path(name), 1, arguments.flags)
            with h5py.File(Path(name) / "run.h5") as output:
                timing = {column: float(values[0]) for column, values in output["timing"].items()}
        runs.append((num_prompts, measured, timing))
    device = Device()
    rate, products = device.copy_rate(), Products(config, device)
    for num_prompts, measured, timing in runs:
        phases = {phase: bound(products, timing, phase, rate) for phase in ("prefill", "decode")}
        least = {phase: sum(found.values()) - found["measured"] for phase, found in phases.items()}
        most = measured["generated_tokens"] / sum(least.values())
        line = {
            "bench": "bound",
            "device": measured["device"],
            "prompts": num_prompts,
            "tokens_per_second": measured["tokens_per_second"],
            "bound_tokens_per_second": round(most, 1),
            "ratio": round(measured["tokens_per_second"] / most, 3),
            "phase_ratio": {name: round(least[name] / max(phases[name]["measured"], 1e-9), 3) for name in phases},
            "seconds": {name: {key: round(one, 3) for key, one in found.items()} for name, found in phases.items()},
            "ms_of_a_decode_round": {
                name: round(1e3 * seconds / max(timing["decode_rounds"], 1), 2)
                for name, seconds in (("measured", timing["decode_seconds"]), ("bound", least["decode"]))
            },
            "copy_gbps": round(rate / 1e9),
            "flags": arguments.flags,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
