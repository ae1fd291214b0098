"""How many of a test's many cases a run takes: one in 25, or all of them with tests/run.sh --full."""

import os

EVERY = 25


def full():
    """Whether all cases run: NORIA_TEST_FULL is set by tests/run.sh --full."""
    return os.environ.get("NORIA_TEST_FULL") == "1"


def count(number):
    """How many of `number` random cases to draw: at least one."""
    return number if full() else -(-number // EVERY)


def some(cases):
    """These cases, or every 25th of them: the first, and others from all over the list."""
    cases = list(cases)
    return cases if full() else cases[::EVERY]
