"""Runs whose attention goes through the lists of attention/items.py, in blocks, tiles and sections that tiny rows fill."""

import contextlib
from unittest.mock import patch

from extra_kinds import extra_kinds
from noria import attention, kinds
from noria.kernels import _waves, lists

SMALL = {"KEY_BLOCK": 16, "SECTION": 32, "LEAST_TILE": 4, "WIDEST": 8}  # a page; two blocks; in rows of a tile


def _refuses_coded(device, dtype, heads, scored, form):
    return "values lie within keys" if heads.within else ""


@contextlib.contextmanager
def listed_kind(programs=30, coded=False):
    """Every run inside attends by extra/attention/listed.py. Yields the lists executed, of which there is one at least.

    programs: 1, and no row's sections are computed apart. coded: it attends to caches in fewer bits as they are.
    """
    with extra_kinds(), contextlib.ExitStack() as held:
        listed, executed = kinds.load("attention", "listed"), []
        for module in (lists, _waves, listed):
            for name in SMALL.keys() & vars(module).keys():
                held.enter_context(patch.object(module, name, SMALL[name]))
        held.enter_context(patch.object(listed, "PROGRAMS", programs))
        held.enter_context(patch.object(attention, "ORDER", ("listed", "sdpa")))
        if coded:
            held.enter_context(patch.object(listed, "refuses_coded", _refuses_coded, create=True))
        run = listed.Execution.run

        def counted(execution):
            executed.append(execution.work)
            return run(execution)

        held.enter_context(patch.object(listed.Execution, "run", counted))
        yield executed
        assert executed
