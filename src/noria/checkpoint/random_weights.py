"""A model without a checkpoint: random weights made in place, the same for the same tensor on every rank and run.

For trying a shape, a placement or a machine. Has the interface of checkpoint.Checkpoint and no file.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from noria.blocks import DTYPE_NBYTES, Parameter
from noria.checkpoint.checkpoint import block_names, model_block, model_shape
from noria.checkpoint.published import KEYS
from noria.errors import InputError, require

# Numbers drawn per parameter; they repeat with this period, a prime, so that no two rows of a matrix are equal.
PERIOD = 1_048_583
TILES = 16  # periods that one thread copies at a time
MAX_THREADS = 16


class RandomCheckpoint:
    """Blocks of random weights. Norms are 1; biases and matrices are normal with the config's own width."""

    def __init__(self, config: dict[str, Any], dtype: str):
        if dtype not in DTYPE_NBYTES:
            raise InputError(f"random weights: dtype is {dtype!r}; known: {', '.join(DTYPE_NBYTES)}")
        self.path, self.adapter = Path("random weights"), ""
        self.config, self.dtype = config, dtype
        self.generation_config: dict[str, Any] = {}
        self.tokenizer: dict[str, bytes] = {}
        quantized = [key for key in KEYS if config.get(key) is not None]
        require(not quantized, f"random weights are plain: take {', '.join(quantized)} out of config.json")
        self._module, self.shape = model_shape(config, "random weights")
        self.family = self.shape.family
        self.blocks = {name: model_block(self._module, self.shape, name, dtype) for name in block_names(self.shape)}
        self.nbytes = sum(block.nbytes for block in self.blocks.values())
        self.header_hash = xxhash.xxh3_128(f"random {dtype} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()
        width = config.get("initializer_range", config.get("init_std", 0.02))
        self._width = width if isinstance(width, float) and 0 < width < 1 else 0.02

    def read_block(self, name: str, into: bytearray | memoryview) -> None:
        """Fills the writable buffer `into`, of exactly the block's nbytes, with the block. Any thread may call it."""
        block, view = self.blocks[name], memoryview(into).cast("B")
        assert len(view) == block.nbytes, (name, len(view), block.nbytes)
        sources = self._module.sources(self.shape, name)
        bytes_ = np.frombuffer(view, np.uint8)
        with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
            periods, end = [], 0
            for parameter in block.parameters:
                bytes_[end : parameter.offset] = 0
                end = parameter.offset + parameter.nbytes
                # the tensors' names are the seed: a tied embedding has one name and so one content
                seed = xxhash.xxh3_64_intdigest("+".join(sources[parameter.name]).encode())
                numbers = pool.submit(self._numbers, parameter, seed)
                periods.append((bytes_[parameter.offset : end], numbers))
            bytes_[end:] = 0
            copies = []
            for target, numbers in periods:
                step = max(TILES * len(numbers.result()), 1)
                parts = [target[begin : begin + step] for begin in range(0, len(target), step)]
                copies += [pool.submit(_tile, part, numbers.result()) for part in parts]
            for copy in copies:
                copy.result()

    def _numbers(self, parameter: Parameter, seed: int) -> np.ndarray:
        """The bytes of one period of a parameter."""
        size, name = parameter.numbers, parameter.name
        if len(parameter.shape) == 1 and "norm" in name and not name.endswith("bias"):
            numbers = torch.ones(min(size, PERIOD))
        else:
            draw = np.random.Generator(np.random.Philox(seed)).standard_normal(min(size, PERIOD), np.float32)
            numbers = torch.from_numpy(draw).mul_(self._width)
        return numbers.to(getattr(torch, parameter.dtype)).view(torch.uint8).numpy()

    def close(self) -> None:
        """Nothing is open."""


def _tile(target: np.ndarray, period: np.ndarray) -> None:
    """Fills `target` with repetitions of `period`, which stays in a core's cache: only the target passes the memory."""
    for begin in range(0, len(target), max(len(period), 1)):
        part = target[begin : begin + len(period)]
        part[:] = period[: len(part)]


def random_checkpoint(config: dict[str, Any], dtype: str) -> RandomCheckpoint:
    """A model of `config` (of a config.json) with random weights in `dtype`. Raises InputError if it cannot be made."""
    return RandomCheckpoint(config, dtype)
