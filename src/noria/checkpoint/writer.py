"""Writes a checkpoint: HDF5 lays out the datasets, filling.py fills them, a rename makes the file appear whole.

Where the bytes come from is the caller's: `chunks(block, parameter)` gives them in any pieces. checkpoint.py reads.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from h5py import h5a, h5d, h5p, h5s

from noria.blocks import ALIGNMENT, Block, Parameter, round_up
from noria.checkpoint.checkpoint import CHECKSUM, FORMAT, KEYS, VERSION
from noria.checkpoint.filling import ExtentWriter
from noria.checkpoint.forms import stored_as, write_form
from noria.errors import InputError
from noria.tools import atomic
from noria.tools.container import hdf5_type
from noria.tools.trailer import append_trailer
from noria.tools.writing import writing

Chunks = Callable[[Block, Parameter], Iterable[memoryview]]
Place = tuple[str, str]  # block and parameter


@dataclass(frozen=True)
class Header:
    """What a checkpoint says beside its weights; config and generation_config are JSON texts. `adapter`: name and hash of
    the one that was merged into it."""

    family: str
    dtype: str
    source: str
    config: str
    generation_config: str = "{}"
    tokenizer: Mapping[str, bytes] = field(default_factory=dict)
    adapter: str = ""


@contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """atomic.replacing, which without `overwrite` replaces nothing: raises InputError if another process was faster."""
    with atomic.replacing(target) as temporary:
        yield temporary
        if target.exists() and not overwrite:
            raise InputError(f"{target} was made by another process meanwhile: use --overwrite to replace it")


def file_nbytes(blocks: Mapping[str, Block], header: Header) -> int:
    """Bytes that a checkpoint of these blocks takes at most."""
    num_objects = sum(len(block.parameters) + 3 for block in blocks.values()) + 64
    texts = sum(map(len, header.tokenizer.values())) + 2 * len(header.config) + 2 * len(header.generation_config)
    return sum(block.nbytes for block in blocks.values()) + texts + num_objects * 2 * ALIGNMENT


def write_checkpoint(
    path: Path, header: Header, blocks: Mapping[str, Block], shared: str | None, chunks: Chunks
) -> None:
    """Writes `blocks` to a new file and syncs it. Raises WriteError where the disk does not take it.

    shared: the parameter of `embed` that is the head's lm_head (a tied embedding), written once.
    chunks(block, parameter) gives the bytes of a parameter in order; a chunk is done with when the next is asked for.
    """
    order = _order(blocks, shared)
    _create(path, header, blocks, order)
    offsets = _offsets(path, blocks)
    descriptor = os.open(path, os.O_RDWR)
    try:
        checksums = _fill(path, descriptor, blocks, order, offsets, chunks)
        _store_checksums(path, checksums)
        with writing(path):
            append_trailer(path, _extents(blocks, offsets))  # of all but the blocks, which have their own
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _order(blocks: Mapping[str, Block], shared: str | None) -> dict[Place, tuple[Place, ...]]:
    """The parameters in the order of their bytes in the file, each with the other name that it has.

    A shared parameter is the end of one block and the beginning of the other, so that both are gap-free extents. Where
    the two blocks do not allow that it is stored twice.
    """
    names = {name: [(name, parameter.name) for parameter in block.parameters] for name, block in blocks.items()}
    head, embed, layers = (
        names["head"],
        names["embed"],
        [place for name in names if "/" in name for place in names[name]],
    )
    none: tuple[Place, ...] = ()
    one, other = ("embed", shared or ""), ("head", "lm_head")
    if shared and head[-1] == other and embed[0] == one:
        return dict.fromkeys(layers + head[:-1], none) | {other: (one,)} | dict.fromkeys(embed[1:], none)
    if shared and head[0] == other and embed[-1] == one:
        return dict.fromkeys(layers + embed[:-1], none) | {other: (one,)} | dict.fromkeys(head[1:], none)
    return dict.fromkeys(embed + layers + head, none)


def _version(blocks: Mapping[str, Block], dtype: str) -> int:
    """The version of the format that a checkpoint of these blocks needs: 1 if all is plain and of one dtype."""
    parameters = [parameter for block in blocks.values() for parameter in block.parameters]
    return 1 if all(parameter.plain and parameter.dtype == dtype for parameter in parameters) else VERSION


def _create(path: Path, header: Header, blocks: Mapping[str, Block], order: Mapping[Place, tuple[Place, ...]]) -> None:
    # alignment: every object of the file starts on a page of its own, which leaves the data of one block without gaps;
    # v108: the oldest format with checksums in its metadata, and without a mark that a killed writer leaves behind
    libver = ("v108", "v108")
    how = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT}
    with _guarded(path, "w", libver=libver, **how) as file:
        file.attrs.update(
            format=FORMAT,
            version=_version(blocks, header.dtype),
            family=header.family,
            dtype=header.dtype,
            source=header.source,
            **{KEYS: "known"},
        )
        file.attrs.update(config=header.config, generation_config=header.generation_config)
        file.attrs.update({"adapter": header.adapter} if header.adapter else {})
        for block in blocks.values():
            file.create_group(block.name).attrs[CHECKSUM] = np.bytes_("0" * 32)
        datasets = []
        for (folder, name), others in order.items():
            parameter = next(parameter for parameter in blocks[folder].parameters if parameter.name == name)
            datasets.append(_create_dataset(file[folder], name, *stored_as(parameter)))
            if not parameter.plain:
                write_form(file[folder][name], parameter)
            for other in others:
                file["/".join(other)] = file[folder][name]
        # space is given at the first write: in this order, with nothing between
        for dataset in datasets:
            _touch(dataset)
        # After the blocks, so that the last block's padding is inside the file.
        tokenizer = file.create_group("tokenizer")
        for name, content in header.tokenizer.items():
            tokenizer.create_dataset(name, data=np.frombuffer(content, np.uint8))


@contextmanager
def _guarded(path: Path, mode: str, **how: Any) -> Iterator[h5py.File]:
    """The file, to write with HDF5, which does not survive a full disk itself. Raises WriteError when it is closed."""
    with atomic.GuardedFile(path, new=mode == "w") as disk:
        with h5py.File(path.name, mode, driver="fileobj", fileobj=disk, **how) as file:
            yield file
        disk.check("make room and try again")


def _create_dataset(group: h5py.Group, name: str, dtype: str, shape: tuple[int, ...]) -> h5d.DatasetID:
    create = h5p.create(h5p.DATASET_CREATE)
    create.set_layout(h5d.CONTIGUOUS)
    create.set_alloc_time(h5d.ALLOC_TIME_LATE)
    create.set_fill_time(h5d.FILL_TIME_NEVER)
    return h5d.create(group.id, name.encode(), hdf5_type(dtype), h5s.create_simple(shape), create)


def _touch(dataset: h5d.DatasetID) -> None:
    rank = dataset.get_space().get_simple_extent_ndims()
    first = dataset.get_space()
    first.select_hyperslab((0,) * rank, (1,) * rank)
    dataset.write(h5s.create_simple((1,) * rank), first, np.zeros((1,) * rank, np.float32))


def _offsets(path: Path, blocks: Mapping[str, Block]) -> dict[Place, int]:
    """Byte offsets in the file, which must be those of the blocks' layouts."""
    with h5py.File(path, "r", locking=False) as file:
        offsets = {
            (block.name, parameter.name): file[block.name][parameter.name].id.get_offset()
            for block in blocks.values()
            for parameter in block.parameters
        }
    for block in blocks.values():
        begin = offsets[block.name, block.parameters[0].name]
        found = [offsets[block.name, parameter.name] - begin for parameter in block.parameters]
        assert begin % ALIGNMENT == 0 and found == [parameter.offset for parameter in block.parameters], (
            block,
            begin,
            found,
        )
    return offsets


