"""A model without a checkpoint: random weights made in place, the same for the same tensor on every rank and run.

For trying a shape, a placement or a machine. Has the interface of checkpoint.Checkpoint and no file.
"""

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from noria import kinds
from noria.blocks import DTYPE_NBYTES, Parameter
from noria.checkpoint.checkpoint import block_names, model_block, model_shape
from noria.checkpoint.quantization import Quantization, laid_out
from noria.checkpoint.said import Chosen, said_by
from noria.errors import InputError
from noria.pieces import Field, Matrix

# Numbers drawn per parameter; they repeat with this period, a prime, so that no two rows of a matrix are equal.
PERIOD = 1_048_583
TILES = 16  # periods that one thread copies at a time
MAX_THREADS = 16
SOME = 6  # modules of a parameter whose names are looked at: those of many experts differ by a number


class RandomCheckpoint:
    """Blocks of random weights. Norms are 1; biases and matrices are normal with the config's own width, those of layers
    encoded as its `quantization_config` says."""

    def __init__(self, config: dict[str, Any], dtype: str):
        if dtype not in DTYPE_NBYTES:
            raise InputError(f"random weights: dtype is {dtype!r}; known: {', '.join(DTYPE_NBYTES)}")
        self.path, self.adapter, self.notes = Path("random weights"), "", list[str]()
        self.config, self.dtype = config, dtype
        self.generation_config: dict[str, Any] = {}
        self.tokenizer: dict[str, bytes] = {}
        self._module, self.shape = model_shape(config, "random weights")
        self.family = self.shape.family
        self.blocks = {name: model_block(self._module, self.shape, name, dtype) for name in block_names(self.shape)}
        chosen = said_by(config, any(block.expert_numbers for block in self.blocks.values()))
        if chosen is not None:
            self._encode(chosen)
        self.nbytes = sum(block.nbytes for block in self.blocks.values())
        self.header_hash = xxhash.xxh3_128(f"random {dtype} {json.dumps(config, sort_keys=True)}".encode()).hexdigest()
        width = config.get("initializer_range", config.get("init_std", 0.02))
        self._width = width if isinstance(width, float) and 0 < width < 1 else 0.02

    def _encode(self, chosen: Chosen) -> None:
        """Makes blocks whose parameters are encoded as it is said of the modules that they are made of."""
        modules = {}
        for block in self.blocks.values():
            sources = self._module.sources(self.shape, block.name)
            for parameter in block.parameters:
                names = [str(one).removesuffix(".weight") for one in sources[parameter.name]]
                modules[block.name, parameter.name] = [*names[:SOME], *names[-1:]]  # experts are alike
        forms = dict(zip(modules, chosen([*modules.values()]), strict=True))
        for name, block in [*self.blocks.items()]:
            own = {parameter.name: forms[name, parameter.name] for parameter in block.parameters}
            self.blocks[name] = laid_out(block, self.dtype, _by_name(own))

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
                if parameter.plain:
                    numbers = pool.submit(self._numbers, parameter, seed)
                    periods.append((bytes_[parameter.offset : end], numbers))
                else:
                    periods += self._encoded(parameter, seed, bytes_[parameter.offset : end], pool)
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
        if "norm" in name and not name.endswith("bias"):
            numbers = torch.ones(min(size, PERIOD))
        else:
            draw = np.random.Generator(np.random.Philox(seed)).standard_normal(min(size, PERIOD), np.float32)
            numbers = torch.from_numpy(draw).mul_(self._width)
        return numbers.to(getattr(torch, parameter.dtype)).view(torch.uint8).numpy()

    def _encoded(
        self, parameter: Parameter, seed: int, target: np.ndarray, pool: ThreadPoolExecutor
    ) -> list[tuple[np.ndarray, Future[np.ndarray]]]:
        """Each field of each piece, with one period of its bytes: of some outputs of a matrix, as they are encoded."""
        pieces, found = target.reshape(parameter.pieces, parameter.piece.nbytes), []
        _clear_gaps(parameter, pieces)
        for number, matrix in enumerate(parameter.piece.matrices):
            some = pool.submit(self._some_encoded, parameter, matrix, seed + number)
            for name, field in parameter.piece.fields_of(number).items():
                period = pool.submit(_period, some, name, field)
                found += [(piece[field.offset : field.offset + field.nbytes], period) for piece in pieces]
        return found

    def _some_encoded(self, parameter: Parameter, matrix: Matrix, seed: int) -> dict[str, torch.Tensor]:
        """The fields of some outputs of a matrix; those of all are repetitions."""
        kind = kinds.load("encodings", parameter.encoding)
        outputs, inputs = matrix.shape
        rows = max(kind.rows(parameter.settings) if hasattr(kind, "rows") else 1, 1)
        some = min(-(-max(PERIOD // inputs, 1) // rows) * rows, outputs)
        draw = np.random.Generator(np.random.Philox(seed)).standard_normal((some, inputs), np.float32)
        fields: dict[str, torch.Tensor] = kind.encode(torch.from_numpy(draw).mul_(self._width), parameter.settings)
        return fields

    def close(self) -> None:
        """Nothing is open."""


def _clear_gaps(parameter: Parameter, pieces: np.ndarray) -> None:
    """Zeroes what lies between fields. Fields are written by several threads, which touch new memory far faster than one."""
    fields = [
        field for number in range(len(parameter.piece.matrices)) for field in parameter.piece.fields_of(number).values()
    ]
    end = 0
    for field in sorted(fields, key=lambda field: field.offset):
        pieces[:, end : field.offset] = 0
        end = field.offset + field.nbytes
    pieces[:, end:] = 0


def _period(some: Future[dict[str, torch.Tensor]], name: str, field: Field) -> np.ndarray:
    """The bytes of a field of some outputs, at most those of all."""
    content = some.result()[name].contiguous().view(-1).view(torch.uint8).numpy()
    return content[: field.nbytes]


def _tile(target: np.ndarray, period: np.ndarray) -> None:
    """Fills `target` with repetitions of `period`, which stays in a core's cache: only the target passes the memory."""
    for begin in range(0, len(target), max(len(period), 1)):
        part = target[begin : begin + len(period)]
        part[:] = period[: len(part)]


def _by_name(forms: Mapping[str, Quantization | None]) -> Callable[[Parameter], Quantization | None]:
    return lambda parameter: forms[parameter.name]


def random_checkpoint(config: dict[str, Any], dtype: str) -> RandomCheckpoint:
    """A model of `config` (of a config.json) with random weights in `dtype`. Raises InputError if it cannot be made."""
    return RandomCheckpoint(config, dtype)
