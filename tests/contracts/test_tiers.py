"""Each tier against its contract, with streams that copy at once and with a twin that copies as late as events allow."""

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from noria.errors import InputError
from noria.streams import CpuStreams
from noria.tiers.cpu import Cpu
from noria.tiers.disk import Disk, Region
from noria.tools import direct

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
from late_streams import LateStreams  # noqa: E402

NBYTES = 300_000
CPU = torch.device("cpu")


def disk(folder, streams, directly, slot_nbytes=16_384, num_slots=2, nbytes=NBYTES):
    """Two regions, of which neither the size nor the place is a multiple of a sector."""
    first = 70_001
    files = [
        direct.scratch_file(folder, 8192 + first, "key", directly),
        direct.scratch_file(folder, nbytes, "key", directly),
    ]
    regions = [Region(files[0], 8192, first), Region(files[1], 0, nbytes - first)]
    return Disk(regions, streams, slot_nbytes, num_slots, num_threads=2)


def cpu(folder, streams):
    tier = Cpu(NBYTES, streams)
    tier.touch()
    tier.register()
    return tier


KINDS = {
    "cpu": cpu,
    "cpu in pieces": lambda folder, streams: Cpu(NBYTES, streams, piece_nbytes=8192),
    "disk direct": lambda folder, streams: disk(folder, streams, True),
    "disk buffered": lambda folder, streams: disk(folder, streams, False),
    "disk one slot": lambda folder, streams: disk(folder, streams, True, slot_nbytes=1, num_slots=1),
}


@pytest.fixture(params=[CpuStreams, LateStreams])
def streams(request):
    return request.param(CPU)


@pytest.fixture(params=KINDS)
def tier(request, streams, tmp_path):
    tier = KINDS[request.param](tmp_path, streams)
    yield tier
    tier.close()


def numbers(nbytes, seed):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def load(tier, streams, offset, nbytes):
    data = torch.zeros(nbytes, dtype=torch.uint8)
    streams.wait(tier.load([(offset, data)]).event())
    return data


def test_what_was_stored_is_loaded(tier, streams):
    data = numbers(NBYTES, 1)
    streams.wait(tier.store([(0, data)]).event())
    assert torch.equal(load(tier, streams, 0, NBYTES), data)
    assert torch.equal(load(tier, streams, 4095, 77_777), data[4095 : 4095 + 77_777])


def test_pieces_of_any_place_and_size_go_where_they_belong(tier, streams):
    draw, held = random.Random(3), torch.zeros(NBYTES, dtype=torch.uint8)
    streams.wait(tier.store([(0, held)]).event())
    for turn in range(20):
        cuts = sorted(draw.sample(range(NBYTES), 8))
        pieces = [(begin, numbers(end - begin, turn)) for begin, end in zip(cuts[::2], cuts[1::2], strict=True)]
        draw.shuffle(pieces)
        for begin, data in pieces:
            held[begin : begin + len(data)] = data
        streams.wait(tier.store(pieces).event())
        targets = [(cut, torch.zeros(min(5000, NBYTES - cut), dtype=torch.uint8)) for cut in cuts]
        streams.wait(tier.load(targets).event())
        for begin, data in targets:
            assert torch.equal(data, held[begin : begin + len(data)]), (turn, begin)


def test_aligned_pieces_of_many_slots_are_whole(tier, streams):
    data = numbers(200_704, 5)  # 49 sectors
    streams.wait(tier.store([(69_632, data)]).event())
    assert torch.equal(load(tier, streams, 69_632, len(data)), data)


def test_the_device_is_not_touched_before_the_events(tier):
    late = LateStreams(CPU)
    tier._streams = late  # events of one stream
    data, target = numbers(5000, 2), torch.zeros(5000, dtype=torch.uint8)
    late.wait(tier.store([(100, data)]).event())
    order = []

    class After:
        def synchronize(self):
            order.append(target.clone())

    late.wait(tier.load([(100, target)], [After()]).event())
    assert order and not order[0].any()
    assert torch.equal(target, data)


def test_nothing_to_move_is_a_transfer_too(tier, streams):
    streams.wait(tier.load([]).event())
    streams.wait(tier.store([]).event())


