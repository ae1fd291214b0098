"""Lines of OpenAI's batch format as rows: `custom_id`, and `body` with a request's own names of the keys.

Knows the format's keys and what Noria calls them; what a value may be is checked where rows are.
"""

import json
from typing import Any

from noria.keys import nearest
from noria.names import FOREIGN, SYNONYMS, asks, misspelt, two_names
from noria.readers import BadRow, Request
from noria.sampling import ROW_KEYS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_OURS = tuple(name for name in ROW_KEYS if name != "logprobs")
# Of the keys that Noria does not have, those that OpenAI has.
_THEIRS = {
    "tool_choice",
    "functions",
    "function_call",
    "response_format",
    "stream",
    "audio",
    "prediction",
    "echo",
}
_THEIRS |= {"suffix", "best_of", "reasoning_effort", "verbosity", "web_search_options"}
# What the chat template reads beside messages; vLLM's requests have them too.
_BESIDE = ("tools", "documents", "continue_final_message", "add_generation_prompt")
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
_KNOWN = {"messages", "prompt", "logprobs", "top_logprobs", "modalities"}
_KNOWN |= {*SYNONYMS, *_OURS, *_BESIDE, *_CARRIED, *_LEFT_OUT}


def is_request(record: dict[str, Any]) -> bool:
    """Whether a line is one of the batch format: no row of Noria's own has a custom_id beside a body."""
    return "custom_id" in record and "body" in record


def as_row(record: dict[str, Any]) -> dict[str, Any] | BadRow:
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
    row |= _logprobs(body) | {SYNONYMS[name]: value for name, value in _synonyms(body).items()}
    if url == CHAT:
        beside = {name: body[name] for name in _BESIDE if name in body}
        return Request(row | {"messages": body.get("messages")} | beside)
    prompt = body.get("prompt")
    said = {"token_ids": prompt} if isinstance(prompt, list) else {"prompt": prompt}
    return Request({"chat": False} | row | said)


def _error(body: Any, url: Any) -> str | None:
    """What is wrong with a request."""
    if not isinstance(body, dict):
        return f"body is {json.dumps(body)[:60]}: it must be an object with messages or a prompt"
    if url not in (CHAT, COMPLETIONS):
        return f"url is {json.dumps(url)[:60]}: {CHAT} and {COMPLETIONS} can be run"
    if body.get("modalities") not in (None, [], ["text"]):
        return "body.modalities: only text can be generated"
    if twice := two_names({name: body[name] for name in _OURS if name in body} | _synonyms(body)):
        return f"body: {twice}"
    for name in (*_BESIDE, "chat_template_kwargs"):
        if url == COMPLETIONS and name in body and asks(name, body[name]):
            return f"body.{name} is for {CHAT}: a completion has no chat template"
    for name in ("tools", "documents"):
        if not isinstance(body.get(name) or [], list):
            return f"body.{name} is {json.dumps(body[name])[:60]}: it must be a list of objects"
    quiet = {name for name in (*FOREIGN, *_THEIRS) if name in body and not asks(name, body[name])}
    unknown = next((name for name in body if name not in _KNOWN and name not in quiet), None)
    if unknown is None:
        return None
    if unknown in _THEIRS:
        return f"body.{unknown} is not in this version of Noria: take it out of the request"
    near = misspelt(unknown, body[unknown])
    hint = f"; did you mean {near!r}?" if near else nearest(unknown[:100], _KNOWN)
    return f"body.{unknown[:100]} is no key of a request{hint} (columns of your own go into metadata or beside body)"


def _synonyms(body: dict[str, Any]) -> dict[str, Any]:
    """The keys of the body that have another name in Noria. OpenAI's max_completion_tokens replaces its max_tokens."""
    found = {name: body[name] for name in SYNONYMS if body.get(name) is not None}
    if "max_completion_tokens" in found:
        found.pop("max_tokens", None)
    return found


def _logprobs(body: dict[str, Any]) -> dict[str, Any]:
    """Chat requests ask with a boolean and the number of alternatives, completions with that number alone."""
    asked, top = body.get("logprobs"), body.get("top_logprobs")
    if asked is None or asked is False:
        return {}
    return {"logprobs": (top or 0) if asked is True else asked}
