"""Tokenizer directories in every form in which they are saved: Noria's tokenizer is what AutoTokenizer makes of them."""

import contextlib
import json
import random
import re

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

import tiny_models
import tiny_tokenizers
from counts import count, full, some
from noria import kinds
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.errors import InputError
from noria.models import TYPES, WRAPPERS
from noria.rows.tokenizer import Tokenizer, tokenizer_of
from noria.rows.tokenizer_classes import _OF_MODEL, _OVERRULED, AS_IS, CLASSES

transformers.logging.set_verbosity_error()
PIECES = [
    *(
        "the",
        " the",
        "cat",
        " Cat",
        "don't",
        "DON'T",
        "é",
        "e\u0301",
        "東京",
        "🎉",
        "1234",
        " 5",
        "5%\n",
        "\n",
        "  ",
        "\t",
    ),
    *("<s>", "</s>", "<|end|>", " <|end|> ", "<|x|>", " <|x|>  ", "<extra>", "[PAD]", "THE", " !", " .", "x", "User"),
]


def make_texts(number):
    random_pieces = random.Random(5)
    return [*PIECES, ""] + [
        "".join(random_pieces.choices(PIECES, k=random_pieces.randint(2, 8))) for _ in range(number - 30)
    ]


TEXTS = make_texts(200)


def flags(text, **more):
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": text, **plain, "special": True} | more


def typed(text, **more):
    """A token as older settings have it."""
    token = {"__type": "AddedToken", **flags(text, **more)}
    return {name: value for name, value in token.items() if name != "special"}


def vocab_of(tree):
    return tree["model"]["vocab"]


def write(folder, files, config):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "config.json").write_text(json.dumps(config))


