"""Rows for the tests of outputs: reproducible, with everything that a row can hold."""

import json

import numpy as np

from noria.output.generations import Generation


def make_row(
    row: int, sample: int = 0, status: str = "done", logprobs: bool = False, num_tokens: int | None = None
) -> Generation:
    random = np.random.default_rng([row, sample])
    count = int(random.integers(0, 9)) if num_tokens is None else num_tokens
    return Generation(
        row=row,
        id=f"row-{row}",
        sample=sample,
        status=status,
        finish_reason={"todo": "none", "error": "error", "done": ("stop", "length")[row % 2]}[status],
        prompt=f"prompt {row} é中\n",
        text=f"text {row} 😀 " * (row % 4),
        token_ids=random.integers(0, 2**31 - 1, count).astype(np.int32),
        prompt_token_ids=random.integers(0, 1000, row % 7).astype(np.int32),
        error="the prompt is empty" if status == "error" else "",
        extra=json.dumps({"label": row, "note": "ü"}) if row % 3 == 0 else "",
        logprobs=-random.random(count).astype(np.float32) if logprobs else None,
    )


def as_tuple(generation: Generation) -> tuple:
    """Everything in a row, comparable with ==."""
    logprobs = generation.logprobs
    return (
        generation.row,
        generation.sample,
        generation.id,
        generation.status,
        generation.finish_reason,
        generation.prompt,
        generation.text,
        np.asarray(generation.token_ids).tolist(),
        np.asarray(generation.prompt_token_ids).tolist(),
        generation.error,
        generation.extra,
        None if logprobs is None or not len(logprobs) else np.asarray(logprobs).tolist(),
    )


def fill(parts, rows, rows_a_part: int = 10) -> None:
    """Adds rows and seals them, `rows_a_part` at a time."""
    for start in range(0, len(rows), rows_a_part):
        for generation in rows[start : start + rows_a_part]:
            parts.add(generation)
        parts.seal()
