"""Tokenizers of real kinds, built here, against transformers reading the same files."""

import json
import time

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from noria.errors import InputError
from noria.rows import tokenizer as module
from noria.rows.tokenizer import Tokenizer, prompt_token_ids

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "the cat sat on the mat, and the dog sat on the log",
    "Größe, naïve café: 東京 и Москва 🎉",
] * 20
TEXTS = [
    "the cat sat",
    " the cat",
    "the  cat\n\nand\tthe dog ",
    "Größe 東京 🎉👩‍👩‍👧 \u0000 Москва",
    "never seen: ξ \U0001f9ff",
    "",
    " ",
    "a </s> b <|end|> c",
    "the " * 300,
]
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def bos_template(backend):
    bos = backend.token_to_id("<s>")
    return processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos)])


def byte_level(specials=("<s>", "</s>", "<|end|>")):
    """As Llama 3, GPT-2 and Qwen have it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=ALPHABET, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level_with_bos():
    backend = byte_level()
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_template(backend)])
    return backend


def sentencepiece_like(normalized=False):
    """As Llama 2 and Mistral have it: byte fallback, and a space put before the text."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False, limit_alphabet=40
    )
    backend.train_from_iterator(CORPUS, trainer)
    tree = json.loads(backend.to_str())
    # The bytes are plain words of the vocabulary in real files, not special tokens.
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in fallback]
    backend = Backend.from_str(json.dumps(tree))
    if normalized:
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = bos_template(backend)
    return backend


def truncated():
    """tokenizer.json as training leaves it, with truncation and padding on."""
    backend = byte_level_with_bos()
    backend.enable_truncation(4)
    backend.enable_padding(length=8, pad_token="<s>", pad_id=0)
    return backend


KINDS = {
    "byte level with a BOS": byte_level_with_bos,
    "byte level without a BOS": byte_level,
    "Metaspace with byte fallback": sentencepiece_like,
    "Prepend and Replace with byte fallback": lambda: sentencepiece_like(normalized=True),
    "truncation and padding left on": truncated,
}
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "__type": "AddedToken"},
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def files_of(backend, **settings):
    return {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(SETTINGS | settings).encode(),
    }