def compare(folder, texts=TEXTS, model_type="llama", **config):
    """Noria's tokenizer of the folder, after it was found to be AutoTokenizer's in ids, texts and template variables."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type} | config))
    theirs = AutoTokenizer.from_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}
    ours = Tokenizer(files, {"model_type": model_type} | config, {})
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    begins = theirs("x").input_ids[0] != theirs("x", add_special_tokens=False).input_ids[0]
    for text in texts:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, add_special_tokens=False) == ids, text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
        whole = theirs(text).input_ids
        doubled = begins and whole[:1] == whole[1:2]  # Noria takes one BOS away where the text begins with one
        assert ours.encode(text) == whole[doubled:], text
    return ours, theirs


def directory(folder, kind="llama", settings=None, **files):
    """Files of one kind: `settings` override tokenizer_config.json; other files by name with __ for the dot."""
    content = tiny_tokenizers.files_of(tiny_tokenizers.KINDS[kind](), **(settings or {}))
    for name, text in content.items():
        (folder / name).write_bytes(text)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_what_transformers_saves_itself_is_read_as_it_reads_it(kind, tmp_path):
    directory(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<extra>", "User"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<|x|>"]})
    (tmp_path / "saved").mkdir()
    tokenizer.save_pretrained(tmp_path / "saved")
    compare(tmp_path / "saved")


SETTINGS = {
    "a token that tokenizer.json lacks": {"added_tokens_decoder": {"900": flags("<|x|>")}},
    "flags that win over tokenizer.json's": {"added_tokens_decoder": {"3": flags("<|end|>", lstrip=True, rstrip=True)}},
    "a token that is not special": {"added_tokens_decoder": {"3": flags("<|end|>", special=False)}},
    "a special token that is normalized": {"added_tokens_decoder": {"900": flags("THE", normalized=True)}},
    "a token of single words": {"added_tokens_decoder": {"901": flags("cat", single_word=True, special=False)}},
    "no tokens at all": {"added_tokens_decoder": {}},
    "additional_special_tokens": {"additional_special_tokens": ["User", "<|x|>"]},
    "additional_special_tokens as objects": {"additional_special_tokens": [typed("<|x|>", lstrip=True)]},
    "extra_special_tokens as a list": {"extra_special_tokens": ["<|x|>"]},
    "extra_special_tokens by name": {"extra_special_tokens": {"image_token": "<|x|>", "boi_token": "<extra>"}},
    "both": {"extra_special_tokens": ["<|x|>"], "additional_special_tokens": ["User"]},
    "a named token that is new": {"pad_token": "[PAD]"},
    "an end that is new": {"eos_token": "<|x|>"},
    "names of one's own": {"image_token": "<|x|>", "audio_token": typed("<extra>"), "wake_token": None},
    "names that are no tokens": {"add_prefix_token": True, "pad_token_id": 3},
    "objects": {"eos_token": typed("</s>", rstrip=True), "mask_token": typed("[PAD]", lstrip=True)},
    "no BOS": {"bos_token": None},
    "split_special_tokens": {"split_special_tokens": True},
    "clean_up_tokenization_spaces": {"clean_up_tokenization_spaces": True},
    "that even for BPE": {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    },
    "add_bos_token": {"add_bos_token": True, "add_eos_token": True},
}


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
def test_every_setting_means_what_it_means_to_transformers(kind, tmp_path):
    for number, (name, settings) in enumerate(some(SETTINGS.items())):
        (tmp_path / str(number)).mkdir()
        try:
            compare(directory(tmp_path / str(number), kind, settings), TEXTS if full() else TEXTS[::4])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


OLDER = {
    "a map beside settings that say otherwise": (
        {"eos_token": "</s>", "pad_token": "[PAD]"},
        {"special_tokens_map__json": {"eos_token": "<|end|>", "pad_token": {**flags("<|x|>"), "lstrip": True}}},
    ),
    "a map that settings with added_tokens_decoder overrule": (
        {"eos_token": "</s>", "added_tokens_decoder": {"3": flags("<|end|>")}},
        {"special_tokens_map__json": {"eos_token": "<|end|>"}},
    ),
    "added_tokens.json": ({"pad_token": "[PAD]"}, {"added_tokens__json": {"<extra>": 900, "[PAD]": 901}}),
    "added_tokens.json that settings overrule": (
        {"added_tokens_decoder": {}},
        {"added_tokens__json": {"<extra>": 900}},
    ),
    "a map with lists": ({}, {"special_tokens_map__json": {"additional_special_tokens": ["<|x|>", "User"]}}),
    "lists on both sides": (
        {"additional_special_tokens": ["<extra>"]},
        {"special_tokens_map__json": {"extra_special_tokens": ["<|x|>", {"content": "User", "lstrip": True}]}},
    ),
    "a map with names of one's own": (
        {},
        {
            "special_tokens_map__json": {
                "image_token": "<|x|>",
                "wake_token": flags("User", lstrip=True),
                "extra_special_tokens": {"boi_token": "<extra>"},
            }
        },
    ),
}


@pytest.mark.parametrize("name", OLDER)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_older_files_count_as_they_do_for_transformers(kind, name, tmp_path):
    settings, files = OLDER[name]
    compare(directory(tmp_path, kind, settings, **files), TEXTS[::2])


# (settings' class, model_type) and what more the settings say
BUILT = [
    ("llama", "LlamaTokenizer", "llama", {}),
    ("llama, legacy", "LlamaTokenizerFast", "llama", {"legacy": False}),
    ("llama, legacy", "LlamaTokenizer", "llama", {"legacy": True}),
    ("llama, legacy", "LlamaTokenizer", "llama", {"legacy": None}),
    ("llama", "LlamaTokenizer", "llama", {"add_prefix_space": False}),
    ("llama", "LlamaTokenizer", "llama", {"add_prefix_space": None, "legacy": False}),
    ("llama, legacy", "LlamaTokenizer", "mistral", {}),
    ("llama, legacy", "LlamaTokenizerFast", "mixtral", {"legacy": False}),
    ("llama, legacy", "LlamaTokenizer", "phi3", {"add_prefix_space": False}),
    ("llama3", "LlamaTokenizer", "llama", {}),
    ("llama3", "PreTrainedTokenizerFast", "llama", {}),
    ("llama3", "PreTrainedTokenizer", "llama", {}),
    ("llama3", "NoSuchTokenizerFast", "llama", {}),
    ("llama3", "NoSuchTokenizer", "gpt2", {}),
    ("llama3", None, "llama", {}),
    ("llama3", None, "qwen3", {}),
    ("llama3", "PreTrainedTokenizerFast", "qwen3", {}),
    ("llama3", "PreTrainedTokenizerFast", "qwen2", {}),
    ("llama3", "LlamaTokenizerFast", "qwen2", {}),
    ("llama3", "Qwen2TokenizerFast", "llama", {}),
    ("llama3", "GPT2TokenizerFast", "llama", {}),
    ("qwen2", "Qwen2Tokenizer", "qwen2", {"pad_token": "<|x|>", "add_prefix_space": True}),
    ("qwen2", "Qwen2Tokenizer", "qwen3_moe", {"eos_token": "<|end|>", "bos_token": None}),
    ("qwen2", "GPT2Tokenizer", "qwen3", {}),
    ("qwen2", None, "qwen3_vl_moe", {}),
    ("gpt2", "GPT2Tokenizer", "gpt2", {"add_prefix_space": True}),
    ("gpt2", None, "opt", {}),
    ("gpt2", "GPTNeoXTokenizerFast", "llama", {"pad_token": "[PAD]"}),
    ("llama3", "GPTNeoXTokenizerFast", "llama", {}),
    ("llama", "CodeLlamaTokenizer", "llama", {}),
    (
        "llama, legacy",
        "CodeLlamaTokenizerFast",
        "llama",
        {"add_prefix_space": False, "extra_special_tokens": ["<|x|>"]},
    ),
    ("llama, legacy", "CodeLlamaTokenizer", "llama", {"prefix_token": "<extra>", "fill_token": None}),
    ("unigram", "LlamaTokenizer", "llama", {}),
    ("wordpiece", "PreTrainedTokenizerFast", "gpt2", {"clean_up_tokenization_spaces": True}),
    ("llama without a prefix space", "GemmaTokenizerFast", "gemma3", {"pad_token": "[PAD]", "mask_token": None}),
    ("llama, legacy", "GemmaTokenizer", "gemma4", {}),
    ("llama", "GemmaTokenizer", "llama", {"add_bos_token": True, "unk_token": "<|end|>"}),
    ("llama", None, "gemma2", {}),
    ("gpt2", "CohereTokenizerFast", "cohere2", {"pad_token": "[PAD]"}),
    ("llama3", "CohereTokenizer", "cohere", {"add_prefix_space": True, "cls_token": "<|x|>"}),
    ("gpt2", "CodeGenTokenizer", "phi", {"add_prefix_space": True}),
    ("llama3", "CodeGenTokenizerFast", "llama", {"pad_token": "[PAD]"}),
    ("llama3", "GPT2Tokenizer", "starcoder2", {}),
    ("llama3", "GPTNeoXTokenizerFast", "olmo2", {}),
    ("llama, legacy", "LlamaTokenizer", "ernie4_5_moe", {}),
    ("llama3", "GPT2Tokenizer", "minimax_m2", {}),
    ("llama3", "GPT2Tokenizer", "granite", {}),
    ("llama3", "Qwen2Tokenizer", "qwen2_moe", {}),
]


@pytest.mark.parametrize(("kind", "name", "model_type", "settings"), BUILT)
def test_the_class_that_is_named_is_built_as_transformers_builds_it(kind, name, model_type, settings, tmp_path):
    directory(tmp_path, kind, {"tokenizer_class": name} | settings)
    if name is None:
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        del settings["tokenizer_class"]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    compare(tmp_path, TEXTS[::2], model_type)


def test_the_class_may_stand_in_the_models_config(tmp_path):
    directory(tmp_path, "llama, legacy")
    (tmp_path / "tokenizer_config.json").unlink()
    compare(tmp_path, TEXTS[::4], tokenizer_class="LlamaTokenizerFast")
    compare(tmp_path, TEXTS[::4], "mistral", tokenizer_class="LlamaTokenizerFast")


VOCABULARIES = [
    ("gpt2", "GPT2Tokenizer", "gpt2", {}),
    ("gpt2", None, "opt", {"add_bos_token": True, "pad_token": "<|x|>"}),
    ("gpt2", "GPT2Tokenizer", "opt", {"add_bos_token": True, "add_eos_token": True}),
    ("qwen2", "Qwen2Tokenizer", "qwen2", {"additional_special_tokens": ["<|end|>", "<|x|>"]}),
    ("qwen2", None, "qwen3", {}),
    ("qwen2", "Qwen2Tokenizer", "llama", {"bos_token": None}),
    ("gpt2", "GPTNeoXTokenizer", "llama", {}),
]


@pytest.mark.parametrize(("kind", "name", "model_type", "settings"), VOCABULARIES)
@pytest.mark.parametrize("added", ["decoder", "file", "none"])
def test_vocabulary_and_merges_are_read_by_the_rules_of_their_class(kind, name, model_type, settings, added, tmp_path):
    model = json.loads(tiny_tokenizers.KINDS[kind]().to_str())["model"]
    merges = "\n".join(["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""])
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(merges)
    keys = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings
    keys |= {} if name is None else {"tokenizer_class": name}
    size = len(model["vocab"])
    if added == "decoder":
        keys["added_tokens_decoder"] = {str(size): flags("<extra>", special=False), "3": flags("<|end|>", rstrip=True)}
    if added == "file":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": size, "User": size + 1}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys))
    compare(tmp_path, TEXTS[::2], model_type)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_tokens_that_have_a_name_are_special_whatever_tokenizer_json_says(kind, tmp_path):
    directory(tmp_path, kind, {"pad_token": "<|end|>"})
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in tree["added_tokens"]:
        token |= {"special": False, "rstrip": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    ours, _ = compare(tmp_path, TEXTS[::4])
    assert "<|end|>" in ours.special_ids


def test_a_padding_of_tokenizer_json_names_the_padding_token_and_pads_nothing(tmp_path):
    directory(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_padding(length=64, pad_id=2, pad_token="</s>")
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, _ = compare(tmp_path, TEXTS[::4])
    assert ours.special_tokens["pad_token"] == "</s>"


MODELS = ["llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "gpt2", "opt"]
MODELS += ["gemma3", "cohere", "phi", "nemotron", "olmo2", "gpt_neox", "ernie4_5_moe", "glm4_moe"]
NAMED = [None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "CodeLlamaTokenizer"]
NAMED += ["GemmaTokenizer", "CohereTokenizerFast", "CodeGenTokenizer"]


@pytest.mark.parametrize("seed", range(count(300)))
def test_any_settings_together_mean_what_they_mean_to_transformers(seed, tmp_path):
    chosen = random.Random(seed)
    settings, files = {"tokenizer_class": chosen.choice(NAMED), "legacy": chosen.choice([True, False])}, {}
    for name in chosen.sample(list(SETTINGS), chosen.randint(0, 4)):
        settings |= SETTINGS[name]
    for name in chosen.sample(list(OLDER), chosen.randint(0, 2)):
        settings, files = settings | OLDER[name][0], files | OLDER[name][1]
    directory(tmp_path, chosen.choice(list(tiny_tokenizers.KINDS)), settings, **files)
    model_type = chosen.choice(MODELS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    try:
        AutoTokenizer.from_pretrained(tmp_path)
    except (AttributeError, KeyError, OSError, TypeError, ValueError):  # what it refuses may be refused here, in words
        with contextlib.suppress(InputError):
            Tokenizer({path.name: path.read_bytes() for path in tmp_path.iterdir()}, {"model_type": model_type}, {})
    else:
        compare(tmp_path, TEXTS[::4], model_type)


def known_to_transformers():
    """Names of tokenizer classes of transformers, without the word for fast ones."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    names = {name for name in TOKENIZER_MAPPING_NAMES.values() if name}
    names |= {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))}
    kinds = {name: tokenizer_class_from_name(name) for name in names}
    return {
        name: kind
        for name, kind in kinds.items()
        if isinstance(kind, type) and kind.__module__ != "transformers.models.auto.tokenization_auto"
    }


