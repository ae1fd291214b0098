"""Weights that few rows are multiplied with as they are stored: nothing of them is decoded that nobody asks for, and what is
lies where the plan has room for it."""

from dataclasses import replace

import pytest
import safetensors
import torch
import torch.nn.functional as F

import families
import mixtures
import tiny_models
from noria import config, encodings
from noria.blocks import lay_out, layer_name
from noria.checkpoint.random_weights import random_checkpoint
from noria.engine.decoding import Decoder
from noria.kernels import as_stored
from noria.kernels.as_stored import StoredWeight
from noria.limits import STORED_ROWS
from noria.model import in_products
from noria.models._linear import linear
from noria.pieces import Wanted
from noria.plan import costs, planner, terms
from noria.plan.loads import load_of
from noria.plan.problem import Machine, Problem
from noria.plan.rates import Rates
from noria.plan.rounds import Workload
from noria.step import Run
from test_decoding_blocks import apart, encoded
from whole import Whole, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = families.CONFIGS | mixtures.CONFIGS
FAMILIES = [name for name in CONFIGS if name == CONFIGS[name]["model_type"]]
DENSE = tiny_models.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
RATES, GIB = Rates(), 1 << 30
CPU = torch.device("cpu")
NAME = "layers/0000"
SHAPES = {"norm": (24,), "qkv": (48, 24), "qkv_bias": (48,), "out": (24, 16), "gate_up": (32, 24)}


def block(name=NAME, shapes=SHAPES):
    """Random numbers in FP8."""
    draw = torch.Generator().manual_seed(len(name))
    computed = {key: torch.randn(shape, generator=draw, dtype=torch.float64) for key, shape in shapes.items()}
    return encoded(lay_out(name, shapes, "float64"), computed)


@pytest.fixture
def decoded(monkeypatch):
    """The names of what is decoded."""
    found, decode = [], encodings.decode

    def counted(parameter, *given):
        found.append(parameter.name)
        decode(parameter, *given)

    monkeypatch.setattr(encodings, "decode", counted)
    return found


@pytest.fixture
def by_kernel(monkeypatch):
    """The kernel's stand-in, and inside of what it returns kinds of weights that go by it."""
    monkeypatch.setattr(
        as_stored, "product", lambda hidden, its, bias: F.linear(hidden, its.plain(hidden.dtype)[0], bias)
    )
    return lambda *weights: as_stored.multiplied_so({(its.kind, bias) for its in weights for bias in (False, True)})


def test_a_step_of_few_rows_decodes_nothing_and_one_of_many_what_it_asks_for_once_a_visit(decoded, by_kernel):
    held = block()
    expected, decoder = apart(held), Decoder(held.block.decoded_nbytes, CPU)
    decoded.clear()
    its = decoder.parameters(NAME, held)
    assert all(isinstance(its[name], StoredWeight) for name in ("qkv", "out", "gate_up")) and not decoded
    few, many = (torch.randn(rows, 24, dtype=torch.float64) for rows in (STORED_ROWS, STORED_ROWS + 1))
    with by_kernel(its["qkv"], its["gate_up"]):
        for hidden in (few[:1], few, many, few, many):
            its = decoder.parameters(NAME, held)  # a microbatch after another
            found = linear(hidden, its["qkv"], its["qkv_bias"])
            torch.testing.assert_close(
                found, F.linear(hidden, expected["qkv"], expected["qkv_bias"]), atol=1e-5, rtol=0
            )
            assert decoded == ["qkv"] * (hidden is many or "qkv" in decoded)
        found = linear(few[:, :16], its["out"])  # of which no kernel was chosen
    assert torch.equal(found, F.linear(few[:, :16], expected["out"])) and decoded == ["qkv", "out"]
    assert torch.equal(linear(few, its["qkv"]), F.linear(few, expected["qkv"])) and decoded == ["qkv", "out"]
    decoder.forget()
    assert torch.equal(linear(few, its["qkv"]), F.linear(few, expected["qkv"])) and decoded == ["qkv", "out", "qkv"]


def test_after_another_block_a_weight_is_decoded_anew(decoded):
    held, other = block(), block("layers/0001")
    expected, decoder = apart(held), Decoder(held.block.decoded_nbytes, CPU)
    its = decoder.parameters(NAME, held)
    decoded.clear()
    its["out"].decoded(), decoder.parameters("layers/0001", other)["out"].decoded()
    assert torch.equal(its["out"].decoded(), expected["out"]) and decoded == ["out"] * 3
    assert its["out"] is decoder.parameters(NAME, held)["out"]  # nothing is made anew for each visit


