"""Makes the files beside it: a tiny model, its prompts, and what the version of commit 8b19e92 generated for them.

git archive 8b19e92 | tar x -C /tmp/old; PYTHONPATH=/tmp/old/src:/tmp/old/tests python make.py FOLDER
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import noria.rows.desk
from noria.files.convert import convert
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

import tiny_models
from noria.__main__ import main

MODEL = tiny_models.LLAMA | {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 64}
CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}<s>assistant:"
ROWS = [
    {"prompt": "to be", "max_new_tokens": 4},
    {"prompt": "or not", "max_new_tokens": 3, "seed": 9, "n": 3},
    {"messages": [{"role": "user", "content": "be not"}], "max_new_tokens": 5, "logprobs": 2},
    {"prompt": "not", "max_new_tokens": 9, "temperature": -1},
    {"prompt": "be", "max_new_tokens": 40, "stop": [" be", "not"]},
    {"token_ids": [5, 60, 7], "max_new_tokens": 40, "logprobs": 1},
    {"prompt": "to be or not", "max_new_tokens": 40, "seed": 9, "n": 2},
    {"prompt": "or", "max_new_tokens": 40, "seed": 9},
    {"prompt": "not to be", "max_new_tokens": 12, "prompt_logprobs": True},
    {"messages": [{"role": "user", "content": "or"}], "max_new_tokens": 6, "temperature": 0},
    {"prompt": "be", "max_new_tokens": 7},
]
KEYS = "--device cpu --dtype float64 --temperature 1.1 --ignore-eos --groups 1 --step-tokens 5".split()
TICKS = 34  # steps until the unfinished run is stopped: rows are finished, half-way and not begun then


def tokenizer() -> Tokenizer:
    """Words of a sentencepiece vocabulary: a text's first space belongs to its first token, and decoding strips it."""
    words = ["▁", "▁to", "▁be", "▁or", "▁not", *"tobenrasiu:\n", *(f"▁w{number}" for number in range(42))]
    vocab = {text: place for place, text in enumerate(["<unk>", "<s>", "</s>", *words])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=_merges(words, vocab), unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    return made


def _merges(words: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """How letters become those words: a letter more at a time, through pieces that the vocabulary gets too."""
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if all(letter in vocab for letter in word) and word[:end] != "▁w":
                vocab.setdefault(word[:end], len(vocab))
                merges.append((word[: end - 1], word[end - 1]))
    return list(dict.fromkeys(merges))


def make(folder: Path) -> None:
    text = tokenizer()
    config = MODEL | {"vocab_size": text.get_vocab_size()}
    directory = tiny_models.write_directory(folder / "hf", config, tiny_models.state(config, seed=5))
    text.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"do_sample": True, "temperature": 0.3, "top_k": 2}  # which that version did not read
    (directory / "generation_config.json").write_text(json.dumps(generation))
    convert(directory, folder / "model.h5")
    shutil.rmtree(directory)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def run(output: str) -> int:
    sys.argv = ["noria", "run"]  # what outputs say of their command
    return main(["run", "--model", "model.h5", "--prompts", "prompts.jsonl", "--output", output, *KEYS])


def stopped_run(output: str) -> None:
    """A run that a signal stops after so many steps."""
    tick, left = noria.rows.desk.Desk.tick, [TICKS]

    def counting(desk) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            while not desk._stopped:
                pass
        tick(desk)

    noria.rows.desk.Desk.tick = counting
    assert run(output) == 75
    noria.rows.desk.Desk.tick = tick


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(exist_ok=True)
    os.chdir(sys.argv[1])
    make(Path("."))
    stopped_run("stopped.h5")
    # The same run to its end, with the seed that the stopped one drew: what it must come to.
    shutil.copytree("stopped.h5.parts", "whole.h5.parts")
    assert run("whole.h5") == 0
    shutil.rmtree("whole.h5.parts", ignore_errors=True)
