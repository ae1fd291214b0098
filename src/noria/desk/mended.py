"""Prompts that were mended after a run: rows in error may have others than before, all rows else must be as they were.

Compares what an output holds of its rows with the prompts as they are now: ids, prompts, their tokens, own columns.
"""

import json
from collections.abc import Callable, Iterable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from noria.config import Config
from noria.desk.earlier import beside, chat_date, sealed_rows
from noria.desk.identity import Identity
from noria.desk.records import CUT, num_cut
from noria.errors import InputError, require
from noria.output.agreement import differing
from noria.output.schema import Generation
from noria.output.sealed import Part, parts_folder, scan, scan_one
from noria.rows.making import of_row
from noria.rows.prompt_files import PromptFiles, extends
from noria.rows.prompts import Prompt, open_prompts
from noria.sampling import OLD_RULES, Sampling
from noria.tools.text import plural, printable, storable
from noria.tools.values import shard_rows

SHOWN = 10  # rows that are told
Encode = Callable[[Prompt], list[int]]


def mended(
    config: Config, files: PromptFiles, own: Identity, num_rows: int, encoder: Callable[[datetime], Encode]
) -> list[str] | None:
    """With `retry_errors`, beside an output that was begun with other prompts: lines for the user that list the rows whose
    prompts are others now. None where nothing is to be accepted: the prompts are the same, or the run differs otherwise.

    `encoder` renders rows as the run does, at a date. Raises InputError if a row that is no error has another prompt.
    """
    if not config.job.retry_errors or own.rules <= OLD_RULES:
        return None
    parts = _parts(Path(config.output))
    headers = [part.header for part in parts]
    other = [header for header in headers if header.get("prompts") != own.header["prompts"]]
    but = ("prompts", "chat.date", "sampling.seed")
    extended = config.job.extend and all(extends(files, str(header.get("prompts"))) for header in other)
    if not other or extended or any(differing(header, own.header, but=but) for header in headers):
        return None
    last = max(int(part.row.max(initial=-1)) for part in parts)
    require(
        last < num_rows,
        f"prompts {files} have {plural(num_rows, 'row')}, and {config.output} has row {last}: put it back",
    )
    rows = shard_rows(config.job.shard, num_rows)
    prompts = (prompt for prompt in open_prompts(files) if prompt.row in rows)
    return _compare(
        config, files, prompts, partial(_is_same, encode=encoder(chat_date(headers[0])), sampling=own.sampling)
    )


def _parts(output: Path) -> list[Part]:
    if output.exists():
        return [scan_one(output)]
    return scan(parts_folder(output), lambda message: None, verify=False)


def _compare(
    config: Config, files: PromptFiles, prompts: Iterable[Prompt], is_same: Callable[[Prompt, Generation], bool]
) -> list[str]:
    changed: list[Prompt] = []
    wrong: list[Prompt] = []
    for prompt, rows in beside(prompts, sealed_rows(config, errors=True)):
        if rows and not all(is_same(prompt, row) for row in rows):
            kept = any(row.status != "error" for row in rows)
            (wrong if kept else changed).append(prompt)
    if wrong:
        raise InputError(
            f"prompts {files}: {plural(len(wrong), 'row')} of {config.output} that {'is' if len(wrong) == 1 else 'are'} no"
            f" error {'has' if len(wrong) == 1 else 'have'} another prompt now ({_names(wrong)}): only rows in error may be"
            " mended; put the others back as they were, or --overwrite starts again"
        )
    return [f"{plural(len(changed), 'row')} in error with another prompt than before: {_names(changed) or 'none'}"]


def _names(prompts: list[Prompt]) -> str:
    """`row 3 (id), row 5`: the first of them, and how many more."""
    shown = [
        f"row {one.row}" + (f" ({printable(one.id[:60])})" if one.id != str(one.row) else "") for one in prompts[:SHOWN]
    ]
    more = len(prompts) - len(shown)
    return ", ".join(shown) + (f" and {plural(more, 'other')}" if more else "")


def _is_same(prompt: Prompt, row: Generation, encode: Encode, sampling: Sampling) -> bool:
    """Whether the row was made of this prompt, as far as the output tells: it does not hold the sampling keys of its rows."""
    if (row.id, row.prompt) != (prompt.id, storable(prompt.prompt)) or _columns(row.extra) != _columns(prompt.extra):
        return False
    try:
        require(prompt.error is None, prompt.error or "")
        of_row(prompt.sampling, prompt.request, sampling).check()
        found = encode(prompt)
    except ValueError as error:
        return str(error) == row.error
    stored = row.prompt_token_ids.tolist()
    return found[num_cut(row) :] == stored and not (row.error and not stored)


def _columns(extra: str) -> dict[str, Any]:
    """The user's own columns, without what Noria says of the row."""
    own = json.loads(extra) if extra else {}
    return {name: value for name, value in own.items() if name not in (CUT, f"input_{CUT}")}
