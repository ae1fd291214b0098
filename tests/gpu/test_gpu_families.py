"""Every decoder on a CUDA device in bfloat16, by the kernels of its layers: as near to float64 as on the CPU by torch alone.

Random numbers of its own in place of a model of transformers, which is not where the GPUs are. Of a mixture no two experts are
near a tie: there a rounding decides which of them a token goes to, and its error is that of another expert.
"""

import zlib
from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch

from decoders import CONFIGS
from noria.blocks import lay_out
from noria.engine.parameters import stored, views
from noria.models import _routing
from noria.step import Run
from whole import Whole, tokens_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Random(Whole):
    """A model of random numbers of bfloat16, the same in every dtype and on every device."""

    def block(self, state, name, shapes):
        layout = lay_out(name, shapes, str(self.dtype).removeprefix("torch."))
        buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self.device)
        for parameter, numbers in stored(buffer, layout).items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{parameter}".encode()))
            noise = torch.randn(numbers.shape, generator=generator) * 0.2
            noise = noise + 1 if parameter.endswith("norm") else noise
            numbers.copy_(noise.bfloat16())
        return views(buffer, layout)


def logits(config, dtype, device="cpu"):
    """[T, V] of a prompt, in two chunks, and of three tokens one by one."""
    whole, token_ids, pages = Random(config, None, dtype, device=device), tokens_of(1, 60), (Run(3, 1), Run(7, 3))
    ends = [0, 20, 57, 58, 59, 60]
    parts = [whole.logits([(token_ids[a:b], a, pages)])[0] for a, b in pairwise(ends)]
    return torch.cat(parts).double().cpu()


APART = 2.0  # between the scores of experts that a token goes to and others: a router's differ by some 0.1, roundings by 0.01


def routers(config):
    """For `logits`: each router's scores of the experts that it chooses in float64 are raised, so that all dtypes choose them."""
    if not config.get("num_experts"):
        return nullcontext
    choose, choices = _routing.choose, []

    def watched(routing, scores, *correction):
        choices.append(choose(routing, scores, *correction)[0])
        return choose(routing, scores, *correction)

    with patch.object(_routing, "choose", watched):
        logits(config, torch.float64)

    def apart():
        left = iter(choices)

        def lifted(routing, scores, *correction):
            chosen = next(left).to(scores.device)
            found = choose(routing, scores.scatter_add(1, chosen, torch.full_like(scores, APART)), *correction)
            assert torch.equal(found[0].sort().values, chosen.sort().values)
            return found

        return patch.object(_routing, "choose", lifted)

    return apart


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_on_a_gpu_are_as_near_as_on_the_cpu(name):
    found = {}
    with torch.inference_mode():
        apart = routers(CONFIGS[name])
        for where in ((torch.float64, "cpu"), (torch.bfloat16, "cuda"), (torch.bfloat16, "cpu")):
            with apart():
                found[where] = logits(CONFIGS[name], *where)
    exact, on_gpu, plain = found.values()
    error, plain_error = ((one - exact).abs().mean() for one in (on_gpu, plain))
    assert exact.std() > 0.3 and 0 < error <= 1.5 * plain_error
