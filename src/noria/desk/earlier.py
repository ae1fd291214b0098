"""What earlier jobs of a run left: parts that must be of this run, rows that they stopped half-way, how long rows get.

Knows no steps and no ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from noria.config import Config
from noria.desk.identity import another_run
from noria.desk.records import num_cut, take_up
from noria.errors import InputError
from noria.output.parts import Parts
from noria.output.schema import Generation
from noria.output.sealed import DONE, gather, parts_folder, scan, scan_one, select
from noria.output.segments import latest_running
from noria.output.target import probe_output, reopen
from noria.rows.chat import Encoder, tells_date
from noria.rows.prompt_files import PromptFiles, extends
from noria.rows.prompts import Prompt
from noria.rows.reservations import REMEMBERED, EarlierLengths, evenly
from noria.rows.sequence import Sequence

_POINTS = 9  # of the lengths of rows in flight, which a job keeps for the next one
_MOST_RUNNING = 2**16  # rows: more than a record of them is believed


def make_room(config: Config) -> None:
    """For a run that nothing refuses any more: moves an old output aside, or lets a finished one be its first part."""
    if config.job.overwrite:
        probe_output(config.output, overwrite=True)
    elif Path(config.output).exists():
        reopen(config.output)


def agree(
    parts: Parts,
    config: Config,
    files: PromptFiles,
    num_prompts: int,
    tokenizer: Mapping[str, bytes],
    mended: bool = False,
) -> None:
    """Raises InputError if the parts are of another run; those that are not may be of an earlier version.

    `mended`: their rows were compared with these prompts, which are not those of before (mended.py). `tokenizer`: its files.
    Where texts depend on the date, that of the job's first start is kept: a row is the same whenever it is generated.
    """
    for part in parts.parts:  # a greedy shard of the old rules drew nothing: any seed agrees with it
        if part.header.get("sampling.seed") is None:
            part.header["sampling.seed"] = parts.header["sampling.seed"]
    if tells_date(tokenizer):
        stored = [part.header["chat.date"] for part in parts.parts if "chat.date" in part.header]
        parts.header["chat.date"] = stored[0] if stored else local_time()
    for part in parts.parts:
        if mended or (config.job.extend and extends(files, part.header["prompts"])):
            part.header["prompts"] = parts.header["prompts"]
    different = parts.differences()
    if different:
        raise another_run(parts.folder, different)
    last = max((int(part.row.max(initial=-1)) for part in parts.parts), default=-1)
    if last >= num_prompts:
        raise InputError(
            f"limit is {config.limit}, and {parts.folder} holds row {last}: leave out --limit, or give at least {last + 1}"
        )
    parts.adopt()


def chat_date(header: Mapping[str, Any]) -> datetime:
    """The date that a chat template tells in a run with this header: that of its first start, else today's."""
    return datetime.fromisoformat(header.get("chat.date") or local_time())


def local_time() -> str:
    """The time of this place, as `2026-11-23T03:15:02`."""
    return datetime.now().isoformat(timespec="seconds")


class Begun:
    """Rows that an earlier job stopped half-way: they keep the tokens of their prompts as they were sealed."""

    def __init__(self, parts: Parts):
        self._rows = parts.unfinished()
        self._cut = {row: num_cut(one) for (row, _), one in self._rows.items()}
        self._prompts = {row: one.prompt_token_ids.tolist() for (row, _), one in self._rows.items()}

    @property
    def lengths(self) -> list[int]:
        """Tokens that were sealed of each row that is not taken up yet."""
        return [len(one.token_ids) for one in self._rows.values()]

    def take_up(self, sequence: Sequence) -> None:
        """Gives the sequence the tokens that were sealed for it."""
        sequence.num_cut = self._cut.get(sequence.prompt.row, sequence.num_cut)
        begun = self._rows.pop((sequence.prompt.row, sequence.sample), None)
        if begun is not None:
            take_up(sequence, begun)

    def encoder(self, encode: Encoder) -> Callable[[Prompt], list[int]]:
        """The way from rows to token ids: sealed ones, where there are."""
        return lambda prompt: self._prompts[prompt.row] if prompt.row in self._prompts else encode(prompt)


def of_running(lengths: Iterable[int]) -> list[int]:
    """How many rows have these lengths, and _POINTS of them, from the shortest to the longest. Empty if there are none."""
    found = np.fromiter(lengths, np.int64)
    if not len(found):
        return []
    return [len(found), *np.quantile(found, np.linspace(0, 1, _POINTS)).astype(int).tolist()]


def earlier_lengths(parts: Parts, begun: Begun) -> EarlierLengths:
    """How long the rows of earlier jobs got. Reads no row: the lengths of a part are known, those of what ran are in segments.

    Of the rows that ended as many as others are judged by, evenly from the latest parts: in time a part has no order.
    """
    done: list[np.ndarray] = []
    for part in reversed(parts.parts):
        if sum(map(len, done)) < REMEMBERED:
            done.append(part.num_tokens[part.status == DONE])
    ended = np.concatenate([np.empty(0, np.int64), *reversed(done)])
    ended = ended[evenly(len(ended), min(len(ended), REMEMBERED))]
    return EarlierLengths(ended, np.array(begun.lengths, np.int64), _lost(latest_running(parts.folder)))


def _lost(running: list[int]) -> np.ndarray:
    """[R] lengths like those that `of_running` was told of."""
    if len(running) <= 1:
        return np.empty(0, np.int64)
    count, *points = running
    ranks = np.linspace(0, len(points) - 1, min(count, _MOST_RUNNING))
    return np.interp(ranks, np.arange(len(points)), points).astype(np.int64)


def sealed_rows(config: Config, errors: bool) -> Iterator[Generation]:
    """The rows that are there, finished or half-way, in order; those in error too if `errors`."""
    output = Path(config.output)
    parts = (
        scan(parts_folder(output), lambda message: None, verify=False) if not output.exists() else [scan_one(output)]
    )
    for block in gather(parts, select(parts, half_way=True)):
        yield from (one for one in block if errors or one.status != "error")


def beside(prompts: Iterable[Prompt], sealed: Iterator[Generation]) -> Iterator[tuple[Prompt, list[Generation]]]:
    """Each prompt with its rows that are there: both come in order."""
    groups = groupby(sealed, key=lambda one: one.row)
    row, ours = next(groups, (None, ()))
    for prompt in prompts:
        rows = list(ours) if row == prompt.row else []
        if rows:
            row, ours = next(groups, (None, ()))
        yield prompt, rows
