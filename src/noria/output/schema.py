"""What an output holds: a row per (prompt, sample) as flat HDF5 datasets, written a block of rows at a time.

Finished outputs and sealed parts are files of this schema. Knows nothing of names of files, nor how rows are made.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
import xxhash

from noria.errors import InputError
from noria.output.columns import Column
from noria.tools.text import storable

FORMAT = "noria-generations"
VERSION = 1
STATUS = ("todo", "done", "error")
FINISH_REASON = ("none", "stop", "length", "error")
STRINGS = ("id", "prompt", "text", "error", "extra")
WIDE = ("top_ids", "top_logprobs")  # [tokens, top]
NO_ID = -1  # in top_ids: the row asked for fewer
NOT_KNOWN = -1  # in cached_tokens: an earlier version wrote the row

# A row's optional values -> what they are as many as, and what stands in the file for a row without them.
_SCORES = {
    "logprobs": ("token_ids", np.nan),
    "top_ids": ("token_ids", NO_ID),
    "top_logprobs": ("token_ids", np.nan),
    "prompt_logprobs": ("prompt_token_ids", np.nan),
}


@dataclass(eq=False)
class Generation:
    """One row: a prompt and what was generated for it. `row` is the global number of the prompt, `extra` JSON text."""

    row: int
    id: str
    sample: int
    status: str
    finish_reason: str
    prompt: str
    text: str
    token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    prompt_token_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    error: str = ""
    extra: str = ""
    logprobs: np.ndarray | None = None  # [tokens]
    top_ids: np.ndarray | None = None  # [tokens, k]
    top_logprobs: np.ndarray | None = None  # [tokens, k]
    prompt_logprobs: np.ndarray | None = None  # [prompt tokens], the first NaN
    reasoning: str | None = None  # None: it is not kept apart from the text
    reasoning_tokens: int = 0
    cached_tokens: int | None = None  # of the prompt, shared with other rows and so not computed; None: not known

    @property
    def columns(self) -> dict[str, Any]:
        """The user's own columns. Raises ValueError where `extra` is no JSON object."""
        return own_columns(self.extra)


def own_columns(extra: str) -> dict[str, Any]:
    """The user's own columns of a row, from their JSON text; NaN, which tables have where nothing is given, is none.

    Raises ValueError; where the text is JSON, but no object, InputError.
    """
    columns = json.loads(extra, parse_constant=lambda name: None if name == "NaN" else float(name)) if extra else {}
    if not isinstance(columns, dict):
        raise InputError(f"a row's own columns are not a JSON object: {extra[:60]!r}")
    return columns


@dataclass(frozen=True)
class Scores:
    """Which of the optional columns a file holds. Log-probabilities: their type ("float32", "float64"; None: none at all),
    those of the tokens chosen, those of the `top` most likely ones (0: none), those of the prompts. `reasoning`: what was
    thought, apart from the text. `cached`: how many tokens of prompts were shared."""

    dtype: str | None = None
    chosen: bool = False
    top: int = 0
    prompt: bool = False
    reasoning: bool = False
    cached: bool = False

    def __str__(self) -> str:
        kinds = ["of tokens"] * self.chosen + [f"top {self.top}"] * (self.top > 0) + ["of prompts"] * self.prompt
        return f"{self.dtype}, {', '.join(kinds)}" if kinds else "none"


def _enum(names: Sequence[str]) -> np.dtype:
    return h5py.enum_dtype({name: value for value, name in enumerate(names)}, basetype="u1")


