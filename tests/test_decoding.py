"""What new tokens say after a prompt: prompt and text together are what transformers' tokenizer says of all tokens."""

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import tiny_tokenizers
from counts import count
from noria.rows.tokenizer import Tokenizer

TEXTS = [
    "the cat sat on the mat",
    "def f(x):\n    return x",
    "Größe 東京 naïve 🎉👩‍👩‍👧 café",
    "it isn't 1234 , or !",
    "  two  spaces ",
]


@functools.cache
def both(kind, **more):
    """Noria's tokenizer of this kind and transformers'."""
    files = tiny_tokenizers.files_of(tiny_tokenizers.KINDS[kind](), **more)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return Tokenizer(files, {}, {}), PreTrainedTokenizerFast.from_pretrained(folder)


def check(kind, prompt, new, skip=True):
    """prompt + text is the whole; where the border cuts a character, what the prompt says before it."""
    ours, theirs = both(kind)
    text = ours.writer(skip).continuation(prompt, new)
    whole, known = (theirs.decode(ids, skip_special_tokens=skip) for ids in (prompt + new, prompt))
    if whole.startswith(known):
        assert known + text == whole
    else:
        beginnings = (theirs.decode(prompt[:end], skip_special_tokens=skip) for end in range(len(prompt) + 1))
        assert whole.endswith(text) and whole[: len(whole) - len(text)] in {
            beginning[: len(beginning) - cut] for beginning in beginnings for cut in (0, 1)
        }


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_prompt_and_text_are_the_whole_wherever_the_prompt_ends(kind, text):
    ids = both(kind)[1](text).input_ids
    for border in range(len(ids) + 1):
        check(kind, ids[:border], ids[border:])


def test_the_space_before_the_first_word_is_kept():
    ours, _ = both("llama")
    prompt, whole = ours.encode("the cat"), ours.encode("the cat sat")
    assert whole[: len(prompt)] == prompt
    new = whole[len(prompt) :]
    assert ours.decode(new) == "sat" and ours.writer().continuation(prompt, new) == " sat"
    prompt, whole = ours.encode("def f(x):"), ours.encode("def f(x):    return")
    assert whole[: len(prompt)] == prompt
    assert ours.writer().continuation(prompt, whole[len(prompt) :]) == "    return"


def test_a_prompt_without_text_leaves_the_first_word_as_the_tokenizer_has_it():
    ours, theirs = both("llama")
    bos, new = ours.encode("")[0], ours.encode("the cat", add_special_tokens=False)
    assert ours.writer().continuation([bos], new) == theirs.decode([bos, *new], skip_special_tokens=True) == "the cat"
    assert ours.writer().continuation([], new) == "the cat"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_character_that_begins_in_the_prompt_is_text_where_it_becomes_whole(kind):
    ours, _ = both(kind)
    ids = ours.encode("so 🧿 the", add_special_tokens=False)
    assert ours.decode(ids[-1:]).strip() == "the"
    for border in range(len(ids) - 3, len(ids) - 1):
        assert ours.writer().continuation(ids[:border], ids[border:]) == "🧿 the"


def test_a_run_of_bytes_is_not_cut_however_long_it_is():
    ours, _ = both("llama")
    ids = ours.encode("🧿" * 40, add_special_tokens=False)
    for border in range(len(ids) - 9, len(ids)):
        check("llama", ids[:border], ids[border:])
    broken = [ours._backend.token_to_id("<0x80>"), *ids]
    check("llama", broken[:-9], broken[-9:])


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
@settings(max_examples=count(1000), deadline=None)
@given(st.data())
def test_any_tokens_are_written_as_all_of_them_together(kind, data):
    size = both(kind)[0].vocab_size + 2
    drawn = st.lists(st.integers(0, size - 1) | st.integers(0, 9), max_size=20)
    check(kind, data.draw(drawn), data.draw(drawn), data.draw(st.booleans()))


def test_only_the_last_few_tokens_of_a_prompt_are_decoded():
    ours, _ = both("llama")
    ids = ours.encode("the cat sat on the mat " * 100)
    assert len(ours.writer().context(ids)) < 20
    special = [1] * 50
    assert ours.writer().context(ids + special)[-50:] == special and len(ours.writer().context(ids + special)) < 70
