"""Pages and states of a tier: as many as have room, in the proportion in which rows hold them."""

from hypothesis import given
from hypothesis import strategies as st

from noria.plan.pools import Usual

SIZES = st.integers(0, 60)


@given(st.integers(1, 7), st.integers(0, 4), SIZES, SIZES, st.integers(0, 5000), st.integers(0, 3))
def test_no_page_more_would_find_room(pages, states, page, state, nbytes, prompts):
    usual = Usual(pages, states, prompts)
    found = usual.fitting(nbytes, page, state)
    if not pages * page + states * state:
        assert found == 1 << 62
        return
    assert usual.nbytes(found, page, state) <= nbytes or not found
    assert usual.nbytes(found + 1, page, state) > nbytes


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 200))
def test_every_usual_prompt_that_has_pages_has_its_states_and_one_more_beginning_too(pages, states, count):
    usual = Usual(pages, states)
    assert usual.states_beside(count) >= (count // pages) * states + 1
    assert usual.pools({"gpu": count, "cpu": 0})["cpu"] == {"pages": 0, "states": 0}


def test_some_prompts_have_a_state_more_among_them():
    assert [Usual(2, 1, 3).states_beside(count) for count in (1, 4, 6, 7, 12)] == [2, 3, 5, 6, 9]


def test_a_family_without_states_has_none():
    assert Usual(3).pools({"gpu": 7}) == {"gpu": {"pages": 7, "states": 0}}
