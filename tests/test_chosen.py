"""Experts that are loaded when a router has chosen them: the same tokens, in every tier and encoding, by the bytes of these."""

import json
from dataclasses import replace

import chosen_worker
import pytest
import torch

import reference
import tiny_models
import world
from counts import some
from late_streams import LateStreams
from noria import config, streams
from noria.__main__ import main
from noria.blocks import layer_name
from noria.checkpoint.checkpoint import open_checkpoint
from noria.engine.assembly import weights_of
from noria.engine.chosen import Tail, runs_of, without_experts
from noria.engine.loading import Loader
from noria.engine.timing import Traffic
from noria.kernels.expert_layer import Arriving
from noria.launch.mpi import Solo
from noria.models import _routing
from noria.output.generations import open_generations
from noria.output.parts import Parts
from noria.plan import costs
from noria.run import run

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
ROWS = [  # of several groups the first one is left
    {"token_ids": ids, "max_new_tokens": new}
    for ids, new in (([5, 6, 7], 9), ([*range(8, 28)], 3), ([30, 31], 2), ([40], 4))
]
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
temperature = 0.0
ignore_eos = true
[pipeline]
step_tokens = 32
"""
FORMS = {"plain": [], "fp8": ["--quantization", "fp8"], "int4": ["--quantization", "int4", "--group-size", "32"]}


def state():
    """Tensors of float64 as transformers names them."""
    draw, size, inner, found = torch.Generator().manual_seed(5), 32, 12, {}
    sizes = {"model.embed_tokens": (97, size), "lm_head": (97, size), "model.norm": (size,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        top = f"model.layers.{layer}"
        sizes |= {
            f"{top}.self_attn.{name}": (rows, size) for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16))
        }
        sizes |= {
            f"{top}.self_attn.o_proj": (size, 32),
            f"{top}.self_attn.q_norm": (8,),
            f"{top}.self_attn.k_norm": (8,),
        }
        sizes |= {f"{top}.input_layernorm": (size,), f"{top}.post_attention_layernorm": (size,)}
        if layer:
            sizes[f"{top}.mlp.gate"] = (16, size)
        for place, wide in [(f"{top}.mlp.experts.{x}", inner) for x in range(16)] if layer else [(f"{top}.mlp", 24)]:
            sizes |= {
                f"{place}.gate_proj": (wide, size),
                f"{place}.up_proj": (wide, size),
                f"{place}.down_proj": (size, wide),
            }
    for name, shape in sizes.items():
        numbers = torch.randn(shape, generator=draw, dtype=torch.float64) * 0.3
        found[f"{name}.weight"] = numbers + 1 if len(shape) == 1 else numbers
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model in each form, prompts, and the tokens that the dense model gives."""
    folder, tensors = tmp_path_factory.mktemp("chosen"), state()
    tiny_models.write_directory(folder / "hf", CONFIG, tensors)
    for form, flags in FORMS.items():
        assert main(["convert", str(folder / "hf"), str(folder / f"{form}.h5"), "--dtype", "float64", *flags]) == 0
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "run.toml").write_text(RUN)
    dense = {name: tensor.numpy() for name, tensor in tensors.items()}
    wanted = [reference.generate(CONFIG, dense, row["token_ids"], row["max_new_tokens"]) for row in ROWS]
    (folder / "expected.json").write_text(json.dumps(wanted))
    return folder


@pytest.fixture
def late(monkeypatch):
    """Copies are as late as their events allow."""
    monkeypatch.setattr(streams, "streams_of", LateStreams)


