"""Generations in OpenAI's format of a batch's responses: an object a request, its samples as choices.

Knows exported rows as plain objects. Token ids stand for tokens (`token_id:5`), because an output has no tokenizer.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import groupby
from typing import Any

from noria.tools.text import storable

CHAT = "/chat/completions"  # the end of a request's url; any other end in /completions


def responses(rows: Iterable[dict[str, Any]], start: str) -> Iterator[dict[str, Any]]:
    """One response for all samples of a request's prompts. `start` is when the job began (ISO 8601). Rows are in order of
    `row`."""
    created = _seconds(start)
    for row, samples in groupby(rows, key=_first_row):
        yield _response(row, list(samples), created)


def _index(one: dict[str, Any]) -> int:
    """Which of its request's prompts the row is of."""
    index, id = one.get("prompt_index"), one.get("custom_id")
    return index if type(index) is int and one["id"] in (storable(str(id)), storable(f"{id}[{index}]")) else 0


def _first_row(one: dict[str, Any]) -> int:
    return one["row"] - _index(one)


def _response(row: int, samples: list[dict[str, Any]], created: int) -> dict[str, Any]:
    first = samples[0]
    wrong = next((one["error"] for one in samples if one["status"] == "error"), None)
    id = first["id"] if not _index(first) else storable(str(first["custom_id"]))
    response = {"id": f"batch_req_{row}", "custom_id": id, "response": None, "error": None}
    if wrong is not None:
        return response | {"error": {"code": "invalid_request", "message": wrong}}
    is_chat = not str(first.get("url", "")).endswith("/completions") or str(first["url"]).endswith(CHAT)
    asked = sum({one["row"]: one["num_prompt_tokens"] for one in samples}.values())
    new = sum(len(one["token_ids"]) for one in samples)
    num_samples = 1 + max(one["sample"] for one in samples)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{row}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": first.get("model", ""),
        "choices": [_choice(one, _index(one) * num_samples + one["sample"], is_chat) for one in samples],
        "usage": {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new},
    }
    return response | {"response": {"status_code": 200, "request_id": f"req_{row}", "body": body}}


def _choice(one: dict[str, Any], index: int, is_chat: bool) -> dict[str, Any]:
    said = (
        {"message": {"role": "assistant", "content": one["text"], "refusal": None}}
        if is_chat
        else {"text": one["text"]}
    )
    return {"index": index, **said, "logprobs": _logprobs(one, is_chat), "finish_reason": one["finish_reason"]}


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
