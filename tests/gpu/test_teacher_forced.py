"""Greedy tokens of whole runs in bfloat16, each judged by transformers behind the same tokens before it.

A random model's best two logits are often nearer than half precisions tell apart. So a token is right that is the most likely
one in float64, or less likely by under twice the largest difference between transformers in bfloat16 and in float64.
"""

import json

import numpy as np
import pytest
import torch

import world
from bits import LLAMA_1B
from mpirun import describe
from noria.checkpoint.convert import convert
from noria.output.generations import open_generations

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.world]
MIXTURE = LLAMA_1B | {
    "num_hidden_layers": 8,
    "moe_intermediate_size": 768,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "head_dim": 64,
}
NUM_ROWS, NEW = 80, 256  # 20,480 tokens
FORMS = {
    "graphs": [],
    "no graphs, chunks of 96": ["--no-graphs", "--step-tokens", "192", "--microbatch-tokens", "96"],
    "weights in CPU memory": ["--weights", "cpu=100"],
}


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def model(request, tmp_path_factory):
    """A folder with a random model in bfloat16, hf/ and model.h5, and prompts, some of which begin alike."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    kind = getattr(transformers, request.param)
    keys = LLAMA_1B if request.param == "LlamaForCausalLM" else MIXTURE
    torch.manual_seed(1)
    with torch.device("cuda"):
        kind(kind.config_class(**keys, tie_word_embeddings=False, initializer_range=0.03)).bfloat16().save_pretrained(
            folder / "hf"
        )
    convert(folder / "hf", folder / "model.h5")
    random = np.random.default_rng(1)
    shared = random.integers(3, 32000, 150).tolist()
    with (folder / "prompts.jsonl").open("w") as file:
        for row in range(NUM_ROWS):
            own = random.integers(3, 32000, 1 + 5 * row).tolist()
            file.write(json.dumps({"token_ids": shared * (row % 2) + own}) + "\n")
    return folder, kind


def peer(folder, kind, dtype):
    """Transformers' own, whose grouped products do not know float64."""
    options = {"experts_implementation": "eager"} if "Moe" in kind.__name__ else {}
    return kind.from_pretrained(folder / "hf", dtype=dtype, device_map="cuda", **options)


def logits_of(module, rows):
    """[tokens of a row, V] of each of them, on the CPU."""
    with torch.inference_mode():
        for ids in rows:
            yield module(torch.tensor([ids], device="cuda")).logits[0].double()


@pytest.mark.parametrize("form", FORMS)
def test_each_of_20000_tokens_is_the_most_likely_one_or_as_likely_as_bfloat16_can_tell(model, form):
    folder, kind = model
    output = folder / f"{[*FORMS].index(form)}.h5"
    command = ["run", "--model", folder / "model.h5", "--prompts", folder / "prompts.jsonl", "--output", output]
    command += ["--max-new-tokens", NEW, "--temperature", 0, "--ignore-eos", "--logprobs", 1, *FORMS[form]]
    done = world.command(1, command, timeout=240)
    assert done.returncode == 0, describe(done)
    with open_generations(output) as file:
        rows = [(list(row.prompt_token_ids), row.token_ids, row.logprobs) for row in file.rows()]
    modules = [peer(folder, kind, dtype) for dtype in (torch.float64, torch.bfloat16)]
    whole = [[*prompt, *tokens.tolist()] for prompt, tokens, _ in rows]
    same, behind, differ, errors = 0, [], 0.0, [0.0, 0.0]
    for (prompt, tokens, logprobs), exact, peers in zip(rows, *(logits_of(one, whole) for one in modules), strict=True):
        exact, peers = exact[len(prompt) - 1 : -1], peers[len(prompt) - 1 : -1]
        chosen = torch.from_numpy(tokens.astype(np.int64)).to(exact.device)[:, None]
        below = exact.max(-1).values - exact.gather(1, chosen)[:, 0]
        same, differ = same + int((below == 0).sum()), max(differ, float((exact - peers).abs().max()))
        behind.append(float(below.max()))
        right, of_peers = (logits.log_softmax(-1).gather(1, chosen)[:, 0].cpu().numpy() for logits in (exact, peers))
        for place, found in enumerate((logprobs, of_peers)):
            errors[place] = max(errors[place], float(np.abs(found - right).max()))
    figures = {
        "tokens": sum(len(tokens) for _, tokens, _ in rows),
        "most_likely": same,
        "behind": max(behind),
        "differ": differ,
        "logprob_error": errors[0],
        "of_transformers": errors[1],
    }
    print(json.dumps({"bench": "teacher forced", "model": kind.__name__, "form": form, **figures}))
    assert figures["tokens"] == NUM_ROWS * NEW
    assert max(behind) <= 2 * differ
    assert errors[0] <= 1.5 * errors[1]
