"""Decode steps as graphs on the CPU: a capturer that reruns the function that it recorded, over the same memory."""

# ruff: noqa: F811 -- the folder of test_same is a fixture here
import contextlib
import json
from types import SimpleNamespace

import graphs_worker
import numpy as np
import pytest
import torch

import tiny_models
import world
from captured import captured
from noria import attention, config, kinds
from noria.checkpoint.convert import convert
from noria.checkpoint.quantization import quantization
from noria.engine.decoding import Decoder
from noria.engine.graphs import SERVED, Graphs
from noria.kernels import as_stored
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import building, search
from noria.run import run
from test_same import RUN, compare, folder  # noqa: F401

CASES = {
    "whole": {"step_tokens": 400, "microbatch_tokens": 400},
    "chunks": {"step_tokens": 11, "microbatch_tokens": 7},
    "laps and groups": {"laps": 3, "groups": 2},
}


def alone(folder, name, prompts="prompts.jsonl", **keys):
    files = {"model": "model.h5", "prompts": prompts, "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_rank_gives_the_references_tokens(folder, case):
    with captured() as graphs:
        alone(folder, f"graphs-{case}", **CASES[case])
    assert graphs.replays > 7 and graphs.captures < graphs.replays
    compare(folder, [f"graphs-{case}"])


@pytest.mark.slow
@pytest.mark.world
def test_rings_give_the_references_tokens(folder):
    counts = world.call(4, graphs_worker.work, folder, timeout=200)
    compare(folder, map(graphs_worker.name, graphs_worker.CASES))
    replays = {num_ranks: [count.get(num_ranks) for count in counts[:num_ranks]] for num_ranks in graphs_worker.CASES}
    assert all(count for counted in replays.values() for count in counted), replays


def same(folder, name, other):
    """Whether two outputs have the same tokens, and log-probabilities but for the rounding of products of other sizes."""
    rows, logprobs = [], []
    for its in (name, other):
        with open_generations(folder / f"{its}.h5") as output:
            found = list(output.rows())
        rows.append([(row.status, row.token_ids.tolist()) for row in found])
        logprobs.append(np.concatenate([row.logprobs for row in found]))
    assert {status for status, _ in rows[0]} == {"done"} and len({tuple(ids) for _, ids in rows[0]}) > len(rows[0]) / 2
    np.testing.assert_allclose(*logprobs, rtol=0, atol=1e-9)
    return rows[0] == rows[1]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A model with windows, and rows that begin alike, of which some grow, some end early."""
    folder, random = tmp_path_factory.mktemp("windowed"), np.random.default_rng(3)
    model = tiny_models.LLAMA | {"num_hidden_layers": 3, "eos_token_id": 3, "max_position_embeddings": 400}
    state = {name: tensor * 0.25 for name, tensor in tiny_models.state(model, torch.float64).items()}
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 70}
    tiny_models.write_directory(folder / "hf", model | mistral, state)
    convert(folder / "hf", folder / "model.h5")
    (folder / "run.toml").write_text(RUN)
    text = lambda length: random.integers(4, 101, length).tolist()  # noqa: E731
    beginnings = [text(130), text(70), []]
    rows = [
        {
            "token_ids": beginnings[row % 3] + text(1 + 5 * row % 40),
            "temperature": 0.9 * (row % 2),
            "max_new_tokens": 4 + 9 * row % 50,
        }
        for row in range(20)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("programs", "seen"), [(1, 0), (30, 0), (30, 2)])
def test_rows_that_begin_alike_and_grow_have_the_same_numbers_with_graphs_and_without(windowed, programs, seen):
    keys = {"logprobs": 1, "step_tokens": 300, "microbatch_tokens": 300}
    with captured(programs, seen) as graphs:
        alone(windowed, f"graphs-{programs}-{seen}", **keys)
        replays = graphs.replays
        alone(windowed, f"plain-{programs}-{seen}", graphs=False, **keys)
    assert replays == graphs.replays > 20 and graphs.captures < replays
    assert same(windowed, f"graphs-{programs}-{seen}", f"plain-{programs}-{seen}")


@pytest.mark.slow
def test_states_go_through_graphs_as_they_do_otherwise(tmp_path, monkeypatch):
    rows = [
        {"token_ids": [*range(5, 6 + row)], "max_new_tokens": 3 + row, "n": 1 + row % 2, "temperature": 0.9}
        for row in range(7)
    ]
    with captured() as graphs:
        turns = kinds.load("models", "turns")
        tiny_models.write_directory(tmp_path / "hf", turns.CONFIG, turns.random_state(turns.CONFIG))
        convert(tmp_path / "hf", tmp_path / "model.h5")
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "run.toml").write_text('dtype = "float64"\ndevice = "cpu"\n[sampling]\nlogprobs = 0\nseed = 5\n')
        monkeypatch.setattr(attention, "fitting", lambda *_: (kinds.load("attention", "listed"), ""))
        alone(tmp_path, "graphs")
        replays = graphs.replays
        alone(tmp_path, "plain", graphs=False)
    assert replays == graphs.replays > 5
    assert same(tmp_path, "graphs", "plain")


@contextlib.contextmanager
def spoiled(graphs, monkeypatch):
    """Before a graph is captured and after each replay, the memory in which weights are decoded holds what nobody wants: of
    a real one the decoding that it captured is all that it does, and it says nothing to the host."""
    decoders, begin, capture = [], Decoder.__init__, graphs.capture

    def begun(self, *arguments):
        begin(self, *arguments)
        decoders.append(self)

    def spoil():
        for decoder in decoders:
            decoder.buffer.fill_(255)

    def captured(call):
        spoil()
        again = capture(call)
        return lambda: (spoil(), again(), spoil())

    monkeypatch.setattr(Decoder, "__init__", begun)
    monkeypatch.setattr(graphs, "capture", captured)
    monkeypatch.setattr(search, "_coded_best", lambda tried, here: here)  # not decoded while they are loaded
    yield


@pytest.mark.slow
@pytest.mark.parametrize("share", [1, 1 << 60], ids=["whole blocks", "a parameter at a time"])
def test_graphs_decode_all_weights_that_they_need_and_steps_beside_them_their_own(tmp_path, monkeypatch, share):
    monkeypatch.setattr(building, "DECODING_SHARE", share)
    config_json = tiny_models.LLAMA | {"num_hidden_layers": 1}  # what was decoded last is what comes next
    tiny_models.write_directory(tmp_path / "hf", config_json, tiny_models.state(config_json, torch.float64))
    convert(tmp_path / "hf", tmp_path / "model.h5", forms=quantization("int4"))
    rows = [{"token_ids": [row + 3] * (3 + row), "max_new_tokens": 3 + row, "logprobs": 1} for row in range(7)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN)
    with captured() as graphs, spoiled(graphs, monkeypatch):
        alone(tmp_path, "graphs", step_tokens=9, microbatch_tokens=9)
        assert graphs.replays > 5
        alone(tmp_path, "plain", step_tokens=9, microbatch_tokens=9, graphs=False)
        rows_of = of_stored_weights(monkeypatch)
        alone(tmp_path, "few", step_tokens=9, microbatch_tokens=9)
    assert same(tmp_path, "graphs", "plain") and same(tmp_path, "few", "plain")
    assert 4 in rows_of["stored"] and max(rows_of["stored"]) == 4 and min(rows_of["decoded"]) > 4


def of_stored_weights(monkeypatch):
    """Up to four rows are multiplied with weights as they are stored from now on, by torch, to what they are in float64. Returns
    how many rows there were, of such and of other products."""
    found = {"stored": set(), "decoded": set()}

    def serves(hidden, *_):
        found["stored" if len(hidden) <= 4 else "decoded"].add(len(hidden))
        return len(hidden) <= 4

    monkeypatch.setattr(as_stored, "serves", serves)
    monkeypatch.setattr(as_stored, "product", lambda hidden, its, _: hidden @ its.plain(hidden.dtype)[0].t())
    return found


def test_what_cannot_be_captured_is_said_once_and_the_run_goes_on(folder, monkeypatch, capfd):
    with captured() as graphs:
        monkeypatch.setattr(graphs, "capture", lambda call: call() or 1 / 0)
        alone(folder, "failed")
    compare(folder, ["failed"])
    assert capfd.readouterr().err.count("could not be captured: division by zero") == 1


def test_a_step_goes_by_the_next_larger_graph_until_its_own_size_has_come_often_enough():
    graphs = Graphs(
        *[
            SimpleNamespace(
                shape=SimpleNamespace(bundle=()),
                model=None,
                device=torch.device("cpu"),
                say=None,
                gauge=None,
                trace=None,
            )
        ]
        * 6
    )
    graphs._graphs = {(0, 64): None, (0, 128): None}
    assert [graphs.size_of(rows) for rows in (33, 64, 65, 100, 129, 20, 3)] == [64, 64, 128, 128, 160, 64, 64]
    near, far = SERVED.values()
    assert [graphs.size_of(33) for _ in range(near + 1)] == [64] * (near - 1) + [40, 40]
    graphs._graphs = {(0, 1024): None}
    assert [graphs.size_of(rows) for rows in (300, 200, 120, 5)] == [
        1024,
        1024,
        1024,
        8,
    ]  # as rows end one after another
    assert [graphs.size_of(200) for _ in range(far + 1)] == [1024] * (far - 1) + [224, 224]
