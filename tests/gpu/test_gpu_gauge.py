"""What keeps a GPU busy, by marks of its streams: against the host's clock, and in a whole run."""

import json
import time

import numpy as np
import pytest
import torch

import world
from mpirun import describe
from noria.engine.gauge import Gauge
from noria.output import opened
from noria.streams import streams_of

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.world]


def test_marks_measure_what_the_host_measures_around_them():
    device = torch.device("cuda", 0)
    streams = streams_of(device)
    matrix, host = torch.randn(8192, 8192, device=device), torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    copied, off = torch.empty_like(host, device=device), []
    torch.mm(matrix, matrix)
    for _ in range(5):  # the host is late where it is busy: the best counts
        gauge = Gauge(streams)
        gauge.end_round("decode")
        torch.cuda.synchronize()
        began = time.perf_counter()
        mark = gauge.mark()
        for _ in range(5):
            torch.mm(matrix, matrix)
        gauge.computed(mark)
        torch.cuda.synchronize()
        computed, began = time.perf_counter() - began, time.perf_counter()
        streams.copy("load", [(copied, host)]).synchronize()
        loaded = time.perf_counter() - began
        gauge.end_round("decode")
        columns = gauge.columns()
        off.append([columns["decode_compute_seconds"] / computed - 1, columns["decode_load_seconds"] / loaded - 1])
    assert np.abs(off).min(0).max() < 0.1, off


def test_a_streaming_run_shows_its_link_at_work(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    (tmp_path / "p.jsonl").write_text((json.dumps({"token_ids": [5] * 64}) + "\n") * 64)
    flags = ["--weights", "cpu=100", "--compress-weights", "off", "--max-new-tokens", "256", "--ignore-eos"]
    files = ["--random-weights", "config.json", "--prompts", "p.jsonl", "--output", "o.h5"]
    files = [str(tmp_path / word) if "." in word else word for word in files]
    done = world.command(1, ["run", *files, *flags], timeout=240)
    assert done.returncode == 0, describe(done)
    assert "\nwaiting for weights " in done.stderr and "\nlink to the GPU " in done.stderr
    with opened.open(tmp_path / "o.h5") as rows:
        timing = rows.timings()
    rounds, watched = timing["decode_rounds"][0], timing["decode_watched_rounds"][0]
    seconds = timing["decode_seconds"][0] / rounds * watched  # of the rounds that were looked at
    assert 0.5 * seconds < timing["decode_load_seconds"][0] < 1.1 * seconds, "the link binds"
    rate = timing["decode_host_to_gpu_nbytes"][0] / rounds * watched / timing["decode_load_seconds"][0]
    assert 10e9 < rate < 200e9
    assert 0 < timing["decode_compute_seconds"][0] < seconds and timing["decode_launches_seconds"][0] > 0
