"""The rows of a run's prompts: which keys they may have, what is wrong with a row, and what is the user's own.

A bad row is a Prompt with an error, never an exception. Knows no tokenizer, no model and no file format.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from noria.errors import InputError
from noria.names import SYNONYMS, is_foreign, refusal, two_names
from noria.readers import BadRow, Request, own_id
from noria.rows.columns import Content, content_of
from noria.rows.ids import Ids, id_of
from noria.rows.messages import beside_of, given, messages_error, without_nulls
from noria.rows.prompt_files import PromptFiles, as_files, check_files, records
from noria.sampling import ROW_KEYS, RUN_KEYS, Sampling, whole
from noria.structured import of_response_format
from noria.tools.text import short

_MAX_DEPTH = 200  # of the lists and objects in a row
MAX_NOTES = 100  # that are said of a run's rows
_FOREIGN = (
    "{} is another program's key, which Noria does not have: rows are generated without it, and it is carried as a column"
    " of your own (--strict-keys makes it an error)"
)
_FOREIGN_STRICT = "{} is another program's key, which Noria does not have (job.strict_keys): take it out of the row"
_MAX_ERROR = 500  # characters: a wrong value may be a megabyte


@dataclass(slots=True)
class Prompt:
    """One row of the prompts. `row` counts from 0 in the whole file.

    `prompt`, `token_ids` or `messages` is to be continued (of messages `prompt` is the JSON text); `beside` is what the
    chat template reads beside messages, by the names of names.BESIDE; `sampling` is the
    row's own keys of config.Sampling, checked; `extra` the user's own columns as JSON text ("" without any); `error`
    says why the row cannot run (None: it can); `notes` what the run's user must know of rows of this form. `request`: it
    is a line of OpenAI's batch format.
    """

    row: int
    id: str
    prompt: str
    token_ids: list[int] | None
    sampling: dict[str, Any]
    extra: str
    error: str | None
    messages: list[dict[str, Any]] | None = None
    beside: dict[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()
    request: bool = False


def open_prompts(prompts: PromptFiles | str | Path) -> Iterator[Prompt]:
    """The prompts of a run's files, or of one file, one at a time, in order.

    Raises InputError for a missing file and an unknown suffix at once, and for a damaged file when the damage is
    reached. Memory does not grow with the files but for 8 bytes a row, which find duplicate ids.
    """
    files = as_files(prompts)
    check_files(files)
    return _prompts(files)


def noted(prompts: Iterable[Prompt], say: Callable[[str], None]) -> Iterator[Prompt]:
    """These prompts; what their rows' forms mean is said once for all rows of a form."""
    said: set[str] = set()
    for prompt in prompts:
        for note in prompt.notes:
            if note not in said and len(said) < MAX_NOTES:
                said.add(note)
                say(note)
        yield prompt


def _prompts(files: PromptFiles) -> Iterator[Prompt]:
    ids, names, current = Ids(), files.names, 0
    for row, (file, record) in enumerate(records(files)):
        if file != current:
            ids.next_file(names[file])
            current = file
        if not isinstance(record, BadRow) and _too_deep(record):
            record = BadRow(
                f"its values are nested more than {_MAX_DEPTH} deep", own_id(record.get(files.columns.id or "id"))
            )
        if isinstance(record, BadRow):
            id, id_error, notes = id_of(row, record.id, ids)
            where = f"{names[file]}: " if len(names) > 1 else ""
            error = "; ".join(filter(None, [where + record.error, id_error]))[:_MAX_ERROR]
            yield Prompt(row, id, "", None, {}, "", error, notes=notes)
        else:
            yield _prompt(row, record, ids, files)


def _prompt(row: int, record: dict[str, Any], ids: Ids, files: PromptFiles) -> Prompt:
    content = content_of(record, files.columns)
    beside, beside_error = beside_of(content) if content.messages is not None else ({}, None)
    own, extra, key_errors, key_notes = _sort_keys(content.rest, files.strict_keys, beside)
    id, id_error, id_notes = id_of(row, content.id, ids)
    sampling, sampling_error = _sampling(own) if own else ({}, None)
    prompt, token_ids, messages = content.prompt, _whole_ids(content.token_ids), None
    content_error = content.error or _content_error(content, token_ids, files.columns.prompt or "prompt")
    if prompt == "" and content.error is None and isinstance(record, Request):
        content_error = None  # the tokenizer may make a token of it, that of the beginning
    content_error = content_error or beside_error
    if content_error is None and content.messages is not None:
        messages = given(content.messages)
        prompt = json_text(messages)
    error = "; ".join(filter(None, [*key_errors, id_error, content_error, sampling_error]))[:_MAX_ERROR]
    return Prompt(
        row,
        id,
        prompt if isinstance(prompt, str) else "",
        None if content_error else token_ids,
        sampling,
        json_text(extra) if extra else "",
        error or None,
        messages,
        beside,
        (*content.notes, *key_notes, *id_notes),
        isinstance(record, Request),
    )


