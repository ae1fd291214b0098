"""Reads a file of generations, a block of rows at a time.

Finished outputs and sealed parts read the same. The schema is schema.py's; knows nothing of folders of parts.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from noria.errors import InputError
from noria.output.columns import Column, column, is_held
from noria.output.schema import (
    FINISH_REASON,
    FORMAT,
    NO_ID,
    NOT_KNOWN,
    STATUS,
    STRINGS,
    VERSION,
    WIDE,
    Generation,
    Scores,
    checksums,
    schema,
    update,
)
from noria.tools.damage import damaged_is_input_error, what_it_is
from noria.tools.looking import Looker
from noria.tools.text import plural, printable

__all__ = ["Generation", "Generations", "NewerVersion", "blocks", "open_generations"]

CACHE_NBYTES = 2**16  # that HDF5 keeps of an open file beside its data
OFFSETS = ("offsets", "prompt_offsets")
BLOCK_ROWS = 4096
BLOCK_TOKENS = 2**21


class NewerVersion(InputError):
    """The file was written by a later version of Noria than this one."""


class Generations:
    """An open file of generations. Made by `open_generations`; a context manager."""

    def __init__(self, path: Path, file: h5py.File, datasets: dict[str, h5py.Dataset], looker: Looker | None = None):
        self.path, self.file, self.scores = path, file, _scores(datasets)
        self.num_rows = len(datasets["row"])
        self.attrs = {name: _plain(value) for name, value in file.attrs.items()}
        self._own = Looker()  # for columns that are looked at as they are read
        self.datasets: dict[str, Column] = {
            name: column(path, name, dataset, looker or self._own) for name, dataset in datasets.items()
        }

    def __len__(self) -> int:
        return self.num_rows

    def __enter__(self) -> "Generations":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self._own.close()

    @property
    def complete(self) -> bool:
        return bool(self.attrs.get("complete", False))

    def column(self, name: str) -> np.ndarray:
        """A whole column of numbers."""
        with damaged_is_input_error(self.path):
            return self.datasets[name][:]

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """[rows] tokens generated in each row; [rows] tokens of each prompt."""
        tokens, prompt_tokens = (self.column(name) for name in ("offsets", "prompt_offsets"))
        return np.diff(tokens).astype(np.int32), np.diff(prompt_tokens).astype(np.int32)

    def rows(self, compared: Collection[str] = ()) -> Iterator[Generation]:
        """All rows in the order of the file, read a block at a time. After the last one the columns `compared` have agreed
        with their checksums; else raises InputError."""
        tokens, prompt_tokens = self.lengths()
        hashers = {name: xxhash.xxh3_64() for name in compared if name in self.datasets}
        for name in hashers.keys() & OFFSETS:
            update(hashers[name], self.column(name)[:1])
        for start, stop in blocks(tokens * (1 + self.scores.top), prompt_tokens):
            values = self._values(start, stop)
            for name, hasher in hashers.items():
                update(hasher, values[name][1:] if name in OFFSETS else values[name])
            yield from _generations(values, range(stop - start))
        if hashers:
            compare(self, {name: hasher.hexdigest() for name, hasher in hashers.items()})

    def read(self, start: int, stop: int, wanted: Sequence[int] | np.ndarray | None = None) -> list[Generation]:
        """Rows start .. stop-1, or those of them at the positions `wanted`, in that order."""
        places = range(stop - start) if wanted is None else np.asarray(wanted) - start
        return list(_generations(self._values(start, stop), places))

    def _values(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Every column's values for rows start .. stop-1; of offsets one more."""
        file, values = self.datasets, dict[str, np.ndarray]()
        with damaged_is_input_error(self.path):
            values |= {name: file[name][start : stop + 1] for name in OFFSETS}
            spans = {"token": values["offsets"], "prompt token": values["prompt_offsets"]}
            parts = {per: slice(int(ends[0]), int(ends[-1])) for per, ends in spans.items()} | {
                "row": slice(start, stop)
            }
            for name, (_, per) in schema(self.scores).items():
                if name not in values:
                    values[name] = file[name][parts[per]]
        return values


