"""The garbage collector beside a run."""

import gc

import small_run
from noria.__main__ import main
from noria.engine.executor import Executor
from noria.tools.garbage import set_aside


def test_what_was_there_is_set_aside_and_looked_at_again_afterwards():
    before = gc.get_freeze_count()
    with set_aside():
        assert gc.get_freeze_count() > 10_000
        own = [[], []]
        assert any(one is own for one in gc.get_objects()), "what is new is looked at"
    assert gc.get_freeze_count() == before == 0


def test_a_run_computes_its_steps_with_all_that_it_has_imported_set_aside(tmp_path, monkeypatch):
    small_run.write_files(tmp_path)
    counts, plain = [], Executor.run
    monkeypatch.setattr(Executor, "run", lambda *given: counts.append(gc.get_freeze_count()) or plain(*given))
    assert main(small_run.command(tmp_path, "run.h5")) == 0
    assert len(counts) == 1 and counts[0] > 10_000 and gc.get_freeze_count() == 0
