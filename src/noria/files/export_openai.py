"""Generations in OpenAI's format of a batch's responses: an object a request, its samples as choices.

Knows exported rows as plain objects. Token ids stand for tokens (`token_id:5`), because an output has no tokenizer.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import groupby
from typing import Any

COMPLETIONS = "/v1/completions"


def responses(rows: Iterable[dict[str, Any]], start: str) -> Iterator[dict[str, Any]]:
    """One response for all samples of a row. `start` is when the job began (ISO 8601). Rows are in order of `row`."""
    created = _seconds(start)
    for row, samples in groupby(rows, key=lambda one: one["row"]):
        yield _response(row, list(samples), created)


def _response(row: int, samples: list[dict[str, Any]], created: int) -> dict[str, Any]:
    first = samples[0]
    wrong = next((one["error"] for one in samples if one["status"] == "error"), None)
    response = {"id": f"batch_req_{row}", "custom_id": first["id"], "response": None, "error": None}
    if wrong is not None:
        return response | {"error": {"code": "invalid_request", "message": wrong}}
    is_chat = first.get("url") != COMPLETIONS
    new = sum(len(one["token_ids"]) for one in samples)
    usage = {"prompt_tokens": first["num_prompt_tokens"], "completion_tokens": new}
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{row}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": first.get("model", ""),
        "choices": [_choice(one, is_chat) for one in samples],
        "usage": usage | {"total_tokens": usage["prompt_tokens"] + new},
    }
    return response | {"response": {"status_code": 200, "request_id": f"req_{row}", "body": body}}


def _choice(one: dict[str, Any], is_chat: bool) -> dict[str, Any]:
    said = (
        {"message": {"role": "assistant", "content": one["text"], "refusal": None}}
        if is_chat
        else {"text": one["text"]}
    )
    return {"index": one["sample"], **said, "logprobs": _logprobs(one, is_chat), "finish_reason": one["finish_reason"]}


def _logprobs(one: dict[str, Any], is_chat: bool) -> dict[str, Any] | None:
    if "logprobs" not in one:
        return None
    tokens = [_token(token_id) for token_id in one["token_ids"]]
    ids, values = one.get("top_ids", [[]] * len(tokens)), one.get("top_logprobs", [[]] * len(tokens))
    tops = [
        {_token(token_id): value for token_id, value in zip(*pair, strict=True) if token_id >= 0}
        for pair in zip(ids, values, strict=True)
    ]
    if not is_chat:
        return {"tokens": tokens, "token_logprobs": one["logprobs"], "top_logprobs": tops}
    content = []
    for token, value, top in zip(tokens, one["logprobs"], tops, strict=True):
        others = [{"token": other, "logprob": number, "bytes": None} for other, number in top.items()]
        content.append({"token": token, "logprob": value, "bytes": None, "top_logprobs": others})
    return {"content": content}


def _token(token_id: int) -> str:
    return f"token_id:{token_id}"


def _seconds(start: str) -> int:
    try:
        return int(datetime.fromisoformat(start).timestamp())
    except (ValueError, TypeError):
        return 0
