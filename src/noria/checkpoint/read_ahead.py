"""Reads blocks one after another, the next ones while the caller has the last: the storage is never left waiting.

Knows checkpoints and host memory; nothing of devices' layouts, dtypes or tiers.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from noria import encodings
from noria.checkpoint.checkpoint import Checkpoint
from noria.limits import LOADING_BUFFERS
from noria.model import OpenModel
from noria.tools.direct import DirectFile, chunks
from noria.tools.pinned import HostMemory

NUM_THREADS = 8


@dataclass
class _Reading:
    """A block under way into `memory`; `buffer` is what to give back after it, or None."""

    name: str
    memory: torch.Tensor
    buffer: HostMemory | None
    reads: list[Future[Any]]


def read_ahead(
    checkpoint: OpenModel,
    names: Iterable[str],
    into: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | None = None,
    heard: Callable[[int, float], None] = lambda nbytes, seconds: None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, host bytes: uint8 [block's nbytes]) in the order of `names`, each checked at its first load.

    The bytes are valid until the next iteration: a copy from them must be complete by then. A block in `into` is read
    straight into that memory and stays there; the others pass through buffers, page-locked if a CUDA `device` is given.
    `heard`: how long the first block was read, while nothing waited for the caller. Past the page cache where the file
    system allows. Raises InputError or OSError, naming the file or block.
    """
    names, into = list(names), into or {}
    sizes = {name: checkpoint.blocks[name].nbytes for name in names}
    buffers = _buffers([sizes[name] for name in names if name not in into], device)
    free = deque(buffers)
    source: _FileSource | _MadeSource
    source = _FileSource(checkpoint) if isinstance(checkpoint, Checkpoint) else _MadeSource(checkpoint)
    waiting = deque(names)
    coming: deque[_Reading] = deque()
    began = time.perf_counter()
    pool = ThreadPoolExecutor(NUM_THREADS, "read")
    try:
        while waiting or coming:
            while waiting and len(coming) < LOADING_BUFFERS and (waiting[0] in into or free):
                name = waiting.popleft()
                buffer = None if name in into else free.popleft()
                memory = into[name] if buffer is None else buffer.memory[: sizes[name]]
                assert memory.numel() == sizes[name], (name, memory.numel(), sizes[name])
                coming.append(_Reading(name, memory, buffer, source.start(pool, name, memory)))
            block = coming.popleft()
            for read in block.reads:
                read.result()
            if block.name == names[0]:
                heard(block.memory.numel(), time.perf_counter() - began)
            source.check(block.name, block.memory)
            yield block.name, block.memory
            if block.buffer is not None:
                free.append(block.buffer)
    finally:
        pool.shutdown(cancel_futures=True)
        source.close()
        for buffer in buffers:
            buffer.close()


def _buffers(sizes: list[int], device: torch.device | None) -> list[HostMemory]:
    buffers = [HostMemory(max(sizes)) for _ in sizes[:LOADING_BUFFERS]]
    if device is not None and device.type == "cuda":
        for buffer in buffers:
            buffer.touch()
            buffer.register(device)
    return buffers


def direct_files(checkpoint: Checkpoint, names: Iterable[str]) -> dict[int, DirectFile]:
    """The files that hold the named blocks, opened once more, by the checkpoint's descriptors. Close each."""
    extents = {checkpoint.extent(name).fd: checkpoint.extent(name) for name in names}
    return {descriptor: DirectFile(descriptor, extent.path) for descriptor, extent in extents.items()}


class _FileSource:
    """The blocks of a checkpoint, read in chunks."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._files = direct_files(checkpoint, checkpoint.blocks)

    def start(self, pool: ThreadPoolExecutor, name: str, memory: torch.Tensor) -> list[Future[Any]]:
        extent, view = self._checkpoint.extent(name), memory.numpy().data
        file = self._files[extent.fd]
        return [pool.submit(file.read, extent.offset + begin, view[begin:end]) for begin, end in chunks(extent.nbytes)]

    def check(self, name: str, memory: torch.Tensor) -> None:
        if check := self._checkpoint.checking(name):
            check.update(memory.numpy().data)
            check.finish()
            encodings.check_block(self._checkpoint.blocks[name], memory, str(self._checkpoint.path))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _MadeSource:
    """The blocks of random weights, made in place."""

    def __init__(self, checkpoint: OpenModel):
        self._checkpoint = checkpoint

    def start(self, pool: ThreadPoolExecutor, name: str, memory: torch.Tensor) -> list[Future[Any]]:
        return [pool.submit(self._checkpoint.read_block, name, memory.numpy().data)]

    def check(self, name: str, memory: torch.Tensor) -> None:
        """What is made is right."""

    def close(self) -> None:
        """Nothing is open."""
