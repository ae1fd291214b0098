"""A cache in fewer bits on a GPU: what the CPU rounds and decodes, bit for bit; the same bits in bfloat16 in every run."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import item_checks
import replays
from noria import config
from noria.arrays import ENCODINGS, encoded, keys_and_values
from noria.attention import items
from noria.encodings import _cached
from noria.engine.capturing import Capturer
from noria.engine.parameters import FIELD_DTYPES
from noria.engine.rounding import RoundedArray, RoundedAttention, RoundedRows
from noria.kernels import attend
from noria.kernels.coded import zeros
from noria.kernels.scoring import HeadShape, Scoring
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run
from noria.streams import streams_of

pytestmark = pytest.mark.gpu
KINDS = sorted(ENCODINGS)
HEADS = [HeadShape(32, 8, 128, 128), HeadShape(14, 2, 64, 64), HeadShape(6, 1, 80, 80), HeadShape(4, 4, 192, 128)]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.05,
}
RUN = """
dtype = "bfloat16"
device = "cuda"
[sampling]
max_new_tokens = 12
ignore_eos = true
logprobs = 2
"""
CASES = {
    "whole": {},
    "chunks": {"step_tokens": 96, "microbatch_tokens": 40, "prefix_sharing": False},
    "no-graphs": {"graphs": False},
    "cache-everywhere": {"cache": {"gpu": 40, "cpu": 30, "disk": 30}, "groups": 2, "laps": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 128), (torch.float16, 80), (torch.float16, 96)])
def test_a_gpu_rounds_and_decodes_to_the_bits_of_the_cpu(kind, dtype, size):
    for array in encoded(keys_and_values(3, size), ENCODINGS[kind]):
        new, found = (torch.randn(700, 3, size) * torch.logspace(-3, 2, 700)[:, None, None]).to(dtype), []
        new[5] = 0
        for device in ("cpu", "cuda"):
            fields = {
                name: torch.zeros(50 * 16, *one.row, dtype=FIELD_DTYPES[one.computed("")], device=device)
                for name, one in array.fields.items()
            }
            assert device == "cpu" or not _cached.refuses(array, torch.device(device, 0), dtype)  # by kernels
            its = RoundedArray(array, fields)
            its.write(torch.arange(700, device=device), new.to(device))
            decoded = torch.zeros(44 * 16, 3, size, dtype=dtype, device=device)
            its.decode(torch.arange(43, -1, -1, device=device), decoded)
            found.append([*(one.cpu() for one in fields.values()), decoded.cpu()])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(HEADS)))
def test_attention_decodes_itself_to_the_bits_of_what_is_decoded_before(kind, number):
    device, dtype, heads = torch.device("cuda", 0), (torch.bfloat16, torch.float16)[number == 2], HEADS[number]
    rows, draw, found = item_checks.MIXED, torch.Generator().manual_seed(1), []
    keys, values = (
        RoundedArray(array, zeros(array, item_checks.MIXED_ROWS, device).fields)
        for array in attend.arrays(heads, ENCODINGS[kind])
    )
    for its in (keys, values):
        new = torch.randn(item_checks.MIXED_ROWS, *its.array.row, generator=draw)
        its.write(torch.arange(len(new), device=device), new.to(device, dtype))
    queries = torch.randn(int(rows.counts.sum()), heads.num_heads, heads.dim, generator=draw).to(device, dtype)
    scores = Scoring(heads.dim**-0.5, window=(None, 150)[number % 2])
    for in_tiles in (False, True):
        over = RoundedAttention(
            items, 400, heads.num_key_heads * (heads.dim + heads.width) * 2, dtype, device, in_tiles
        )
        plan = over.of_rows(rows, device)
        assert isinstance(plan, RoundedRows) != in_tiles
        found.append(over.attention(plan, queries, keys, values, scores))
    assert found[0].isfinite().all()
    assert torch.equal(found[0].view(torch.int16), found[1].view(torch.int16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(HEADS)))
@pytest.mark.parametrize("window", [None, 150])
def test_a_layer_that_is_replayed_leaves_the_bits_of_one_that_is_queued_anew(kind, number, window):
    device, dtype = torch.device("cuda", 0), (torch.bfloat16, torch.float16)[number == 2]
    capturer = Capturer(streams_of(device))
    found, captures = replays.differences(HEADS[number], ENCODINGS[kind], dtype, device, capturer, window)
    assert not found and captures < replays.STEPS


def rows():
    """Prompts of 1 to 1,100 tokens, some of a shared beginning; one in two is sampled, by a seed of its own."""
    random = np.random.default_rng(1)
    begins = random.integers(10, 31000, 192).tolist()
    for row in range(24):
        ids = begins * (row % 4 > 1) + random.integers(10, 31000, [1, 7, 65, 130, 400, 1100][row % 6]).tolist()
        yield {"token_ids": ids, **({"temperature": 1.0, "top_p": 0.95, "seed": row} if row % 2 else {})}


def hashes(output):
    with open_generations(output) as file:
        found = list(file.rows())
    assert {row.status for row in found} == {"done"}
    arrays = ((row.token_ids, row.logprobs, row.top_logprobs) for row in found)
    return [hashlib.sha256(b"".join(np.ascontiguousarray(one).tobytes() for one in its)).hexdigest() for its in arrays]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_every_run(kind, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    found, replayed = {}, {}
    for name, keys in CASES.items():
        files = {"prompts": "prompts.jsonl", "output": f"{name}.h5", "random_weights": "config.json", "scratch": "."}
        flags = {key: str(tmp_path / file) for key, file in files.items()} | keys | {"kv_cache_dtype": kind}
        assert run(config.load(tmp_path / "run.toml", flags), Solo()) == 0
        found[name] = hashes(tmp_path / f"{name}.h5")
        replayed[name] = re.search(r"graphs: [1-9]\d* of \d+ decode visits", capfd.readouterr().err) is not None
    assert len({*found["whole"]}) == 24
    assert replayed["whole"] and not replayed["no-graphs"], replayed
    assert {name: sum(map(str.__ne__, its, found["whole"])) for name, its in found.items()} == dict.fromkeys(CASES, 0)
