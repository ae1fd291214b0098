"""Generations in OpenAI's format of a batch's responses: an object a request, its samples as choices.

Knows exported rows as plain objects, and tokens by what a TokenTexts says of them; an output has no tokenizer. Fields and
their meaning: OpenAI's API reference (the batch's output lines, the chat completion object, the completion object).
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any, Protocol

from noria.tools.text import REPLACEMENT, storable

CHAT = "/chat/completions"  # the end of a request's url; any other end in /completions
UNLIKELY = -9999.0  # OpenAI's log-probability of a token that is very unlikely: JSON has no infinity
_CUT = REPLACEMENT.encode()


class TokenTexts(Protocol):
    """What is known of tokens: rows.pieces.Pieces."""

    def spelled(self, token_id: int) -> bytes | None:
        """The bytes of a token that stands alone."""
        ...

    def of(
        self,
        prompt_token_ids: Sequence[int],
        token_ids: Sequence[int],
        text: str,
        to_the_end: bool,
        num_thought: int | None,
    ) -> list[bytes | None] | None:
        """What each token adds to the text; None where that is not known."""
        ...


class NoTexts:
    """Tokens as their ids, for an output whose tokenizer is not at hand."""

    def spelled(self, token_id: int) -> None:
        return None

    def of(self, *_: object) -> None:
        return None


# What a response needs of a row beside what is exported: always there, None where it is not known.
HIDDEN = ("row", "prompt_token_ids", "reasoning", "num_reasoning_tokens", "num_cached_tokens")


def responses(
    rows: Iterable[dict[str, Any]], start: str, checkpoint: str, texts: TokenTexts
) -> Iterator[dict[str, Any]]:
    """One response for all samples of a request's prompts. `start` is when the job began (ISO 8601), `checkpoint` the hash
    that tells the model from others. Rows have HIDDEN too, and are in order of `row`."""
    made = {"created": _seconds(start), "system_fingerprint": f"fp_{checkpoint[:10]}"}
    for row, samples in groupby(rows, key=_first_row):
        yield _response(row, list(samples), made, texts)


def is_error(response: dict[str, Any]) -> bool:
    """Whether a line is one of those that OpenAI writes to a batch's error file."""
    return response["error"] is not None


def _index(one: dict[str, Any]) -> int:
    """Which of its request's prompts the row is of."""
    index, id = one.get("prompt_index"), one.get("custom_id")
    return index if type(index) is int and one["id"] in (storable(str(id)), storable(f"{id}[{index}]")) else 0


def _first_row(one: dict[str, Any]) -> int:
    return one["row"] - _index(one)


def _response(row: int, samples: list[dict[str, Any]], made: dict[str, Any], texts: TokenTexts) -> dict[str, Any]:
    first = samples[0]
    wrong = next((one["error"] for one in samples if one["status"] == "error"), None)
    id = first["id"] if not _index(first) else storable(str(first["custom_id"]))
    response = {"id": f"batch_req_{row}", "custom_id": id, "response": None, "error": None}
    if wrong is not None:
        return response | {"error": {"code": "invalid_request", "message": wrong}}
    is_chat = not str(first.get("url", "")).endswith("/completions") or str(first["url"]).endswith(CHAT)
    num_samples = 1 + max(one["sample"] for one in samples)
    choose = _chat_choice if is_chat else _choice
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{row}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": made["created"],
        "model": first.get("model", ""),
        "choices": [choose(one, _index(one) * num_samples + one["sample"], texts) for one in samples],
        "usage": _usage(samples),
        "system_fingerprint": made["system_fingerprint"],
    }
    return response | {"response": {"status_code": 200, "request_id": f"req_{row}", "body": body}}