def test_a_disk_reads_after_what_it_was_told_to_write(tmp_path, streams):
    """Without a wait in between, in both directions, many times."""
    tier = disk(tmp_path, streams, True, num_slots=4)
    loads = []
    for turn in range(100):
        offset = turn * 37 % 50_000
        stored = tier.store([(offset, numbers(20_000, turn))])
        target = torch.zeros(20_000, dtype=torch.uint8)
        loads.append((turn, target, tier.load([(offset, target)], [stored.event()])))
    for turn, target, transfer in loads:
        streams.wait(transfer.event())
        assert torch.equal(target, numbers(20_000, turn)), turn
    tier.close()


def test_a_view_outlives_the_memory_tier(tmp_path):
    tier = cpu(tmp_path, CpuStreams(CPU))
    view = tier.memory[10:20]
    tier.close()
    tier.close()
    assert view.tolist() == [0] * 10


def test_memory_that_cannot_be_locked_is_refused_with_the_remedy(monkeypatch):
    class Refusing:
        def cudaHostRegister(self, *_):
            return 2

    streams = CpuStreams(CPU)
    tier = Cpu(4096, streams)
    streams.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    with pytest.raises(OSError, match=r"4096 bytes.*CUDA error 2.*ulimit -l"):
        tier.register()


class Driver:
    """Stands for CUDA's: which memory is page-locked. It refuses the pieces whose numbers are `refused`."""

    def __init__(self, refused=()):
        self.locked, self.refused, self.threads = {}, set(refused), set()
        self.meeting = threading.Barrier(2)  # two pieces are under way at once, or nothing goes on

    def cudaHostRegister(self, begin, nbytes, flags):
        if len(self.locked) + 1 in self.refused:
            return 2
        self.locked[begin] = nbytes
        return 0

    def cudaHostUnregister(self, begin):
        self.threads.add(threading.get_ident())
        if len(os.sched_getaffinity(0)) > 1 and len(self.locked) > 1 and not self.meeting.broken:
            with contextlib.suppress(threading.BrokenBarrierError):
                self.meeting.wait(2)
        del self.locked[begin]
        return 0


def driven(monkeypatch, driver):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())


def locking_tier(nbytes, piece_nbytes):
    streams = CpuStreams(CPU)
    tier = Cpu(nbytes, streams, piece_nbytes)
    tier.touch()
    streams.device = torch.device("cuda", 0)
    return tier


def resident_nbytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_locked_and_given_back_piece_by_piece_by_several_threads(monkeypatch):
    driver = Driver()
    driven(monkeypatch, driver)
    tier = locking_tier(40 << 20, 8 << 20)
    view = tier.memory[3:5]
    begin = tier.memory.data_ptr()
    tier.register()
    tier.register()
    assert driver.locked == {begin + piece * (8 << 20): 8 << 20 for piece in range(5)}
    held = resident_nbytes()
    assert tier.close() == 40 << 20 and not driver.locked
    assert held - resident_nbytes() > 30 << 20, "though a view is left"
    assert len(os.sched_getaffinity(0)) == 1 or len(driver.threads) > 1
    assert view.tolist() == [0, 0] and tier.close() == 0


def test_memory_of_which_a_piece_cannot_be_locked_stays_unlocked(monkeypatch):
    driver = Driver(refused=[3])
    driven(monkeypatch, driver)
    tier = locking_tier(5 * 8192 + 17, 8192)
    with pytest.raises(OSError, match=r"40977 bytes.*CUDA error 2.*ulimit -l"):
        tier.register()
    assert not driver.locked and tier.close() == 0


@pytest.mark.parametrize("registered", [True, False])
def test_memory_is_locked_ahead_of_what_is_stored_there_and_unlocked_whatever_comes(monkeypatch, registered):
    driver, begun = Driver(), threading.Event()
    driven(monkeypatch, driver)
    tier, data = locking_tier(5 * 8192, 8192), numbers(9000, 4)
    lock = driver.cudaHostRegister
    driver.cudaHostRegister = lambda *its: begun.wait(5) and lock(*its)
    tier.register_ahead()
    threading.Timer(0.05, begun.set).start()
    assert not driver.locked
    tier.store([(8000, data)])
    assert {tier.memory.data_ptr() + piece * 8192 for piece in (0, 1, 2)} <= driver.locked.keys()
    assert torch.equal(tier.memory[8000:17000], data)
    if registered:
        tier.register()
        assert len(driver.locked) == 5
    assert 3 * 8192 <= tier.close() <= 5 * 8192 and not driver.locked


