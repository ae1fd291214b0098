"""Many runs of bytes by one call of the driver, on a GPU."""

import numpy as np
import pytest
import torch

from noria.batch_copies import CopyRuns, batch_copies
from noria.streams import CudaStreams
from noria.tiers import TierRuns
from noria.tiers.cpu import Cpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROUNDS, MOST = 20, 300


def drawn(random, size):
    """Disjoint runs of a memory of so many bytes, in any order, of 1 to 999 bytes, 1 to 999 apart."""
    sizes = random.integers(1, 1000, MOST)
    first = np.cumsum(random.integers(1, 1000, MOST) + sizes) - sizes
    order = random.permutation(MOST)
    kept = order[(first + sizes)[order] <= size][: random.integers(1, MOST)]
    return first[kept], sizes[kept]


def test_the_driver_copies_runs_as_torch_copies_each():
    device, random = torch.device("cuda", 0), np.random.default_rng(0)
    assert batch_copies(CudaStreams(device)._copying) is not None, "CUDA 12.8 and later have the call"
    streams, size = CudaStreams(device), 400_000
    tier = Cpu(size, streams, piece_nbytes=1 << 16)
    whole = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8))
    tier.memory[:] = whole
    tier.register()
    for _ in range(ROUNDS):
        there, nbytes = drawn(random, size)
        here, _ = drawn(random, size)
        count = min(len(there), len(here))
        here = np.cumsum(nbytes[:count] + 3) - nbytes[:count]
        runs = TierRuns(torch.zeros(size, dtype=torch.uint8, device=device), there[:count], here, nbytes[:count])
        expected = runs.buffer.clone()
        for offset, (begin, length) in zip(runs.there, zip(runs.here, runs.nbytes, strict=True), strict=True):
            expected[begin : begin + length] = whole[offset : offset + length].to(device)
        tier.load(runs).event().synchronize()
        assert torch.equal(runs.buffer, expected)
        for _, part in runs:
            part.add_(1)
        torch.cuda.synchronize()
        for offset, part in runs:
            whole[offset : offset + part.numel()] = part.cpu()
        tier.store(runs).event().synchronize()
        assert torch.equal(tier.memory, whole)
    tier.close()


def test_runs_are_pairs_of_bytes():
    memory = torch.arange(20, dtype=torch.uint8)
    runs = CopyRuns(torch.zeros(20, dtype=torch.uint8), memory, *(np.array(its) for its in ((0, 9), (5, 1), (3, 2))))
    for there, here in runs:
        there.copy_(here)
    assert runs.destination.tolist()[:12] == [5, 6, 7, 0, 0, 0, 0, 0, 0, 1, 2, 0] and len(runs) == 2
