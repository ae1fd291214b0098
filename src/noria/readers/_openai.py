"""Lines of OpenAI's batch format as rows: `custom_id`, and `body` with a request's own names of the keys.

Knows the format's keys and what Noria calls them; what a value may be is checked where rows are.
"""

import json
from dataclasses import fields

from noria.keys import nearest
from noria.readers import BadRow
from noria.sampling import Sampling, misspelt

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LENGTHS = ("max_completion_tokens", "max_tokens")
_OURS = tuple(field.name for field in fields(Sampling) if field.name != "logprobs")
# Asked for where the answer would be another one, and which cannot be had here: refused where they say anything.
_REFUSED = (
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "stream",
    "audio",
    "prediction",
    "echo",
    "suffix",
    "best_of",
    "reasoning_effort",
    "verbosity",
    "web_search_options",
)
_NO_WISH = (None, [], {}, "none", "auto", {"type": "text"})
# They change nothing in the answer: where it is kept, who asked, how it is sent.
_CARRIED = ("model", "user", "metadata")
_LEFT_OUT = (
    "store",
    "service_tier",
    "parallel_tool_calls",
    "stream_options",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
_KNOWN = {"messages", "prompt", "logprobs", "top_logprobs", *_LENGTHS, *_OURS, *_REFUSED, *_CARRIED, *_LEFT_OUT}


def is_request(record: dict) -> bool:
    """Whether a line is one of the batch format: no row of Noria's own has a custom_id beside a body."""
    return "custom_id" in record and "body" in record


def as_row(record: dict) -> dict | BadRow:
    """The request as a row: Noria's keys, and `model`, `url`, `user`, `metadata` as the user's own columns.

    A key of the body that is neither OpenAI's nor Noria's is refused, as OpenAI does: what it asks for could not be
    honoured. A bad request has its custom_id.
    """
    body, url = record["body"], record.get("url", CHAT)
    if error := _error(body, url):
        return BadRow(error, record["custom_id"])
    row = {name: value for name, value in record.items() if name not in ("custom_id", "body", "method", "url")}
    row = {"id": record["custom_id"], "url": url} | row
    row |= {name: body[name] for name in (*_OURS, *_CARRIED) if name in body}
    length = next((body[name] for name in _LENGTHS if body.get(name) is not None), None)
    if length is not None:
        row["max_new_tokens"] = length
    row |= _logprobs(body)
    if url == CHAT:
        return row | {"messages": body.get("messages")}
    prompt = body.get("prompt")
    return {"chat": False} | row | ({"token_ids": prompt} if isinstance(prompt, list) else {"prompt": prompt})


def _error(body, url) -> str | None:
    """What is wrong with a request."""
    if not isinstance(body, dict):
        return f"body is {json.dumps(body)[:60]}: it must be an object with messages or a prompt"
    if url not in (CHAT, COMPLETIONS):
        return f"url is {json.dumps(url)[:60]}: {CHAT} and {COMPLETIONS} can be run"
    if body.get("modalities") not in (None, [], ["text"]):
        return "body.modalities: only text can be generated"
    for name in _REFUSED:
        if _wished(body.get(name)):
            return f"body.{name} is not in this version of Noria: take it out of the request"
    unknown = next((name for name in body if name not in _KNOWN and name != "modalities"), None)
    if unknown is None:
        return None
    near = misspelt(unknown, body[unknown])
    hint = f"; did you mean {near!r}?" if near else nearest(unknown[:100], _KNOWN)
    return f"body.{unknown[:100]} is no key of a request{hint} (columns of your own go into metadata or beside body)"


def _wished(value) -> bool:
    return value is not False and value not in _NO_WISH and not (value == 1 and value is not True)


def _logprobs(body: dict) -> dict:
    """Chat requests ask with a boolean and the number of alternatives, completions with that number alone."""
    asked, top = body.get("logprobs"), body.get("top_logprobs")
    if asked is None or asked is False:
        return {}
    return {"logprobs": (top or 0) if asked is True else asked}
