"""Decode steps over a cache in fewer bits, replayed as a device replays them: what a step differs by lies where they read it.

Attention, rounding and decoding by the kernels that GPUs have, in Triton's interpreter. Needs what test_items.py needs; where
there is a GPU, gpu/test_graphs.py captures them.
"""

import contextlib
import importlib
import importlib.util
import json
from unittest.mock import patch

import numpy as np
import pytest
import torch

if not importlib.util.find_spec("triton"):
    pytest.skip("needs triton", allow_module_level=True)
if torch.cuda.is_available() or np.lib.NumpyVersion(np.__version__) >= "2.4.0":
    pytest.skip("Triton's interpreter does not run here", allow_module_level=True)

with pytest.MonkeyPatch.context() as environment:  # what is imported now is interpreted
    environment.setenv("TRITON_INTERPRET", "1")
    compiled = importlib.import_module("noria.kernels.items")
    attend, rounded = map(importlib.import_module, ("noria.kernels.attend", "noria.kernels.rounded"))
if {type(its).__name__ for its in (compiled.attend_items, rounded.round_rows)} != {"InterpretedFunction"}:
    pytest.skip("the kernels were imported before, to be compiled", allow_module_level=True)

import tiny_models
from captured import ROWS, Counted
from noria import attention, config
from noria.arrays import ENCODINGS
from noria.attention import items
from noria.checkpoint.convert import convert
from noria.encodings import _cached
from noria.engine import graphs
from noria.kernels.work import Packing
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import building
from noria.run import run
from recorded import Recorder

KINDS = sorted(ENCODINGS)
RUN = """
dtype = "float32"
device = "cpu"
[sampling]
ignore_eos = true
logprobs = 2
seed = 3
"""
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 40}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with windows, and rows that begin alike, cross pages and blocks, and end one after another."""
    folder, random = tmp_path_factory.mktemp("recorded"), np.random.default_rng(4)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 200}
    model = tiny_models.LLAMA | sizes | {"eos_token_id": 3}
    state = {name: tensor * 0.3 for name, tensor in tiny_models.state(model).items()}
    tiny_models.write_directory(folder / "hf", model | MISTRAL, state)
    convert(folder / "hf", folder / "model.h5")
    (folder / "run.toml").write_text(RUN)
    text = lambda length: random.integers(4, 101, length).tolist()  # noqa: E731
    begins = text(64)
    rows = [
        {"token_ids": begins * (row % 2) + text([3, 14, 62][row % 3]), "max_new_tokens": 3 + 2 * (row % 3)}
        for row in range(5)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@contextlib.contextmanager
def by_kernels(capturer):
    """Every run inside attends, rounds and captures as on a GPU."""

    def packing(device, heads, window=None):
        return Packing(heads.group, heads.num_key_heads, 12, window=window)

    with (
        patch.object(items, "refuses", lambda *_: ""),
        patch.object(items, "refuses_coded", lambda *_: ""),
        patch.object(attend, "packing", packing),
        patch.object(attention, "ORDER", ("items", "sdpa")),
        patch.object(_cached, "_by_kernels", lambda *_: True),
        patch.object(graphs, "SEEN", 0),
        patch.object(graphs, "capturer_of", lambda _: capturer),
        patch.object(building, "_graph_rows", lambda problem, _: ROWS * problem.config.pipeline.graphs),
    ):
        yield


def generated(folder, name, capturer, **keys):
    """Tokens and log-probabilities of each row."""
    files = {"model": "model.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    with by_kernels(capturer):
        assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    with open_generations(folder / f"{name}.h5") as output:
        rows = list(output.rows())
    assert {row.status for row in rows} == {"done"}
    return [(row.token_ids.tolist(), row.logprobs.tolist(), row.top_logprobs.tolist()) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replayed_is_what_the_host_would_queue_anew(folder, kind):
    recorder, again = Recorder(), Counted()
    found = generated(folder, f"recorded-{kind}", recorder, kv_cache_dtype=kind)
    expected = generated(folder, f"again-{kind}", again, kv_cache_dtype=kind)
    assert found == expected
    assert recorder.replays == again.replays > recorder.captures and recorder.kernels
    plain = generated(folder, f"plain-{kind}", None, kv_cache_dtype=kind, graphs=False)
    assert [tokens for tokens, *_ in plain] == [tokens for tokens, *_ in found]
