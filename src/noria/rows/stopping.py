"""When a sequence ends. Knows counts and token ids alone, neither text nor devices."""

from collections.abc import Container, Sequence

from noria.config import Sampling


def finish_reason(
    token_ids: Sequence[int], sampling: Sampling, end_token_ids: Container[int], prompt_length: int, max_positions: int
) -> str:
    """Why a sequence with these generated tokens ends: `stop`, `length`, or `none` while it goes on.

    `stop`: the last token is an end token, which stays in `token_ids`; `length`: max_new_tokens are generated, or
    prompt and generated tokens together fill the model's max_positions. An end token in the last place is a `stop`.
    """
    if not token_ids:
        return "none"
    if not sampling.ignore_eos and token_ids[-1] in end_token_ids:
        return "stop"
    full = len(token_ids) >= sampling.max_new_tokens or prompt_length + len(token_ids) >= max_positions
    return "length" if full else "none"