@pytest.mark.parametrize("whole", [True, False])
def test_numbers_lie_where_the_plan_has_room_for_them(whole):
    held = block()
    room = held.block.decoding_room(1 << 40 if whole else 0)
    decoder = Decoder(room, CPU)
    assert (
        len(decoder.buffer) == (held.block.decoded_nbytes if whole else room)
        and (room < held.block.decoded_nbytes) != whole
    )
    its, expected = decoder.parameters(NAME, held), apart(held)
    begin = decoder.buffer.data_ptr()
    for name in ("qkv", "out", "gate_up"):
        numbers = its[name].decoded()
        assert torch.equal(numbers, expected[name])
        assert begin <= numbers.data_ptr() and numbers.data_ptr() + numbers.nbytes <= begin + room
    assert torch.equal(its["qkv"].decoded(), expected["qkv"]) and {*its} == {*SHAPES}


def test_to_torch_a_stored_weight_is_its_numbers():
    held = block()
    weight, expected = Decoder(held.block.decoded_nbytes, CPU).parameters(NAME, held)["out"], apart(held)["out"]
    hidden = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(F.linear(hidden, weight=weight), F.linear(hidden, expected))
    assert torch.equal(hidden @ torch.t(weight), hidden @ expected.t())


def test_what_is_taken_otherwise_than_in_products_of_hidden_states_comes_as_numbers():
    shapes = SHAPES | {
        "router": (8, 24),
        "x_bias": (2, 24),
        "latent": (24, 24),
        "up": (48, 24),
        "own": Wanted((8, 24), "float32"),
    }
    names = [one.name for one in in_products(lay_out(NAME, shapes, "bfloat16"))]
    assert names == ["qkv", "out", "gate_up", "latent"]
    assert [one.name for one in in_products(lay_out(NAME, {"up": (48, 24), "mix": (2, 8, 8)}, "bfloat16"))] == ["up"]
    assert in_products(lay_out("head", {"lm_head": (48, 24)}, "bfloat16")) == ()


# ---- what a plan counts


def planned(dtype="bfloat16", said=None, device="cuda", **flags):
    """The plan of a dense model in 4 bits on a GPU, and what it has to do."""
    form = said or {"quant_method": "int4", "group_size": 64}
    made = random_checkpoint(DENSE | {"quantization_config": form}, dtype)
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "dtype": dtype} | flags)
    problem = Problem(
        run, made.shape, made.blocks, dtype, 1, Machine(device, 40 * GIB, 60 * GIB), 64, Workload(64, 99, 9)
    )
    plan = planner.make(problem, RATES)
    return plan, problem, load_of(plan, problem.cut(plan.laps), 0)


def decoding(plan, problem, load, rows, rates=RATES):
    """Seconds of a round of so many rows in one microbatch."""
    return costs.resources(plan, problem.shape, load, rates, costs.Round(rows, 99))["decoding"]


@pytest.mark.parametrize("weights", [{"gpu": 100}, {"cpu": 100}])
@pytest.mark.parametrize("room", [0, 1 << 40])
def test_rounds_of_few_rows_are_planned_without_decoding(weights, room):
    plan, problem, _ = planned(weights=weights, groups=1, microbatches=1)
    plan = replace(plan, decoded=False, decoding_room=room)
    load = load_of(plan, problem.cut(plan.laps), 0)
    assert decoding(plan, problem, load, STORED_ROWS) == 0
    block, many = problem.blocks["layers/0000"], decoding(plan, problem, load, STORED_ROWS + 1)
    assert many == pytest.approx(terms.decoding(2 * block.decoding_nbytes, RATES), rel=0.01)
    assert decoding(replace(plan, dtype="float32"), problem, load, 1) == many
    assert decoding(plan, problem, load, 1, replace(RATES, device="CPU")) > many


def test_weights_that_no_kernel_takes_are_planned_as_before():
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    plan, problem, load = planned(said=said, weights={"cpu": 100}, groups=1)
    assert load.decoded + load.decoded_again > 0 and load.dense == (0, 0)
    assert decoding(plan, problem, load, 1) == decoding(plan, problem, load, STORED_ROWS + 1) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_such_weights_by_linear_alone(name, monkeypatch, tmp_path):
    def refused(*given):
        raise AssertionError("a stored weight came to torch")

    monkeypatch.setattr(StoredWeight, "__torch_function__", refused)
    families.save(CONFIGS[name], tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    whole, blocks = Whole(CONFIGS[name], state, torch.float64), []
    for number, computed in enumerate(whole.layers):
        shapes = whole.model.layer_parameters(whole.shape, number)
        blocks.append(encoded(lay_out(layer_name(number), shapes, "float64"), computed))
    decoder = Decoder(max(held.block.decoding_room(0) for held in blocks), CPU)
    whole.layers = [decoder.parameters(held.block.name, held) for held in blocks]
    assert all(any(isinstance(its, StoredWeight) for its in layer.values()) for layer in whole.layers)
    assert whole.logits([(tokens_of(3, 21), 0, (Run(0, 4),))])[0].isfinite().all()
