"""What each token adds to a text, in bytes: written by hand for the known kinds; for all kinds the pieces joined are the text."""

import random

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import tiny_tokenizers
from counts import count
from noria.rows.pieces import Pieces
from noria.rows.tokenizer import Tokenizer
from noria.tools.text import storable

CUT = "\ufffd".encode()


def tokenizer_of(backend):
    return Tokenizer(tiny_tokenizers.files_of(backend), {}, {})


def byte_tokenizer():
    """A token a byte, and one for the word ` the`; `<s>` and `</s>` are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate(alphabet)} | {"Ġthe": 256}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return backend


def sentencepiece():
    """Words with `▁`, and a token a byte for what is no word."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "h", "ab"]
    backend = Backend(
        models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return backend


@pytest.fixture(scope="module")
def of_bytes():
    backend = byte_tokenizer()
    return Pieces(tokenizer_of(backend)), lambda text: backend.encode(text, add_special_tokens=False).ids, 258, 259


def test_a_token_of_a_byte_is_that_byte_and_an_emoji_is_four_of_them(of_bytes):
    pieces, ids, _, end = of_bytes
    found = pieces.of(ids("p"), [*ids("q"), *ids("🧬"), *ids("x"), end], "q🧬x", False)
    assert found == [b"q", b"\xf0", b"\x9f", b"\xa7", b"\xac", b"x"], "the end token is not in the text"
    assert pieces.spelled(256) == b" the" and pieces.spelled(end) == b"</s>" and pieces.spelled(10**6) is None
    assert [pieces.spelled(one) for one in ids("é\n ")] == [b"\xc3", b"\xa9", b"\n", b" "]


def test_a_row_that_ends_within_a_character_has_a_replacement_character_at_its_last_token(of_bytes):
    pieces, ids, _, _ = of_bytes
    assert pieces.of([], [*ids("q"), *ids("🧬")[:3]], "q\ufffd", True) == [b"q", b"", b"", CUT]
    broken = [*ids("🧬")[:2], *ids("a"), *ids("é")[:1], *ids("é")]
    assert pieces.of([], broken, "\ufffda\ufffdé", True) == [b"", CUT, b"a", CUT, b"\xc3", b"\xa9"]


def test_a_stop_text_cuts_the_token_in_which_it_begins_and_those_behind_it(of_bytes):
    pieces, ids, _, _ = of_bytes
    assert pieces.of([], [*ids("a"), 256, *ids("n")], "a t", False) == [b"a", b" t"]
    assert pieces.of([], [256, *ids("ab")], "", False) == []


def test_special_tokens_within_a_text_have_their_bytes_where_the_text_has_them(of_bytes):
    pieces, ids, begin, end = of_bytes
    row = [*ids("a"), begin, *ids("b"), end]
    assert pieces.of([], row, "ab", True) == [b"a", b"", b"b", b""]
    assert pieces.of([], row, "a<s>b</s>", False) == [b"a", b"<s>", b"b", b"</s>"]


def test_what_hdf5_cannot_hold_is_in_the_pieces_as_it_is_in_the_text(of_bytes):
    pieces, ids, _, _ = of_bytes
    assert pieces.of([], ids("a\0b"), "a\ufffdb", True) == [b"a", CUT, b"b"]


def test_a_character_that_the_prompt_began_belongs_to_the_token_that_makes_it_whole(of_bytes):
    pieces, ids, _, _ = of_bytes
    emoji = ids("🧬")
    assert pieces.of(emoji[:2], [*emoji[2:], *ids("x")], "🧬x", True) == [b"", "🧬".encode(), b"x"]


def test_words_of_sentencepiece_begin_with_their_space_and_bytes_are_bytes():
    pieces, the, space, h, ab = Pieces(tokenizer_of(sentencepiece())), 259, 260, 261, 262
    dna = [3 + byte for byte in "🧬".encode()]
    assert pieces.of([1, h], [the, space, *dna, ab, 2], " the 🧬ab", False) == [
        b" the", b" ", b"\xf0", b"\x9f", b"\xa7", b"\xac", b"ab",
    ]  # fmt: skip
    # Bytes that are no characters are decoded one by one.
    assert pieces.of([1, h], [ab, *dna[:2], ab], "ab\ufffd\ufffdab", True) == [b"ab", CUT, CUT, b"ab"]


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_the_pieces_of_any_tokens_joined_are_the_text(kind):
    tokenizer, draw = tokenizer_of(tiny_tokenizers.KINDS[kind]()), random.Random(kind)
    pieces = Pieces(tokenizer)
    for _ in range(count(500)):
        prompt, row = ([draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 12))] for _ in range(2))
        skip, to_the_end = draw.random() < 0.7, draw.random() < 0.5
        text = storable(tokenizer.writer(skip).continuation(prompt, row))
        if not to_the_end:
            text = text[: draw.randrange(len(text) + 1)]
        found = pieces.of(prompt, row, text, to_the_end)
        assert b"".join(found).decode() == text and len(found) <= len(row)
        assert not to_the_end or len(found) == len(row)


def test_of_a_row_that_thinks_the_tokens_of_its_answer_have_pieces_and_the_others_have_none(of_bytes):
    pieces, ids, begin, end = of_bytes
    thought = [begin, *ids("hm t"), *ids("</t>")]
    assert pieces.of([], [*thought, *ids(" a"), 256, end], "a the", False, 5) == [*[None] * 10, b"a", b" the"]
    assert pieces.of([], [*thought, end], "", False, 5) == [], "no answer"
    assert pieces.of([], [begin, *ids("hm")], "", True, 2) == [None] * 3, "the thinking was not closed"
    assert pieces.of([], [*ids("a"), 256], "a the", True, 0) == [b"a", b" the"], "it did not think"