def generated(folder, form, name, **keys):
    """The tokens of a run of the model in this form, and what it measured."""
    files = {"model": f"{form}.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    with open_generations(folder / f"{name}.h5") as output:
        tokens = [row.token_ids.tolist() for row in output.rows()]
        return (
            tokens,
            {key: value[:] for key, value in output.file["timing"].items()},
            json.loads(output.file.attrs["plan"]),
        )


def always(monkeypatch, tokens=4):
    """Steps of so many tokens have their chosen experts alone, whatever is faster here."""
    monkeypatch.setattr(costs, "chosen_tokens", lambda plan, cut, rates, workload: tokens)


CASES = [
    (form, weights, keys)
    for form in FORMS
    for weights in ({"cpu": 100}, {"disk": 100}, {"gpu": 40, "cpu": 60}, {"cpu": 50, "disk": 50})
    for keys in (
        {"groups": 1},
        {"groups": 1, "laps": 2, "microbatches": 2},
        {"groups": 1, "schedule": "sequential"},
        {"groups": 3, "laps": 2},
        {"groups": 3, "schedule": "multi_batch", "cache": {"cpu": 100}},
    )
]


@pytest.mark.parametrize("case", some(CASES))
def test_tokens_are_those_of_whole_blocks_in_fewer_bytes_in_every_tier_form_and_order(folder, late, monkeypatch, case):
    form, weights, keys = case
    whole, loaded_whole, _ = generated(folder, form, "whole", weights=weights, overwrite=True, **keys)
    if form == "plain":
        assert whole == json.loads((folder / "expected.json").read_text())
    always(monkeypatch)
    chosen, loaded, plan = generated(folder, form, "chosen", weights=weights, overwrite=True, **keys)
    assert chosen == whole and plan["chosen_tokens"] == 4
    for link in ("host_to_gpu", "disk_to_host") if "disk" in weights else ("host_to_gpu",):
        assert 0 < loaded[f"decode_{link}_nbytes"][0] < loaded_whole[f"decode_{link}_nbytes"][0]
        saved = loaded_whole[f"prefill_{link}_nbytes"][0] - loaded[f"prefill_{link}_nbytes"][0]
        assert saved == 0 if keys["groups"] == 1 else saved >= 0, (
            "a group's few tokens may come before another's prompts"
        )


@pytest.mark.parametrize("form", FORMS)
def test_bytes_counted_are_those_of_the_chosen_experts_and_of_the_rest_of_each_layer(folder, late, monkeypatch, form):
    always(monkeypatch)
    asked, choose = [], _routing.choose

    def choosing(*given):
        found = choose(*given)
        asked.append(found[0])
        return found

    monkeypatch.setattr(_routing, "choose", choosing)
    _, loaded, plan = generated(folder, form, f"{form}-bytes", weights={"cpu": 100}, groups=1)
    with open_checkpoint(folder / f"{form}.h5") as checkpoint:
        blocks = checkpoint.blocks
    experts = {
        name: next((one for one in its.parameters if one.name == "experts"), None) for name, its in blocks.items()
    }
    rest = {name: its.nbytes - (experts[name].nbytes if experts[name] else 0) for name, its in blocks.items()}
    decodes = max(row["max_new_tokens"] for row in ROWS) - 1
    layers = [layer_name(layer) for layer in range(1, 5)]
    assert len(asked) == (1 + decodes) * len(layers) and plan["weight_slots"] == 3
    wanted = decodes * sum(rest[name] for name in [layer_name(0), *layers, "head"])
    for number, choices in enumerate(asked[len(layers) :]):
        parameter, chosen = experts[layers[number % 4]], len(choices.unique())
        came_whole = number < 2  # and layer 0 in the third slot: they had set out while prompts were computed
        wanted += parameter.nbytes if came_whole else chosen * parameter.piece.nbytes
    assert loaded["decode_host_to_gpu_nbytes"][0] == wanted
    assert loaded["weights_unused_nbytes"][0] < sum(rest[name] for name in [layer_name(0), *layers]), (
        "no expert in vain"
    )


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("form", FORMS)
def test_an_expert_that_nobody_chose_is_not_there_and_a_chosen_one_is_loaded_once(folder, form, tier):
    name, traffic, late_streams = layer_name(2), Traffic(), LateStreams(CPU)
    with open_checkpoint(folder / f"{form}.h5") as checkpoint:
        block = checkpoint.blocks[name]
        experts = next(one for one in block.parameters if one.name == "experts")
        resident, streamed = (
            weights_of(
                replace(Loader(checkpoint, {name: place}, "float64", late_streams).load(), chosen_tokens=most),
                [range(2, 3)], 1, 1, late_streams, traffic, ahead=False,
            )
            for place, most in (("gpu", 0), (tier, 1))
        )  # fmt: skip
        expected, buffer = resident.wait(name), streamed._free[0].buffer
        streamed.begin(0, 0, 0, tokens=1)
        assert not isinstance(streamed.wait(name)["experts.gate_up"], Arriving), "the first time all come"
        streamed.done(name)
        traffic.end_round(prefill=True)
        buffer.fill_(7)
        streamed.begin(1, 0, 0, tokens=1)
        found, brought = streamed.wait(name), set()
        for choices in ([[3, 4], [4, 9]], [[9, 3], [3, 4]], [[15, 4]]):
            assert isinstance(found["experts.gate_up"], Arriving)
            found["experts.gate_up"].bring(torch.tensor(choices))
            brought |= {one for pair in choices for one in pair}
            check(found, expected, sorted(brought))
            for expert in {*range(16)} - brought:
                first, nbytes = experts.place(expert)
                assert buffer[first : first + nbytes].eq(7).all()
        streamed.done(name)
        streamed.close()
        resident.close()
    traffic.end_round(prefill=False)
    assert traffic.prefill["host_to_gpu"] == block.nbytes
    assert traffic.decode["host_to_gpu"] == block.nbytes - (16 - 4) * experts.piece.nbytes
    assert traffic.decode["disk_to_host"] == traffic.decode["host_to_gpu"] * (tier == "disk")


def check(found, expected, experts):
    """These experts, and all else, are as they are where all are on the device."""
    assert {*found} == {*expected}
    for name in found:
        here, whole = (one.there if isinstance(one, Arriving) else one for one in (found[name], expected[name]))
        if name.startswith("experts."):
            here, whole = (
                one[experts] if isinstance(one, torch.Tensor) else one.of(experts).clone() for one in (here, whole)
            )
        assert torch.equal(here, whole), name


def test_a_run_that_was_stopped_goes_on_with_chosen_experts(folder, monkeypatch):
    always(monkeypatch)
    wanted, _, _ = generated(folder, "plain", "unstopped", weights={"cpu": 100})
    with open_generations(folder / "unstopped.h5") as file:
        rows, header = list(file.rows()), json.loads(file.attrs["header"])
    parts = Parts(folder / "stopped.h5", header)
    for row in rows[::2]:
        row.status, row.finish_reason, row.text, row.token_ids = "todo", "none", "", row.token_ids[:1]
        parts.add(row)
    parts.seal()
    tokens, _, _ = generated(folder, "plain", "stopped", weights={"disk": 100}, laps=2)
    assert tokens == wanted == json.loads((folder / "expected.json").read_text())


@pytest.mark.world
def test_rings_give_the_same_tokens_whose_last_group_chooses(folder):
    world.call(2, chosen_worker.work, folder)
    for case in chosen_worker.CASES:
        counted = {}
        for most in chosen_worker.MOST:
            with open_generations(folder / f"{case}-{most}.h5") as output:
                assert [row.token_ids.tolist() for row in output.rows()] == json.loads(
                    (folder / "expected.json").read_text()
                )
                counted[most] = output.file["timing/decode_host_to_gpu_nbytes"][:]
        assert (counted[4] < counted[0]).all()


@pytest.mark.parametrize("groups", [[5, 0], [0, 5], [5]])
def test_experts_stay_behind_where_one_group_of_few_tokens_is_left(groups):
    tail = Tail(5)
    assert not tail.leaves_experts(), "nothing is known yet"
    for group, tokens in enumerate(groups):
        tail.visit(group, tokens)
    assert tail.leaves_experts()
    tail.visit(9, 1)
    assert not tail.leaves_experts(), "another group computes"
    tail.visit(9, 0)
    tail.visit(groups.index(5), 6)
    assert not tail.leaves_experts(), "too many tokens"


def test_neighbours_are_one_run_and_the_rest_of_a_block_is_what_no_expert_has(folder):
    with open_checkpoint(folder / "plain.h5") as checkpoint:
        dense, block = (checkpoint.blocks[layer_name(layer)] for layer in (0, 1))
    experts = next(one for one in block.parameters if one.name == "experts")
    assert without_experts(dense) == [(0, dense.nbytes)]
    size, begin = experts.piece.nbytes, experts.offset
    assert runs_of(experts, [0, 1, 4, 15]) == [(begin, 2 * size), (begin + 4 * size, size), (begin + 15 * size, size)]
    left = [byte for first, nbytes in without_experts(block) for byte in range(first, first + nbytes)]
    assert left == [byte for byte in range(block.nbytes) if not begin <= byte < begin + 16 * size]
