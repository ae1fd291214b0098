"""The texts of a run, in its output and its exports: what transformers' tokenizer says after the prompt."""

import csv
import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_models
import tiny_tokenizers
from noria.__main__ import main
from noria.checkpoint.convert import convert

WORDS = [*tiny_tokenizers.SPECIAL, "▁Hello", "▁world", "▁is", "▁round"]
CHAIN = ["▁Hello", "▁world", "<|end|>", "▁is", "▁round", "</s>"]


def backend():
    made = Backend(models.WordLevel({word: token_id for token_id, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(tiny_tokenizers.SPECIAL)
    return tiny_tokenizers.bos_first(made)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that says the words of CHAIN one after the other, its tokenizer and its checkpoint."""
    folder = tmp_path_factory.mktemp("texts")
    config = tiny_models.LLAMA | {"vocab_size": 8, "eos_token_id": 2, "num_hidden_layers": 1}
    state = {name: torch.zeros_like(tensor) for name, tensor in tiny_models.state(config).items()}
    state["model.norm.weight"].fill_(1)
    for word, following in itertools.pairwise(CHAIN):
        state["model.embed_tokens.weight"][WORDS.index(word), WORDS.index(word)] = 1
        state["lm_head.weight"][WORDS.index(following), WORDS.index(word)] = 1
    tiny_models.write_directory(folder / "hf", config, state)
    for name, content in tiny_tokenizers.files_of(backend()).items():
        (folder / "hf" / name).write_bytes(content)
    convert(folder / "hf", folder / "model.h5")
    return folder


ROWS = [
    {},
    {"stop": " is"},
    {"stop": " is", "include_stop_str_in_output": True},
    {"stop": "<|end|>"},
    {"stop": "<|end|>", "include_stop_str_in_output": True},
    {"stop": "<|end|>", "include_stop_str_in_output": True, "skip_special_tokens": False},
    {"skip_special_tokens": False},
    {"skip_special_tokens": False, "include_stop_str_in_output": True},
    {"skip_special_tokens": False, "stop": "|> is round", "include_stop_str_in_output": True},
    {"max_new_tokens": 1, "include_stop_str_in_output": True},
]


def expected(theirs, row, tokens, keys):
    """By transformers: what all tokens say after what the prompt's say, up to the stop text."""
    skip, include = keys.get("skip_special_tokens", True), keys.get("include_stop_str_in_output", False)
    prompt = theirs("Hello").input_ids
    last = theirs.convert_ids_to_tokens(tokens[-1])
    if not include and (last == "</s>" or last == keys.get("stop")):
        tokens = tokens[:-1]
    whole, known = (theirs.decode(ids, skip_special_tokens=skip) for ids in (prompt + tokens, prompt))
    text = whole.removeprefix(known)
    stop = keys.get("stop")
    if stop in (None, "<|end|>"):
        return text
    return text[: text.index(stop) + include * len(stop)]


def export(output, name):
    assert main(["export", str(output), str(output.parent / name)]) == 0
    return (output.parent / name).read_text()


@pytest.mark.parametrize("in_run", [False, True], ids=["keys of rows", "keys of the run"])
def test_texts_and_exports_are_what_the_keys_ask_for(folder, in_run):
    theirs = PreTrainedTokenizerFast.from_pretrained(folder / "hf")
    rows = [{"prompt": "Hello"} | (keys if not in_run else {}) for keys in ROWS]
    kept = ROWS if not in_run else [{"skip_special_tokens": False, "include_stop_str_in_output": True}] * len(ROWS)
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--model", "model.h5", "--prompts", "p.jsonl", "--output", f"{in_run}.h5"]
    arguments = [str(folder / one) if one[0] != "-" else one for one in arguments]
    more = ["--no-skip-special-tokens", "--include-stop-str-in-output"] if in_run else []
    assert main(["run", *arguments, "--device", "cpu", "--max-new-tokens", "9", *more]) == 0
    output = folder / f"{in_run}.h5"
    read = [json.loads(line) for line in export(output, "o.jsonl").splitlines()]
    right = [expected(theirs, row, one["token_ids"], keys) for row, one, keys in zip(rows, read, kept, strict=True)]
    assert [one["text"] for one in read] == right
    assert [one["text"] for one in csv.DictReader(export(output, "o.csv").splitlines())] == right
    if not in_run:
        ends = ["stop"] * 9 + ["length"]
        assert [one["finish_reason"] for one in read] == ends
        assert right == [
            " world is round",
            " world",
            " world is",
            " world",
            " world",
            " world<|end|>",
            " world<|end|> is round",
            " world<|end|> is round</s>",
            " world<|end|> is round",
            " world",
        ]


def test_requests_of_openais_batch_format_may_have_the_keys(folder):
    body = {"prompt": "Hello", "max_tokens": 9, "stop": " is", "include_stop_str_in_output": True}
    line = {"custom_id": "a", "url": "/v1/completions", "body": body | {"skip_special_tokens": False}}
    (folder / "b.jsonl").write_text(json.dumps(line) + "\n")
    arguments = ["--model", folder / "model.h5", "--prompts", folder / "b.jsonl", "--output", folder / "b.h5"]
    assert main(["run", *map(str, arguments), "--device", "cpu"]) == 0
    assert main(["export", str(folder / "b.h5"), str(folder / "r.jsonl"), "--format", "openai"]) == 0
    choice = json.loads((folder / "r.jsonl").read_text())["response"]["body"]["choices"][0]
    assert choice["text"] == " world<|end|> is"
