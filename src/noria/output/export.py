"""Generations as a file for other programs, in the order of the prompts: JSON lines, CSV, parquet, OpenAI's responses.

Knows the finished output and its parts; nothing of how they came about.
"""

import contextlib
import gzip
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from noria.errors import InputError
from noria.output.export_openai import HIDDEN, NoTexts, TokenTexts, is_error, responses
from noria.output.export_rows import ExportedRows, Origin, origin_of, rows_so_far
from noria.output.export_tables import check_pyarrow, write_csv, write_parquet
from noria.output.generations import Generations, open_generations, stored_checksums, verify_checksums
from noria.output.schema import Generation, own_columns
from noria.output.sealed import Gone, is_unfinished, to_stderr
from noria.output.wanted import WantedRows
from noria.tools.atomic import check_file, real, replacing
from noria.tools.keys import nearest
from noria.tools.text import json_text
from noria.tools.writing import open_new

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
FORMATS = ("rows", "openai")
SCORES = ("logprobs", "top_ids", "top_logprobs", "prompt_logprobs")
KEYS = ("id", "sample", "status", "finish_reason", "prompt", "text", "token_ids", *SCORES, "error")
REASONING = "reasoning"  # one of Noria's keys where an output keeps it apart; elsewhere a column of the user's
# What a table's columns of these names hold.
KINDS = dict.fromkeys(KEYS, "string") | {"sample": "int32", "token_ids": "list<int32>", "top_ids": "list<list<int32>>"}
KINDS |= {"logprobs": "list<float64>", "top_logprobs": "list<list<float64>>", "prompt_logprobs": "list<float64>"}


def no_texts(origin: Origin) -> TokenTexts:
    """Tokens are written as their ids, whatever output they are of."""
    return NoTexts()


@dataclass(frozen=True)
class ExportSettings:
    """How rows are exported. `errors`: the file for the responses that are errors (openai alone; None: they stand among the
    others). `texts`: what is known of an output's tokens, called only where log-probabilities are exported as responses."""

    format: str = "rows"
    errors: Path | None = None
    wanted: WantedRows = WantedRows()
    texts: Callable[[Origin], TokenTexts] = no_texts


def export(
    source: str | Path,
    target: str | Path,
    report: Callable[[str], None] = to_stderr,
    settings: ExportSettings | None = None,
) -> int:
    """Writes the generations of an output to `target`, by its suffix, and returns the number of rows or responses.

    The keys of KEYS (REASONING, SCORES and `error` where there are any) and the user's own columns; a user's column that has
    the name of one of these is exported as `input_NAME`, never instead of Noria's. NaN becomes null, and infinity where JSON
    is written, which has none. `settings`: which rows, and whether as OpenAI's responses, one a prompt, as JSON lines.
    An output that is not finished is exported from its parts, as far as they go, and `report` is told. What is exported is
    compared with its checksums, where there are any. `target` appears whole or not at all. Raises InputError for what is no
    output, what is damaged or a target that cannot be, WriteError where a write fails.
    """
    source, target, settings = Path(source), Path(target), settings or ExportSettings()
    for path in filter(None, (target, settings.errors)):
        check_target(path, settings.format)
        if source.exists() and path.exists() and path.samefile(source):
            raise InputError(f"{path} is a link to {source}, the output itself, which would be lost: name another file")
    if settings.errors is not None and (settings.format != "openai" or real(settings.errors) == real(target)):
        why = "is the file of the responses too" if settings.format == "openai" else "is for --format openai"
        raise InputError(f"errors {settings.errors} {why}: name another file, or leave it out")
    while is_unfinished(source):
        with contextlib.suppress(Gone):  # read once more: other parts, or the output itself
            return _write(target, rows_so_far(source, report), settings)
    with open_generations(source) as file:
        compared = _compared(file, settings.format)
        if not compared:
            report(f"{source} has no checksums: it is not known whether its rows are as they were written")
        with _damage_named(file, compared):
            return _write(
                target, ExportedRows(lambda: file.rows(compared), origin_of(file), file.scores.chosen), settings
            )


@contextlib.contextmanager
def _damage_named(file: Generations, compared: Sequence[str]) -> Iterator[None]:
    """What damaged values make the writers raise, before their column's checksum is compared, as an InputError."""
    try:
        yield
    except InputError as error:
        if str(file.path) in str(error):
            raise
        raise InputError(f"{file.path}: {error}") from error
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        if compared:
            verify_checksums(file)  # names the columns that differ; where none does, the fault is not the file's
            raise
        raise InputError(f"{file.path} is damaged: {type(error).__name__} {str(error)[:200]!r}") from error


def _compared(file: Generations, format: str) -> list[str]:
    """The columns that are exported, each to be compared with its checksum; none where the file has no checksums."""
    prompts = format == "openai" or file.scores.prompt
    left_out = () if prompts else ("prompt_tokens", "prompt_offsets")
    return [name for name in file.datasets if name not in left_out] if stored_checksums(file) is not None else []