def _usage(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The tokens of a request; those of a prompt count once for all its samples. Details are there where they are known."""
    asked = sum({one["row"]: len(one["prompt_token_ids"]) for one in samples}.values())
    new = sum(len(one["token_ids"]) for one in samples)
    usage: dict[str, Any] = {"prompt_tokens": asked, "completion_tokens": new, "total_tokens": asked + new}
    cached = {one["row"]: one["num_cached_tokens"] for one in samples if one["num_cached_tokens"] is not None}
    thought = [one["num_reasoning_tokens"] for one in samples if one["num_reasoning_tokens"] is not None]
    if cached:
        usage["prompt_tokens_details"] = {"cached_tokens": sum(cached.values())}
    if thought:
        usage["completion_tokens_details"] = {"reasoning_tokens": sum(thought)}
    return usage


def _chat_choice(one: dict[str, Any], index: int, texts: TokenTexts) -> dict[str, Any]:
    message = {"role": "assistant", "content": one["text"], "refusal": None}
    if one["reasoning"] is not None:  # the second name is that of vLLM's earlier versions and of others
        message |= dict.fromkeys(("reasoning", "reasoning_content"), one["reasoning"] or None)
    logprobs = None if "logprobs" not in one else {"content": _content(one, texts), "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": one["finish_reason"]}


def _choice(one: dict[str, Any], index: int, texts: TokenTexts) -> dict[str, Any]:
    logprobs = None if "logprobs" not in one else _lists(one, texts)
    return {"text": one["text"], "index": index, "logprobs": logprobs, "finish_reason": one["finish_reason"]}


def _content(one: dict[str, Any], texts: TokenTexts) -> list[dict[str, Any]]:
    """The tokens of a message, one by one."""
    content = []
    for token_id, piece, value, top in _tokens(one, texts):
        alone = texts.spelled(token_id)
        others = [
            {"token": _shown(other, spelled), "logprob": number, "bytes": _numbers(spelled)}
            for other, number, spelled in ((other, number, texts.spelled(other)) for other, number in top)
        ]
        entry = {"token": _shown(token_id, _seen(piece, alone)), "logprob": value, "bytes": _numbers(piece)}
        content.append(entry | {"top_logprobs": others})
    return content


def _lists(one: dict[str, Any], texts: TokenTexts) -> dict[str, Any]:
    """The tokens of a completion: a list of each of their values. A token that is no character is `bytes:\\xf0\\x9f`, as the
    completions of OpenAI have it; offsets are characters of the choice's text."""
    lists: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for token_id, piece, value, top in _tokens(one, texts):
        name = _shown(token_id, _seen(piece, texts.spelled(token_id)), "bytes:")
        likely: dict[str, float] = {}
        for other, number in [*top, (token_id, value)]:  # the token itself is always among them
            likely.setdefault(name if other == token_id else _shown(other, texts.spelled(other), "bytes:"), number)
        lists["tokens"].append(name)
        lists["token_logprobs"].append(value)
        lists["top_logprobs"].append(likely)
        if piece is not None:
            lists["text_offset"].append(offset)
            offset += len(decoder.decode(piece))
    return lists


def _tokens(
    one: dict[str, Any], texts: TokenTexts
) -> Iterator[tuple[int, bytes | None, float, list[tuple[int, float]]]]:
    """Of each token within the row's text: its id, its piece of the text, its log-probability, the likeliest ids with theirs.

    The token that ended the row, those of a stop text and those of its reasoning are not in the text.
    """
    ids = one["token_ids"]
    whole = one["finish_reason"] == "length"
    pieces = texts.of(one["prompt_token_ids"], ids, one["text"], whole, one["num_reasoning_tokens"])
    none: list[list[Any]] = [[]] * len(ids)
    rows = zip(ids, one["logprobs"], one.get("top_ids", none), one.get("top_logprobs", none), strict=True)
    for (token_id, value, top_ids, top_values), piece in zip(
        rows, [None] * len(ids) if pieces is None else pieces, strict=False
    ):
        if pieces is None or piece is not None:
            top = [(other, _logprob(number)) for other, number in zip(top_ids, top_values, strict=True) if other >= 0]
            yield token_id, piece, _logprob(value), top


def _logprob(value: float | None) -> float:
    return UNLIKELY if value is None else value


def _seen(piece: bytes | None, alone: bytes | None) -> bytes | None:
    """The bytes by which a token is shown: what it adds to the text, if it is all of a character."""
    return piece if piece and _CUT not in piece else alone


def _shown(token_id: int, spelled: bytes | None, mark: str = "") -> str:
    """A token's text; bytes that are no character as `\\xf0\\x9f`, with a mark before it."""
    if spelled is None:
        return f"token_id:{token_id}"
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return mark + spelled.decode(errors="backslashreplace")


def _numbers(spelled: bytes | None) -> list[int] | None:
    return None if spelled is None else list(spelled)


def _seconds(start: str) -> int:
    try:
        return int(datetime.fromisoformat(start).timestamp())
    except (ValueError, TypeError):
        return 0
