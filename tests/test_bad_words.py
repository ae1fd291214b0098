"""bad_words, allowed_token_ids and truncate_prompt_tokens: against a plain reimplementation in numpy and transformers'
processor, in the sampler alone and in whole runs of the demo model, beside a dense reference in float64."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, NoBadWordsLogitsProcessor

import reference
import test_row_settings
import tiny_tokenizers
from counts import count
from noria.checkpoint.convert import convert
from noria.engine.row_settings import BadWords, RowSettings
from noria.engine.sampler import Sampler
from noria.errors import InputError
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.output.parts import Parts
from noria.rows.making import bad_words, kept_tokens
from noria.rows.prompts import Prompt
from noria.rows.sequence import Sequence, sampler_settings
from noria.rows.tokenizer import Tokenizer
from noria.sampling import Sampling
from noria.step import Admitted, Step

sys.path.insert(0, str(Path(__file__).parent / "mpi"))
from worker import generate

DEMO = Path(__file__).parent.parent / "inputs" / "demo" / "model"
CONFIG = json.loads((DEMO / "config.json").read_text())
STATE = {name: tensor.double().numpy() for name, tensor in load_file(DEMO / "model.safetensors").items()}
THEIRS = AutoTokenizer.from_pretrained(DEMO)
OURS = Tokenizer({path.name: path.read_bytes() for path in DEMO.glob("*.json")}, CONFIG, {})
END, VOCAB = 1, 40


def masked(scores, generated, words, allowed):
    """[V] scores with -inf for what the row may not have now."""
    scores = scores.copy()
    for word in words:
        if generated[len(generated) - len(word) + 1 :] == word[:-1] and len(generated) >= len(word) - 1:
            scores[word[-1]] = -np.inf
    if allowed:
        mask = np.full(len(scores), -np.inf)
        mask[allowed] = 0
        scores = scores + mask
    return scores


def random_row(draw, row):
    """A row with few different tokens, so that words of several tokens are often begun."""
    words = [draw.integers(0, 5, draw.integers(1, 4)).tolist() for _ in range(draw.integers(0, 5))]
    allowed = sorted(set(draw.integers(0, VOCAB, 12).tolist())) if draw.random() < 0.5 else []
    keys = {"temperature": float(draw.choice([0.0, 0.7])), "logprobs": 2, "allowed_token_ids": allowed or None}
    prompt, new = draw.integers(0, 5, 9).tolist(), draw.integers(0, 5, 6).tolist()
    one = Sequence(Prompt(row, "", "", prompt, {}, "", None), Sampling().override(keys), prompt, token_ids=new)
    one.bad_words = words
    return one


def test_what_a_row_may_not_have_is_what_the_definition_says():
    """Prompts come in chunks, tokens one by one; the draw is the inverse of the distribution of what is left."""
    draw = np.random.default_rng(1)
    for _ in range(count(200)):
        sequences = [random_row(draw, row) for row in range(6)]
        sampler = Sampler(torch.device("cpu"))
        positions = test_row_settings.feed(sampler, sequences)
        logits, uniforms = torch.randn(6, VOCAB, dtype=torch.float64), draw.random(6)
        before = logits.clone()
        found = sampler.sample(logits, np.arange(6), uniforms, positions, 2)
        assert torch.equal(logits, before)
        raw = torch.log_softmax(logits, -1).numpy()
        for row, one in enumerate(sequences):
            scores = masked(logits[row].numpy(), one.token_ids, one.bad_words, one.sampling.allowed_token_ids)
            if one.sampling.temperature == 0:
                expected = scores.argmax() if np.isfinite(scores).any() else -1
            else:
                weights = np.exp((scores - scores.max()) / 0.7)
                expected = int((np.cumsum(weights) <= uniforms[row] * weights.sum()).sum())
            assert found.token_ids[row] == expected
            if expected >= 0:
                assert abs(found.logprobs[row].item() - raw[row, expected]) < 1e-12
            assert found.top_ids[row].tolist() == np.argsort(-raw[row])[:2].tolist()


def test_bad_words_are_those_of_transformers_over_the_generated_tokens():
    draw = np.random.default_rng(2)
    for _ in range(count(300)):
        words = [draw.integers(0, 4, draw.integers(1, 4)).tolist() for _ in range(4)]
        generated = draw.integers(0, 4, draw.integers(0, 7)).tolist()
        ours = BadWords(words, 3)
        ours.add([0, 1, 2, *generated], 0)
        scores = torch.zeros(1, VOCAB)
        expected = NoBadWordsLogitsProcessor(words)(torch.tensor([generated], dtype=torch.long), scores)
        assert ours.banned().tolist() == torch.isinf(expected[0]).nonzero()[:, 0].tolist()


def test_tokens_in_any_pieces_and_given_again_leave_the_same_words_begun():
    draw = np.random.default_rng(3)
    tokens = draw.integers(0, 3, 30).tolist()
    words = [[0, 1, 2], [2, 2], [1], [0, 0, 0, 1]]
    for length in range(5, 31):
        whole, pieces = BadWords(words, 4), BadWords(words, 4)
        whole.add(tokens[:length], 0)
        place = 0
        while place < length:
            size = int(draw.integers(1, 5))
            pieces.add(tokens[max(0, place - 2) : min(place + size, length)], max(0, place - 2))
            place += size
        assert whole.banned().tolist() == pieces.banned().tolist()


def test_a_row_that_begins_with_pages_of_another_or_with_tokens_of_an_earlier_job_knows_its_words():
    sampler = Sampler(torch.device("cpu"))
    one = Sequence(
        Prompt(0, "", "", [7] * 20, {}, "", None), Sampling().override({}), [7] * 20, token_ids=[3, 4], cached=16
    )
    one.bad_words = [[3, 4, 5]]
    header = json.loads(json.dumps(sampler_settings(one, ())))
    sampler.apply(Step(0, 0, admitted=(Admitted(0, (), header),)))
    ids = np.array([*one.prompt_token_ids[16:], 3, 4], np.int32)
    sampler.count(Step(0, 0, slots=np.array([0]), counts=np.array([6]), positions=np.array([16]), token_ids=ids))
    logits = torch.zeros(1, 8, dtype=torch.float64)
    logits[0, 5], logits[0, 2] = 9, 1
    assert sampler.sample(logits, np.array([0]), np.zeros(1), np.array([22])).token_ids.tolist() == [2]


def test_a_row_without_such_keys_is_still_searched_once():
    assert RowSettings.from_header({"temperature": 0.0}).greedy
    for key, value in (("bad_words", [[5]]), ("allowed", [5])):
        assert not RowSettings.from_header({"temperature": 0.0, key: value}).greedy


@pytest.mark.parametrize("word", ["the", " the", "LORD", "  God", "kingdom of", "é", "and"])
def test_a_word_is_banned_alone_and_after_a_space(word):
    """As the documentation of transformers' bad_words_ids asks of its callers."""
    plain = THEIRS(word.lstrip(), add_special_tokens=False).input_ids
    spaced = THEIRS(" " + word.lstrip(), add_special_tokens=False).input_ids
    assert plain != spaced and bad_words(Sampling(bad_words=word), OURS, 10**6) == [plain, spaced]