def _generations(values: dict[str, np.ndarray], places: Iterable[int]) -> Iterator[Generation]:
    """The rows at these places of a block's values."""
    ends, prompt_ends = (values[name] - values[name][0] for name in OFFSETS)
    scores = {name: values[name] for name in ("logprobs", *WIDE) if name in values}
    prompt_logprobs, thought, cached = (values.get(name) for name in ("prompt_logprobs", "reasoning", "cached_tokens"))
    for index in places:
        span = slice(ends[index], ends[index + 1])
        prompt_span = slice(prompt_ends[index], prompt_ends[index + 1])
        yield Generation(
            row=int(values["row"][index]),
            sample=int(values["sample"][index]),
            status=STATUS[values["status"][index]],
            finish_reason=FINISH_REASON[values["finish_reason"][index]],
            token_ids=values["tokens"][span],
            prompt_token_ids=values["prompt_tokens"][prompt_span],
            prompt_logprobs=None if prompt_logprobs is None else _some(prompt_logprobs[prompt_span]),
            reasoning=None if thought is None else thought[index].decode(errors="replace"),
            reasoning_tokens=0 if thought is None else int(values["reasoning_tokens"][index]),
            cached_tokens=None if cached is None or cached[index] == NOT_KNOWN else int(cached[index]),
            **_scores_of_row({name: array[span] for name, array in scores.items()}),
            **{name: values[name][index].decode(errors="replace") for name in STRINGS},
        )


def _some(values: np.ndarray) -> np.ndarray | None:
    """The log-probabilities of a row, or None where the file holds none of it."""
    return None if np.isnan(values).all() else values


