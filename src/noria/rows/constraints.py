"""What the text of a row must be, compiled by llguidance: JSON of a schema, a regular expression, a choice, a grammar.

Each distinct constraint is compiled once and the last of them are kept; nothing can stop a thread inside llguidance, so its
own limits bound what one takes. Opens no file, follows no reference out of a schema. Knows no rows and no steps.
"""

import contextlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from noria.errors import InputError
from noria.rows.schema_errors import place_of, plainly
from noria.rows.tokenizer import Tokenizer
from noria.structured import is_compact, kind_of, schema_of
from noria.tools.text import one_line

HOW_TO_GET = "structured output needs llguidance: pip install 'llguidance>=1.8'"
MOST_KEPT = 128  # constraints that are compiled
MOST_THREADS = 8  # that make masks
MOST_COMPILED = 32  # times a constraint that many rows have, so that threads find rows which need not wait
COPIES = 8  # of a compiled constraint, one after another, before the next is copied
WORTH_SECONDS = 0.2  # what takes longer is compiled once, however many rows have it
_MOST_SAID = 300  # characters of an error
# What JSON may have between its parts: bounded, so that a row cannot go on with blanks for ever.
_BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"


def llguidance() -> Any:
    """The library. Raises InputError that says how to get it."""
    try:
        import llguidance as found
    except ImportError as error:
        raise InputError(HOW_TO_GET) from error
    return found


@dataclass
class _Compiled:
    """One constraint: its matchers, or why there is none. A matcher and its copies hold one lock in turn while they make masks,
    whatever threads there are: many rows are copies of several."""

    found: list[Any]
    seconds: float  # that compiling it took
    copies: int = 0

    def copy(self, again: Callable[[], Any]) -> tuple[Any, int]:
        """A matcher at the beginning of a text, and of which it is a copy; `again` compiles one more. Raises InputError."""
        if isinstance(self.found[0], InputError):
            raise InputError(str(self.found[0]))
        place, self.copies = self.copies // COPIES % MOST_COMPILED, self.copies + 1
        if place >= len(self.found) and self.seconds < WORTH_SECONDS:
            self.found.append(again())
        place = min(place, len(self.found) - 1)
        return self.found[place].deep_copy(), place


class Constraints:
    """Compiles for one tokenizer and a model of so many token ids. Loads nothing before it is first asked."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled: OrderedDict[str, _Compiled] = OrderedDict()

    def matcher(self, constraint: Mapping[str, Any]) -> Any:
        """A new LLMatcher at the beginning of a text, for a checked value of structured_outputs that asks for something.

        Raises InputError for what llguidance cannot do, with the place in the schema.
        """
        return self.copy(constraint)[0]

    def copy(self, constraint: Mapping[str, Any]) -> tuple[Any, int]:
        """The same, and which of the constraint's compiled matchers it is a copy of: copies of one wait for one another."""
        source = json.dumps(constraint, sort_keys=True)
        if source not in self._compiled:
            with contextlib.suppress(InputError):
                self._reader  # noqa: B018 - made once: its half a second is no part of the first constraint's time
            began = time.perf_counter()
            found = self._result(constraint)
            self._compiled[source] = _Compiled([found], time.perf_counter() - began)
            if len(self._compiled) > MOST_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(source)
        return self._compiled[source].copy(lambda: self._result(constraint))

    @property
    def crowded(self) -> bool:
        """Whether rows have so many different ones that more rows should not be read than are needed soon."""
        return len(self._compiled) > MOST_KEPT // 2

    @property
    def mask_width(self) -> int:
        """32-bit words of a mask."""
        return -(-self._reader.vocab_size // 32)

    @cached_property
    def executor(self) -> Any:
        """Makes masks on this process's cores but one; many more threads than these are in each other's way."""
        return llguidance().LLExecutor(num_threads=max(1, min(MOST_THREADS, len(os.sched_getaffinity(0)) - 1)))

    def _result(self, constraint: Mapping[str, Any]) -> Any:
        try:
            return self._compile(constraint)
        except InputError as error:
            return error

    def _compile(self, constraint: Mapping[str, Any]) -> Any:
        kind = kind_of(constraint)
        if kind == "json":
            schema = schema_of(constraint["json"])
            return self._of_schema(schema, is_compact(constraint))
        if kind == "json_object":
            return self._of_schema({"type": "object"}, is_compact(constraint))
        assert kind is not None, "nothing is asked for"
        found = self._of_grammar(lambda: _grammar(kind, constraint[kind]))
        if isinstance(found, str):
            raise InputError(f"structured_outputs.{kind}: llguidance cannot do it: {found}")
        return found

    def _of_schema(self, schema: Any, compact: bool) -> Any:
        compile = llguidance().LLMatcher.grammar_from_json_schema
        blanks = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _BLANKS}

        def made(part: Any) -> Any:
            part = ({} if part else {"enum": []}) if isinstance(part, bool) else part  # options go into an object
            return self._of_grammar(lambda: compile(json.dumps(part), defaults=blanks))

        found = made(schema)
        if isinstance(found, str):
            where = place_of(schema, lambda part: error if isinstance(error := made(part), str) else "")
            raise InputError(f"structured_outputs.json: llguidance cannot do {where}: {plainly(where, found)}")
        return found

    def _of_grammar(self, source: Callable[[], str]) -> Any:
        """A matcher of the grammar, or what is wrong with it."""
        library = llguidance()
        limits = library.LLParserLimits(verbose_errors=False)
        reader = self._reader
        try:
            found = library.LLMatcher(reader, source(), log_level=0, limits=limits)
        except ValueError as error:
            return one_line(str(error))[:_MOST_SAID]
        return one_line(found.get_error())[:_MOST_SAID] if found.is_error() else found

    @cached_property
    def _reader(self) -> Any:
        """The tokenizer as llguidance reads it; it ends a text with any of the model's end tokens."""
        library, tokenizer = llguidance(), self._tokenizer
        if tokenizer is None or not tokenizer.vocab_size:
            raise InputError("structured_outputs: the checkpoint has no tokenizer to read texts with")
        ends = sorted(token_id for token_id in tokenizer.end_token_ids if 0 <= token_id < self._vocab_size)
        if not ends:
            raise InputError(
                "structured_outputs: the model has no end token, with which a text of this kind has to end"
            )
        size = max(self._vocab_size, tokenizer.vocab_size)
        try:
            return library.LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=ends)
        except ValueError as error:
            said = one_line(str(error))[:_MOST_SAID]
            raise InputError(f"structured_outputs: llguidance cannot read the model's tokenizer: {said}") from error


def _literal(text: str) -> str:
    """An expression that matches this text alone."""
    return "".join(one if one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text)


def _grammar(kind: str, value: Any) -> str:
    """The grammar of a constraint that is no schema. Raises ValueError."""
    library = llguidance()
    if kind == "choice":  # one expression: a grammar has at most 2,000 alternatives
        kind, value = "regex", "|".join(map(_literal, value))
    return str(library.grammar_from(kind, value))
