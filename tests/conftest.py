"""Which tests are skipped here, and how several workers share the rest (pytest-xdist, as tests/run.sh starts it)."""

from collections import Counter

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    _skip_without_gpu(items)
    _share(items)


def _skip_without_gpu(items):
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch  # only here: it takes a second, and most runs of one test file do not need it

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _share(items):
    """A file goes to one worker, for what its tests have in common; files of the world all to the same, and first.

    The others follow by their number of slow tests: what takes long begins early.
    """
    world = {item.path for item in items if item.get_closest_marker("world")}
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("world" if item.path in world else item.path.stem))
    items.sort(key=lambda item: (item.path not in world, -slow[item.path]))
