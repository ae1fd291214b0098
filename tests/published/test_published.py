"""A published chat model, 24 conversations, one rank and two: token by token what transformers says, in float32.

The reference computes a row's prompt and Noria's tokens in one pass, and each token must be the one that the
reference chooses after those before it. So all of a row are equal exactly where its own generation, token by token,
would give the same row. Two right computations in float32 differ by their rounding; where the reference's choice
turns on less than twice the largest difference that was measured in that row's log-probabilities, either choice is
right: such ties are counted, and must be few.
"""

import json
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import xxhash

from mpirun import describe, mpirun
from noria.checkpoint.convert import convert
from noria.output.generations import open_generations

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "jobs" / "local" / "published_model.py"
UNAVAILABLE = 69
SEED, TOP, MAX_NEW_TOKENS = 7, 5, 40  # of the run; TOP log-probabilities of each token
ROUNDING = 2e-4  # of a log-probability, at most
TIES = 0.01  # of all tokens, at most

STORY = "Once upon a time there was a miller whose water wheel turned by day and by night. " * 12
ROLES = ["assistant", "user"]
TURNS = [{"role": ROLES[turn % 2], "content": f"{turn}: {STORY[: 97 * turn]}"} for turn in (5, 4, 3, 2, 1)]
OWN = [
    {"prompt": "Name the planets of the solar system.", "chat": True, "stop": ["never said", "Mars"]},
    {"prompt": "Name three colours.", "chat": True, "system": "Answer in a list.", "stop": "\n"},
    {"prompt": "Describe a river in two sentences.", "chat": True, "stop": [" the", ". "]},
    {"prompt": "The water wheel turns", "temperature": 1.0, "top_k": 40},
    {"prompt": "写一首关于水车的诗。🌊 Ça va ?", "chat": True, "temperature": 1.3, "top_p": 0.95, "min_p": 0.02},
    {"messages": TURNS},
    {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hello!"}], "temperature": 0},
    {"messages": [{"role": "user", "content": "Say yes."}], "max_new_tokens": 1, "temperature": 0},
]


def conversations():
    """The demo's sixteen questions, every second one greedy, and eight more; stop texts are looked for greedily."""
    lines = (ROOT / "inputs" / "demo" / "questions.jsonl").read_text().splitlines()
    for number, row in enumerate([*map(json.loads, lines), *OWN]):
        greedy = {"temperature": 0} if "stop" in row or (number < len(lines) and number % 2) else {}
        yield {"id": f"row {number}"} | row | greedy


ROWS = list(conversations())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model as transformers saves it (hf), its checkpoint, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("published")
    done = subprocess.run([sys.executable, SCRIPT, folder / "hf"], capture_output=True, text=True)
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    convert(folder / "hf", folder / "model.h5")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="session")
def defaults(folder):
    """How the model itself is sampled."""
    said = json.loads((folder / "hf" / "generation_config.json").read_text())
    assert said["do_sample"] and said["temperature"] > 0 and said["top_p"] < 1
    return {name: said[name] for name in ("temperature", "top_p")}


@pytest.fixture(scope="session")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder / "hf")


@pytest.fixture(scope="session")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference(model):
    """log_probabilities of this model, each sequence computed once."""
    return cache(partial(log_probabilities, model))


@pytest.fixture(scope="session")
def generate(folder):
    """Noria's rows, by the number of ranks; each run is made once."""
    found = {}

    def rows(num_ranks):
        if num_ranks not in found:
            output = folder / f"{num_ranks}.h5"
            keys = {"model": folder / "model.h5", "prompts": folder / "prompts.jsonl", "output": output, "seed": SEED}
            keys |= {"dtype": "float32", "device": "cpu", "max-new-tokens": MAX_NEW_TOKENS, "logprobs": TOP}
            flags = [word for name, value in keys.items() for word in (f"--{name}", value)]
            command = [sys.executable, "-m", "noria", "run", *flags, "--prompt-logprobs"]
            done = mpirun(num_ranks, command, timeout=240)
            assert done.returncode == 0, describe(done)
            with open_generations(output) as file:
                found[num_ranks] = list(file.rows())
        return found[num_ranks]

    return rows


