from types import SimpleNamespace

import numpy as np
import pytest
import torch

from late_streams import LateStreams
from noria.arrays import Array, Layout, keys_and_values
from noria.engine import states
from noria.engine.batch import PageTable, to_staging
from noria.engine.kv_cache import KvCache, Staging, TierPages
from noria.engine.layer_cache import LayerCache
from noria.engine.timing import Traffic
from noria.model import ModelShape
from noria.step import Admitted, Run, Step
from noria.streams import CpuStreams
from noria.tiers.cpu import Cpu

CPU = torch.device("cpu")
SHAPE = ModelShape("llama", 4, 8, 2, 1, 4, 10, 64, False)


def cache():
    return KvCache(SHAPE, [1, 3], (6, 0), "float32", CpuStreams(torch.device("cpu")))


def admit(pages, **slots):
    admitted = tuple(Admitted(int(slot[1:]), runs, {}) for slot, runs in slots.items())
    pages.apply(Step(0, 0, admitted=admitted))


def test_each_layer_has_its_own_pages():
    kv_cache = cache()
    keys, values = kv_cache.layer(1).values()
    assert keys.shape == values.shape == (6 * 16, 1, 4)
    assert kv_cache.nbytes == 2 * 2 * keys.nbytes
    keys.fill_(1)
    kv_cache.layer(3)["key"].fill_(2)
    assert (kv_cache.layer(1)["key"] == 1).all()
    with pytest.raises(KeyError):
        kv_cache.layer(2)


def test_what_is_stored_from_a_staging_buffer_comes_back_into_another_although_every_copy_is_late():
    """Two microbatches of a sequence in the cpu tier, in every layer, through two buffers."""
    streams, traffic = LateStreams(torch.device("cpu")), Traffic()
    tier = Cpu(Layout({layer: SHAPE.arrays(layer) for layer in (1, 3)}, "float32", 4).nbytes, streams)
    cpu = TierPages(2, 4, tier, ("host_to_gpu",), ("gpu_to_host",))
    kv_cache = KvCache(SHAPE, [1, 3], (2, 0), "float32", streams, Staging((cpu,), 2, 2), traffic)
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


def test_layers_differ_and_one_that_reads_another_finds_its_new_rows_although_every_copy_is_late():
    """In the cpu tier: the loads of the reading layer are asked for before the layer that it reads has been computed."""
    cache = (Array("latent", (5,)),), keys_and_values(1, 4), 0
    shape, streams, traffic = (
        ModelShape("llama", 3, 8, 2, 1, 4, 10, 64, False, cache=cache),
        LateStreams(CPU),
        Traffic(),
    )
    layout = Layout({layer: shape.arrays(layer) for layer in range(3)}, "float32", 4)
    cpu = TierPages(0, 4, Cpu(layout.nbytes, streams), ("host_to_gpu",), ("gpu_to_host",))
    kv_cache, pages = KvCache(shape, [0, 1, 2], (0, 0), "float32", streams, Staging((cpu,), 2, 2), traffic), PageTable()
    assert kv_cache.nbytes == 2 * 2 * 16 * 8 * 4  # slots hold the largest layer
    admit(pages, s0=(Run(3, 1), Run(1, 1)))
    written = torch.zeros(18, 5)
    for position, count in ((0, 15), (15, 2), (17, 1)):
        step = Step(0, 0, slots=np.array([0]), counts=np.array([count]), positions=np.array([position]))
        _, staged = to_staging(pages.spans(step, 0, 1), [cpu])
        kv_cache.load(0, 0, staged)
        kv_cache.load(2, 0, staged)
        (latent,) = kv_cache.tensors(0, 0, staged).values()
        written[position : position + count] = latent[position : position + count, 0] = torch.randn(count, 5)
        kv_cache.store(0, 0, staged)
        kv_cache.load(1, 0, staged)
        assert [array.shape for array in kv_cache.tensors(1, 0, staged).values()] == [(32, 1, 4)] * 2
        kv_cache.store(1, 0, staged)
        (latent,) = kv_cache.tensors(2, 0, staged).values()
        assert torch.equal(latent[: position + count, 0], written[: position + count])
        kv_cache.store(2, 0, staged)
    traffic.end_round(prefill=False)
    stored = 18 * (5 + 8) * 4
    assert traffic.decode == {"gpu_to_host": stored, "host_to_gpu": (15 + 17) * (5 + 8) * 4 + (15 + 17 + 18) * 5 * 4}
    kv_cache.close()


def test_states_are_loaded_where_rows_read_them_and_stored_where_they_write_although_every_copy_is_late():
    """Two rows in the cpu tier; of its three states, ids 2 to 4, the second is shared by both and never written again."""
    cache = (Array("state", (3,), "sequence"), Array("tail", (2, 2), "sequence", "float64")), keys_and_values(1, 4)
    shape, streams, traffic = (
        ModelShape("llama", 2, 8, 2, 1, 4, 10, 64, False, cache=cache),
        LateStreams(CPU),
        Traffic(),
    )
    layout = Layout({layer: shape.arrays(layer) for layer in range(2)}, "float32", 4, 3)
    assert layout.nbytes == 3 * (16 + 32) + 4 * 16 * 8 * 4
    cpu = TierPages(1, 4, Cpu(layout.nbytes, streams), ("host_to_gpu",), ("gpu_to_host",), 2, 3)
    kv_cache, pages = KvCache(shape, [0, 1], (1, 2), "float32", streams, Staging((cpu,), 2, 2, 2), traffic), PageTable()
    admit(pages, s0=(Run(1, 1),), s1=(Run(2, 1),))
    held = np.full((3, 3), np.nan)
    for reads, writes in (([-1, -1], [3, 4]), ([3, 3], [2, 4]), ([2, 4], [2, 4]), ([3, 2], [4, 2])):
        ids = {"reads": np.array(reads), "writes": np.array(writes), "kept": np.array([1, 1])}
        step = Step(0, 0, slots=np.array([0, 1]), counts=np.array([1, 1]), positions=np.array([0, 0]), **ids)
        _, staged = to_staging(pages.spans(step, 0, 2), [cpu])
        arrays, staged = states.arrays_of(step, 0, 2, staged), states.moved(step, 0, 2, staged)
        its = states.on_device(list(map(torch.from_numpy, arrays)))
        for layer in (0, 1):
            kv_cache.load(layer, 0, staged)
            found = kv_cache.tensors(layer, 0, staged)
            if layer == 0:
                opened = LayerCache(None, SimpleNamespace(states=its), found, shape.arrays(0))
                before = [np.zeros(3) if id < 0 else held[id - 2] for id in reads]
                assert np.array_equal(opened.before("state"), before)
                assert np.array_equal(opened.before("tail")[:, 0, 1], [row[1] for row in before])
                new = torch.randn(2, 3)
                opened.after("state", new)
                opened.after("tail", torch.stack([new[:, :2], new[:, 1:]], 2))
                opened.commit()
                held[[id - 2 for id in writes]] = new
            kv_cache.store(layer, 0, staged)
    traffic.end_round(prefill=False)
    row = 4 * 8  # bytes of a token's key and value: each new row of one token only
    assert traffic.decode == {"gpu_to_host": 8 * (48 + row), "host_to_gpu": 6 * 48}
    kv_cache.close()
