"""Stop texts are found as soon as the tokens say them, wherever the borders of tokens lie."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_tokenizers
from counts import count
from noria.rows.decoding import Writer
from noria.rows.ends import StopTexts
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling

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


WRITER = TOKENIZER.writer()


def words(*pieces):
    """A tokenizer whose token i says pieces[i]."""
    return Writer(lambda ids: "".join(pieces[token_id] for token_id in ids), lambda token_id: pieces[token_id])


def grow(token_ids, texts, prompt=(), writer=WRITER, **keys):
    """(tokens until it stops, text up to where it is cut), or (all of them, None)."""
    search = StopTexts(Sampling(stop=texts, **keys), writer, prompt)
    for number in range(1, len(token_ids) + 1):
        end = search.find(token_ids[:number])
        if end is not None:
            return number, writer.continuation(prompt, token_ids[:number])[:end]
    return len(token_ids), None


def expected(token_ids, texts, prompt=(), writer=WRITER):
    """The same from the text of every beginning, decoded anew each time.

    Replacement characters at its end count when there were some there after each of the last eight tokens with a text.
    """
    cut = 0
    for number in range(1, len(token_ids) + 1):
        text = writer.continuation(prompt, token_ids[:number])
        has_text = writer.piece(token_ids[number - 1]) is not None
        cut = (cut + has_text or 1) if writer.decode([*prompt, *token_ids[:number]]).endswith("\ufffd") else 0
        if 0 < cut < 8:
            text = text.rstrip("\ufffd")
        cut %= 8
        places = [text.find(stop) for stop in texts if stop in text]
        if places:
            return number, text[: min(places)]
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
    assert grow(ids, ["ab"]) == (2, "")
    assert grow([0], ["ab"], writer=words("ab\ufffd")) == (1, "")


def test_the_earliest_of_several_texts_cuts():
    ids = byte_tokens("one two three")
    assert grow(ids, ["two", "one two"])[1] == ""
    assert grow(ids, ["wo t", "two"]) == (7, "one ")


def test_a_text_does_not_count_before_the_least_number_of_tokens():
    ids = byte_tokens("a.b.c.d")
    assert grow(ids, ["."]) == (2, "a")
    assert grow(ids, ["."], min_new_tokens=2) == (2, "a")
    assert grow(ids, ["."], min_new_tokens=3) == (4, "a.b")
    assert grow(ids, [".b", "b.c"], min_new_tokens=4) == (5, "a.")
    assert grow(ids, ["."], min_new_tokens=20) == (7, None)


def test_bytes_that_never_become_a_character_do_not_hide_what_follows():
    bad = VOCAB[LETTERS[0xF0]]
    ids = [bad] * 30 + byte_tokens("stop here")
    assert grow(ids, ["stop"])[0] == 34


def test_a_text_that_begins_with_the_space_after_the_prompt_is_found():
    ours = Tokenizer(tiny_tokenizers.files_of(tiny_tokenizers.llama()), {}, {})
    prompt, whole = ours.encode("the cat"), ours.encode("the cat sat on the mat")
    new = whole[len(prompt) :]
    assert grow(new, [" sat"], prompt, ours.writer())[1] == ""
    assert grow(new, [" on the"], prompt, ours.writer())[1] == " sat"
    special = [ours.special_ids["<|end|>"]]
    assert grow([*special, *new], [" sat"], prompt, ours.writer())[1] == ""
    assert grow(new[:-1] + special * 20 + new[-1:], [" mat"], prompt, ours.writer())[1] == " sat on the"


def test_the_replacement_of_a_character_that_is_not_whole_is_no_text():
    assert grow(byte_tokens("a😀b"), ["\ufffd"])[1] is None
    assert grow(byte_tokens("a😀b"), ["a\ufffd", "😀"]) == (5, "a")
    assert grow(byte_tokens("a\ufffdb"), ["\ufffd"]) == (5, "a")  # a whole one counts once something follows it
    ours = Tokenizer(tiny_tokenizers.files_of(tiny_tokenizers.llama()), {}, {})
    new = ours.encode("🧿🧿 x", add_special_tokens=False)[1:]
    assert grow(new, ["\ufffd"], writer=ours.writer())[1] is None
    prompt = byte_tokens("a😀")[:3]
    assert grow(byte_tokens("a😀")[3:], ["\ufffd"], prompt)[1] is None
    assert grow(byte_tokens("a😀")[3:], ["😀"], prompt) == (2, "")


def test_a_stop_text_stays_in_the_text_where_that_is_asked():
    ids = byte_tokens("one two three")
    assert grow(ids, ["wo t", "two"], include_stop_str_in_output=True) == (7, "one two")
    assert grow(ids, ["on", "one"], include_stop_str_in_output=True) == (2, "on")
    assert grow([0], ["t", "tw"], writer=words("two"), include_stop_str_in_output=True) == (1, "t")
    assert grow([0], ["tw", "t"], writer=words("two"), include_stop_str_in_output=True) == (1, "tw")


LLAMA = Tokenizer(tiny_tokenizers.files_of(tiny_tokenizers.llama()), {}, {})
DRAWN = {
    "byte level": (WRITER, [*byte_tokens("aé😀中b"), *TOKENIZER.encode("and the LORD said. aaab")]),
    "byte fallback": (LLAMA.writer(), LLAMA.encode("a🧿中b and the cat sat. aaab</s>", add_special_tokens=False)),
    "special tokens shown": (LLAMA.writer(False), LLAMA.encode("a🧿 the the</s>", add_special_tokens=False)),
}


@pytest.mark.parametrize("kind", DRAWN)
@settings(max_examples=count(1000), deadline=None)
@given(st.data())
def test_any_tokens_stop_where_decoding_everything_anew_would_stop_them(kind, data):
    writer, ids = DRAWN[kind]
    token_ids = data.draw(st.lists(st.sampled_from(ids), max_size=30))
    prompt = data.draw(st.lists(st.sampled_from(ids), max_size=12))
    some = ["a", "é", "😀中", "aa", " the", "b😀", "and", "D s", ".", "中a", "🧿", "</s>", " c"]
    texts = data.draw(st.lists(st.sampled_from(some), min_size=1, max_size=3))
    assert grow(token_ids, texts, prompt, writer) == expected(token_ids, texts, prompt, writer)


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

    prompt = TOKENIZER.encode("and the LORD said unto Moses ") * 40
    grow(token_ids, ["never there"], prompt, Writer(decode, WRITER.piece))
    assert max(decoded) < 30