def test_each_family_has_the_class_that_transformers_gives_it():
    from transformers.models.auto import tokenization_auto as auto

    families = {*kinds.names("models"), *WRAPPERS, *TYPES}
    given = {name: auto.TOKENIZER_MAPPING_NAMES.get(name) for name in families}
    given = {name: AS_IS if kind == "MistralCommonBackend" else kind for name, kind in given.items() if kind}
    assert {name: _OF_MODEL[name] for name in families & {*_OF_MODEL}} == given
    assert {*_OVERRULED} == families & auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


@pytest.mark.slow
def test_every_class_of_transformers_is_built_or_refused_by_name():
    files, known = tiny_tokenizers.files_of(tiny_tokenizers.gpt2()), known_to_transformers()
    as_it_is, helpers = (
        {"TokenizersBackend", "PreTrainedTokenizer", "PreTrainedTokenizerFast"},
        {"BasicTokenizer", "CharacterTokenizer", "MecabTokenizer", "WordpieceTokenizer"},
    )
    for name, kind in known.items():
        plain = name.removesuffix("Fast")
        kind = known.get(plain, kind)  # as AutoTokenizer looks it up
        rebuilds = not issubclass(kind, transformers.TokenizersBackend) or "__init__" in vars(kind)
        settings = json.dumps({"tokenizer_class": name}).encode()
        if plain in CLASSES or name in as_it_is | helpers or not rebuilds:
            assert Tokenizer(files | {"tokenizer_config.json": settings}, {"model_type": "llama"}, {}).vocab_size
        else:
            with pytest.raises(InputError, match=f"tokenizer_class is '{plain}'.*PreTrainedTokenizerFast"):
                Tokenizer(files | {"tokenizer_config.json": settings}, {"model_type": "llama"}, {})