def prompt_ids(row, tokenizer):
    """The row's prompt by transformers' own rendering of the model's template."""
    messages = row.get("messages")
    if row.get("chat"):
        system = [{"role": "system", "content": row["system"]}] if "system" in row else []
        messages = [*system, {"role": "user", "content": row["prompt"]}]
    if messages is None:
        return tokenizer(row["prompt"])["input_ids"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def log_probabilities(model, token_ids):
    """[T, V] float32 after each of T tokens."""
    return torch.log_softmax(model(torch.tensor([token_ids])).logits[0], dim=-1).numpy()


def uniform(row, position):
    digest = xxhash.xxh3_64_intdigest(np.array([SEED, row, 0, position], "<i8").tobytes())
    return (digest >> 11) / 2**53


def draw(scores, row, number, shift=0.0):
    """Temperature, top-k, top-p, min-p and the inverse of the cumulative distribution in numpy.

    top_p is `shift` larger than said, and min_p that much smaller.
    """
    if not row["temperature"]:
        return int(scores.argmax())
    scaled = scores / row["temperature"]
    order = np.argsort(-scaled, kind="stable")[: row.get("top_k") or None]
    weights = np.exp(scaled[order] - scaled[order[0]])
    before = np.cumsum(weights) - weights
    kept = (before < (row["top_p"] + shift) * weights.sum()) | (np.arange(len(order)) == 0)
    kept &= weights >= row.get("min_p", 0.0) - shift
    ids, weights = order[kept], weights[kept]
    by_id = np.argsort(ids)
    reached = np.cumsum(weights[by_id])
    return int(ids[by_id][min(np.searchsorted(reached, number * reached[-1], "right"), len(ids) - 1)])


def is_tie(scores, row, number, chosen, difference):
    """Whether scores that differ by `difference` at most may choose this token instead."""
    if not row["temperature"]:
        return scores.max() - scores[chosen] < 2 * difference
    slack = 2 * difference / row["temperature"]  # of every probability, relative
    numbers = np.clip([number - slack, number, number + slack], 0, 1 - 2**-53)
    return any(draw(scores, row, one, shift) == chosen for one in numbers for shift in (-slack, 0, slack))


def compare(number, generation, reference, tokenizer, defaults):
    """Raises AssertionError where a row is not the reference's. Returns how many tokens were chosen by a tie, how many there
    are, and the largest difference of a log-probability."""
    row = {"max_new_tokens": MAX_NEW_TOKENS} | defaults | ROWS[number]
    prompt, tokens = prompt_ids(row, tokenizer), generation.token_ids.tolist()
    assert (generation.id, generation.status) == (row["id"], "done")
    assert generation.prompt_token_ids.tolist() == prompt
    scores = reference((*prompt, *tokens)).astype(float)
    known = scores[np.arange(len(prompt + tokens) - 1), (prompt + tokens)[1:]]
    scores = scores[len(prompt) - 1 : -1]
    top = np.take_along_axis(scores, generation.top_ids.astype(int), axis=1)
    ours = (generation.prompt_logprobs[1:], generation.logprobs, generation.top_logprobs, generation.top_logprobs)
    theirs = (*np.split(known, [len(prompt) - 1]), top, -np.sort(-scores, axis=1)[:, :TOP])
    difference = max(np.abs(one - other).max(initial=0) for one, other in zip(ours, theirs, strict=True))
    assert difference < ROUNDING, f"row {number}: log-probabilities differ by {difference:.2e}"
    ties = 0
    for position, (chosen, one) in enumerate(zip(tokens, scores, strict=True)):
        u = uniform(number, position)
        if (wanted := draw(one, row, u)) != chosen:
            assert is_tie(one, row, u, chosen, difference), f"row {number}, token {position}: {chosen}, not {wanted}"
            ties += 1
    assert (generation.text, generation.finish_reason) == ending(tokens, row, tokenizer)
    return ties, len(tokens), difference


def ending(tokens, row, tokenizer):
    """(text, why it ended) of a row with these tokens; raises AssertionError where it should have ended at another."""
    stops = [row["stop"]] if isinstance(row.get("stop"), str) else row.get("stop", [])
    decode = partial(tokenizer.decode, skip_special_tokens=True)

    def ends(count):
        return tokens[count - 1] == tokenizer.eos_token_id or any(stop in decode(tokens[:count]) for stop in stops)

    assert not any(map(ends, range(1, len(tokens)))), "goes on past its end"
    assert ends(len(tokens)) or len(tokens) == row["max_new_tokens"], "ends too early"
    text = decode(tokens)
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places, default=None)], "stop" if ends(len(tokens)) else "length"


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_token_is_the_references(generate, reference, tokenizer, defaults, num_ranks):
    rows = generate(num_ranks)
    assert len(rows) == len(ROWS) == 24
    found = [compare(number, row, reference, tokenizer, defaults) for number, row in enumerate(rows)]
    ties, tokens, difference = sum(row[0] for row in found), sum(row[1] for row in found), max(row[2] for row in found)
    print(f"ranks: {num_ranks}; tokens: {tokens}, ties: {ties}; log-probabilities differ by {difference:.1e} at most")
    assert ties <= TIES * tokens, f"{ties} of {tokens} tokens are ties"


@pytest.mark.mpi
def test_ends_and_draws_of_every_kind_are_among_them(generate, tokenizer):
    rows = list(zip(ROWS, generate(1), strict=True))
    assert {row.finish_reason for _, row in rows} == {"stop", "length"}
    stopped = [row for keys, row in rows if "stop" in keys and row.token_ids[-1] != tokenizer.eos_token_id]
    assert [row.finish_reason for row in stopped] == ["stop"] * 3
    by_default = [row for keys, row in rows if "temperature" not in keys and "stop" not in keys]
    assert sum((row.logprobs < row.top_logprobs[:, 0]).sum() for row in by_default) > 5, "drawn as the most likely ones"


@pytest.mark.mpi
def test_one_changed_weight_is_seen(generate, model, reference, tokenizer, defaults):
    weights = model.model.layers[15].mlp.down_proj.weight.detach().view(-1)
    place = int(weights.abs().median(dim=0).indices)  # of ordinary size
    row, before = generate(1)[0], weights[place].item()
    compare(0, row, reference, tokenizer, defaults)
    try:
        weights[place] = -before
        with pytest.raises(AssertionError, match="log-probabilities differ"):
            compare(0, row, partial(log_probabilities, model), tokenizer, defaults)
    finally:
        weights[place] = before
