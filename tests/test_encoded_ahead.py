import threading

import pytest

from noria.errors import InputError
from noria.rows.encoded_ahead import AHEAD, EARLY, EARLY_LENGTH, EncodedAhead
from noria.rows.prompts import Prompt

ROWS = 3 * AHEAD


def prompts(count=ROWS, fails=None):
    for row in range(count):
        if row == fails:
            raise OSError("the disk is gone")
        yield Prompt(row, str(row), "x" * row, None, {}, "", None)


def encode(prompt):
    if prompt.row % 7 == 3:
        raise InputError(f"row {prompt.row} is wrong")
    return [prompt.row, len(prompt.prompt)]


def told(prompt, encode):
    try:
        return encode(prompt)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("wanted", [lambda prompt: True, lambda prompt: prompt.row % 3 > 0])
def test_every_prompt_comes_in_its_order_with_what_encoding_it_gives(wanted):
    ahead = EncodedAhead(prompts(), encode, wanted)
    found = [(prompt.row, told(prompt, ahead.encode)) for prompt in ahead.prompts]
    assert found == [(prompt.row, told(prompt, encode)) for prompt in prompts()]


def test_prompts_are_encoded_beside_the_run_before_they_are_asked_for():
    reached, threads = threading.Event(), set()

    def noted(prompt):
        threads.add(threading.current_thread())
        if prompt.row == AHEAD - 1:
            reached.set()
        return encode(prompt)

    ahead = EncodedAhead(prompts(), noted, lambda prompt: True)
    first = next(ahead.prompts)
    assert first.row == 0 and reached.wait(20), "those that follow wait for the first to be asked for"
    assert threading.current_thread() not in threads and ahead.encode(first) == [0, 0]


def test_what_reading_raises_comes_behind_the_rows_before_it():
    ahead, found = EncodedAhead(prompts(fails=20), encode, lambda prompt: True), []
    with pytest.raises(OSError, match="the disk is gone"):
        found += (prompt.row for prompt in ahead.prompts)
    assert found == [*range(20)]


def test_what_nobody_asks_for_is_not_kept():
    ahead = EncodedAhead(prompts(2 * EARLY), encode, lambda prompt: True)
    for _ in ahead.prompts:
        assert len(ahead._coming) <= EARLY + AHEAD + 1
    assert not ahead._coming


def test_rows_that_need_no_encoding_are_not_read_before_they_are_asked_for_but_the_first():
    read = []
    noted = (read.append(prompt.row) or prompt for prompt in prompts(EARLY + 50))
    ahead = EncodedAhead(noted, encode, lambda prompt: False)
    ahead._early.result(20)
    assert len(read) == EARLY
    for prompt in ahead.prompts:
        assert read[-1] == max(prompt.row, EARLY - 1)


def slow(count, at, reached, goes_on, read):
    """Prompts, of which number `at` comes when it may."""
    for prompt in prompts(count):
        read.append(prompt.row)
        if prompt.row == at:
            reached.set()
            assert goes_on.wait(20)
        yield prompt


def test_reading_early_ends_where_nobody_asks_any_more():
    reached, goes_on, read = threading.Event(), threading.Event(), []
    ahead = EncodedAhead(slow(EARLY, 5, reached, goes_on, read), encode, lambda prompt: False)
    assert reached.wait(20)
    ahead.close()
    goes_on.set()
    ahead._early.result(20)
    assert read == [*range(6)]


@pytest.mark.parametrize("wanted", [True, False])
def test_who_asks_while_the_thread_reads_early_gets_every_prompt_in_its_order(wanted):
    for attempt in range(20):
        reached, goes_on, read = threading.Event(), threading.Event(), []
        goes_on.set()
        ahead = EncodedAhead(slow(EARLY + 50, 5, reached, goes_on, read), encode, lambda prompt: wanted)
        found = [prompt.row for prompt in ahead.prompts]
        assert found == read == [*range(EARLY + 50)], attempt


def test_long_prompts_are_not_all_read_early():
    long = (Prompt(row, str(row), "x" * (EARLY_LENGTH // 4), None, {}, "", None) for row in range(50))
    ahead = EncodedAhead(long, encode, lambda prompt: False)
    ahead._early.result(20)
    assert len(ahead._ahead) == 5 and len([*ahead.prompts]) == 50