def schema(scores: Scores) -> dict[str, tuple[np.dtype, str]]:
    """Dataset -> (type, what it has one of: row, row+1, token, prompt token), in the order of the file.

    Datasets of WIDE have scores.top values for each of it: [tokens, top].
    """
    text = h5py.string_dtype("utf-8")
    columns = {
        "row": (np.dtype("<i8"), "row"),
        "id": (text, "row"),
        "sample": (np.dtype("<i4"), "row"),
        "status": (_enum(STATUS), "row"),
        "finish_reason": (_enum(FINISH_REASON), "row"),
        "prompt": (text, "row"),
        "text": (text, "row"),
        "tokens": (np.dtype("<i4"), "token"),
        "offsets": (np.dtype("<i8"), "row+1"),
        "prompt_tokens": (np.dtype("<i4"), "prompt token"),
        "prompt_offsets": (np.dtype("<i8"), "row+1"),
        "error": (text, "row"),
        "extra": (text, "row"),
    }
    number = np.dtype(scores.dtype or "float32").newbyteorder("<")
    if scores.chosen:
        columns["logprobs"] = (number, "token")
    if scores.top:
        columns["top_ids"] = (np.dtype("<i4"), "token")
        columns["top_logprobs"] = (number, "token")
    if scores.prompt:
        columns["prompt_logprobs"] = (number, "prompt token")
    if scores.reasoning:
        columns["reasoning"] = (text, "row")
        columns["reasoning_tokens"] = (np.dtype("<i4"), "row")
    if scores.cached:
        columns["cached_tokens"] = (np.dtype("<i4"), "row")
    return columns


def scores_of(generations: Sequence[Generation]) -> Scores:
    """What the rows hold together: float64 if any row has that, the widest top, whatever any row has."""
    rows = [one for one in generations if one.logprobs is not None or one.prompt_logprobs is not None]
    arrays = [array for one in rows for array in (one.logprobs, one.prompt_logprobs) if array is not None]
    dtype = "float64" if any(np.asarray(array).dtype == np.float64 for array in arrays) else "float32"
    return Scores(
        dtype if arrays else None,
        any(one.logprobs is not None for one in rows),
        max((one.top_ids.shape[1] for one in rows if one.top_ids is not None), default=0),
        any(one.prompt_logprobs is not None for one in rows),
        any(one.reasoning is not None for one in generations),
        any(one.cached_tokens is not None for one in generations),
    )


def scores_together(files: Iterable[Scores]) -> Scores:
    """What a file must hold that takes the rows of all these files."""
    files = list(files)
    dtypes = {scores.dtype for scores in files}
    return Scores(
        "float64" if "float64" in dtypes else "float32" if "float32" in dtypes else None,
        any(scores.chosen for scores in files),
        max((scores.top for scores in files), default=0),
        any(scores.prompt for scores in files),
        any(scores.reasoning for scores in files),
        any(scores.cached for scores in files),
    )


