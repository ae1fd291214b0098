"""The pages of the KV cache against a model that knows only sets of pages."""

import itertools
import random
import time
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from noria.rows.pages import Pages
from noria.step import Run

NUM_PAGES = 24


def pages_of(runs):
    return [page for run in runs for page in range(run.start, run.start + run.count)]


def longest_free_run(free):
    longest = length = 0
    for page in range(NUM_PAGES):
        length = length + 1 if page in free else 0
        longest = max(longest, length)
    return longest


class AgainstSets(RuleBasedStateMachine):
    """Any sequence of reservations, shares and releases leaves the same pages free as counting holders one by one."""

    def __init__(self):
        super().__init__()
        self.pages = Pages(NUM_PAGES)
        self.holders = Counter()
        self.held = []  # runs of each holder

    def free(self):
        return {page for page in range(NUM_PAGES) if self.holders[page] == 0}

    @rule(count=st.integers(0, NUM_PAGES + 2))
    def reserve(self, count):
        free = self.free()
        runs = self.pages.reserve(count)
        if count > len(free):
            assert runs is None
            return
        assert len(pages_of(runs)) == len(set(pages_of(runs))) == count
        assert set(pages_of(runs)) <= free
        assert all(run.count > 0 for run in runs)
        assert len(runs) == (count > 0) if count <= longest_free_run(free) else len(runs) > 1
        self.holders.update(pages_of(runs))
        self.held.append(runs)

    @rule(data=st.data(), most=st.integers(0, 6))
    def extend(self, data, most):
        if self.held and (runs := data.draw(st.sampled_from(self.held))):
            last, free = runs[-1], self.free()
            wanted = list(itertools.takewhile(free.__contains__, range(last.start + last.count, NUM_PAGES)))[:most]
            longer = self.pages.extend(last, most)
            assert (longer.start, longer.count) == (last.start, last.count + len(wanted))
            self.holders.update(wanted)
            self.held.append(tuple(Run(page, 1) for page in wanted))

    @rule(data=st.data())
    def share(self, data):
        if self.held:
            runs = data.draw(st.sampled_from(self.held))
            # A shared prefix: the first pages of a sequence, whatever runs they lie in.
            prefix = pages_of(runs)[: data.draw(st.integers(0, len(pages_of(runs))))]
            runs = tuple(Run(page, 1) for page in prefix)
            self.pages.share(runs)
            self.holders.update(prefix)
            self.held.append(runs)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            runs = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pages.release(runs)
            self.holders.subtract(pages_of(runs))

    @invariant()
    def the_same_number_is_free(self):
        assert self.pages.num_free == len(self.free())


TestAgainstSets = AgainstSets.TestCase
TestAgainstSets.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_a_reservation_is_one_run_as_long_as_a_free_run_holds_it():
    pages = Pages(10)
    first, second, third = pages.reserve(3), pages.reserve(2), pages.reserve(5)
    assert first == (Run(0, 3),) and second == (Run(3, 2),) and third == (Run(5, 5),)
    pages.release(first)
    pages.release(third)
    assert pages.reserve(3) == (Run(0, 3),)  # the smaller of the two holes
    assert pages.reserve(5) == (Run(5, 5),)


def test_a_reservation_that_no_hole_holds_is_split_into_the_fewest_runs():
    pages = Pages(12)
    runs = [pages.reserve(2) for _ in range(6)]
    for index in (0, 2, 3, 5):
        pages.release(runs[index])
    assert sorted(pages.reserve(6), key=lambda run: run.start) == [Run(0, 2), Run(4, 4)]


def test_neighbours_merge_when_they_are_released_in_any_order():
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0]):
        pages = Pages(9)
        runs = [pages.reserve(3) for _ in range(3)]
        for index in order:
            pages.release(runs[index])
        assert pages.reserve(9) == (Run(0, 9),)


def test_too_large_a_reservation_takes_nothing():
    pages = Pages(4)
    assert pages.reserve(5) is None
    assert pages.num_free == 4
    assert Pages(0).reserve(1) is None
    assert Pages(0).reserve(0) == ()


def test_a_shared_page_is_free_only_after_its_last_release():
    pages = Pages(4)
    runs = pages.reserve(4)
    pages.share((Run(1, 2),))
    pages.release(runs)
    assert pages.num_free == 2
    pages.release((Run(1, 2),))
    assert pages.reserve(4) == (Run(0, 4),)


def test_a_release_of_free_pages_is_our_own_mistake():
    pages = Pages(4)
    runs = pages.reserve(2)
    pages.release(runs)
    for wrong in (runs, (Run(3, 2),)):
        with pytest.raises(AssertionError):
            pages.release(wrong)
        with pytest.raises(AssertionError):
            pages.share(wrong)
    assert pages.num_free == 4


def test_a_hundred_thousand_pages_and_thousands_of_reservations_are_quick():
    pages, held, choose = Pages(100_000), [], random.Random(1)
    begin = time.process_time()
    for _ in range(20_000):
        if (runs := pages.reserve(choose.randint(1, 60))) is None:
            for _ in range(100):
                pages.release(held.pop(choose.randrange(len(held))))
        else:
            held.append(runs)
    assert len(held) > 2000
    assert time.process_time() - begin < 5  # it takes 0.2 s; a search through all free runs or pages takes minutes


def test_pages_that_begin_elsewhere_are_given_out_and_taken_back_all_the_same():
    pages = Pages(10, first=7)
    first, second = pages.reserve(6), pages.reserve(4)
    assert (first, second) == ((Run(7, 6),), (Run(13, 4),)) and pages.reserve(1) is None
    pages.share(first)
    pages.release(first)
    assert pages.num_free == 0
    pages.release(first)
    pages.release(second)
    assert pages.num_free == 10 and pages.reserve(10) == (Run(7, 10),)
