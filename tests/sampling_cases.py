"""Logits and settings that are hard to draw by, for the kernels beside the plain sampler; in the interpreter and on a GPU."""

import numpy as np
import torch

from noria.engine.sampler import Sampler, greedy
from noria.engine.sampler import draw as plain_draw
from noria.kernels import drawing
from noria.masks import ANY, Masks
from noria.step import NO_TOKEN, NONE_LEFT, Admitted, Step

VOCABS = [1, 2, 37, 2048, 2049, 5000]
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 1e-310},
    {"temperature": 0.3, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 1e-9},
    {"top_p": 0.5, "top_k": 3},
    {"top_p": 0.999},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1024},
    {"top_k": 10**6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.33},
]
KEYS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits_of(kind: str, vocab: int, random: np.random.Generator) -> np.ndarray:
    normal = random.normal(0, 3, vocab)
    some = random.random(vocab)
    kinds = {
        "normal": normal,
        "far": normal + 500,
        "below zero": -np.abs(normal) * 30,
        "ties": np.round(normal),
        "two values": np.where(some < 0.5, 2.0, -1.0),
        "equal": np.full(vocab, -7.25),
        "zeros": np.where(some < 0.5, 0.0, -0.0),
        "masked": np.where(some < 0.9, -np.inf, normal),
        "one": np.where(np.arange(vocab) == vocab // 2, 3.0, -np.inf),
        "peaked": np.where(np.arange(vocab) == vocab - 1, 60.0, normal),
        "wide": normal * 1e4,
        "tiny": normal * 1e-6,
        "nan": np.where(np.arange(vocab) == vocab - 1, np.nan, normal),
        "infinite": np.where(np.arange(vocab) == 0, np.inf, normal),
        "none": np.full(vocab, -np.inf),
    }
    return kinds[kind]


KINDS = (
    "normal", "far", "below zero", "ties", "two values", "equal", "zeros", "masked", "one", "peaked", "wide", "tiny",
    "nan", "infinite", "none",
)  # fmt: skip


def rows_of(
    vocab: int, dtype: torch.dtype, device: torch.device, every: int
) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """One in `every` of each kind of logits with each of the settings and a few numbers: kinds, logits [S, V], settings."""
    random = np.random.default_rng(vocab)
    cases = [
        (kind, logits_of(kind, vocab, random), [*(KEYS | keys).values(), uniform])
        for kind in KINDS
        for keys in SETTINGS
        for uniform in (0.0, random.random(), 1 - 2.0**-53)
    ]
    kinds, logits, settings = zip(*cases[vocab % every :: every], strict=True)
    of_rows = torch.tensor(settings, dtype=torch.float64, device=device)
    return kinds, torch.tensor(np.array(logits)).to(device, dtype), of_rows


def plain(logits: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    """[S] the ids that the plain sampler draws, in float64."""
    wide, ids = logits.double(), greedy(logits)
    for row in ((settings[:, 0] > 0) & (ids >= 0)).nonzero()[:, 0].tolist():
        temperature, top_k, top_p, min_p, uniform = settings[row : row + 1].T
        limits = temperature, top_k.long(), top_p, min_p, uniform
        excludes = bool(top_k > 0) or bool(top_p < 1) or bool(min_p > 0)
        ids[row] = plain_draw(wide[row : row + 1], *limits, None if excludes else torch.tensor([], dtype=torch.long))[0]
    return ids


def otherwise_drawn(vocab: int, dtype: torch.dtype, device: torch.device, every: int = 1) -> list[tuple]:
    """The rows, of one in `every`, that the kernels draw otherwise than the plain sampler."""
    kinds, logits, settings = rows_of(vocab, dtype, device, every)
    ids = torch.full((len(logits),), -99, dtype=torch.int64, device=device)
    drawing.draw(logits, settings, ids)
    wide, of_rows, found = logits.cpu().double(), settings.cpu(), ids.cpu()
    right = found == plain(wide, of_rows)
    for change in (-1e-13, 1e-13):  # where sums of another order may fall on the other side of the number
        near = of_rows.clone()
        near[:, -1] = (near[:, -1] + change).clamp(min=0)  # beyond 1: the last id
        right |= found == plain(wide, near)
    return [(kinds[row], of_rows[row].tolist(), found[row].item()) for row in (~right).nonzero()[:, 0].tolist()]


def error_of_logprobs(dtype: torch.dtype, device: torch.device, top: int = 3) -> float:
    """The largest difference to log_softmax in float64, of chosen ids and the most likely ones; lower ids come first."""
    random = np.random.default_rng(0)
    kinds = ["normal", "ties", "peaked", "masked", "one"]
    logits = torch.tensor(np.array([logits_of(kind, 3000, random) for kind in kinds])).to(device, dtype)
    rows = torch.tensor([4, 0, 1, 2, 3], dtype=torch.int32, device=device)
    ids = logits.argmax(1) - 1
    logprobs, top_ids, top_logprobs = (
        torch.full(shape, -99, dtype=kind, device=device)
        for shape, kind in (((5,), torch.float64), ((5, top), torch.int64), ((5, top), torch.float64))
    )
    drawing.log_probabilities(logits, rows, ids, logprobs, top_ids, top_logprobs)
    raw = torch.log_softmax(logits.double(), -1)
    ordered, order = raw.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top_ids, order[:, :top])
    pairs = (logprobs, raw.gather(1, ids[:, None])[:, 0]), (top_logprobs, ordered[:, :top])
    return max(float((found - its).nan_to_num(0, 0, 0).abs().max()) for found, its in pairs)


OF_SAMPLER = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "prompt_length": 8},
    {"temperature": 0.0, "logit_bias": {"5": 9.0}, "banned": [2, 7], "min_new_tokens": 99, "logprobs": 0},
    {"temperature": 1.0, "masked": True, "logprobs": 1},
    {"temperature": 0.0, "allowed": [3, 500]},
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "masked": True},
]


