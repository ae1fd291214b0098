"""What became of the rows of an output: errors by reason, rows that were cut short, and the exit code that follows.

Reads outputs and parts; knows nothing of how rows are made.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from noria.output.generations import Generations, blocks, open_generations
from noria.output.schema import FINISH_REASON, STATUS, Generation
from noria.output.sealed import Part, Selection, reading
from noria.sampling import OPEN
from noria.structured import may_have_blanks
from noria.tools.damage import damaged_is_input_error
from noria.tools.text import plural, printable

# Exit code (EX_DATAERR) of a whole output of which all rows, or with fail_on_errors some, are errors.
ROWS_IN_ERROR = 65
EXAMPLES = 3  # rows that are kept to be shown
_SHOWN = 5  # reasons
_MAX_REASONS = 1000  # that are told apart
_WIDTH = 200  # characters of a reason


@dataclass
class Reasons:
    """Why rows are in error, counted. Reasons that differ in numbers alone are one, told as it was first said."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # ids and words of the first rows

    def add(self, id: str, error: str) -> None:
        kind = re.sub(r"\d[\d.,]*", "#", error[:500])
        kind = kind if kind in self.counts or len(self.counts) < _MAX_REASONS else "other reasons"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < EXAMPLES:
            examples.append((id, error))

    def lines(self, shown: int = _SHOWN) -> list[str]:
        """`3 rows in error, such as ID: REASON`: the most frequent reasons first."""
        ordered = sorted(self.counts, key=lambda kind: -self.counts[kind])
        lines = [f"{plural(self.counts[kind], 'row')} in error, {self._words(kind)}" for kind in ordered[:shown]]
        rest = sum(self.counts[kind] for kind in ordered[shown:])
        others = plural(len(ordered) - shown, "other reason")
        return lines + [f"{plural(rest, 'row')} in error for {others}"] * (rest > 0)

    def groups(self) -> list[tuple[int, list[tuple[str, str]]]]:
        """How many rows each reason has, the most frequent first, with id and words of its first rows."""
        ordered = sorted(self.counts, key=lambda kind: -self.counts[kind])
        return [(self.counts[kind], self.examples[kind]) for kind in ordered]

    def as_list(self) -> list[dict[str, Any]]:
        """count, id and error (as first said) of each reason, the most frequent first."""
        return [{"count": count, "id": first[0], "error": first[1]} for count, (first, *_) in self.groups()]

    def _words(self, kind: str) -> str:
        id, error = self.examples[kind][0]
        such = "such as " if self.counts[kind] > 1 else ""
        return f"{such}{printable(id[:60])}: {printable(error[:_WIDTH])}{'...' if len(error) > _WIDTH else ''}"


class Outcome:
    """Counts the rows of files of generations whose `header` says how they were sampled, and keeps the first ones done."""

    def __init__(self, header: Mapping[str, Any]):
        self.num_rows = self.num_errors = self.num_cut = 0
        self.num_prompt_tokens = self.num_tokens = self.num_cached = 0
        self.finish_reasons = dict.fromkeys(FINISH_REASON, 0)  # "none": of rows that stopped half-way
        self.examples: list[Generation] = []
        self.reasons = Reasons()
        most = header.get("sampling.max_new_tokens")
        self._most: int = OPEN["max_new_tokens"] if most is None else most
        self._json = may_have_blanks(header.get("sampling.structured_outputs") or {})
        self._cut_texts: list[str] = []  # of the first rows that were cut short
        self._wanted = header.get("sampling.ignore_eos", False)  # by a run that goes on to the end of every row

    def add(self, file: Generations, positions: np.ndarray | None = None) -> None:
        """Counts all rows of a file, or those at these positions."""
        positions = np.arange(len(file)) if positions is None else np.sort(positions)
        status, reason = file.column("status")[positions], file.column("finish_reason")[positions]
        lengths, prompt_lengths = file.lengths()
        self.num_rows += len(positions)
        self.num_tokens += int(lengths[positions].sum())
        self.num_prompt_tokens += int(prompt_lengths[positions].sum())
        if file.scores.cached:
            self.num_cached += int(file.column("cached_tokens")[positions].clip(min=0).sum())
        for name, count in zip(FINISH_REASON, np.bincount(reason, minlength=len(FINISH_REASON)), strict=True):
            self.finish_reasons[name] += int(count)
        cut = (reason == FINISH_REASON.index("length")) & (lengths[positions] == self._most)
        self.num_cut += int(cut.sum())
        for position in positions[cut][: EXAMPLES - len(self._cut_texts)]:
            self._cut_texts += [one.text for one in file.read(int(position), int(position) + 1)]
        self._add_errors(file, positions[status == STATUS.index("error")])
        for position in positions[status == STATUS.index("done")][: EXAMPLES - len(self.examples)]:
            self.examples += file.read(int(position), int(position) + 1)

    def _add_errors(self, file: Generations, positions: np.ndarray) -> None:
        self.num_errors += len(positions)
        for start, stop in blocks(np.zeros(len(file), int)):
            ours = positions[(positions >= start) & (positions < stop)] - start
            if len(ours):
                ids, errors = (file.datasets[name][start:stop][ours] for name in ("id", "error"))
                for id, error in zip(ids, errors, strict=True):
                    self.reasons.add(id.decode(errors="replace"), error.decode(errors="replace"))

    def lines(self) -> list[str]:
        """What people should know of it: nothing for rows that are all as they should be."""
        return self.reasons.lines() + self.cut_lines()

    def cut_lines(self) -> list[str]:
        """That rows were cut short, if they were and nobody wanted it."""
        if not self.num_cut or not self._most or self._wanted:
            return []
        of = f"{self.num_cut:,} of {plural(self.num_rows, 'row')}"
        line = f"{of} ended at max_new_tokens ({self._most:,}): raise it if they should go on"
        blank = self._json and self._cut_texts and all(map(_is_blank_json, self._cut_texts))
        return [
            line
            + '; most of their text is blanks: "disable_any_whitespace": true in structured_outputs leaves none'
            * bool(blank)
        ]

    def code(self, fail_on_errors: bool = False) -> int:
        """The exit code of a command that leaves the output whole."""
        wrong = self.num_errors > 0 and (fail_on_errors or self.num_errors == self.num_rows)
        return ROWS_IN_ERROR if wrong else 0


def _is_blank_json(text: str) -> bool:
    """Whether a text begins as JSON does, and has more blanks than other characters."""
    return text.lstrip().startswith(("{", "[")) and sum(map(str.isspace, text)) > len(text) / 2


def outcome_of(output: str | Path) -> Outcome:
    """That of a finished output, which was looked at before. Raises InputError if it is damaged."""
    with open_generations(output) as file, damaged_is_input_error(Path(output)):
        outcome = Outcome(json.loads(file.attrs.get("header", "{}")))
        outcome.add(file)
    return outcome


def outcome_of_parts(parts: Sequence[Part], selection: Selection) -> Outcome:
    """That of the selected rows of an unfinished output. Raises sealed.Gone, InputError for a part that is damaged."""
    outcome = Outcome(parts[-1].header if parts else {})
    for number in np.unique(selection.part):
        path = parts[number].path
        with reading(path), open_generations(path) as file, damaged_is_input_error(path):
            outcome.add(file, selection.position[selection.part == number])
    return outcome


def how_to_read(output: str | Path) -> str:
    """What to type to see an output's rows."""
    name = printable(str(output))
    return "to read it: " + shlex.join(["noria", "export", name, f"{name.removesuffix('.h5')}.jsonl"])
