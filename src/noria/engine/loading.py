"""Puts a rank's blocks where its plan has them: on the device, in CPU memory, or left on disk, cast to the run's dtype.

Knows files and tiers; nothing of steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from noria import encodings
from noria.blocks import Block, Parameter
from noria.checkpoint.read_ahead import read_ahead
from noria.checkpoint.scratch import checkpoint_regions, copied_regions
from noria.engine.coding import Coder
from noria.engine.decoding import Decoding
from noria.engine.parameters import TORCH_DTYPES, Parameters, Undecoded, place, stored, views
from noria.engine.weights import Home, Placed
from noria.limits import DISK_SLOT_NBYTES
from noria.model import OpenModel
from noria.streams import Streams
from noria.tiers.cpu import Cpu
from noria.tiers.disk import Disk
from noria.tools.pinned import HostMemory

DECODING_NBYTES = 256 << 20  # of pieces on the device, while blocks that stay there are decoded


class Loader:
    """Reads the blocks that `tiers` names, each into its tier.

    `scratch`: the folder that the disk tier's blocks are copied to first (None: they are read where they lie). `decoding`:
    what becomes of encoded parameters. `say` is told what people should read in the log.
    """

    def __init__(
        self,
        checkpoint: OpenModel,
        tiers: Mapping[str, str],
        dtype: str,
        streams: Streams,
        scratch: Path | None = None,
        decoding: Decoding | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._checkpoint, self._tiers, self._streams, self._scratch = checkpoint, dict(tiers), streams, scratch
        self._dtype, self._decoding = dtype, decoding or Decoding()
        self._coder = Coder(streams, say) if self._decoding.coded and dtype == "bfloat16" else None
        self._targets = {name: self._target(name) for name in tiers}
        self._resident: dict[str, Parameters | Undecoded] = {}
        self._homes: dict[str, Home] = {}
        self._regions: dict[str, torch.Tensor] = {}

    def load(self) -> Placed:
        """All blocks, in their tiers. Raises InputError for a block that is damaged, or a scratch folder without room."""
        memory = self._host_memory()
        try:
            self._read(memory)
            self._open_disk()
            if self._coder:
                self._coder.close()
        except BaseException:
            if self._coder:
                self._coder.finish()
            if memory is not None:
                memory.close()
            raise
        return Placed(self._resident, self._homes, () if memory is None else (memory,), self._decoding.room)

    def _read(self, memory: Cpu | None) -> None:
        """All blocks but those of the disk tier; `memory` is that of the cpu tier, where there are any."""
        straight = {
            name: region for name, region in self._regions.items() if not (self._is_cast(name) or self._is_coded(name))
        }
        straight |= self._on_this_device()
        names = sorted((name for name, tier in self._tiers.items() if tier != "disk"), key=lambda name: name == "embed")
        if memory is not None and any(self._is_coded(name) for name in names):
            memory.register_ahead()
        for name, host in read_ahead(
            self._checkpoint, names, into=straight, device=self._streams.device, heard=self._heard
        ):
            if self._tiers[name] == "gpu" and name not in self._resident:
                self._put_on_device(name, host)
            elif self._is_coded(name):
                self._code(name, host)
            elif name in self._regions and self._is_cast(name):
                self._cast(name, host, self._regions[name])
        if self._coder:
            self._coder.finish()
        if memory is not None:
            memory.register()

    def _heard(self, nbytes: int, seconds: float) -> None:
        if self._coder:
            self._coder.was_read(nbytes, seconds)

    def _code(self, name: str, host: torch.Tensor) -> None:
        """Puts a block into CPU memory, coded if it may be."""
        assert self._coder is not None
        home = self._homes[name]
        layout = self._coder.put(
            self._targets[name], host, lambda its, after: home.tier.store([(home.offset, its)], [after]).event()
        )
        if layout is None:
            self._regions[name].copy_(host)
        else:
            self._homes[name] = replace(home, block=layout)

    def _is_coded(self, name: str) -> bool:
        """Whether a block may be coded on its way into CPU memory, or to scratch."""
        target = self._targets[name]
        streams = self._tiers[name] != "gpu" and name != "embed"
        return self._coder is not None and streams and not self._is_cast(name) and target.coded is not target

    def _target(self, name: str) -> Block:
        """A block's layout where it is placed."""
        block = self._checkpoint.blocks[name]
        decoded = self._decoding.residents and self._tiers[name] == "gpu" and block.encoded
        return block.plain(self._dtype) if decoded else block.cast(self._dtype)

    def _host_memory(self) -> Cpu | None:
        """The memory of the cpu tier, exactly as large as its blocks, with a place for each."""
        held = [name for name, tier in self._tiers.items() if tier == "cpu"]
        if not held:
            return None
        memory, offset = Cpu(sum(self._targets[name].nbytes for name in held), self._streams), 0
        for name in held:
            target = self._targets[name]
            self._regions[name] = memory.memory[offset : offset + target.nbytes]
            if name == "embed":
                self._resident[name] = views(self._regions[name], target)
            else:
                self._homes[name] = Home(target, memory, offset, ("host_to_gpu",))
            offset += target.nbytes
        return memory

    def _on_this_device(self) -> dict[str, torch.Tensor]:
        """Where the device is the CPU: memory for its blocks, to read them into without a second copy."""
        if self._streams.device.type != "cpu":
            return {}
        shared = {"embed"} if self._checkpoint.shape.tied and self._tiers.get("head") == "gpu" else set()
        names = {name for name, tier in self._tiers.items() if tier == "gpu" and not self._is_cast(name)} - shared
        found = {name: HostMemory(self._targets[name].nbytes).memory for name in names}
        self._resident |= {name: place(memory, self._targets[name]) for name, memory in found.items()}
        return found

    def _put_on_device(self, name: str, host: torch.Tensor) -> None:
        """A block that stays on the device. A tied embedding has no table of its own beside the head's."""
        table = self._table_of_the_head() if name == "embed" and self._checkpoint.shape.tied else None
        if table is None:
            buffer = torch.empty(self._targets[name].nbytes, dtype=torch.uint8, device=self._streams.device)
            self._cast(name, host, buffer)
            self._resident[name] = place(buffer, self._targets[name])
            return
        own = {key: value for key, value in views(host, self._checkpoint.blocks[name]).items() if key != "tokens"}
        dtypes = {parameter.name: TORCH_DTYPES[parameter.dtype] for parameter in self._targets[name].parameters}
        device = self._streams.device
        held = {key: value.to(device, dtypes[key], copy=True) for key, value in own.items()}
        self._resident[name] = held | {"tokens": table}

    def _table_of_the_head(self) -> torch.Tensor | None:
        """The head's matrix, if it is on the device."""
        head = self._resident.get("head")
        return (views(head.buffer, head.block) if isinstance(head, Undecoded) else head or {}).get("lm_head")

    def _is_cast(self, name: str) -> bool:
        block = self._checkpoint.blocks[name]
        return block.changes(self._dtype) or len(block.encoded) != len(self._targets[name].encoded)

    def _cast(self, name: str, host: torch.Tensor, target: torch.Tensor) -> None:
        """Copies a block's bytes, parameter by parameter where they are cast. Complete when it returns."""
        if not self._is_cast(name):
            target.copy_(host)
            return
        block, its = self._checkpoint.blocks[name], self._targets[name]
        values, parameters, computed = stored(host, block), stored(target, its), views(target, its)
        for parameter, placed in zip(block.parameters, its.parameters, strict=True):
            if parameter.plain or not placed.plain:
                parameters[parameter.name].copy_(values[parameter.name])
            else:
                self._decode(parameter, values[parameter.name], {key: computed[key] for key in parameter.computed})

    def _decode(self, parameter: Parameter, pieces: torch.Tensor, into: Parameters) -> None:
        """Decodes pieces in host memory on the device, a few at a time."""
        count = max(DECODING_NBYTES // parameter.piece.nbytes, 1)
        for first in range(0, parameter.pieces, count):
            its = into if parameter.pieces == 1 else {key: value[first : first + count] for key, value in into.items()}
            encodings.decode(parameter, pieces[first : first + count].to(self._streams.device), its)

    def _recoded(self, name: str, host: torch.Tensor) -> torch.Tensor:
        """What goes to scratch of a block's bytes."""
        if self._coder and self._is_coded(name):
            layout = self._coder.put(
                self._targets[name],
                host,
                lambda its, after: self._streams.copy("store", [(host[: len(its)], its)], [after]),
            )
            self._coder.finish()
            self._targets[name] = layout or self._targets[name]
        return host[: self._targets[name].nbytes]

    def _open_disk(self) -> None:
        names = [name for name, tier in self._tiers.items() if tier == "disk"]
        if not names:
            return
        if self._scratch is None:
            regions = checkpoint_regions(self._checkpoint, names)
        else:
            device = self._streams.device if self._coder else None
            regions = copied_regions(
                self._checkpoint, names, self._scratch, recoded=self._recoded, heard=self._heard, device=device
            )
        largest = max(self._targets[name].nbytes for name in names)
        unseen = str(self._checkpoint.path) if self._scratch is None else None
        disk, offset = Disk(regions, self._streams, slot_nbytes=min(DISK_SLOT_NBYTES, largest)), 0
        for name in names:
            self._homes[name] = Home(self._targets[name], disk, offset, ("disk_to_host", "host_to_gpu"), unseen)
            offset += self._targets[name].nbytes
