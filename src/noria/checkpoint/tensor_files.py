"""Reads the tensors of one weights file, safetensors or torch's zip/pickle, in pieces and without trusting it.

A shard tells its tensors' dtypes and shapes, and gives a tensor's numbers as flat chunks of bounded size. Knows nothing
of models or checkpoints. The safetensors format: github.com/huggingface/safetensors, section Format.

The library safetensors is not used here. It reads by a map of the file, whose pages count as the process's memory: of a
file of 256 MiB, read slice by slice, it keeps 255 MiB in memory, this module 20, and `convert` promises a few MiB whatever
the model's size. Extents are checked here against hostile headers. The tests write their files with the library.

Large tensors are read past the page cache, ahead of who wants them: through it a processor copies each byte, and takes a page
from the system for it.
"""

import json
import pickle
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch

from noria.blocks import ALIGNMENT, round_up
from noria.errors import InputError
from noria.tools.container import read_full
from noria.tools.direct import DirectFile, chunks
from noria.tools.pinned import ReusedMemory

T = TypeVar("T")
U = TypeVar("U")
CHUNK_NBYTES = (4 << 20) - ALIGNMENT  # with the beginning of its first page it finds room in two huge ones
DIRECT_NBYTES = 256 << 10  # a tensor of at least so many bytes is read past the page cache
READERS = 2  # threads that read ahead
AHEAD_NBYTES, MOST_AHEAD = 16 << 20, 8  # what they read before it is wanted: so many bytes, and items at most
MAX_HEADER_NBYTES = 100_000_000  # as the format says
# The dtypes of safetensors by the words that torch has for them, and the dtype that their bytes are read as: codes of 8
# bits, which stand for numbers, are read as bytes.
_WORDS = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}
_BYTES = ("float8_e4m3fn", "float8_e8m0fnu")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a shard. dtype: torch's name, such as `bfloat16`, or the file's own word for one that is not read.

    offset: bytes, of safetensors from the beginning of the file, of torch's files from that of the tensor.
    """

    name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def read_as(self) -> torch.dtype:
        """The dtype that a Reader gives."""
        return torch.uint8 if self.dtype in _BYTES else getattr(torch, self.dtype)


def slice_of(tensor: Tensor, number: int) -> Tensor:
    """The part `number` along the first dimension of a tensor, as a tensor of its own."""
    known = tensor.dtype in _BYTES or hasattr(torch, tensor.dtype)  # what is not read has no slices
    nbytes = prod(tensor.shape[1:]) * (tensor.read_as.itemsize if known else 0)
    return replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + number * nbytes)


def list_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard by name. Raises InputError if it is damaged, truncated or holds anything else."""
    if path.suffix == ".safetensors":
        return _list_safetensors(path)
    return {
        name: Tensor(name, path, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in _load(path).items()
    }


def _list_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(8)
        if beginning == b"version ":
            raise InputError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
        nbytes = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or nbytes > MAX_HEADER_NBYTES:
            raise InputError(f"{path} is not a safetensors file: its {size} bytes begin with {beginning!r}")
        if 8 + nbytes > size:
            raise InputError(
                f"{path} is truncated: its header ends at byte {8 + nbytes}, the file has {size}; download it again"
            )
        header = file.read(nbytes)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor(name, path, entry, 8 + nbytes) for name, entry in entries.items()}
        end = 8 + nbytes + _end_of({name: entry["data_offsets"] for name, entry in entries.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: its safetensors header is damaged: {str(error)[:200]!r}") from error
    if end > size:
        raise InputError(f"{path} is truncated: its tensors end at byte {end}, the file has {size}; download it again")
    return tensors


def _end_of(places: dict[str, list[int]]) -> int:
    """The byte where the last tensor ends. Raises ValueError for a byte that two tensors have."""
    end, last = 0, ""
    for begin, its_end, name in sorted((begin, end, name) for name, (begin, end) in places.items()):
        if begin < min(end, its_end):
            raise ValueError(f"{name} begins in {last}")
        end, last = max(end, its_end), name
    return end


def _tensor(name: str, path: Path, entry: dict[str, Any], data: int) -> Tensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    if not isinstance(dtype, str) or not whole or begin > end:
        raise ValueError(f"{name}: {entry}")
    tensor = Tensor(name, path, _WORDS.get(dtype, dtype), tuple(shape), data + begin)
    if dtype in _WORDS and end - begin != tensor.size * tensor.read_as.itemsize:
        raise ValueError(f"{name}: {dtype} {shape} does not take the bytes {begin} to {end}")
    return tensor


class Reader:
    """Reads tensors. Of torch's files one is open at a time, mapped into memory."""

    def __init__(self) -> None:
        self._memory = ReusedMemory()
        self._lock = Lock()  # over what follows
        self._path: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def chunks(self, tensor: Tensor, transposed: bool = False) -> Iterator[torch.Tensor]:
        """The numbers in row-major order as flat tensors of at most CHUNK_NBYTES, the next ones read meanwhile.

        Transposed: of the matrix's transpose; the whole matrix is in memory meanwhile.
        """
        chunks = self._safetensors(tensor) if tensor.shard.suffix == ".safetensors" else self._torch(tensor)
        return _transposed(tensor, chunks) if transposed else chunks

    def whole(self, tensor: Tensor) -> torch.Tensor:
        """All of a tensor, in memory of its own. Any thread may call it."""
        if tensor.shard.suffix != ".safetensors":
            with self._lock:
                return torch.cat(list(self._torch(tensor)) or [torch.empty(0, dtype=tensor.read_as)]).view(tensor.shape)
        nbytes = tensor.size * tensor.read_as.itemsize
        with tensor.shard.open("rb", buffering=0) as file:
            if nbytes >= DIRECT_NBYTES:
                content = self._past_the_cache(file.fileno(), tensor, nbytes)
            else:
                content = torch.empty(nbytes, dtype=torch.uint8)
                read_full(file.fileno(), content.numpy().data, tensor.offset, tensor.shard)
        return content.view(tensor.read_as).view(tensor.shape)

    def _past_the_cache(self, descriptor: int, tensor: Tensor, nbytes: int) -> torch.Tensor:
        """The bytes of a tensor, read with those before it in its first page and those behind it in its last."""
        before = tensor.offset % ALIGNMENT
        memory = self._memory.take(round_up(before + nbytes))
        file = DirectFile(descriptor, tensor.shard)
        try:
            file.read(tensor.offset - before, memory.numpy().data, before + nbytes)
        finally:
            file.close()
        content = memory[before : before + nbytes]
        return content if before % tensor.read_as.itemsize == 0 else content.clone()

    def _safetensors(self, tensor: Tensor) -> Iterator[torch.Tensor]:
        nbytes = tensor.read_as.itemsize
        parts = [
            replace(tensor, shape=(end - begin,), offset=tensor.offset + begin * nbytes)
            for begin, end in chunks(tensor.size, CHUNK_NBYTES // nbytes)
        ]
        return ahead(self.whole, parts, CHUNK_NBYTES) if len(parts) > 1 else map(self.whole, parts)

    def _torch(self, tensor: Tensor) -> Iterator[torch.Tensor]:
        if tensor.shard != self._path:
            self._tensors = {}  # before the next is opened: never two at a time
            self._path, self._tensors = tensor.shard, _load(tensor.shard)
        flat = self._tensors[tensor.name].reshape(-1)
        flat = flat.view(torch.uint8) if tensor.dtype in _BYTES else flat
        first = tensor.offset // flat.element_size()
        flat = flat[first : first + tensor.size]
        for chunk in flat.split(CHUNK_NBYTES // flat.element_size()):
            yield chunk.clone()  # a view would keep the whole file mapped


def ahead(call: Callable[[T], U], items: Iterable[T], nbytes: int) -> Iterator[U]:
    """What `call` returns of each item of so many bytes, in order, by threads that are ahead of who asks.

    More items are under way than there are threads, unless they are large: none waits until who asks has taken one.
    """
    waiting, most = iter(items), min(max(AHEAD_NBYTES // max(nbytes, 1), READERS), MOST_AHEAD)
    with ThreadPoolExecutor(READERS, "ahead") as pool:
        coming = deque(pool.submit(call, item) for item in islice(waiting, most))
        while coming:
            found = coming.popleft().result()
            coming.extend(pool.submit(call, item) for item in islice(waiting, 1))
            yield found


def _transposed(tensor: Tensor, chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    flat, done = whole.view(-1), 0
    for chunk in chunks:
        flat[done : done + len(chunk)] = chunk
        done += len(chunk)
    rows = max(1, CHUNK_NBYTES // max(1, whole.element_size() * len(whole)))
    for some in whole.t().split(rows):
        yield from some.reshape(-1).split(CHUNK_NBYTES // whole.element_size())


def _check_archive(path: Path) -> None:
    """Raises InputError for a zip with compressed entries: torch saves none, and they could grow without bound."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is not a file of plain tensors, or is damaged: {str(error)[:200]!r}") from error
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    nbytes, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if not stored or nbytes > size:
        raise InputError(f"{path} is an archive of {nbytes} bytes compressed to {size}: torch saves it uncompressed")


def _load(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        if file.read(8) == b"version ":
            raise InputError(f"{path} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`")
    _check_archive(path)
    try:
        tensors = _unpickle(path)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
    ) as error:
        reason = " ".join(str(error).split())[:160]
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to let it run code
            reason = "it holds more than tensors, and Noria runs no other code of a pickle"
        raise InputError(f"{path} is not a file of plain tensors, or is damaged: {reason!r}") from error
    size = path.stat().st_size
    for name, tensor in tensors.items() if isinstance(tensors, dict) else [("the file", tensors)]:
        plain = isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        there = plain and tensor.device.type == "cpu" and tensor.numel() * tensor.element_size() <= size
        if not there or tensor.is_quantized:
            raise InputError(f"{path}: {str(name)[:80]!r} is not a plain tensor with its numbers in the file")
    return tensors


def _unpickle(path: Path) -> Any:
    """What torch's own restricted unpickler makes of the file: no code of the file's runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with the file is said in one line, by the caller
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used with files saved with" not in str(error):
                raise
            # the format before torch 1.6 cannot be mapped: the whole file is in memory while it is read
            return torch.load(path, map_location="cpu", weights_only=True)
