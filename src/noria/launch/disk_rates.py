"""How fast the disk of a folder is written and read, as a run does it: past the page cache, by several threads."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from noria.limits import DISK_THREADS
from noria.tools import direct
from noria.tools.pinned import HostMemory

FASTEST = 8e9  # bytes/s


def disk_rates(folder: Path, seconds: float, sharing: int) -> tuple[float, float]:
    """Bytes/s read and written, each in about so many seconds, of a file so large that the fastest disk needs that time.

    It takes at most half of what is free, shared with the other ranks of the host, `sharing` in all, but a piece for each
    thread. Raises InputError where there is no room, OSError where the disk fails.
    """
    space = os.statvfs(folder)
    most = min(FASTEST * seconds, space.f_bavail * space.f_frsize / 2 / sharing)
    num_pieces = max(int(most) // direct.CHUNK_NBYTES, DISK_THREADS)
    pieces = direct.chunks(num_pieces * direct.CHUNK_NBYTES)
    memory = HostMemory(DISK_THREADS * direct.CHUNK_NBYTES)
    memory.touch()
    views = [part.numpy().data for part in memory.memory.split(direct.CHUNK_NBYTES)]
    file = direct.scratch_file(folder, pieces[-1][1])
    try:
        with ThreadPoolExecutor(DISK_THREADS) as pool:
            write, done = _passes(pool, pieces, views, file.write, seconds)
            read, _ = _passes(pool, pieces[:done], views, file.read, seconds)
    finally:
        file.close()
        memory.close()
    return read, write


def _passes(
    pool: ThreadPoolExecutor,
    pieces: list[tuple[int, int]],
    views: list[memoryview],
    call: Callable[[int, memoryview], None],
    seconds: float,
) -> tuple[float, int]:
    """Bytes/s of calls for one piece after another, some at once, and how many pieces were done in about `seconds`."""
    done, nbytes, began = 0, 0, time.perf_counter()
    while done < len(pieces) and (time.perf_counter() - began < seconds or not done):
        turn = pieces[done : done + len(views)]
        list(pool.map(lambda one: call(one[0][0], one[1][: one[0][1] - one[0][0]]), zip(turn, views, strict=False)))
        done, nbytes = done + len(turn), nbytes + sum(end - start for start, end in turn)
    return nbytes / (time.perf_counter() - began), done
