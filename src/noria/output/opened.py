"""An output as Python reads it (`noria.open`): its rows, read when they are asked for, of a run that is not finished too.

Knows files of generations and parts; nothing of runs.
"""

import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import xxhash

from noria.output.export import KINDS, as_object
from noria.output.export_tables import columns_of, record_batches
from noria.output.generations import Generations, blocks, open_generations
from noria.output.schema import Generation
from noria.output.sealed import is_unfinished, reading, select, tried_again, unfinished_parts
from noria.output.timings import timings_of
from noria.tools.damage import damaged_is_input_error
from noria.tools.looking import Looker
from noria.tools.text import plural

if TYPE_CHECKING:
    import pandas
    import pyarrow

_GAP = 64  # rows between two that are wanted, from which on they are read apart
_ID_ROWS = 2**14  # whose ids are in memory at once

# From a file and the places of rows in it (the first, one more than the last, all in order) to a value each.
Read = Callable[[Generations, int, int, np.ndarray], Iterable[Any]]


class Output:
    """The rows of an output, in the order of the prompts, as they were when it was opened. Made by `noria.open`.

    `run[3]` and `run["moses"]` are rows, by place and by id (Generation: `text`, `token_ids`, `status`, `columns`, ...).
    `run[10:20]` and `run["a":"b"]` (from the first row of id a to the last of id b) are outputs too, as is
    `run[["b", "a"]]`; they read nothing before their rows are asked for. Iterating holds a few thousand rows in memory at a
    time. Of a run that is not finished it has the rows that are finished. Raises InputError where the file is damaged.
    """

    def __init__(self, path: Path, finished: bool, files: Sequence[Generations], at: tuple[np.ndarray, np.ndarray]):
        """`at`: [R] each row's file among `files`, and its place in it."""
        self.path, self.finished = path, finished
        self._files, self._file, self._place = files, *at
        self._hashes: tuple[np.ndarray, np.ndarray] | None = None
        self.held: object = None  # what must live as long as these rows are read

    def __len__(self) -> int:
        return len(self._place)

    def __repr__(self) -> str:
        state = "finished" if self.finished else "not finished"
        return f"<noria.open({str(self.path)!r}): {plural(len(self), 'row')}, {state}>"

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files, those of its slices too. May be called twice."""
        for file in self._files:
            file.close()

    @property
    def attrs(self) -> dict[str, Any]:
        """How a finished output was made (its attributes); nothing of a run that is not finished."""
        return self._files[0].attrs if self.finished else {}

    def timings(self) -> dict[str, np.ndarray]:
        """What each rank measured: see timings.py; nothing of a run that is not finished."""
        return timings_of(self._files[0]) if self.finished else {}

    def numbers(self, name: str) -> np.ndarray:
        """[R] a column of numbers, such as `row`, `sample`, `status`, `finish_reason` (places in schema's lists)."""
        return self._of_files(lambda file: file.column(name))

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """[R] tokens generated in each row; [R] tokens of each prompt."""
        return self._of_files(lambda file: file.lengths()[0]), self._of_files(lambda file: file.lengths()[1])

    def __iter__(self) -> Iterator[Generation]:
        for start, stop in blocks(self._weights()):
            yield from self._read(np.arange(start, stop))

    @overload
    def __getitem__(self, key: "int | np.integer[Any] | str") -> Generation: ...

    @overload
    def __getitem__(self, key: slice | list[str]) -> "Output": ...

    def __getitem__(self, key: Any) -> "Generation | Output":
        """A row by place or id; rows by a slice of places or ids, or a list of ids. Raises IndexError, KeyError."""
        if isinstance(key, str):
            return self._row_of(key)
        if isinstance(key, slice):
            return self._some(self._slice(key))
        if isinstance(key, list) and all(isinstance(id, str) for id in key):
            places = [self._places_of(id) for id in key]
            return self._some(np.concatenate([np.empty(0, np.int64), *places]))
        place = range(len(self))[operator.index(key)]
        return self._read(np.array([place]))[0]

    def __contains__(self, id: object) -> bool:
        """Whether a row has this id."""
        return isinstance(id, str) and len(self._find(id)) > 0

    def to_arrow(self) -> "pyarrow.Table":
        """A table with the columns and types of `noria export FILE.parquet`. Raises InputError where pyarrow is missing."""
        import pyarrow

        schema, batches = record_batches(lambda: map(as_object, self), KINDS)
        return pyarrow.Table.from_batches(batches, schema)

    def to_pandas(self) -> "pandas.DataFrame":
        """The same columns as a DataFrame: values as they are in Python, None where a row has none; token ids as lists."""
        import pandas

        rows = list(map(as_object, self))
        names = columns_of(rows, KINDS)
        return pandas.DataFrame({name: [row.get(name) for row in rows] for name in names}, columns=list(names))

    def _some(self, rows: slice | np.ndarray) -> "Output":
        some = Output(self.path, self.finished, self._files, (self._file[rows], self._place[rows]))
        some.held = self.held
        return some

    def _slice(self, key: slice) -> slice:
        """A slice of places; one of ids holds both of its ends."""
        start, stop = key.start, key.stop
        if isinstance(start, str):
            start = int(self._places_of(start)[0])
        if isinstance(stop, str):
            stop = int(self._places_of(stop)[-1]) + 1
        return slice(start, stop, key.step)

    def _row_of(self, id: str) -> Generation:
        places = self._places_of(id)
        if len(places) > 1:
            raise KeyError(f"{len(places)} rows have the id {id!r}: [{id!r}:{id!r}] or [[{id!r}]] are all of them")
        return self._read(places)[0]

    def _places_of(self, id: str) -> np.ndarray:
        """The places of the rows of this id, at least one. Raises KeyError."""
        places = self._find(id)
        if not len(places):
            raise KeyError(f"{self.path} has no row of id {id!r}" + (" yet" if not self.finished else ""))
        return places

    def _find(self, id: str) -> np.ndarray:
        if self._hashes is None:
            self._hashes = self._hash_ids()
        hashes, places = self._hashes
        name = id.encode(errors="replace")
        wanted = np.uint64(xxhash.xxh3_64_intdigest(name))
        begin, end = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
        found = np.sort(places[begin:end])
        same = [one == name for some in _pieces(found) for one in self._gather(some, _ids)]
        return found[np.array(same, bool)]

    def _hash_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """[R] the hashes of all ids, sorted, and the place of each."""
        hashes = np.empty(len(self), np.uint64)
        for number, file in enumerate(self._files):
            own = np.flatnonzero(self._file == number)
            of_file = np.empty(len(file), np.uint64)
            for start in range(0, len(file) if len(own) else 0, _ID_ROWS):
                with damaged_is_input_error(file.path):
                    ids = file.datasets["id"][start : start + _ID_ROWS]
                of_file[start : start + len(ids)] = [xxhash.xxh3_64_intdigest(id) for id in ids]
            hashes[own] = of_file[self._place[own]]
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _weights(self) -> np.ndarray:
        """[R] about how much of a block each row is."""

        def weights(file: Generations) -> np.ndarray:
            tokens, prompt_tokens = file.lengths()
            return tokens.astype(np.int64) * (1 + file.scores.top) + prompt_tokens

        return self._of_files(weights)

    def _of_files(self, read: Callable[[Generations], np.ndarray]) -> np.ndarray:
        """[R] of the numbers that `read` has for each row of a file, those of these rows."""
        numbers = np.zeros(len(self), np.int64)
        for number, file in enumerate(self._files):
            own = self._file == number
            numbers[own] = read(file)[self._place[own]]
        return numbers

    def _read(self, rows: np.ndarray) -> list[Generation]:
        """The rows at these places of the output, in that order."""
        return self._gather(rows, Generations.read)

    def _gather(self, rows: np.ndarray, read: Read) -> list[Any]:
        found: list[Any] = [None] * len(rows)
        files, places = self._file[rows], self._place[rows]
        for number in np.unique(files):
            own = np.flatnonzero(files == number)
            own = own[np.argsort(places[own], kind="stable")]
            for near in np.split(own, np.flatnonzero(np.diff(places[own]) > _GAP) + 1):
                wanted = places[near]
                values = read(self._files[number], int(wanted[0]), int(wanted[-1]) + 1, wanted)
                for place, value in zip(near, values, strict=True):
                    found[place] = value
        return found


def _ids(file: Generations, start: int, stop: int, wanted: np.ndarray) -> np.ndarray:
    with damaged_is_input_error(file.path):
        return file.datasets["id"][start:stop][wanted - start]


def _pieces(places: np.ndarray) -> Iterator[np.ndarray]:
    return (places[start : start + _ID_ROWS] for start in range(0, len(places), _ID_ROWS))


def open(path: str | Path) -> Output:
    """The rows of an output; of a run that is not finished those that are. Changes nothing, and may be called meanwhile.

    Raises InputError for what is no output. A damaged part is left out, with a warning.
    """
    path = Path(path)
    found, damaged = tried_again(path, lambda: _unfinished(path) if is_unfinished(path) else (_finished(path), []))
    for message in damaged:
        warnings.warn(message, stacklevel=2)
    return found


def _finished(path: Path) -> Output:
    with Looker() as looker:
        file = open_generations(path, looker)
    return Output(path, file.complete, [file], (np.zeros(len(file), np.int32), np.arange(len(file))))


def _unfinished(path: Path) -> tuple[Output, list[str]]:
    """The rows that are finished, and what is said of damaged parts. Raises Gone."""
    files: list[Generations] = []
    damaged: list[str] = []
    parts = unfinished_parts(path, damaged.append, verify=False)
    selection = select(parts)
    with ExitStack() as on_error:
        # Open from now on: a job that puts parts together takes their names away, not their content.
        for part in parts:
            with reading(part.path):
                files.append(on_error.enter_context(open_generations(part.path)))
        on_error.pop_all()
    return Output(path, False, files, (selection.part.astype(np.int32), selection.position)), damaged
