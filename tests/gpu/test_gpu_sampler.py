"""The sampler on a GPU: the same tokens as on the CPU, and never a wait for the device."""

import numpy as np
import pytest
import torch

from noria.engine.sampler import Sampler
from noria.masks import ANY, Masks
from noria.step import Admitted, Step

pytestmark = pytest.mark.gpu
VOCAB, ROWS = 32_000, 96
KINDS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "logprobs": 4},
    {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "prompt_length": 8,
    },
    {"temperature": 0.0, "logit_bias": {"5": 9.0, "31999": 3.5}, "banned": [2, 7], "min_new_tokens": 99, "logprobs": 0},
    {"temperature": 1.0, "masked": True, "logprobs": 1},
    {"temperature": 0.0, "masked": True},
]
BITS = np.random.default_rng(2).integers(0, 256, (ROWS, VOCAB // 8), np.uint8)


def masks():
    """Of every row that may have one: bits, and a forced token for one in five."""
    samples = np.array([row for row in range(ROWS) if "masked" in KINDS[row % len(KINDS)]], np.int32)
    forced = np.where(np.arange(len(samples)) % 5 == 0, 77, ANY).astype(np.int32)
    return Masks(samples, forced, BITS[: int((forced == ANY).sum())])


def filled(device, by_kernels=False):
    """A sampler whose rows have had 24 tokens, and what it samples from."""
    sampler, slots = Sampler(torch.device(device), by_kernels), np.arange(ROWS)
    admitted = tuple(Admitted(int(slot), (), KINDS[slot % len(KINDS)]) for slot in slots)
    sampler.apply(Step(0, 0, admitted=admitted))
    ids = np.random.default_rng(0).integers(0, 2000, 24 * ROWS)
    sampler.count(Step(0, 0, slots=slots, counts=slots * 0 + 24, positions=slots * 0, token_ids=ids))
    logits = torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    logits = logits.bfloat16() if by_kernels else logits
    return sampler, logits.to(device), slots, np.random.default_rng(1).random(ROWS)


def sample(sampler, logits, slots, uniforms):
    found = sampler.sample(logits, slots, uniforms, slots * 0 + 24, sampler.top(slots), masks())
    return found, sampler.score(logits, torch.arange(ROWS, device=logits.device))


def test_a_gpu_samples_what_the_cpu_samples():
    (mine, my_scores), (theirs, their_scores) = sample(*filled("cuda")), sample(*filled("cpu"))
    assert mine.token_ids.tolist() == theirs.token_ids.tolist() and mine.top_ids.tolist() == theirs.top_ids.tolist()
    assert torch.allclose(mine.logprobs.cpu(), theirs.logprobs, atol=1e-12, equal_nan=True)
    assert torch.allclose(my_scores.cpu(), their_scores, atol=1e-12)


@pytest.mark.parametrize("by_kernels", [False, True])
def test_nothing_in_a_draw_waits_for_the_device(by_kernels):
    arguments = filled("cuda", by_kernels)
    sample(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
