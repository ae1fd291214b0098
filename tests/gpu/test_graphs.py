"""Decode steps as CUDA graphs: the same bits with them and without, over sizes, shared beginnings, growth, windows, mixtures."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

from noria import config
from noria.arrays import ENCODINGS as CACHES
from noria.engine.capturing import Capturer
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import building, search
from noria.run import run
from noria.streams import streams_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.05,
}
WINDOWED = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 200}
MIXTURE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "head_dim": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS = {"llama": LLAMA, "windowed": WINDOWED, "mixture": MIXTURE}
RUN = """
dtype = "bfloat16"
device = "cuda"
[sampling]
max_new_tokens = 40
ignore_eos = true
logprobs = 2
"""


def rows(case):
    """Prompts of some rows of some lengths; new tokens differ, so that rows become fewer and sizes change."""
    random = np.random.default_rng(1)
    text = lambda length: random.integers(10, 4000, int(length)).tolist()  # noqa: E731
    beginnings = [text(length) for length in (192, 1100, 70)]
    count, lengths = {
        "one": (1, (5,)),
        "few": (9, (1, 64, 900)),
        "many": (150, (3, 65, 130)),
        "long": (6, (1000, 2040)),
    }.get(case, (60, (1, 30)))
    for row in range(count):
        begins = beginnings[row % 3] if case == "shared" else []
        sampled = {"temperature": 1.0, "seed": row} if row % 2 else {}
        yield {
            "token_ids": begins + text(lengths[row % len(lengths)]),
            "max_new_tokens": 20 + 30 * (row % 3),
            **sampled,
        }


CASES = ["one", "few", "many", "long", "shared"]


def hashes(output):
    with open_generations(output) as file:
        found = []
        for row in file.rows():
            assert row.status == "done", row.error
            arrays = row.token_ids, row.logprobs
            found.append(hashlib.sha256(b"".join(np.ascontiguousarray(its).tobytes() for its in arrays)).hexdigest())
        return found


def generate(folder, name, prompts, capfd, **keys):
    """The rows' hashes, and what the log says of graphs."""
    files = {"random_weights": "config.json", "prompts": prompts, "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    capfd.readouterr()
    assert run(config.load(folder / "run.toml", flags | {"overwrite": True} | keys), Solo()) == 0
    said = capfd.readouterr().err
    return hashes(folder / f"{name}.h5"), [
        line for line in said.splitlines() if "rank=" in line and "graphs" in line and "plan:" not in line
    ]


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(MODELS[request.param]))
    (folder / "run.toml").write_text(RUN)
    for case in CASES:
        (folder / f"{case}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(case)))
    return folder


def same_with_graphs_and_without(folder, case, capfd, **keys):
    """That each row of a case has the same bits, and that most decode visits were graphs."""
    replayed, said = generate(folder, f"{case}-graphs", f"{case}.jsonl", capfd, **keys)
    plain, none = generate(folder, f"{case}-plain", f"{case}.jsonl", capfd, graphs=False, **keys)
    print(case, keys, said, none)
    assert not any("decode visits" in line for line in none)
    assert replayed == plain
    found = re.search(r"graphs: (\d+) of (\d+) decode visits", " ".join(said))
    assert found and int(found[1]) > 0.6 * int(found[2]) and len(said) == 1, said


@pytest.mark.parametrize("case", CASES)
def test_a_row_has_the_same_bits_with_graphs_and_without(folder, case, capfd):
    same_with_graphs_and_without(folder, case, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(CACHES))
@pytest.mark.parametrize("case", ["few", "many", "long", "shared"])
def test_over_a_cache_in_fewer_bits_too(folder, case, kind, capfd):
    same_with_graphs_and_without(folder, case, capfd, kv_cache_dtype=kind)


def test_groups_of_rows_take_turns_in_the_same_graphs(folder, capfd):
    found, said = generate(folder, "groups", "many.jsonl", capfd, groups=3)
    expected, _ = generate(folder, "many-plain", "many.jsonl", capfd, graphs=False)
    assert found == expected and any("decode visits" in line for line in said), said


ENCODED = {
    "int4": LLAMA | {"quantization_config": {"quant_method": "int4"}},
    "mxfp4": LLAMA | {"quantization_config": {"quant_method": "mxfp4"}},
    "fp8 experts": MIXTURE | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("share", [1, 1 << 60], ids=["whole", "in parts"])
@pytest.mark.parametrize("model", ENCODED)
def test_weights_that_stay_encoded_are_decoded_within_the_graph_to_the_same_bits(
    tmp_path, model, share, monkeypatch, capfd
):
    monkeypatch.setattr(building, "DECODING_SHARE", share)
    monkeypatch.setattr(search, "_coded_best", lambda tried, here: here)  # not decoded while they are loaded
    (tmp_path / "config.json").write_text(json.dumps(ENCODED[model]))
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("other")))
    replayed, said = generate(tmp_path, "graphs", "rows.jsonl", capfd)
    plain, _ = generate(tmp_path, "plain", "rows.jsonl", capfd, graphs=False)
    assert replayed == plain
    found = re.search(r"graphs: (\d+) of (\d+) decode visits", " ".join(said))
    assert found and int(found[1]) > 0.6 * int(found[2]), said


@torch.inference_mode()
def test_what_cannot_be_captured_is_refused_and_leaves_the_device_as_it_was():
    device = torch.device("cuda", 0)
    capturer, numbers, sums = (
        Capturer(streams_of(device)),
        torch.ones(1000, device=device),
        torch.zeros(1, device=device),
    )

    def waits():
        sums.fill_((numbers * 2).sum().item())

    with pytest.raises(RuntimeError):
        capturer.capture(waits)
    replay = capturer.capture(lambda: sums.copy_((numbers * 3).sum()))
    for value in (1.0, 2.0):
        numbers.fill_(value)
        replay()
        assert sums.item() == 3000 * value
    held = torch.cuda.memory_reserved(device)
    for _ in range(3):
        torch.empty(64 << 20, device=device)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) <= held


def test_a_capture_that_fails_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    def fails(capturer, call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("few")))
    expected, _ = generate(tmp_path, "plain", "few.jsonl", capfd, graphs=False)
    monkeypatch.setattr(Capturer, "capture", fails)
    found, said = generate(tmp_path, "failed", "few.jsonl", capfd)
    assert found == expected and sum("could not be captured: CUDA out of memory" in line for line in said) == 1, said
