"""Launches the kernels that draw tokens, and says where they serve.

S samples, V vocab, C rows that are chosen of them.
"""

import importlib
from functools import lru_cache
from typing import Any

import torch

from noria.kernels.trying import tried

SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # bits of a float32 number that these do not have
HALVES = (torch.bfloat16, torch.float16)
COLUMNS = 5  # of settings: temperature, top_k, top_p, min_p, and the number from 0 to 1 that is drawn with
BLOCK, OPTIONS = 1024, {"num_warps": 8}  # ids that a program takes at a time, by so many warps: the order of its sums
BLOCKS, LEAST_TILES = 4, 64  # sampling.py sums so many blocks as one, and keeps as many sums for 262,144 ids and less
LEAST_VOCAB = 8  # that the check of the kernels needs


def draw(logits: torch.Tensor, settings: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """Draws an id for each row of logits [S, V], by settings [S, COLUMNS] float64, into ids [S] int64: see `draw_rows`.

    rows [C] int32: logits and settings are those of C edited rows, which these are of the S ids.
    """
    if not len(logits):
        return
    vocab = logits.shape[1]
    tiles = max(LEAST_TILES, 1 << (-(-vocab // (BLOCKS * BLOCK)) - 1).bit_length())
    _kernels().draw_rows[(len(logits),)](
        logits, settings, ids if rows is None else rows, ids, vocab, logits.stride(0), rows is not None, COLUMNS,
        SHIFTS[logits.dtype], tiles, BLOCK, **OPTIONS,
    )  # fmt: skip


def mask(scores: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Makes ids impossible in rows [C] of scores [S, V] float32, contiguous, where bits [C, W] uint8 say so: see Masks."""
    grid = len(rows), -(-scores.shape[1] // BLOCK)
    _kernels().mask_rows[grid](scores, rows, bits, scores.shape[1], bits.shape[1], BLOCK, num_warps=4)


def log_probabilities(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Writes of rows [C] int32 of logits [S, V] the log-probabilities of ids [S] to logprobs [S] float64, and the most
    likely ids with theirs to top_ids and top_logprobs [S, top], the lower of equal ones first."""
    if not len(rows):
        return
    vocab, top = logits.shape[1], top_ids.shape[1]
    _kernels().logprobs_of_rows[(len(rows),)](
        logits, rows, ids, logprobs, top_ids, top_logprobs, vocab, logits.stride(0), top, BLOCK, **OPTIONS
    )


def refuses(device: torch.device, dtype: torch.dtype, vocab: int) -> str:
    """Why tokens of logits [S, V] in this dtype are not drawn by kernels on this device; empty where they are, and built."""
    if device.type != "cuda":
        return f"it needs a CUDA device, this is the {device.type.upper()}"
    if dtype not in HALVES:
        return f"it draws in float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return _unbuilt(device, dtype, max(vocab, LEAST_VOCAB))


@lru_cache
def _unbuilt(device: torch.device, dtype: torch.dtype, vocab: int) -> str:
    """Why the kernels cannot be built or are wrong; empty where they are right. They are built once."""
    return tried(lambda: "" if draws(device, dtype, vocab) else "it draws other tokens")


def draws(device: torch.device, dtype: torch.dtype, vocab: int) -> bool:
    """Whether rows get what they must, of ids 0, 1, 2 that are as likely and a most likely one behind them; first as they
    are, then edited, one masked. Builds every kernel."""
    logits = torch.full((3, vocab), -torch.inf, dtype=dtype, device=device)
    logits[:, :3], logits[:, -1] = 1, 2
    wanted = [[0, 0, 1, 0, 0.5], [1, 3, 1, 0, 0.4], [1, 0, 0.8, 0.1, 0.99]]
    settings = torch.tensor(wanted, dtype=torch.float64, device=device)
    ids, rows = torch.zeros(3, dtype=torch.int64, device=device), torch.arange(3, device=device)
    draw(logits, settings, ids)
    found, edited = ids.tolist(), logits.float()
    mask(edited, rows[:1], torch.tensor([[2]], dtype=torch.uint8, device=device))
    draw(edited, settings, ids, rows.int())
    logprobs, tops = settings.new_empty(3), settings.new_empty(3, 1)
    log_probabilities(logits, rows.int(), rows, logprobs, ids.view(3, 1).clone(), tops)
    right = torch.log_softmax(logits.double(), dim=-1)
    near = torch.allclose(logprobs, right[:, :3].diagonal()) and torch.allclose(tops[:, 0], right[:, -1])
    return near and found == [vocab - 1, 1, vocab - 1] and ids.tolist() == [1, 1, vocab - 1]


def _kernels() -> Any:
    """Imported where there is a GPU: others may lack Triton."""
    return importlib.import_module("noria.kernels.sampling")
