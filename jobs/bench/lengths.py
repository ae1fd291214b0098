"""Rows of random token ids for the benchmarks: all of one length, or lengths as real files have them."""

import argparse
from collections.abc import Iterator

import numpy as np

MIXED_PROMPT = (32, 2048)  # tokens, log-uniform
MIXED_NEW = (16, 512)  # uniform


def add_arguments(parser: argparse.ArgumentParser, prompts: list[int] | int, max_new_tokens: int) -> None:
    parser.add_argument("--prompts", type=int, nargs="+" if isinstance(prompts, list) else None, default=prompts)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    least, most = MIXED_PROMPT
    says = f"prompts of {least} to {most} tokens, log-uniform, each with a limit of its own, {MIXED_NEW[0]} to {MIXED_NEW[1]}"
    parser.add_argument("--mixed", action="store_true", help=f"{says}; the two above say nothing then")


def rows(arguments: argparse.Namespace, num_rows: int, vocabulary: int, context: int) -> Iterator[dict]:
    """The rows of a prompts file, the same in every call. A mixed row leaves room for its new tokens in the context."""
    random = np.random.default_rng(0)
    for _ in range(num_rows):
        if arguments.mixed:
            length, limit = (
                int(np.exp(random.uniform(*np.log(MIXED_PROMPT)))),
                int(random.integers(*MIXED_NEW, endpoint=True)),
            )
            length = min(length, context - limit)
        else:
            length, limit = arguments.prompt_tokens, arguments.max_new_tokens
        yield {"token_ids": random.integers(4, vocabulary, length).tolist(), "max_new_tokens": limit}
