"""Lines of OpenAI's batch format as rows: `custom_id`, and `body` with a request's own names of the keys.

Knows the format's keys and what Noria calls them; what a value may be is checked where rows are.
"""

import json

from noria.readers import BadRow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "n",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
_SAME += ("repetition_penalty", "stop_token_ids", "ignore_eos")
_LENGTHS = ("max_completion_tokens", "max_tokens")
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
)
_REFUSED += ("suffix", "best_of", "reasoning_effort", "web_search_options")
_NO_WISH = (None, [], {}, "none", "auto", {"type": "text"})
_CARRIED = ("model", "user", "metadata")


def is_request(record: dict) -> bool:
    """Whether a line is one of the batch format: no row of Noria's own has a custom_id beside a body."""
    return "custom_id" in record and "body" in record


def as_row(record: dict) -> dict | BadRow:
    """The request as a row: Noria's keys, and `model`, `url`, `user`, `metadata` as the user's own columns."""
    body, url = record["body"], record.get("url", CHAT)
    if not isinstance(body, dict):
        return BadRow(f"body is {type(body).__name__}: it must be an object with messages or a prompt")
    if url not in (CHAT, COMPLETIONS):
        return BadRow(f"url is {json.dumps(url)[:60]}: {CHAT} and {COMPLETIONS} can be run")
    refused = [name for name in _REFUSED if _wished(body.get(name))]
    if refused:
        return BadRow(f"body.{refused[0]} is not in this version of Noria: take it out of the request")
    row = {name: value for name, value in record.items() if name not in ("custom_id", "body", "method", "url")}
    row = {"id": record["custom_id"], "url": url} | row
    row |= {name: body[name] for name in (*_SAME, *_CARRIED) if name in body}
    length = next((body[name] for name in _LENGTHS if body.get(name) is not None), None)
    if length is not None:
        row["max_new_tokens"] = length
    row |= _logprobs(body)
    if url == CHAT:
        return row | {"messages": body.get("messages")}
    prompt = body.get("prompt")
    return row | ({"token_ids": prompt} if isinstance(prompt, list) else {"prompt": prompt, "chat": False})


def _wished(value) -> bool:
    return value is not False and value not in _NO_WISH and not (value == 1 and value is not True)


def _logprobs(body: dict) -> dict:
    """Chat requests ask with a boolean and the number of alternatives, completions with that number alone."""
    asked, top = body.get("logprobs"), body.get("top_logprobs")
    if asked is None or asked is False:
        return {}
    return {"logprobs": (top or 0) if asked is True else asked}