def both(tmp_path, files, kind=PreTrainedTokenizerFast, config=None):
    """Noria's tokenizer and transformers', of the same files."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return Tokenizer(files, config or {}, {}), kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_and_texts_are_those_of_transformers(kind, tmp_path):
    ours, theirs = both(tmp_path, files_of(KINDS[kind]()))
    for text in TEXTS:
        token_ids = theirs(text).input_ids
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_add_bos_token_beside_a_tokenizer_json_is_taken_as_transformers_takes_it(kind, add_bos_token, tmp_path):
    ours, theirs = both(tmp_path, files_of(KINDS[kind](), add_bos_token=add_bos_token))
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("in_settings", [True, False])
@pytest.mark.parametrize("added", [[], ["<extra>", "<more>"]])
def test_vocabulary_and_merges_alone_are_the_tokenizer_of_opt_and_gpt2(add_bos_token, added, in_settings, tmp_path):
    model = json.loads(byte_level(("<s>", "<pad>", "</s>")).to_str())["model"]
    added = {text: token_id for token_id, text in enumerate(added, len(model["vocab"]))}
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""])
    decoder = {str(token_id): {"content": text, "normalized": True} for text, token_id in added.items()}
    settings = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    files = {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": merges.encode(),
        "special_tokens_map.json": json.dumps(settings).encode(),
        "added_tokens.json": json.dumps(added).encode(),
        "tokenizer_config.json": json.dumps({"add_bos_token": add_bos_token}).encode(),
    }
    if in_settings:
        whole = settings | {"add_bos_token": add_bos_token, "added_tokens_decoder": decoder}
        files["tokenizer_config.json"] = json.dumps(whole).encode()
        del files["added_tokens.json"]
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    ours, theirs = both(tmp_path, files, AutoTokenizer, {"model_type": "opt"})
    for text in [*TEXTS, "a <extra> b<more>c <pad>"]:
        token_ids = theirs(text).input_ids
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert ours.end_token_ids == {2}


@pytest.mark.parametrize("kind", ["byte level with a BOS", "Metaspace with byte fallback"])
def test_a_text_that_begins_with_the_bos_has_one_bos_and_no_other_text_loses_any(kind):
    tokenizer = Tokenizer(files_of(KINDS[kind]()), {}, {})
    bos = Backend.from_str(KINDS[kind]().to_str()).token_to_id("<s>")
    assert tokenizer.encode("<s>the cat").count(bos) == 1
    assert tokenizer.encode("<s>the cat")[0] == bos
    assert tokenizer.encode("<s>") == tokenizer.encode("") == [bos]
    assert tokenizer.encode("<s><s>the").count(bos) == 2  # as the user wrote it
    assert tokenizer.encode("the <s>cat").count(bos) == 2


def test_a_beginning_of_two_tokens_is_doubled_only_if_both_are():
    backend = byte_level()
    begin, middle = backend.token_to_id("<s>"), backend.token_to_id("<|end|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> <|end|> $A", special_tokens=[("<s>", begin), ("<|end|>", middle)]
    )
    tokenizer = Tokenizer(files_of(backend), {}, {})
    assert tokenizer.encode("<s><|end|>the") == tokenizer.encode("the")
    assert tokenizer.encode("<s>the") == [begin, middle, begin, *tokenizer.encode("the")[2:]]


def test_a_tokenizer_that_adds_no_bos_keeps_those_of_the_text():
    tokenizer = Tokenizer(files_of(byte_level()), {}, {})
    bos = byte_level().token_to_id("<s>")
    assert tokenizer.encode("<s>the").count(bos) == 1
    assert tokenizer.encode("<s><s>the").count(bos) == 2


def test_token_ids_of_the_user_are_used_exactly_as_they_are():
    tokenizer = Tokenizer(files_of(byte_level_with_bos()), {}, {})
    for token_ids in ([0, 0, 5], [5], [399]):
        assert prompt_token_ids(tokenizer, "", token_ids, 400) == token_ids


def test_ids_outside_the_models_vocabulary_and_prompts_without_tokens_are_refused():
    tokenizer = Tokenizer(files_of(byte_level()), {}, {})
    for token_ids in ([5, 400], [-1]):
        with pytest.raises(InputError, match=f"token id {token_ids[-1]} .* 400"):
            prompt_token_ids(tokenizer, "", token_ids, 400)
    largest = max(tokenizer.encode("the cat sat on the mat"))
    with pytest.raises(InputError, match=f"token id {largest} is not in the model's vocabulary of {largest}"):
        prompt_token_ids(tokenizer, "the cat sat on the mat", None, largest)
    assert prompt_token_ids(tokenizer, "the cat sat on the mat", None, largest + 1)
    with pytest.raises(InputError, match="no tokens"):
        prompt_token_ids(tokenizer, "", None, 400)


@pytest.mark.parametrize("kind", ["byte level without a BOS", "Metaspace with byte fallback"])
def test_a_character_that_is_cut_in_the_middle_becomes_a_replacement_character(kind):
    tokenizer = Tokenizer(files_of(KINDS[kind]()), {}, {})
    token_ids = tokenizer.encode("the 🧿")
    assert tokenizer.decode(token_ids) == "the 🧿"
    text = tokenizer.decode(token_ids[:-1])
    assert text.startswith("the \ufffd") and set(text[4:]) == {"\ufffd"}


def test_lone_surrogates_are_read_as_replacement_characters():
    tokenizer = Tokenizer(files_of(byte_level()), {}, {})
    assert tokenizer.encode("a\ud83db\udc00") == tokenizer.encode("a\ufffdb\ufffd")
    assert tokenizer.encode("\ud83c\udf89") == tokenizer.encode("🎉")


def test_special_tokens_are_left_out_of_texts_even_if_only_the_settings_call_them_special(tmp_path):
    tree = json.loads(byte_level().to_str())
    for token in tree["added_tokens"]:
        token["special"] = False
    backend = Backend.from_str(json.dumps(tree))
    ours, theirs = both(tmp_path, files_of(backend, pad_token="<|end|>"))
    token_ids = theirs("a<|end|></s>b").input_ids
    assert ours.encode("a<|end|></s>b") == token_ids
    assert ours.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True) == "ab"


def test_ids_that_the_tokenizer_does_not_have_are_no_text():
    tokenizer = Tokenizer(files_of(byte_level()), {}, {})
    token_ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*token_ids, 100_000]) == "the cat"


def test_end_tokens_are_the_union_of_all_that_name_one():
    files = files_of(byte_level())
    end = byte_level().token_to_id("</s>")
    assert Tokenizer(files, {"eos_token_id": 9}, {"eos_token_id": [7, 8]}).end_token_ids == {7, 8, 9, end}
    assert Tokenizer(files, {"eos_token_id": [9]}, {"eos_token_id": 7}).end_token_ids == {7, 9, end}
    assert Tokenizer(files, {"eos_token_id": None}, {}).end_token_ids == {end}
    assert Tokenizer({}, {"eos_token_id": 9}, {}).end_token_ids == {9}
    assert Tokenizer({}, {"text_config": {"eos_token_id": [5, 6]}}, {"eos_token_id": 7}).end_token_ids == {5, 6, 7}
    assert Tokenizer({}, {"text_config": None}, {}).end_token_ids == frozenset()
    assert Tokenizer({}, {}, {}).end_token_ids == frozenset()


def test_without_a_tokenizer_token_ids_run_and_text_is_refused_with_the_remedy():
    tokenizer = Tokenizer({"tokenizer_config.json": b"{}"}, {}, {})
    assert tokenizer.vocab_size == 0
    assert tokenizer.decode([1, 2]) == ""
    assert prompt_token_ids(tokenizer, "", [1, 2], 10) == [1, 2]
    with pytest.raises(InputError, match="tokenizer.json.*save_pretrained"):
        tokenizer.encode("text")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": b"{"},
        {"tokenizer.json": b"\xff"},
        {"tokenizer.json": b"{}"},
        {"tokenizer_config.json": b"["},
        {"tokenizer_config.json": b"[]"},
        {"special_tokens_map.json": b"\xff\xfe"},
        {"vocab.json": b'{"a": "b"}', "merges.txt": b""},
        {"vocab.json": b'{"a": 0}', "merges.txt": b"a b c"},
        {"tokenizer_config.json": b'{"bos_token": {"text": "<s>"}}'},
        {"tokenizer_config.json": b'{"added_tokens_decoder": [1]}'},
        {"tokenizer_config.json": b'{"extra_special_tokens": [5]}'},
        {"special_tokens_map.json": b'{"pad_token": 7}'},
    ],
)
def test_damaged_files_are_the_users_error(files):
    with pytest.raises(InputError, match="tokenizer|special_tokens_map"):
        Tokenizer(files, {"model_type": "gpt2"}, {})


def split_by(pattern):
    backend = Backend(models.BPE(vocab={"a": 0, "z": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return Tokenizer({"tokenizer.json": backend.to_str().encode()}, {}, {})


def test_a_text_on_which_the_tokenizer_gives_up_is_an_error_and_the_next_is_read():
    tokenizer = split_by("^(a|a)*$")
    for length in (40, 400):
        with pytest.raises(InputError, match="cannot read this text .*retry-limit"):
            tokenizer.encode("a" * length + "z")
    assert tokenizer.encode("aaz") == [0, 0, 1]
    strict = Tokenizer({"tokenizer.json": Backend(models.WordLevel({"a": 0})).to_str().encode()}, {}, {})
    with pytest.raises(InputError, match="cannot read this text .*UNK"):
        strict.encode("zzz")


def test_a_text_that_takes_for_ever_is_an_error_after_its_time_and_other_threads_go_on(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.2)
    monkeypatch.setattr(module, "_MOST_STUCK", 2)
    tokenizer = split_by("(?:a|a){19}(?![a-z])")  # 10 ms at every letter
    hard, easy = "a" * 250 + "z", "z" * 250
    for _ in range(2):
        begun = time.perf_counter()
        with pytest.raises(InputError, match="took more than 0 s with a text of 251 characters"):
            tokenizer.encode(hard)
        assert time.perf_counter() - begun < 2
        if tokenizer._num_stuck < 2:
            assert tokenizer.encode(easy) == [1] * 250
    with pytest.raises(InputError, match="did not finish 2 texts"):
        tokenizer.encode(easy)
