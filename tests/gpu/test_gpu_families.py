"""Every decoder on a CUDA device in bfloat16, by the kernels of its layers: as near to float64 as on the CPU by torch alone.

Random numbers of its own in place of a model of transformers, which is not where the GPUs are.
"""

import zlib
from itertools import pairwise

import pytest
import torch

from decoders import CONFIGS
from noria.blocks import lay_out
from noria.engine.parameters import stored, views
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


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_on_a_gpu_are_as_near_as_on_the_cpu(name):
    with torch.inference_mode():
        exact = logits(CONFIGS[name], torch.float64)
        found, plain = logits(CONFIGS[name], torch.bfloat16, "cuda"), logits(CONFIGS[name], torch.bfloat16)
    error, plain_error = ((one - exact).abs().mean() for one in (found, plain))
    assert exact.std() > 0.3 and 0 < error <= 1.5 * plain_error