def check_sampler(device: torch.device, dtype: torch.dtype, rows: int = 16, vocab: int = 1500) -> None:
    """The same tokens and log-probabilities with kernels and without, of rows that are masked, forced, penalised, spoilt."""
    random, slots = np.random.default_rng(3), np.arange(rows) * 5000
    logits = torch.tensor(random.normal(0, 3, (rows, vocab))).to(device, dtype)
    logits[6, 9] = torch.nan
    masked = np.array([row for row in range(rows) if row % 8 in (4, 7)], np.int32)
    forced = np.where(np.arange(len(masked)) == 1, 77, ANY).astype(np.int32)
    bits = random.integers(0, 256, (int((forced == ANY).sum()), vocab // 8 - 3), np.uint8)
    bits[-1] = 0  # nothing is left
    given = logits, slots, random.random(rows), np.full(rows, 24)
    steps = [
        Step(0, 0, admitted=tuple(Admitted(int(slot), (), OF_SAMPLER[at % 8]) for at, slot in enumerate(slots))),
        Step(0, 0, slots=slots, counts=np.full(rows, 24), positions=np.zeros(rows, int), token_ids=random.integers(0, 99, 24 * rows)),
    ]  # fmt: skip
    results = []
    for by_kernels in (False, True):
        sampler = Sampler(device, by_kernels)
        sampler.apply(steps[0])
        sampler.count(steps[1])
        results.append(sampler.sample(*given, sampler.top(slots), Masks(masked, forced, bits)))
        results.append(sampler.score(logits[:4], torch.arange(4, device=device)))
    plain_result, plain_scores, result, scores = results
    assert result.token_ids.tolist() == plain_result.token_ids.tolist()
    assert result.token_ids[6] == NO_TOKEN and NONE_LEFT in result.token_ids.tolist()
    for name in ("logprobs", "top_logprobs"):
        assert torch.allclose(getattr(result, name), getattr(plain_result, name), atol=1e-12, equal_nan=True)
    assert torch.allclose(scores, plain_scores, atol=1e-12)