class RowWriter:
    """Fills a new HDF5 file with rows whose number and tokens are known beforehand, and sums what it writes."""

    def __init__(self, file: h5py.File, num_rows: int, num_tokens: int, num_prompt_tokens: int, scores: Scores):
        self.file, self.scores = file, scores
        self.columns = schema(scores)
        self.sizes = {"row": num_rows, "row+1": num_rows + 1, "token": num_tokens, "prompt token": num_prompt_tokens}
        self.written = {"row": 0, "row+1": 0, "token": 0, "prompt token": 0}
        self.hashers = {name: xxhash.xxh3_64() for name in self.columns}
        self.datasets = {
            name: file.create_dataset(name, (self.sizes[per], scores.top)[: 1 + (name in WIDE)], dtype)
            for name, (dtype, per) in self.columns.items()
        }
        self._write({"offsets": np.zeros(1, "<i8"), "prompt_offsets": np.zeros(1, "<i8")})

    def append(self, generations: Sequence[Generation]) -> None:
        """Writes the next rows. Text is made storable."""
        if not generations:
            return
        numbers = {
            "row": [one.row for one in generations],
            "sample": [one.sample for one in generations],
            "status": [STATUS.index(one.status) for one in generations],
            "finish_reason": [FINISH_REASON.index(one.finish_reason) for one in generations],
        }
        if self.scores.reasoning:
            numbers["reasoning_tokens"] = [one.reasoning_tokens for one in generations]
        if self.scores.cached:
            known = (one.cached_tokens for one in generations)
            numbers["cached_tokens"] = [NOT_KNOWN if count is None else count for count in known]
        values = {name: np.asarray(column, self.columns[name][0]) for name, column in numbers.items()}
        for name in (*STRINGS, *(("reasoning",) if self.scores.reasoning else ())):
            values[name] = np.empty(len(generations), object)
            values[name][:] = [storable(getattr(one, name) or "").encode() for one in generations]
        for name, offsets, source in (
            ("tokens", "offsets", "token_ids"),
            ("prompt_tokens", "prompt_offsets", "prompt_token_ids"),
        ):
            rows = [np.asarray(getattr(one, source), "<i4") for one in generations]
            values[name] = np.concatenate(rows)
            values[offsets] = self.written[self.columns[name][1]] + np.cumsum([len(row) for row in rows], dtype="<i8")
        for name, (count, none) in _SCORES.items():
            if name in self.columns:
                width = (self.scores.top,) * (name in WIDE)
                rows = [_padded(one, name, len(getattr(one, count)), width, none) for one in generations]
                values[name] = np.concatenate(rows).astype(self.columns[name][0])
        self._write(values)

    def finish(self) -> dict[str, str]:
        """Stores the xxh3 checksums of the datasets as the attribute `checksums`, and returns them by name."""
        assert self.written == self.sizes, f"wrote {self.written} of {self.sizes}"
        sums = {name: hasher.hexdigest() for name, hasher in self.hashers.items()}
        write_attrs(self.file, {"checksums": sums})
        return sums

    def _write(self, values: Mapping[str, np.ndarray]) -> None:
        ends = {}
        for name, array in values.items():
            per = self.columns[name][1]
            ends[per] = self.written[per] + len(array)
            assert ends[per] <= self.sizes[per], f"{name}: {ends[per]} values, announced {self.sizes[per]}"
            if len(array):
                self.datasets[name][self.written[per] : ends[per]] = array
            update(self.hashers[name], array)
        self.written |= ends


def _padded(generation: Generation, name: str, count: int, width: tuple[int, ...], none: float) -> np.ndarray:
    """[count, *width] a row's values as the file holds them: `none` where the row has none."""
    values = getattr(generation, name)
    if values is None:
        return np.full((count, *width), none)
    assert len(values) == count, f"row {generation.row}: {len(values)} {name} for {count} tokens"
    missing = width[0] - values.shape[1] if width else 0
    return np.pad(values, ((0, 0), (0, missing)), constant_values=none) if missing else np.asarray(values)


def update(hasher: xxhash.xxh3_64, values: np.ndarray) -> None:
    """Adds the next values of a column, in the type of the schema or as bytes, to its checksum."""
    # Strings one after another with their lengths, so that the sum does not depend on the blocks they came in.
    if values.dtype.kind == "O":
        hasher.update(b"".join(len(text).to_bytes(8, "little") + text for text in values))
    else:
        hasher.update(np.ascontiguousarray(values).data)


def checksums(datasets: Mapping[str, Column], scores: Scores) -> dict[str, str]:
    """The checksum of each dataset as it reads now."""
    result = {}
    for name, (dtype, _) in schema(scores).items():
        hasher, dataset = xxhash.xxh3_64(), datasets[name]
        step = 256 if dtype.kind == "O" else 2**20
        for start in range(0, len(dataset), step):
            values = dataset[start : start + step]
            update(hasher, values if dtype.kind == "O" else values.astype(dtype))
        result[name] = hasher.hexdigest()
    return result


def write_attrs(file: h5py.File, attrs: Mapping[str, object]) -> None:
    """Texts as text of any length, numbers as numbers, anything else (lists, tables, None) as JSON text."""
    for name, value in attrs.items():
        number = isinstance(value, (bool, float, np.number, np.bool_)) or (
            isinstance(value, int) and abs(value) < 2**63
        )
        if not number:
            value = storable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
        file.attrs[name] = value
