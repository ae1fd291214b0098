"""Which tests are skipped here, and how several workers share the rest (pytest-xdist, as tests/run.sh starts it)."""

import functools
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_configure(config):
    """Launches find rates of any CPU, so that none measures. Tests of what is kept name another folder."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="noria-rates-")
        config.add_cleanup(folder.cleanup)
        shutil.copy(ROOT / "tests" / "data" / "noria-rates-cpu.toml", folder.name)
        os.environ["NORIA_CACHE"] = folder.name  # workers have it from here


@pytest.fixture(autouse=True)
def _no_mpi_in_this_process():
    """Fails the test that starts MPI in the process of the tests, whose later tests would be ranks: theirs may end it all."""
    before = _mpi_is_up()
    yield
    assert before or not _mpi_is_up(), (
        "this test started MPI here: let ranks of the world or a process of its own do that"
    )


@pytest.fixture
def one_thread():
    """Torch computes on one thread, without gradients."""
    import torch

    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def _mpi_is_up():
    return getattr(sys.modules.get("mpi4py.MPI"), "__file__", None) is not None  # a stand-in has no file


def pytest_collection_modifyitems(items):
    _skip_without_gpu(items)
    _begin_with_the_longest(items)


def pytest_xdist_make_scheduler(config, log):
    """A file goes to one worker, for what its tests have in common; the files of the world all go to the same."""
    from xdist.scheduler import LoadScopeScheduling

    class FileByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "world" if _of_the_world(ROOT / file) else file

    return FileByFile(config, log)


@functools.cache
def _of_the_world(path):
    return "mark.world" in path.read_text()


def _begin_with_the_longest(items):
    """The files of the world come first, then the others by their number of slow tests."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (not _of_the_world(item.path), -slow[item.path]))


def _skip_without_gpu(items):
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch  # only here: it takes a second, and most runs of one test file do not need it

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
