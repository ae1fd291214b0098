"""Lines of OpenAI's batch format as rows: `custom_id`, and `body` with a request's own names of the keys.

Knows the format's keys and what Noria calls them; what a value may be is checked where rows are.
"""

import json
from typing import Any

from noria.names import BESIDE, FOREIGN, SYNONYMS, asks, misspelt, two_names
from noria.readers import OWN, BadRow, Request
from noria.sampling import ROW_KEYS, whole
from noria.tools.keys import nearest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_OURS = tuple(name for name in ROW_KEYS if name != "logprobs")
# Of the keys that Noria does not have, those that OpenAI has.
_THEIRS = {"tool_choice", "functions", "function_call", "stream", "audio", "prediction", "echo", "suffix", "best_of"}
_THEIRS |= {"verbosity", "web_search_options"}
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
# Names of the keys of a row: beside the body they are columns of the user's own.
_RESERVED = {*OWN, *BESIDE, "chat", "custom_id", "prompt_index"}
EFFORT = "reasoning_effort"  # which templates read
_KNOWN = {"messages", "prompt", "logprobs", "top_logprobs", "modalities", "response_format", EFFORT}
_KNOWN |= {*SYNONYMS, *_OURS, *BESIDE, *_CARRIED, *_LEFT_OUT}


def is_request(record: dict[str, Any]) -> bool:
    """Whether a line is one of the batch format: no row of Noria's own has a custom_id beside a body."""
    return "custom_id" in record and "body" in record


def requested_rows(record: dict[str, Any]) -> list[dict[str, Any] | BadRow]:
    """The request as rows, one for each of its prompts: Noria's keys, and `model`, `url`, `user`, `metadata` as the user's
    own columns, as are those beside `body` (`input_NAME` where such a column has the name of one of these).

    A key of the body that is neither OpenAI's nor Noria's is refused, as OpenAI does: what it asks for could not be
    honoured. A bad request has its custom_id. Of several prompts each row has `custom_id` and `prompt_index`.
    """
    body, url, id = record["body"], _url(record), record["custom_id"]
    if error := _error(record, url):
        return [BadRow(error, id)]
    carried = {name: body[name] for name in _CARRIED if name in body}
    row = {"id": id, "url": record.get("url") or url} | carried
    for name, value in record.items():
        if name not in ("custom_id", "body", "method", "url"):
            row[f"input_{name}" if name in row or name in _RESERVED else name] = value
    row |= {name: body[name] for name in (*_OURS, "response_format") if name in body} | _logprobs(body)
    row |= {SYNONYMS[name]: value for name, value in _synonyms(body).items()}
    row = _in_our_ranges(row)
    if url == CHAT:
        beside = {name: body[name] for name in BESIDE if name in body}
        return [Request(row | _effort(body) | {"messages": _messages(body.get("messages"))} | beside)]
    row = {"chat": False} | row
    prompts = _prompts(body.get("prompt"))
    if len(prompts) == 1:
        return [Request(row | prompts[0])]
    several = [{"id": id_of(id, index), "custom_id": id, "prompt_index": index} for index in range(len(prompts))]
    return [Request(row | which | prompt) for which, prompt in zip(several, prompts, strict=True)]


def _effort(body: dict[str, Any]) -> dict[str, Any]:
    """The effort that a request asks for, as a key of its template."""
    kwargs = body.get("chat_template_kwargs")
    if body.get(EFFORT) is None or not isinstance(kwargs, dict | None):
        return {}
    return {"chat_template_kwargs": {**(kwargs or {}), EFFORT: body[EFFORT]}}


def id_of(custom_id: object, index: int) -> object:
    """The id of the row of one of a request's prompts: the first has the request's own."""
    return f"{custom_id}[{index}]" if index and isinstance(custom_id, str | int) else custom_id


def _url(record: dict[str, Any]) -> object:
    """What the request asks for, CHAT or COMPLETIONS, or another url: Azure's has no /v1, none at all goes by the body."""
    url, body = record.get("url"), record["body"]
    if url is None:
        return COMPLETIONS if isinstance(body, dict) and "messages" not in body and "prompt" in body else CHAT
    return f"/v1{url}" if isinstance(url, str) and f"/v1{url}" in (CHAT, COMPLETIONS) else url