def test_pieces_that_nobody_waits_for_any_more_are_not_locked(monkeypatch):
    driver, begun = Driver(), threading.Event()
    driven(monkeypatch, driver)
    tier, lock, asked = locking_tier(50 * 8192, 8192), driver.cudaHostRegister, []
    driver.cudaHostRegister = lambda *its: asked.append(its) or (begun.wait(5) and lock(*its))
    tier.register_ahead()
    threading.Timer(0.05, begun.set).start()
    tier.close()
    assert 0 < len(asked) < 10 and not driver.locked


def test_memory_of_which_a_piece_cannot_be_locked_ahead_stays_unlocked(monkeypatch):
    driver = Driver(refused=[3])
    driven(monkeypatch, driver)
    tier = locking_tier(5 * 8192 + 17, 8192)
    tier.register_ahead()
    with pytest.raises(OSError, match=r"40977 bytes.*CUDA error 2.*ulimit -l"):
        tier.register()
    assert not driver.locked and tier.close() == 0


def test_no_copy_crosses_from_one_locked_piece_to_the_next():
    streams, seen = CpuStreams(CPU), []
    tier = Cpu(40_000, streams, piece_nbytes=8192)
    copy = streams.copy
    streams.copy = lambda lane, pairs, after=(): seen.extend(pairs := list(pairs)) or copy(lane, pairs, after)
    begin, data = tier.memory.data_ptr(), numbers(30_000, 4)
    for offset in (0, 100, 8191, 8192, 10_000):
        tier.store([(offset, data)])
        assert torch.equal(tier.memory[offset : offset + 30_000], data)
        got = torch.zeros_like(data)
        tier.load([(offset, got)])
        assert torch.equal(got, data)
    places = [
        (part.data_ptr() - begin, part.numel())
        for pair in seen
        for part in pair
        if begin <= part.data_ptr() < begin + 40_000
    ]
    assert places and all(at // 8192 == (at + nbytes - 1) // 8192 for at, nbytes in places)


@pytest.mark.parametrize("directly", [True, False])
def test_a_file_that_was_truncated_is_named_at_the_wait(tmp_path, streams, directly):
    path = tmp_path / "model.h5"
    path.write_bytes(bytes(40_960))
    with path.open("rb") as file:
        region = Region(direct.DirectFile(file.fileno(), path, direct=directly), 4096, 36_864)
    tier = Disk([region], streams, 8192, 2)
    os.truncate(path, 20_000)
    transfer = tier.load([(0, torch.zeros(36_864, dtype=torch.uint8))])
    with pytest.raises(
        InputError, match=r"model.h5 is truncated: .* bytes were to be read at byte .*the file has 20000"
    ):
        transfer.event()
    load(tier, streams, 0, 8192)  # the tier goes on
    tier.close()


def broken(call, number, after=0):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return call(*arguments)

    return fail


@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_cannot_be_read_is_named_at_the_wait(tmp_path, streams, monkeypatch, after):
    tier = disk(tmp_path, streams, True)
    monkeypatch.setattr(os, "preadv", broken(os.preadv, errno.EIO, after))
    with pytest.raises(OSError, match=r"scratch file: reading \d+ bytes at byte \d+") as raised:
        tier.load([(0, torch.zeros(NBYTES, dtype=torch.uint8))]).event()
    assert raised.value.errno == errno.EIO
    tier.close()


def test_a_disk_that_cannot_be_written_fails_what_comes_later(tmp_path, streams, monkeypatch):
    tier = disk(tmp_path, streams, True, num_slots=1)
    monkeypatch.setattr(os, "pwritev", broken(os.pwritev, errno.ENOSPC))
    with pytest.raises(OSError, match="no space left on device, 16,384 more bytes were to be written"):
        tier.store([(0, numbers(100_000, 1))]).event()
        tier.load([(0, torch.zeros(100_000, dtype=torch.uint8))]).event()
    with pytest.raises(OSError, match="no space left on device"):
        tier.load([(0, torch.zeros(10, dtype=torch.uint8))]).event()
    tier.close()


def closes(tier):
    """Whether close() returns: it waits for every slot."""
    closing = threading.Thread(target=tier.close, daemon=True)
    closing.start()
    closing.join(10)
    return not closing.is_alive()


class Failing(CpuStreams):
    """Streams whose copies, or the events after them, fail."""

    def __init__(self, copies=False):
        super().__init__(CPU)
        self.copies = copies

    def copy(self, lane, pairs, after=()):
        if self.copies:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self

    def synchronize(self):
        raise RuntimeError("CUDA error: unspecified launch failure")

    def query(self):
        return True


@pytest.mark.parametrize("copies", [True, False])
def test_a_device_that_fails_while_bytes_leave_it_does_not_hold_up_the_end(tmp_path, copies):
    tier = disk(tmp_path, CpuStreams(CPU), True, num_slots=2)
    tier._streams = Failing(copies)
    for _ in range(3):  # more often than there are slots
        transfer = tier.store([(0, numbers(5000, 1))])
        while not transfer.settled:
            time.sleep(0.001)
    tier._streams = CpuStreams(CPU)
    with pytest.raises(RuntimeError, match="CUDA error"):
        tier.load([(0, torch.zeros(5000, dtype=torch.uint8))]).event()
    assert closes(tier)


@pytest.mark.parametrize("lane", ["load", "store"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_machine_that_starts_no_more_threads_does_not_hold_up_the_end(tmp_path, streams, monkeypatch, lane, after):
    tier, submitted = disk(tmp_path, streams, True, num_slots=2), []
    submit = tier._pool.submit

    def refusing(*arguments):
        submitted.append(arguments)
        if len(submitted) > after:
            raise RuntimeError("can't start new thread")
        return submit(*arguments)

    monkeypatch.setattr(tier._pool, "submit", refusing)
    data = numbers(NBYTES, 1)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        getattr(tier, lane)([(0, data)]).event()
        tier.load([(0, data)]).event()
    assert len(submitted) > after and closes(tier)


def test_a_file_system_that_refuses_direct_reads_is_read_through_its_cache(tmp_path, streams, monkeypatch):
    tier = disk(tmp_path, streams, True)
    file = tier._regions._regions[1].file
    plain, refused = os.preadv, []

    def preadv(descriptor, buffers, offset):
        if descriptor == file._direct:
            refused.append(offset)
            raise OSError(errno.EINVAL, "no")
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    load(tier, streams, 0, NBYTES)
    assert refused and not file.direct
    tier.close()


class Sum:
    def __init__(self, found):
        self.found, self.taken = found, b""

    def update(self, data):
        self.taken += bytes(data)

    def finish(self):
        self.found.append(self.taken)
        if not any(self.taken):
            raise InputError("damaged")


def test_a_region_is_checked_once_in_order_when_it_is_first_loaded_whole(tmp_path, streams):
    path, found = tmp_path / "file", []
    data = numbers(100_000, 9)
    path.write_bytes(bytes(data.numpy()) + bytes(50_000))
    with path.open("rb") as file:
        opened = direct.DirectFile(file.fileno(), path)
    checks = [lambda: Sum(found), lambda: Sum(found)]
    tier = Disk([Region(opened, 0, 100_000, checks[0]), Region(opened, 100_000, 50_000, checks[1])], streams, 8192, 3)
    load(tier, streams, 0, 5000)
    assert not found
    for _ in range(2):
        assert torch.equal(load(tier, streams, 0, 100_000), data)
    assert found == [bytes(data.numpy())]
    with pytest.raises(InputError, match="damaged"):
        tier.load([(100_000, torch.zeros(50_000, dtype=torch.uint8))]).event()
    tier.close()


def test_a_scratch_folder_without_room_is_refused_with_the_numbers(tmp_path):
    with pytest.raises(InputError, match=r"needs 9313225.75 GiB .* bytes too few: lower placement.cache.disk"):
        direct.scratch_file(tmp_path, 10**16, "placement.cache.disk")
    with pytest.raises(InputError, match="set placement.scratch"):
        direct.scratch_file(tmp_path / "absent", 1, "placement.cache.disk")
    assert not list(tmp_path.iterdir())


CHILD = """
import sys, time, torch
from noria.tools import direct
from noria.streams import CpuStreams
from noria.tiers.disk import Disk, Region
streams = CpuStreams(torch.device("cpu"))
tier = Disk([Region(direct.scratch_file(sys.argv[1], 1 << 20, "key"), 0, 1 << 20)], streams, 1 << 16, 2)
tier.store([(0, torch.ones(1 << 20, dtype=torch.uint8))]).event()
print("stored", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_scratch_file(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent / "src")}
    arguments = [sys.executable, "-c", CHILD, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout.readline() == b"stored\n"
        opened = [os.readlink(entry) for entry in Path(f"/proc/{child.pid}/fd").iterdir()]
        assert any(str(tmp_path) in name and name.endswith("(deleted)") for name in opened)
        child.kill()
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())