def _extents(blocks: Mapping[str, Block], offsets: Mapping[Place, int]) -> list[tuple[int, int]]:
    """From which byte to which each block lies."""
    begins = [offsets[name, block.parameters[0].name] for name, block in blocks.items()]
    return [(begin, begin + block.nbytes) for begin, block in zip(begins, blocks.values(), strict=True)]


def _fill(
    path: Path,
    descriptor: int,
    blocks: Mapping[str, Block],
    order: Mapping[Place, tuple[Place, ...]],
    offsets: Mapping[Place, int],
    chunks: Chunks,
) -> dict[str, str]:
    digests = {name: xxhash.xxh3_128() for name in blocks}
    with writing(path):
        os.fsync(descriptor)  # what HDF5 wrote is in the page cache
    with ExtentWriter(path, descriptor) as filling:
        for place, others in order.items():
            block = blocks[place[0]]
            parameter = next(parameter for parameter in block.parameters if parameter.name == place[1])
            mine = [digests[name] for name, _ in (place, *others)]
            at = 0
            for chunk in _padded(chunks(block, parameter), parameter.nbytes):
                filling.put(offsets[place] + at, chunk)
                for digest in mine:
                    digest.update(chunk)
                at += len(chunk)
            assert at == round_up(parameter.nbytes), (place, at, parameter.nbytes)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _padded(chunks: Iterable[memoryview], nbytes: int) -> Iterator[memoryview]:
    for chunk in chunks:
        yield memoryview(chunk).cast("B")
    if round_up(nbytes) > nbytes:
        yield memoryview(bytes(round_up(nbytes) - nbytes))


def _store_checksums(path: Path, checksums: Mapping[str, str]) -> None:
    # in place of the zeros that were put there: nothing moves
    with _guarded(path, "r+") as file:
        for name, checksum in checksums.items():
            h5a.open(file[name].id, CHECKSUM.encode()).write(np.array(checksum.encode(), "S32"))