def _scores_of_row(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """A row's logprobs, top_ids and top_logprobs: as many of the most likely ids as the row asked for, else None."""
    row: dict[str, Any] = {"logprobs": _some(values["logprobs"])} if "logprobs" in values else {}
    if "top_ids" in values:
        top = int((values["top_ids"] != NO_ID).sum(axis=1).max(initial=0))
        row |= {name: values[name][:, :top] if top else None for name in WIDE}
    return row


def _scores(datasets: Mapping[str, h5py.Dataset]) -> Scores:
    """Which optional columns these datasets are."""
    dtypes = [datasets[name].dtype.name for name in ("logprobs", "prompt_logprobs") if name in datasets]
    top = datasets["top_ids"].shape[1] if "top_ids" in datasets else 0
    which = [name in datasets for name in ("logprobs", "prompt_logprobs", "reasoning", "cached_tokens")]
    return Scores(dtypes[0] if dtypes else None, which[0], top, *which[1:])


def blocks(*lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that are read at once: BLOCK_ROWS at most, and BLOCK_TOKENS but for one longer row."""
    totals = np.cumsum(np.sum(lengths, axis=0, dtype=np.int64))
    start, num_rows = 0, len(totals)
    while start < num_rows:
        before = totals[start - 1] if start else 0
        stop = int(np.searchsorted(totals, before + BLOCK_TOKENS, side="right"))
        stop = max(start + 1, min(stop, start + BLOCK_ROWS))
        yield start, stop
        start = stop


def open_generations(path: str | Path, looker: Looker | None = None) -> Generations:
    """Opens a finished output or a sealed part. The `looker` looks at it first: needed once for a file of which this
    process does not know that it is whole, because it wrote it, compared its checksum or looked at it before.

    Raises InputError for a file that is missing, no Noria output, cut off or at odds with itself; NewerVersion.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: " + ("it is a folder, not an output" if path.is_dir() else "there is no such file"))
    if looker is not None:
        looker.look(path)
    try:
        file = h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path} is not a Noria output: it is {what_it_is(path, error)}") from error
    try:
        with damaged_is_input_error(path):
            _bound_cache(file)
            _check_format(path, file)
            return Generations(path, file, _checked_columns(path, file), looker)
    except BaseException:
        file.close()
        raise


def _bound_cache(file: h5py.File) -> None:
    """Lets HDF5 keep little of a file's strings in memory: hundreds of files may be open, each with up to 32 MB by default."""
    cache = file.id.get_mdc_config()
    cache.set_initial_size, cache.initial_size = True, CACHE_NBYTES
    cache.min_size = cache.max_size = CACHE_NBYTES
    file.id.set_mdc_config(cache)


def _check_format(path: Path, file: h5py.File) -> None:
    name = _plain(file.attrs.get("format", ""))
    if name != FORMAT:
        holds = ", ".join(map(printable, list(file)[:4])) or "nothing"
        kind = (
            f"a file of format {printable(str(name))}" if name else f"an HDF5 file of something else (it holds {holds})"
        )
        raise InputError(f"{path} is not a Noria output: it is {kind}")
    version = int(file.attrs.get("version", 0))
    if version > VERSION:
        raise NewerVersion(
            f"{path} has format version {version}, this Noria reads {VERSION}: use the Noria that wrote it"
        )


def _checked_columns(path: Path, file: h5py.File) -> dict[str, h5py.Dataset]:
    def require(condition: object, reason: str) -> None:
        if not condition:
            raise InputError(f"{path} is damaged: {reason}")

    sizes: dict[str, int] = {}
    datasets: dict[str, h5py.Dataset] = {}
    optional: dict[str, h5py.Dataset] = {}
    for name in ("logprobs", "prompt_logprobs", "reasoning", "cached_tokens", *WIDE):
        if isinstance(file.get(name, getlink=True), h5py.HardLink) and isinstance(file[name], h5py.Dataset):
            optional[name] = file[name]
            require(optional[name].ndim == 1 + (name in WIDE), f"{name} has {optional[name].ndim} dimensions")
    scores = _scores(optional)
    require(scores.dtype in (None, "float32", "float64"), f"logprobs are {scores.dtype}")
    for name, (dtype, per) in schema(scores).items():
        dataset: Any = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        require(isinstance(dataset, h5py.Dataset) and dataset.ndim == 1 + (name in WIDE), f"dataset {name} is missing")
        require(name not in WIDE or dataset.shape[1] == scores.top, f"{name} has rows of {dataset.shape[-1]} values")
        require(not dataset.is_virtual and not dataset.external, f"dataset {name} is in another file")
        right = h5py.check_string_dtype(dataset.dtype) if dtype.kind == "O" else dataset.dtype == dtype
        enum = h5py.check_enum_dtype(dtype)
        require(right and h5py.check_enum_dtype(dataset.dtype) == enum, f"dataset {name} has type {dataset.dtype}")
        require(is_held(dataset, path.stat().st_size), f"dataset {name} says that it has more than its file holds")
        datasets[name] = dataset
        sizes.setdefault(per, len(dataset))
        require(len(dataset) == sizes[per], f"dataset {name} has {len(dataset)} values, not {sizes[per]}")
        if enum:
            require(not len(dataset) or dataset[:].max() < len(enum), f"dataset {name} has values without a name")
    require(sizes["row+1"] == sizes["row"] + 1, f"{sizes['row+1']} offsets for {sizes['row']} rows")
    for name, per in (("offsets", "token"), ("prompt_offsets", "prompt token")):
        offsets = datasets[name][:]
        right = offsets[0] == 0 and offsets[-1] == sizes[per] and (np.diff(offsets) >= 0).all()
        require(right, f"{name} do not cover its {plural(sizes[per], per)}")
    return datasets


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value


def verify_checksums(generations: Generations) -> str:
    """Reads every column again. Returns a line that says so; raises InputError naming the columns that differ."""
    with damaged_is_input_error(generations.path):
        found = checksums(generations.datasets, generations.scores)
    compare(generations, found)
    return f"checksums: {len(found)} of {len(found)} columns agree"


def stored_checksums(generations: Generations) -> dict[str, str] | None:
    """Those that the file holds, by column; None if it holds none."""
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        stored = json.loads(generations.attrs["checksums"])
        if isinstance(stored, dict):
            return stored
    return None


def compare(generations: Generations, found: Mapping[str, str]) -> None:
    """Raises InputError naming the columns whose checksums are others than these."""
    stored = stored_checksums(generations)
    if stored is None:
        raise InputError(f"{generations.path} is damaged: it has no checksums of its columns that can be read")
    wrong = [name for name in found if found[name] != stored.get(name)]
    if wrong:
        raise InputError(f"{generations.path} is damaged: {', '.join(wrong)} do not agree with their checksums")
