"""This rank's weights: the layer blocks it holds, read from the checkpoint and cast to the dtype of the run.

Knows blocks and bytes, not what a layer computes.
"""

from collections.abc import Callable, Iterable

import torch

from noria.blocks import Block, lay_out

TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def views(buffer: torch.Tensor, block: Block) -> dict[str, torch.Tensor]:
    """The block's parameters as views into `buffer` ([block.nbytes] uint8)."""
    dtype = TORCH_DTYPES[block.dtype]
    return {p.name: buffer[p.offset : p.offset + p.nbytes].view(dtype).view(p.shape) for p in block.parameters}


def cast_block(block: Block, dtype: str) -> Block:
    """The layout of the same block in another dtype."""
    return lay_out(block.name, {p.name: p.shape for p in block.parameters}, dtype)


class Weights:
    """Blocks resident on the device. `wait(name)` gives a block's parameters by name."""

    def __init__(
        self,
        checkpoint,
        names: Iterable[str],
        dtype: str,
        device: torch.device,
        loaded: Callable[[int], None] = lambda nbytes: None,
    ):
        """Reads the named blocks, one at a time; `loaded` hears of each block's bytes as it is in place."""
        self.nbytes = 0
        self._parameters: dict[str, dict[str, torch.Tensor]] = {}
        names = list(names)
        shared = checkpoint.shape.tied and {"embed", "head"} <= set(names)
        for name in sorted(names, key=lambda name: name == "embed"):
            read = _read(checkpoint, name, dtype, device)
            if shared and name == "embed":
                read = {key: value.clone() for key, value in read.items() if key != "tokens"}
                read["tokens"] = self._parameters["head"]["lm_head"]
            self._parameters[name] = read
            loaded(checkpoint.blocks[name].nbytes)
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for b in self._parameters.values()
            for p in b.values()
        }
        self.nbytes = sum(storages.values())

    def wait(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of a block, ready to be used on the compute stream."""
        return self._parameters[name]


def _read(checkpoint, name: str, dtype: str, device: torch.device) -> dict[str, torch.Tensor]:
    source = checkpoint.blocks[name]
    host = torch.empty(source.nbytes, dtype=torch.uint8)
    checkpoint.read_block(name, memoryview(host.numpy()))
    if source.dtype == dtype:
        return views(host.to(device), source)
    target = cast_block(source, dtype)
    buffer = torch.empty(target.nbytes, dtype=torch.uint8, device=device)
    parameters = views(buffer, target)
    for key, value in views(host, source).items():
        parameters[key].copy_(value)
    return parameters