def _sort_keys(
    rest: dict[str, Any], strict: bool, beside: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str], list[str]]:
    """The row's sampling keys (null: not given), the user's own columns, what is wrong with keys, and what is noted.

    What is `beside` its messages is read, and carried as well.
    """
    own, extra, errors, notes = {}, {}, [], []
    for name, value in rest.items():
        if name in ROW_KEYS:
            if value is not None:
                own[name] = without_nulls(value) if name == "logit_bias" else value
        elif name in SYNONYMS:
            notes.append(f"{name} in rows is read as {SYNONYMS[name]}")
        elif name in beside:
            extra[name] = value
        elif name == "chat_template" and isinstance(value, str):
            errors.append("chat_template: a row cannot have its own template; the model's is used")
        elif name == "response_format" and isinstance(value, dict):
            errors += _take_format(value, own, rest.get("structured_outputs"))
        elif name in (RUN_KEYS[0], RUN_KEYS[-1]) and isinstance(value, str | list):  # the others are words of columns
            errors.append(f"{name} is a key of the run: it is the same for all rows")
        elif is_foreign(name, value):
            extra[name] = value
            (errors if strict else notes).append(_FOREIGN_STRICT.format(name) if strict else _FOREIGN.format(name))
        elif wrong := refusal(name, value):
            errors.append(wrong)
        else:
            extra[name] = value
    synonyms = {name: value for name, value in rest.items() if name in SYNONYMS and value is not None}
    if synonyms:
        errors += filter(None, [two_names(own | synonyms)])
        own = {SYNONYMS[name]: value for name, value in synonyms.items()} | own
    return own, extra, errors, notes


def _take_format(value: dict[str, Any], own: dict[str, Any], other: Any) -> list[str]:
    """Puts OpenAI's response_format among the row's keys; returns what is wrong with it, or with both."""
    try:
        asked = of_response_format(value)
    except InputError as error:
        return [str(error)]
    if asked and other:
        return ["response_format and structured_outputs are two constraints: give one of them"]
    own["structured_outputs"] = other or asked
    return []


def _too_deep(value: Any, left: int = _MAX_DEPTH) -> bool:
    """Whether lists and objects hold each other more than `left` deep: what reads and writes them has such a limit."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    kinds = set(map(type, held))  # by kind: thousands of token ids are not looked at one by one
    holds = any(issubclass(kind, dict | list) for kind in kinds)
    return left < 0 or (holds and any(_too_deep(one, left - 1) for one in held if isinstance(one, dict | list)))


def _content_error(content: Content, token_ids: Any, name: str) -> str | None:
    """What is wrong with the part of the row that is to be continued; `name`: the column of its prompt."""
    prompt = content.prompt
    if content.messages is not None:
        return messages_error(content.messages)
    if token_ids is not None:
        return _token_ids_error(token_ids)
    if not isinstance(prompt, str):
        return f"{name} is {short(prompt)}: it must be a string"
    return None if prompt else f"{name} is empty"


def _whole_ids(token_ids: Any) -> Any:
    """Token ids as integers where a table has them as floats."""
    if isinstance(token_ids, list) and float in map(type, token_ids):
        return [whole(token_id) for token_id in token_ids]
    return token_ids


def _token_ids_error(token_ids: Any) -> str | None:
    if not isinstance(token_ids, list):
        return f"token_ids is {short(token_ids)}: it must be a list of integers"
    if not token_ids:
        return "token_ids is empty"
    if {int}.issuperset(map(type, token_ids)) and min(token_ids) >= 0 and max(token_ids) < 2**31:
        return None
    wrong = (place for place, one in enumerate(token_ids) if type(one) is not int or not 0 <= one < 2**31)
    place = next(wrong)
    return f"token_ids[{place}] is {short(token_ids[place])}: it must be an integer from 0"


def _sampling(own: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The row's own sampling keys, checked, and what is wrong with them."""
    hashable = not any(isinstance(value, list | dict) or len(str(value)) > 100 for value in own.values())
    override = _override if hashable else _override.__wrapped__
    try:
        return dict(override(tuple(own), *own.values())), None
    except InputError as error:
        return {}, str(error)


@lru_cache(maxsize=4096, typed=True)  # typed: true is not 1
def _override(names: tuple[str, ...], *values: Any) -> dict[str, Any]:
    """Rows mostly repeat each other's values, and checking them takes longer than all the rest."""
    settings = Sampling().override(dict(zip(names, values, strict=True)))
    return {name: getattr(settings, name) for name in names}


def json_text(extra: dict[str, Any] | list[dict[str, Any]]) -> str:
    """JSON of own columns or a conversation, readable in any script; lone surrogates, which no file holds, stay escaped."""
    text = json.dumps(extra, ensure_ascii=False)
    return text if _encodable(text) else json.dumps(extra)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
