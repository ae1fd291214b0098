"""Stop texts are found as soon as the tokens say them, wherever the borders of tokens lie."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noria.rows.stopping import StopTexts
from noria.rows.tokenizer import Tokenizer

DEMO = Path(__file__).parent.parent / "inputs" / "demo" / "model"
TOKENIZER = Tokenizer({"tokenizer.json": (DEMO / "tokenizer.json").read_bytes()}, {}, {})
VOCAB = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]


def bytes_to_unicode():
    """How byte-level BPE writes bytes (GPT-2's encoder.py)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + place) for place, byte in enumerate(others)}


LETTERS = bytes_to_unicode()


def byte_tokens(text):
    """A token a byte: every character beyond ASCII is cut."""
    return [VOCAB[LETTERS[byte]] for byte in text.encode()]


def grow(token_ids, texts, least=0, decode=TOKENIZER.decode):
    """(tokens until it stops, text before the stop text), or (all of them, None)."""
    search = StopTexts(texts, decode, least)
    for count in range(1, len(token_ids) + 1):
        end = search.find(token_ids[:count])
        if end is not None:
            return count, decode(token_ids[:count])[:end]
    return len(token_ids), None


def expected(token_ids, texts, decode=TOKENIZER.decode):
    """The same from the text of every beginning, decoded anew each time."""
    for count in range(1, len(token_ids) + 1):
        text = decode(token_ids[:count])
        places = [text.find(stop) for stop in texts if stop in text]
        if places:
            return count, text[: min(places)]
    return len(token_ids), None


def test_a_text_across_the_border_of_two_tokens_is_found_and_cut():
    ids = TOKENIZER.encode("and God said unto Moses", add_special_tokens=False)
    pieces = [TOKENIZER.decode([token_id]) for token_id in ids]
    border = len(pieces[0])
    stop = "".join(pieces)[border - 2 : border + 3]
    assert not any(stop in piece for piece in pieces)
    assert grow(ids, [stop])[1] == "".join(pieces)[: border - 2]


def test_a_character_that_is_cut_in_the_middle_is_waited_for():
    ids = byte_tokens("naïve 😀 end")
    assert grow(ids, ["😀"]) == (len("naïve 😀".encode()), "naïve ")
    assert grow(ids, ["ï"]) == (4, "na")
    assert grow(ids, [" 😀 e"]) == (len("naïve 😀 e".encode()), "naïve")


def test_a_text_is_found_before_the_character_after_it_is_whole():
    # The last byte of a token may begin a character: the text before it is certain already.
    ids = [*byte_tokens("ab"), *byte_tokens("é")[:1]]
    assert grow(ids, ["ab"], decode=TOKENIZER.decode) == (2, "")
    merged = StopTexts(["ab"], lambda ids: "ab\ufffd" if ids else "", 0)
    assert merged.find([1]) == 0


def test_the_earliest_of_several_texts_cuts():
    ids = byte_tokens("one two three")
    assert grow(ids, ["two", "one two"])[1] == ""
    assert grow(ids, ["wo t", "two"]) == (7, "one ")


def test_a_text_does_not_count_before_the_least_number_of_tokens():
    ids = byte_tokens("a.b.c.d")
    assert grow(ids, ["."]) == (2, "a")
    assert grow(ids, ["."], least=2) == (2, "a")
    assert grow(ids, ["."], least=3) == (4, "a.b")
    assert grow(ids, [".b", "b.c"], least=4) == (5, "a.")
    assert grow(ids, ["."], least=20) == (7, None)


def test_bytes_that_never_become_a_character_do_not_hide_what_follows():
    bad = VOCAB[LETTERS[0xF0]]
    ids = [bad] * 30 + byte_tokens("stop here")
    assert grow(ids, ["stop"])[0] == 34


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([*byte_tokens("aé😀中b"), *TOKENIZER.encode("and the LORD said. aaab")]), max_size=30),
    st.lists(
        st.sampled_from(["a", "é", "😀中", "aa", " the L", "b😀", "and", "D s", ".", "中a"]), min_size=1, max_size=3
    ),
)
def test_any_tokens_stop_where_decoding_everything_anew_would_stop_them(token_ids, texts):
    assert grow(token_ids, texts) == expected(token_ids, texts)


@pytest.mark.parametrize(
    "token_ids",
    [TOKENIZER.encode("and the LORD said unto Moses ") * 40, [VOCAB[LETTERS[0xF0]]] * 200],
    ids=["text", "bytes that are no characters"],
)
def test_a_token_costs_the_same_however_long_the_sequence_is(token_ids):
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return TOKENIZER.decode(ids)

    grow(token_ids, ["never there"], decode=decode)
    assert max(decoded) < 20