def _in_our_ranges(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what OpenAI allows and Noria says otherwise: top_p 0 is the most likely token, a seed has 64 bits."""
    if row.get("top_p") == 0 and not isinstance(row["top_p"], bool):
        row = {name: value for name, value in row.items() if name != "top_p"} | {"top_k": 1}
    seed = whole(row.get("seed"))
    if isinstance(seed, int) and -(2**63) <= seed < 0:
        row["seed"] = seed + 2**63
    return row


def _messages(messages: object) -> object:
    """The messages, with what an assistant refused to say as the text that it is."""
    if not isinstance(messages, list):
        return messages
    return [_without_refusal(message) if isinstance(message, dict) else message for message in messages]


def _without_refusal(message: dict[str, Any]) -> dict[str, Any]:
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, list):
        content = [_text_part(part) if isinstance(part, dict) else part for part in content]
    elif content is None and isinstance(refusal, str):
        content, refusal = refusal, None
    said = {name: value for name, value in message.items() if name != "refusal" or refusal is not None}
    return said if content is None else said | {"content": content}


def _text_part(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": part.get("refusal")} if part.get("type") == "refusal" else part


def _prompts(prompt: object) -> list[dict[str, Any]]:
    """The prompts of a request, each as the keys of its row: a text, token ids, or a list of such."""
    if not isinstance(prompt, list):
        return [{"prompt": prompt}]
    several = prompt if isinstance(prompt[0], str | list) else [prompt]
    return [{"token_ids": one} if isinstance(one, list) else {"prompt": one} for one in several]


def _prompt_error(prompt: object) -> str | None:
    """What is wrong with a prompt that is a list."""
    if not isinstance(prompt, list):
        return None
    nested = any(isinstance(one, str | list) for one in prompt)
    for place, ids in enumerate(prompt) if nested else [(None, prompt)]:
        where = "body.prompt" if place is None else f"body.prompt[{place}]"
        if not isinstance(ids, str | list):
            return f"{where} is {json.dumps(ids)[:60]}: it must be a text or a list of token ids"
        if not ids and isinstance(ids, list):
            return f"{where} is empty: it must have a text or token ids"
        for index, one in enumerate(ids if isinstance(ids, list) else ()):
            if type(whole(one)) is not int or not 0 <= one < 2**31:
                return f"{where}[{index}] is {json.dumps(one)[:60]}: it must be a token id, an integer from 0"
    return None


def _error(record: dict[str, Any], url: object) -> str | None:
    """What is wrong with a request."""
    body, method = record["body"], record.get("method")
    if not isinstance(body, dict):
        return f"body is {json.dumps(body)[:60]}: it must be an object with messages or a prompt"
    if url not in (CHAT, COMPLETIONS):
        return f"url is {json.dumps(url)[:60]}: {CHAT} and {COMPLETIONS} can be run"
    if method is not None and str(method).upper() != "POST":
        return f"method is {json.dumps(method)[:60]}: it must be POST"
    if body.get("modalities") not in (None, [], ["text"]):
        return "body.modalities: only text can be generated"
    if not isinstance(body.get("response_format"), dict | None):
        return f"body.response_format is {json.dumps(body['response_format'])[:60]}: it must be an object with a type"
    ours = {name: body[name] for name in _OURS if name in body}
    twice = next((name for name in ours if name in record and record[name] != body[name]), None)
    if twice:
        return f"{twice} is beside body too, with another value: give it once"
    if twice := two_names(ours | _synonyms(body)):
        return f"body: {twice}"
    return _unknown_error(body) or _beside_error(body, url) or _content_error(body, url)


def _beside_error(body: dict[str, Any], url: object) -> str | None:
    """What is wrong with what a template reads beside the messages."""
    for name in (*BESIDE, "chat_template_kwargs", EFFORT):
        if url == COMPLETIONS and name in body and asks(name, body[name]):
            return f"body.{name} is for {CHAT}: a completion has no chat template"
    effort, kwargs = body.get(EFFORT), body.get("chat_template_kwargs")
    if not isinstance(effort, str | None):
        return f"body.{EFFORT} is {json.dumps(effort)[:60]}: it must be a word, such as low, medium or high"
    if effort is not None and isinstance(kwargs, dict) and kwargs.get(EFFORT, effort) != effort:
        return f"body.{EFFORT} and body.chat_template_kwargs.{EFFORT} are given, with other values: give one"
    for name in ("tools", "documents"):
        if not isinstance(body.get(name) or [], list):
            return f"body.{name} is {json.dumps(body[name])[:60]}: it must be a list of objects"
    return None


def _unknown_error(body: dict[str, Any]) -> str | None:
    quiet = {name for name in (*FOREIGN, *_THEIRS) if name in body and not asks(name, body[name])}
    unknown = next((name for name in body if name not in _KNOWN and name not in quiet), None)
    if unknown is None:
        return None
    if unknown in _THEIRS:
        return f"body.{unknown} is not in this version of Noria: take it out of the request"
    near = misspelt(unknown, body[unknown])
    hint = f"; did you mean {near!r}?" if near else nearest(unknown[:100], _KNOWN)
    return f"body.{unknown[:100]} is not a key of a request{hint} (columns of your own go into metadata or beside body)"


def _content_error(body: dict[str, Any], url: object) -> str | None:
    """What is wrong with keys that stand in one kind of request alone."""
    other = "prompt" if url == CHAT else "messages"
    if body.get(other) is not None:
        right = COMPLETIONS if url == CHAT else CHAT
        return f"body.{other} is a key of {right}, and url says {url}"
    needed = "messages" if url == CHAT else "prompt"
    if body.get(needed) is None:
        return f"body has no {needed}, which {url} needs"
    if body.get("top_logprobs") not in (None, 0):
        if url == COMPLETIONS:
            return f"body.top_logprobs is a key of {CHAT}: {COMPLETIONS} has the number itself as logprobs"
        if body.get("logprobs") in (None, False):
            return "body.top_logprobs is without logprobs: add logprobs: true"
    return _prompt_error(body.get("prompt"))


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