def check_target(target: Path, format: str = "rows") -> None:
    """Raises InputError for a suffix that cannot be written, or a folder that does not take the file."""
    suffix = _suffix(target)
    known = SUFFIXES if format == "rows" else SUFFIXES[:2]
    if suffix not in known:
        raise InputError(
            f"{target}: {suffix or 'a name without a suffix'} is not a format of export{nearest(suffix, known)}; export"
            f" {'writes' if format == 'rows' else f'--format {format} writes'} {', '.join(known)}: name the file"
            f" {target.name.partition('.')[0] or 'rows'}.jsonl"
        )
    if target.is_dir():
        raise InputError(f"{target} is a folder: name a file in it")
    if suffix == ".parquet":
        check_pyarrow("parquet")
    check_file(target)


def _suffix(target: Path) -> str:
    """The end of its name that says the format, with `.gz` before which it stands."""
    suffixes = [suffix.lower() for suffix in target.suffixes[-2:]]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def as_object(generation: Generation) -> dict[str, Any]:
    """The row as it is exported: Noria's keys, then the user's own columns."""
    row = {
        "id": generation.id,
        "sample": generation.sample,
        "status": generation.status,
        "finish_reason": generation.finish_reason,
        "prompt": generation.prompt,
        "text": generation.text,
        "token_ids": generation.token_ids.tolist(),
    }
    if generation.reasoning is not None:
        row[REASONING] = generation.reasoning
    for name in SCORES:
        values = getattr(generation, name)
        if values is not None and values.size:
            row[name] = _numbers(values)
    if generation.error:
        row["error"] = generation.error
    own = own_columns(generation.extra)
    keys = KEYS if generation.reasoning is None else (*KEYS, REASONING)
    for name, value in own.items():
        row[f"input_{name}" if _taken(name, own, keys) else name] = value
    return row


def _taken(name: str, own: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Whether a user's column has the name of one of Noria's keys, or of a user's column that is renamed for that."""
    while name not in keys:
        before = name.removeprefix("input_")
        if before == name or before not in own:
            return False
        name = before
    return True


def _numbers(values: np.ndarray) -> list[Any]:
    if values.ndim > 1:
        return [_numbers(one) for one in values]
    return values.tolist() if values.dtype.kind == "i" else [_shortest(value) for value in values]


def _shortest(value: np.floating) -> float | None:
    # str() of a numpy number has as many digits as its own precision needs.
    return float(str(value)) if np.isfinite(value) else None


def _write(target: Path, rows: ExportedRows, settings: ExportSettings) -> int:
    remedy = "make room, or name a file on another disk, and export again"
    with contextlib.ExitStack() as both:
        unfinished = both.enter_context(replacing(target, remedy))
        errors = both.enter_context(replacing(settings.errors, remedy)) if settings.errors else None
        return _write_rows(unfinished, errors, target, rows, settings)


def _write_rows(path: Path, errors: Path | None, target: Path, rows: ExportedRows, settings: ExportSettings) -> int:
    suffix = _suffix(target)
    if settings.format == "openai":
        texts = settings.texts(rows.origin) if rows.has_logprobs else NoTexts()
        objects = (as_object(one) | _hidden(one) for one in rows.those(settings.wanted))
        lines = responses(objects, rows.origin.start, rows.origin.checkpoint, texts)
        if errors is None or settings.errors is None:
            return _write_lines(path, lines, suffix)
        with _lines(errors, _suffix(settings.errors)) as write_error:
            return _write_lines(path, _but_errors(lines, write_error), suffix)
    if suffix.startswith(".jsonl"):
        return _write_lines(path, map(as_object, rows.those(settings.wanted)), suffix)
    write = write_csv if suffix == ".csv" else write_parquet
    return write(lambda: map(as_object, rows.those(settings.wanted)), path, KINDS)


def _but_errors(
    lines: Iterable[dict[str, Any]], write_error: Callable[[dict[str, Any]], None]
) -> Iterator[dict[str, Any]]:
    """The responses that are no errors; the others are written apart."""
    for one in lines:
        if is_error(one):
            write_error(one)
        else:
            yield one


def _hidden(generation: Generation) -> dict[str, Any]:
    """What a response needs beside what is exported."""
    known = {"row": generation.row, "prompt_token_ids": generation.prompt_token_ids.tolist()}
    if generation.reasoning is not None:
        known |= {"reasoning": generation.reasoning, "num_reasoning_tokens": generation.reasoning_tokens}
    known["num_cached_tokens"] = generation.cached_tokens
    return dict.fromkeys(HIDDEN) | known


def _write_lines(path: Path, objects: Iterable[dict[str, Any]], suffix: str) -> int:
    count = 0
    with _lines(path, suffix) as write:
        for one in objects:
            write(one)
            count += 1
    return count


@contextlib.contextmanager
def _lines(path: Path, suffix: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What writes an object a line to a new file."""
    with open_new(path) as plain, contextlib.ExitStack() as closing:
        # without a name and a time in it: the same rows are the same bytes
        packed = gzip.GzipFile("", "wb", 6, plain, mtime=0) if suffix.endswith(".gz") else None
        file: BinaryIO | gzip.GzipFile = plain if packed is None else closing.enter_context(packed)

        def write(one: dict[str, Any]) -> None:
            file.write(line_of(one))

        yield write


def line_of(row: dict[str, Any]) -> bytes:
    """A row as it is exported, as a line of JSON."""
    try:
        return json_text(row).encode() + b"\n"
    except UnicodeEncodeError:
        # A lone surrogate in a user's own column, which UTF-8 cannot hold and a JSON escape can.
        return json_text(row, ensure_ascii=True).encode() + b"\n"
