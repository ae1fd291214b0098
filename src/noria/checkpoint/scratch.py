"""Where the disk tier's blocks are read from: the checkpoint's own files, or a copy in the node's scratch folder.

Knows checkpoints and files; nothing of streams.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from noria.checkpoint.checkpoint import Checking, Checkpoint
from noria.checkpoint.read_ahead import NUM_THREADS, direct_files, read_ahead
from noria.errors import InputError
from noria.model import OpenModel
from noria.tiers.disk import Region
from noria.tools.direct import chunks, scratch_file


def checkpoint_regions(checkpoint: OpenModel, names: Iterable[str]) -> list[Region]:
    """A region a block, in the order of `names`, in the checkpoint's own files; each is checked at its first load, and
    again when its file was written to.

    The checkpoint may be closed after them. Raises InputError for random weights, which have no file.
    """
    names = list(names)
    if not isinstance(checkpoint, Checkpoint):
        raise InputError(
            f"{checkpoint.path} are in no file that a disk tier could read: set placement.stage and placement.scratch"
        )
    files, regions = direct_files(checkpoint, names), []
    for name in names:
        extent = checkpoint.extent(name)
        first, again = partial(checkpoint.checking, name), partial(Checking, checkpoint, name)
        regions.append(Region(files[extent.fd], extent.offset, extent.nbytes, first, again))
    return regions


def copied_regions(
    checkpoint: OpenModel,
    names: Iterable[str],
    folder: str | Path,
    recoded: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, memory: memory,
    heard: Callable[[int, float], None] = lambda nbytes, seconds: None,
    device: torch.device | None = None,
) -> list[Region]:
    """Copies the blocks, checked, into one nameless file in `folder`: a region a block, in the order of `names`.

    The file is gone when its regions' tier is closed, or the process ends in any way. `recoded`: what is written of a
    block's bytes, the first ones of their memory, which it may write to. `heard`, `device`: as read_ahead has them. Raises
    InputError, with the numbers, if the folder has no room for them.
    """
    names = list(names)
    file = scratch_file(folder, sum(checkpoint.blocks[name].nbytes for name in names), "placement.weights.disk")
    regions, offset = [], 0
    try:
        with ThreadPoolExecutor(NUM_THREADS, "scratch") as pool:
            for name, memory in read_ahead(checkpoint, names, device=device, heard=heard):
                view = recoded(name, memory).numpy().data
                writes = [pool.submit(file.write, offset + begin, view[begin:end]) for begin, end in chunks(len(view))]
                for write in writes:
                    write.result()
                regions.append(Region(file, offset, len(view)))
                offset += len(view)
        file.end(offset)
    except BaseException:
        file.close()
        raise
    return regions


def scratch_region(folder: str | Path, nbytes: int) -> list[Region]:
    """One nameless file of `nbytes` for the cache, its space reserved. Raises InputError, naming the key, if full."""
    return [Region(scratch_file(folder, nbytes, "placement.cache.disk"), 0, nbytes)]