def test_a_tokenizer_that_is_code_of_its_own_is_refused(tmp_path):
    directory(tmp_path, "gpt2", {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    with pytest.raises(ValueError, match="trust_remote_code"):
        compare(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="has its own code .*own.Own"):
        Tokenizer(files, {"model_type": "llama"}, {})
    for model_type in ("phi3", "qwen3"):
        compare(tmp_path, TEXTS[::4], model_type)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer_class": "BertTokenizerFast"}, "tokenizer_class is 'BertTokenizer'"),
        (
            {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"]},
            "fast_tokenizer_files .*tokenizer.4.0.0",
        ),
        ({"eos_token": 5}, "eos_token is 5: it must be a text"),
    ],
)
def test_convert_refuses_a_tokenizer_that_no_run_could_use_and_writes_nothing(settings, said, tmp_path, capsys):
    source = tiny_models.write_directory(tmp_path / "hf", tiny_models.LLAMA, tiny_models.state(tiny_models.LLAMA))
    directory(source, "llama", settings)
    assert main(["convert", str(source), str(tmp_path / "model.h5")]) == 2
    assert re.search(f"{said}.*if all rows have token_ids", capsys.readouterr().err)
    assert not (tmp_path / "model.h5").exists()


def test_a_checkpoint_has_all_files_that_count(tmp_path):
    config = tiny_models.LLAMA | {"vocab_size": 400}
    source = tiny_models.write_directory(tmp_path / "hf", config, tiny_models.state(config))
    directory(source, "llama", {"tokenizer_class": "LlamaTokenizer"}, added_tokens__json={"<extra>": 900, "User": 901})
    (source / "vocab.json").write_text("{}")
    assert main(["convert", str(source), str(tmp_path / "model.h5")]) == 0
    theirs = AutoTokenizer.from_pretrained(source)
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        assert "vocab.json" not in checkpoint.tokenizer
        ours = tokenizer_of(checkpoint)
    for text in TEXTS[::4]:
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False).input_ids