@pytest.mark.parametrize("kind", ["llama_legacy", "llama", "llama_no_prefix", "gpt2", "llama3", "qwen2", "unigram"])
def test_wherever_a_tokenizer_writes_the_word_its_last_tokens_are_banned(kind):
    backend = getattr(tiny_tokenizers, kind)()
    ours = Tokenizer(tiny_tokenizers.files_of(backend), {}, {})
    for word in ("the", "hello", "world is"):
        found = bad_words(Sampling(bad_words=f"  {word}"), ours, 10**6)
        for before in ("", " ", "a ", "\n", "a\n", " a\n\n"):
            ids = backend.encode(before + word, add_special_tokens=False).ids
            assert any(ids[-len(one) :] == one for one in found), (before, word)


@pytest.mark.parametrize(
    ("text", "begins"), [("\nthe", "\nthe"), ("  \nthe", "\nthe"), ("\tthe", "\tthe"), ("  ", " ")]
)
def test_of_the_white_space_that_a_word_begins_with_spaces_alone_say_nothing(text, begins):
    for ids in bad_words(Sampling(bad_words=text), OURS, 10**6):
        assert THEIRS.decode(ids).lstrip(" ").startswith(begins.lstrip(" ")) and len(THEIRS.decode(ids)) >= len(begins)


def test_a_word_of_ids_that_the_model_lacks_is_never_generated_and_needs_no_ban():
    assert bad_words(Sampling(bad_words=["the"]), OURS, 2) == []
    with pytest.raises(InputError, match="bad_words: the checkpoint has no tokenizer"):
        bad_words(Sampling(bad_words=["the"]), None, 100)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bad_words": [""]}, "sampling.bad_words has ''"),
        ({"bad_words": [5]}, "sampling.bad_words has '5'"),
        ({"bad_words": ["x"] * 1001}, "sampling.bad_words has 1001 texts"),
        ({"allowed_token_ids": []}, "sampling.allowed_token_ids is empty"),
        ({"allowed_token_ids": [-1]}, "sampling.allowed_token_ids has '-1'"),
        ({"truncate_prompt_tokens": 0}, "sampling.truncate_prompt_tokens is 0"),
        ({"truncate_prompt_tokens": -2}, "sampling.truncate_prompt_tokens is -2"),
    ],
)
def test_wrong_values_are_refused(keys, words):
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        Sampling().override(keys)


def test_minus_one_keeps_what_the_context_leaves():
    assert kept_tokens(Sampling(truncate_prompt_tokens=-1, max_new_tokens=10), 64) == 54
    assert kept_tokens(Sampling(truncate_prompt_tokens=7), 64) == 7 and kept_tokens(Sampling(), 64) is None
    with pytest.raises(InputError, match=r"max_new_tokens \(64\) leaves nothing of the model's context of 64"):
        kept_tokens(Sampling(truncate_prompt_tokens=-1, max_new_tokens=64), 64)


# Whole runs.

