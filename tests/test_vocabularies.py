"""Tokenizers in the formats of their makers' own programs, against these programs (data/tokenizers/make.py)."""

import base64
import json
import random
from pathlib import Path

import pytest

import tiny_models
from counts import count
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.vocabularies import tokenizer_files
from noria.errors import InputError
from noria.rows.tokenizer import Tokenizer, tokenizer_of

DATA = json.loads((Path(__file__).parent / "data/tokenizers/tokenizers.json").read_text())


def directory(folder, name, **files):
    """A model directory with the tokenizer of a case; `files` override its files, by name with __ for the dot."""
    case = DATA["cases"][name]
    contents = {case["name"]: base64.b64decode(case["content"])}
    if case["settings"]:
        contents["tokenizer_config.json"] = json.dumps(case["settings"]).encode()
    contents |= {key.replace("__", "."): value for key, value in files.items()}
    for file, content in contents.items():
        (folder / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    return Directory(folder)


def made(folder, name, **files):
    found, notes = tokenizer_files(directory(folder, name, **files))
    assert len(notes) == 1
    return Tokenizer(found, {"model_type": "mistral"}, {}), notes[0]


@pytest.mark.parametrize("name", DATA["cases"])
def test_ids_and_texts_are_those_of_the_makers_library(name, tmp_path):
    case, (tokenizer, _) = DATA["cases"][name], made(tmp_path, name)
    compared = 0
    for text, ids, decoded in zip(DATA["texts"], case["ids"], case["decoded"], strict=True):
        if ids is None or (name == "Unigram" and "<0x41>" in text):
            continue
        assert tokenizer.encode(text) == ids, text
        unknown = tokenizer.special_ids.get("<unk>")
        if unknown not in ids:  # which sentencepiece writes as a question mark
            assert tokenizer.decode(ids, skip_special_tokens=name != "Kimi") == decoded, text
        compared += 1
    assert compared >= 90


def refused(folder, name, **files):
    with pytest.raises(InputError) as error:
        tokenizer_files(directory(folder, name, **files))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_text_begins_and_ends_as_the_settings_say(tmp_path):
    asked = {"add_bos_token": True, "add_eos_token": True}
    tokenizer, _ = made(tmp_path, "Llama", tokenizer_config__json=asked)
    plain = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.encode("the cat") == [1, *plain, 2]
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_a_space_is_put_before_the_first_text_alone_where_it_is_not_the_older_way(tmp_path):
    ids = {}
    for legacy in (True, False):
        (tmp_path / str(legacy)).mkdir()
        tokenizer, _ = made(tmp_path / str(legacy), "Llama", tokenizer_config__json={"legacy": legacy})
        ids[legacy] = tokenizer.encode("the cat</s>sat")
        whole, second = tokenizer.encode("the cat"), tokenizer.encode("sat")
        assert ids[legacy][: len(whole) + 1] == [*whole, 2]
        assert (ids[legacy][len(whole) + 1 :] == second) == legacy
    assert ids[True] != ids[False]


def test_pieces_that_stand_for_special_tokens_have_their_names(tmp_path):
    named = {"added_tokens_decoder": {"300": {"content": "<|im_start|>"}}}
    tokenizer, _ = made(tmp_path, "Llama", tokenizer_config__json=named)
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [300]


def test_the_pattern_is_read_where_the_makers_code_has_it_and_the_code_never_runs(tmp_path):
    code = "raise SystemExit\nclass TikTokenTokenizer:\n    pat_str: str = '|'.join([r'\\p{L}+', r'[^\\p{L}]+'])\n"
    tokenizer, note = made(tmp_path, "Kimi", tokenization_kimi__py=code.encode())
    assert note == "tokenizer.json is made of tiktoken.model: 380 tokens, words by the pattern of tokenization_kimi.py"
    text = "the cat 12345"
    reference = DATA["cases"]["Kimi"]["ids"][DATA["texts"].index("1234567890")]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("1234567890") != reference  # Kimi's own pattern cuts digits by three


@pytest.mark.parametrize(
    "code",
    [
        "class TikTokenTokenizer:\n    pat_str = make()",
        "class TikTokenTokenizer:\n    pat_str = '|'.join(parts)",
        "class Other:\n    pat_str = 'a'",
        "class TikTokenTokenizer",
        "(" * 100_000,
        "-" * 100_000 + "1",
        "class TikTokenTokenizer:\n    pat_str = '('",
        "x = 1\0",
    ],
)
def test_code_whose_pattern_is_not_written_out_is_refused(code, tmp_path):
    message = refused(tmp_path, "Kimi", tokenization_kimi__py=code.encode())
    assert "tokenizer.json" in message and "tok" in message


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


KIMI = DATA["cases"]["Kimi"]["settings"]
RANKS = base64.b64decode(DATA["cases"]["Kimi"]["content"])
TEKKEN = json.loads(base64.b64decode(DATA["cases"]["tekken"]["content"]))
FILES = {
    "no special tokens": (
        "Kimi",
        {"tokenizer_config__json": without(KIMI, "added_tokens_decoder")},
        "added_tokens_decoder",
    ),
    "no code and no known class": (
        "Kimi",
        {"tokenizer_config__json": KIMI | {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}},
        "XTokenizer",
    ),
    "an id of another token": (
        "Kimi",
        {"tokenizer_config__json": KIMI | {"added_tokens_decoder": {"7": {"content": "a"}}}},
        "begin at 380",
    ),
    "an id without an end": (
        "Kimi",
        {"tokenizer_config__json": KIMI | {"added_tokens_decoder": {"999999999": {"content": "a"}}}},
        "999999999",
    ),
    "a rank twice": ("Kimi", {"tiktoken__model": RANKS + RANKS.splitlines()[0]}, "line 381"),
    "a rank that lacks": ("Kimi", {"tiktoken__model": RANKS + b"/////////w== 400\n"}, "ranks are not"),
    "no token of a byte": ("Kimi", {"tiktoken__model": b"YQ== 0\n"}, "255 bytes"),
    "no line of ranks": ("Kimi", {"tiktoken__model": RANKS + b"YQ==\n"}, "line 381"),
    "another format": ("Kimi", {"tiktoken__model": b"GGUF"}, "tiktoken.model"),
    "special tokens that are missing": (
        "tekken",
        {"tekken__json": without(TEKKEN, "special_tokens")},
        "special_tokens",
    ),
    "no pattern": ("tekken", {"tekken__json": TEKKEN | {"config": {}}}, "pattern"),
    "a pattern that is none": (
        "tekken",
        {"tekken__json": TEKKEN | {"config": TEKKEN["config"] | {"pattern": "("}}},
        "pattern '('",
    ),
    "fewer tokens than its size": (
        "tekken",
        {"tekken__json": TEKKEN | {"config": TEKKEN["config"] | {"default_vocab_size": 99999}}},
        "99999",
    ),
    "ranks out of order": ("tekken", {"tekken__json": TEKKEN | {"vocab": TEKKEN["vocab"][::-1]}}, "vocab[0]"),
    "not JSON": ("tekken", {"tekken__json": b"{"}, "JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_tokenizer_that_is_not_understood_is_refused_with_its_file(name, tmp_path):
    case, files, words = FILES[name]
    message = refused(tmp_path, case, **files)
    assert words in message and str(tmp_path) in message


@pytest.mark.parametrize("field", ["words", "characters", "spaces after", "table", "unknown"])
def test_models_of_sentencepiece_that_compute_otherwise_are_refused(field, tmp_path):
    content = base64.b64decode(DATA["cases"]["Llama"]["content"])
    # The last value of a field counts: specs of their own behind the file's, field 2 the trainer's and 3 the normalizer's.
    added = {
        "words": b"\x12\x02\x18\x03",
        "characters": b"\x12\x02\x18\x04",
        "spaces after": b"\x12\x03\xc0\x01\x01",
        "table": b"\x1a\x03\x12\x01x",
        "unknown": b"\x12\x04\xc0\x02\xff\x7f",
    }
    message = refused(tmp_path, "Llama", tokenizer__model=content + added[field])
    words = {"spaces after": "before them", "table": "table of characters", "unknown": "unk_id"}
    assert words.get(field, field) in message and "tokenizer.model" in message


@pytest.mark.parametrize("name", ["Kimi", "tekken", "Llama", "Unigram"])
def test_damaged_files_are_refused_or_read_and_nothing_else(name, tmp_path):
    content = base64.b64decode(DATA["cases"][name]["content"])
    draw, file = random.Random(3), DATA["cases"][name]["name"].replace(".", "__")
    refusals = 0
    for number in range(count(250)):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 3))):
            damaged[draw.randrange(len(damaged) if draw.random() < 0.5 else 60)] = draw.randrange(256)
        damaged = damaged[: draw.randrange(len(damaged))] if draw.random() < 0.3 else damaged
        (tmp_path / str(number)).mkdir()
        try:
            tokenizer_files(directory(tmp_path / str(number), name, **{file: bytes(damaged)}))
        except InputError as error:
            refusals += 1
            assert str(tmp_path) in str(error) and "\n" not in str(error)
    assert refusals


def test_a_tokenizer_json_is_taken_before_any_other(tmp_path):
    found, notes = tokenizer_files(directory(tmp_path, "Llama", tokenizer__json=b"{}"))
    assert not notes and found["tokenizer.json"] == b"{}" and "tokenizer.model" not in found


@pytest.mark.slow
def test_convert_makes_the_tokenizer_and_says_so(tmp_path, capsys):
    config = tiny_models.LLAMA | {"vocab_size": 500}
    source = tiny_models.write_directory(tmp_path / "hf", config, tiny_models.state(config))
    directory(tmp_path, "Llama")
    (source / "tokenizer.model").write_bytes((tmp_path / "tokenizer.model").read_bytes())
    assert main(["convert", str(source), str(tmp_path / "model.h5")]) == 0
    assert "noria: tokenizer.json is made of tokenizer.model: " in capsys.readouterr().err
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        assert tokenizer_of(checkpoint).encode("the cat")
    (source / "tokenizer.model").write_bytes(b"GGUF")
    assert main(["convert", str(source), str(tmp_path / "other.h5")]) == 2
    said = capsys.readouterr().err
    assert "tokenizer.model" in said and "remove the file" in said and not (tmp_path / "other.h5").exists()
