import numpy as np
import pytest
import torch

from late_streams import LateStreams
from noria.engine.batch import PageTable, to_staging
from noria.engine.kv_cache import KvCache, Staging, TierPages, pages_nbytes
from noria.engine.timing import Traffic
from noria.model import ModelShape
from noria.step import Admitted, Run, Step
from noria.streams import CpuStreams
from noria.tiers.cpu import Cpu

SHAPE = ModelShape("llama", 4, 8, 2, 1, 4, 10, 64, False)


def cache():
    return KvCache(SHAPE, [1, 3], 6, torch.float32, CpuStreams(torch.device("cpu")))


def admit(pages, **slots):
    admitted = tuple(Admitted(int(slot[1:]), runs, {}) for slot, runs in slots.items())
    pages.apply(Step(0, 0, admitted=admitted))


def test_each_layer_has_its_own_pages():
    kv_cache = cache()
    keys, values = kv_cache.layer(1)
    assert keys.shape == values.shape == (6 * 16, 1, 4)
    assert kv_cache.nbytes == 2 * 2 * keys.nbytes
    keys.fill_(1)
    kv_cache.layer(3)[0].fill_(2)
    assert (kv_cache.layer(1)[0] == 1).all()
    with pytest.raises(KeyError):
        kv_cache.layer(2)


def test_what_is_stored_from_a_staging_buffer_comes_back_into_another_although_every_copy_is_late():
    """Two microbatches of a sequence in the cpu tier, in every layer, through two buffers."""
    streams, traffic = LateStreams(torch.device("cpu")), Traffic()
    tier = Cpu(pages_nbytes(SHAPE, 2, 4, "float32"), streams)
    cpu = TierPages(2, 4, tier, ("host_to_gpu",), ("gpu_to_host",))
    kv_cache = KvCache(SHAPE, [1, 3], 2, torch.float32, streams, Staging((cpu,), 2, 2), traffic)
    pages = PageTable()
    admit(pages, s0=(Run(5, 1), Run(2, 1)))  # pages 3 and 0 of the tier
    written = torch.zeros(2, 2, 18, 4)
    for position, count in ((0, 15), (15, 2), (17, 1)):
        step = Step(0, 0, slots=np.array([0]), counts=np.array([count]), positions=np.array([position]))
        spans, staged = to_staging(pages.spans(step, 0, 1), [cpu])
        assert spans[0].runs[0].start == 0
        for index, layer in enumerate((1, 3)):
            kv_cache.load(layer, 0, staged)
            for which, rows in enumerate(kv_cache.tensors(layer, 0, staged).values()):
                assert torch.equal(rows[:position, 0], written[index, which, :position]), (layer, which)
                new = torch.randn(count, 4)
                rows[position : position + count, 0] = new
                written[index, which, position : position + count] = new
            kv_cache.store(layer, 0, staged)
    traffic.end_round(prefill=False)
    row = 4 * 4 * 2 * 2  # bytes of K and V in both layers
    assert traffic.decode == {"host_to_gpu": (15 + 17) * row, "gpu_to_host": 18 * row}
    kv_cache.close()