RUN = 'dtype = "float64"\ndevice = "cpu"\n[sampling]\nmax_new_tokens = 12\nseed = 3\n'
LONG = "And it came to pass in those days, that there went out a decree from the king, that all the people. " * 3
SOME = [
    id for text in (" the", " LORD", " God", " of", " and", " king", ",") for id in THEIRS(text).input_ids if id > 1
]
ROWS = [
    {"prompt": "The LORD is my"},
    {"prompt": "The LORD is my", "bad_words": ["my", "rock", "the"], "logprobs": 1},
    {"prompt": "The LORD is my", "bad_words": ["and my", "fortress"]},
    {"prompt": "And God said", "bad_words": ["unto", "unto the", "LORD God"], "n": 3, "temperature": 0.9},
    {"prompt": "Grace be unto you", "allowed_token_ids": SOME, "logprobs": 0},
    {"prompt": "Praise", "allowed_token_ids": SOME, "bad_words": "the", "n": 2, "temperature": 1.1, "top_k": 5},
    {"prompt": LONG, "truncate_prompt_tokens": 20, "truncated_prompt_tokens": "mine"},
    {"prompt": LONG, "truncate_prompt_tokens": 20, "n": 2, "temperature": 1, "bad_words": ["and"]},
    {"prompt": "I am", "truncate_prompt_tokens": 20},
    {"prompt": "I am", "allowed_token_ids": [10**6]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad-words")
    convert(DEMO, folder / "model.h5")
    (folder / "run.toml").write_text(RUN)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert generate(folder, "whole", {"groups": 2}, Solo()) == 0
    return folder


def rows_of(path):
    with open_generations(path) as file:
        return list(file.rows())


@pytest.mark.slow
def test_greedy_rows_of_a_run_are_those_of_a_dense_reference(folder):
    for row in rows_of(folder / "whole.h5"):
        asked = ROWS[row.row]
        if asked.get("temperature") or row.status == "error":
            continue
        ids = THEIRS(asked["prompt"]).input_ids[-asked.get("truncate_prompt_tokens", 10**6) :]
        assert row.prompt_token_ids.tolist() == ids
        words = asked.get("bad_words", [])
        banned = [THEIRS(form, add_special_tokens=False).input_ids for word in words for form in (word, f" {word}")]
        generated, logprobs = [], []
        while len(generated) < 12 and END not in generated:
            raw = reference.logits(CONFIG, STATE, [*ids, *generated])[-1]
            generated.append(int(masked(raw, generated, banned, asked.get("allowed_token_ids")).argmax()))
            logprobs.append(raw[generated[-1]] - np.log(np.exp(raw - raw.max()).sum()) - raw.max())
        assert row.token_ids.tolist() == generated
        if "logprobs" in asked:
            assert np.allclose(row.logprobs, logprobs, atol=1e-9)


@pytest.mark.slow
def test_no_row_of_a_run_has_what_it_may_not_have_and_the_number_of_cut_tokens_is_a_column(folder):
    free = next(row for row in rows_of(folder / "whole.h5") if row.row == 0)
    assert " my" in free.text
    for row in rows_of(folder / "whole.h5"):
        asked, extra = ROWS[row.row], json.loads(row.extra or "{}")
        if row.row == len(ROWS) - 1:
            assert row.status == "error" and "allowed_token_ids has 1000000: the model's vocabulary has" in row.error
            continue
        assert row.status == "done" and (row.token_ids.size > 0)
        if "allowed_token_ids" in asked:
            assert set(row.token_ids.tolist()) <= set(SOME)
        for word in (
            [asked.get("bad_words", [])] if isinstance(asked.get("bad_words"), str) else asked.get("bad_words", [])
        ):
            assert f" {word} " not in f" {row.text} ".replace(",", " ").replace(".", " ")
        if "truncate_prompt_tokens" in asked:
            whole = len(THEIRS(asked["prompt"]).input_ids)
            assert extra["truncated_prompt_tokens"] == max(0, whole - 20) == whole - len(row.prompt_token_ids)
            assert row.prompt == asked["prompt"]
            assert extra.get("input_truncated_prompt_tokens") == asked.get("truncated_prompt_tokens")
        else:
            assert not extra


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_words_begun(folder):
    whole = rows_of(folder / "whole.h5")
    with open_generations(folder / "whole.h5") as file:
        header = json.loads(file.attrs["header"])
    for cut in (1, 5):
        parts = Parts(folder / f"cut{cut}.h5", header)
        for row in rows_of(folder / "whole.h5"):
            if row.status == "done" and len(row.token_ids) > cut:
                row.status, row.finish_reason, row.text, row.token_ids = "todo", "none", "", row.token_ids[:cut]
                for name in ("logprobs", "top_ids", "top_logprobs"):
                    setattr(row, name, getattr(row, name)[:cut] if getattr(row, name) is not None else None)
            parts.add(row)
        parts.seal()
        assert generate(folder, f"cut{cut}", {"groups": 1}, Solo()) == 0
        again = rows_of(folder / f"cut{cut}.h5")
        for one, other in zip(whole, again, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist() and one.text == other.text
            assert one.extra == other.extra and one.status == other.status
