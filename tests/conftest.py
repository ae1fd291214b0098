"""Skips the tests marked `gpu` on a machine without one."""

import pytest


def pytest_collection_modifyitems(items):
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch  # only here: it takes a second, and most runs of one test file do not need it

    if not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
