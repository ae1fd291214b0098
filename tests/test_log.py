"""What ranks say: lines of the time, the rank and the message on stderr, or wherever a program that runs Noria has them go."""

import io
import logging
import re
import sys

import pytest

from noria.tools.log import log


def test_a_log_line_carries_time_and_rank_and_is_one_write(monkeypatch):
    writes = []
    stream = io.StringIO()
    stream.write = writes.append
    monkeypatch.setattr(sys, "stderr", stream)
    log(1, 4, "first\nsecond \x1b[31m")
    assert len(writes) == 2
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ rank=1/4 first\n", writes[0])
    assert writes[1].endswith("rank=1/4 second \\x1b[31m\n")


def test_each_message_goes_to_the_stderr_of_its_moment_or_to_the_stream_that_is_named(monkeypatch):
    first, second, named = io.StringIO(), io.StringIO(), io.StringIO()
    for stream in (first, second):
        monkeypatch.setattr(sys, "stderr", stream)
        log(0, 1, "here")
    log(0, 1, "there", named)
    for stream, word in ((first, "here"), (second, "here"), (named, "there")):
        assert stream.getvalue().endswith(f" rank=0/1 {word}\n") and stream.getvalue().count("\n") == 1


@pytest.fixture
def logger():
    logger = logging.getLogger("noria")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers = []
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    yield logger
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)  # not the attribute: what is enabled is kept


def test_a_handler_and_a_level_of_the_program_that_runs_noria_are_left_alone(logger, capsys):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    log(2, 4, "a line of 100 %")
    logger.setLevel(logging.WARNING)
    log(2, 4, "not heard")
    assert [(one.getMessage(), one.rank, one.levelname) for one in records] == [("a line of 100 %", "2/4", "INFO")]
    assert capsys.readouterr().err == ""
