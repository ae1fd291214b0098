"""Parameters with a dtype of their own, in pieces, encoded: from the directory to the tokens, against the dense model."""

import json
import os

import h5py
import numpy as np
import parameters_worker
import pytest
import torch

import reference
import tiny_models
import world
from extra_kinds import extra_kinds
from late_streams import LateStreams
from noria import config, encodings, kinds
from noria.blocks import layer_name
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.random_weights import random_checkpoint
from noria.engine.assembly import load, weights_of
from noria.engine.decoding import Decoding, SomePieces
from noria.engine.loading import Loader
from noria.engine.timing import Meters, Traffic
from noria.engine.trace import OFF
from noria.errors import InputError
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.plan import building, costs, planner, rates, search
from noria.plan.costs import Workload
from noria.plan.loads import load_of
from noria.plan.problem import Machine, Problem
from noria.run import run
from noria.streams import CpuStreams
from noria.tiers.cpu import Cpu
from noria.tools import container

CONFIG = {
    "model_type": "biased_moe",
    "architectures": ["BiasedMoeForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 3,
}
GROUP = 5  # divides neither the 32 inputs of most matrices nor the 12 of an expert's down matrix
FORMS = {name: ("grouped", {"group": GROUP}) for name in ("qkv", "out", "experts")}
NUM_ROWS = 6
RUN = """
dtype = "float64"
device = "cpu"
[sampling]
max_new_tokens = 6
logprobs = 0
[pipeline]
step_tokens = 24
microbatch_tokens = 16
"""


def state():
    """Tensors in bfloat16, as transformers names them; the router's biases in float32."""
    generator, size, inner = torch.Generator().manual_seed(3), CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]

    def draw(*shape, width=0.3):
        return torch.randn(shape, generator=generator) * width

    tensors = {"model.embed_tokens.weight": draw(97, size), "lm_head.weight": draw(97, size)}
    tensors["model.norm.weight"] = draw(size) + 1
    for layer in range(CONFIG["num_hidden_layers"]):
        top = f"model.layers.{layer}"
        its = {"q_proj": (32, size), "k_proj": (16, size), "v_proj": (16, size), "o_proj": (size, 32)}
        tensors |= {f"{top}.self_attn.{name}.weight": draw(*shape) for name, shape in its.items()}
        norms = {
            "self_attn.q_norm": 8,
            "self_attn.k_norm": 8,
            "input_layernorm": size,
            "post_attention_layernorm": size,
        }
        tensors |= {f"{top}.{name}.weight": draw(number) + 1 for name, number in norms.items()}
        tensors[f"{top}.mlp.gate.weight"] = draw(6, size)
        tensors[f"{top}.mlp.gate.bias"] = draw(6, width=2.0)
        for expert in range(6):
            its = {"gate_proj": (inner, size), "up_proj": (inner, size), "down_proj": (size, inner)}
            tensors |= {f"{top}.mlp.experts.{expert}.{name}.weight": draw(*shape) for name, shape in its.items()}
        outlier = tensors[f"{top}.mlp.experts.{layer}.down_proj.weight"]
        outlier[layer, :3] = torch.tensor([3.0, -4.0, 2.5])
    return {name: value if name.endswith("gate.bias") else value.bfloat16() for name, value in tensors.items()}


def prompts():
    random = np.random.default_rng(8)
    return [random.integers(4, 97, length).tolist() for length in (1, 3, 30, 9, 17, 2)]


def decoded(path):
    """The dense model's tensors, as the file's own words say: read by h5py and numpy alone."""
    tensors = {name: value.double().numpy() for name, value in state().items()}
    names = {"qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], "out": ["self_attn.o_proj"]}
    names["experts"] = [f"mlp.experts.{{}}.{matrix}_proj" for matrix in ("gate", "up", "down")]
    with h5py.File(path) as file:
        for layer in range(CONFIG["num_hidden_layers"]):
            for parameter, modules in names.items():
                dataset = file[f"layers/{layer:04d}/{parameter}"]
                for piece, content in enumerate(dataset[:]):
                    for module, matrix in zip(modules, decoded_piece(dataset.attrs, content), strict=True):
                        tensors[f"model.layers.{layer}.{module.format(piece)}.weight"] = matrix
    return tensors


def decoded_piece(attributes, content):
    """The matrices [outputs, inputs] in a piece of the encoding `grouped`."""
    fields = {field["name"]: content[field["offset"] :].tobytes() for field in json.loads(attributes["fields"])}
    sizes = {field["name"]: field for field in json.loads(attributes["fields"])}
    matrices = json.loads(attributes["matrices"])
    for number, matrix in enumerate(matrices):
        arrays = {}
        for name in ("codes", "scales", "large"):
            full = f"{number}.{name}" if len(matrices) > 1 else name
            shape, dtype = sizes[full]["shape"], sizes[full]["dtype"]
            arrays[name] = np.frombuffer(fields[full], dtype, int(np.prod(shape))).reshape(shape)
        outputs, inputs = matrix["shape"]
        numbers, large = np.zeros((outputs, inputs)), iter(arrays["large"])
        for row in range(outputs):
            for column in range(inputs):
                code, scale = int(arrays["codes"][row, column]), arrays["scales"][row, column // GROUP]
                numbers[row, column] = np.float32(code - 128) * scale if code else next(large)
        yield numbers


def expected(tensors):
    """Of each prompt: the tokens that the dense model gives, and their log-probabilities."""
    rows = []
    for prompt in prompts():
        tokens, scores = [], []
        while len(tokens) < 6 and 3 not in tokens:
            logits = reference.logits(CONFIG, tensors, prompt + tokens)[-1]
            tokens.append(int(logits.argmax()))
            scores.append(float(logits.max() - np.logaddexp.reduce(logits)))
        rows.append((tokens, scores))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """plain.h5, encoded.h5 and both in float64, the prompts, the run file, and what the dense models give."""
    folder = tmp_path_factory.mktemp("parameters")
    tiny_models.write_directory(folder / "hf", CONFIG, state())
    with extra_kinds():
        made = convert(folder / "hf", folder / "plain.h5")
        assert made.dtype == "bfloat16" and not any("cast" in note for note in made.notes)
        convert(folder / "hf", folder / "encoded.h5", forms=FORMS)
        convert(folder / "hf", folder / "wide.h5", "float64")  # what a disk tier reads must have the run's dtype
        convert(folder / "hf", folder / "wide-encoded.h5", "float64", forms=FORMS)
    rows = [{"token_ids": prompt} for prompt in prompts()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    dense = {name: value.double().numpy() for name, value in state().items()}
    wanted = {"plain": expected(dense), "encoded": expected(decoded(folder / "encoded.h5"))}
    wanted |= {"wide": wanted["plain"], "wide-encoded": wanted["encoded"]}
    assert wanted["plain"] != wanted["encoded"]
    (folder / "expected.json").write_text(json.dumps(wanted))
    return folder


def compare(folder, model, output):
    wanted = json.loads((folder / "expected.json").read_text())[model]
    assert len({tuple(tokens) for tokens, _ in wanted}) > 3
    with open_generations(output) as file:
        rows = list(file.rows())
    assert [row.token_ids.tolist() for row in rows] == [tokens for tokens, _ in wanted]
    for row, (_, scores) in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row.logprobs, scores, rtol=0, atol=1e-9)


def alone(folder, model, name, **keys):
    files = {"model": f"{model}.h5", "prompts": "prompts.jsonl", "output": f"{name}.h5", "scratch": "."}
    flags = {key: str(folder / file) for key, file in files.items()}
    with extra_kinds():
        assert run(config.load(folder / "run.toml", flags | keys), Solo()) == 0
    return folder / f"{name}.h5"


@pytest.mark.parametrize("weights", ["gpu", "cpu"])
@pytest.mark.parametrize("model", ["plain", "encoded"])
def test_parameters_are_cast_to_a_wider_run_and_give_the_dense_model_s_tokens(folder, model, weights):
    compare(folder, model, alone(folder, model, f"{model}-{weights}", weights={weights: 100}, groups=2))


@pytest.mark.slow
@pytest.mark.world
def test_every_tier_lap_and_ring_gives_the_dense_model_s_tokens(folder):
    world.call(2, parameters_worker.work, folder, ["wide", "wide-encoded"], timeout=300)
    for model in ("wide", "wide-encoded"):
        for num_ranks in (1, 2):
            for name, _ in parameters_worker.cases(num_ranks):
                compare(folder, model, folder / f"{model}-{name}.h5")


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("model", ["wide", "wide-encoded"])
def test_an_expert_is_one_run_of_bytes_in_a_tier(folder, model, tier):
    path, name = folder / f"{model}.h5", "layers/0003"
    with extra_kinds(), open_checkpoint(path) as checkpoint:
        streams = CpuStreams(torch.device("cpu"))
        home = Loader(checkpoint, {"layers/0002": tier, name: tier}, "float64", streams).load().homes[name]
        experts = next(one for one in home.block.parameters if one.name == "experts")
        offset, nbytes = experts.place(5)
        content = torch.empty(1, nbytes, dtype=torch.uint8)
        home.tier.load([(home.offset + offset, content[0])]).event().synchronize()
        shapes = experts.computed.items()
        into = {key: torch.empty(1, *shape[1:], dtype=torch.float64) for key, shape in shapes}
        encodings.decode(experts, content, into)
        home.tier.close()
    dense = (
        decoded(path) if model == "wide-encoded" else {key: value.double().numpy() for key, value in state().items()}
    )
    assert np.array_equal(into["experts.down"][0], dense["model.layers.3.mlp.experts.5.down_proj.weight"])


# ---- what a run holds


def tensors_of(folder, model, dtype, tier="gpu", decoding=None):
    """What the model functions get of each layer, by its name and theirs."""
    with extra_kinds(), open_checkpoint(folder / f"{model}.h5") as checkpoint:
        names, streams = [layer_name(layer) for layer in range(5)], LateStreams(torch.device("cpu"))
        placed = Loader(checkpoint, dict.fromkeys(names, tier), dtype, streams, None, decoding).load()
        weights = weights_of(placed, [range(5)], 1, 2, streams, Traffic())
        weights.begin(0, 0, 0)
        found = {}
        for name in names:
            found |= {f"{name}/{key}": all_of(value) for key, value in weights.wait(name).items()}
            weights.done(name)
        weights.close()
    return found


def all_of(value):
    """A copy of a tensor, or of all the pieces that are decoded a few at a time."""
    if isinstance(value, SomePieces):
        runs = [range(first, min(first + value.most, len(value))) for first in range(0, len(value), value.most)]
        return torch.cat([value.of(run).clone() for run in runs])
    return value.clone()


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_a_parameter_with_a_dtype_of_its_own_is_widened_and_never_narrowed(folder, dtype, computed):
    tensors = state()
    for tier in ["gpu", "cpu", *(["disk"] if dtype == "bfloat16" else [])]:
        for name, value in tensors_of(folder, "plain", dtype, tier).items():
            own = name.endswith("router_bias")
            assert value.dtype == getattr(torch, computed if own else dtype), (tier, name)
            if own:
                layer = int(name[7:11])
                assert torch.equal(value.double(), tensors[f"model.layers.{layer}.mlp.gate.bias"].double())


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(0), Decoding(residents=True)], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_encoded_parameters_are_decoded_to_the_run_s_dtype_from_every_tier(folder, tier, dtype, decoding):
    model = "encoded" if dtype == "bfloat16" else "wide-encoded"
    dense = {name: torch.from_numpy(value) for name, value in decoded(folder / f"{model}.h5").items()}
    found = tensors_of(folder, model, dtype, tier, decoding)
    for layer in range(5):
        top, its = f"model.layers.{layer}", f"layers/{layer:04d}"
        qkv = torch.cat([dense[f"{top}.self_attn.{part}_proj.weight"] for part in "qkv"])
        down = torch.stack([dense[f"{top}.mlp.experts.{expert}.down_proj.weight"] for expert in range(6)])
        assert torch.equal(found[f"{its}/qkv"], qkv.to(getattr(torch, dtype)))
        assert torch.equal(found[f"{its}/experts.down"], down.to(getattr(torch, dtype)))


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_fields_that_their_encoding_does_not_make_are_refused_from_every_tier(folder, tmp_path, tier, monkeypatch):
    with extra_kinds():
        grouped = kinds.load("encodings", "grouped")
        encode = grouped.encode

        def spoilt(numbers, settings):
            fields = encode(numbers, settings)
            return fields | {"scales": fields["scales"] * (torch.nan if len(numbers) == 16 else 1.0)}

        monkeypatch.setattr(grouped, "encode", spoilt)
        convert(folder / "hf", tmp_path / "bad.h5", "float64", forms={"qkv": FORMS["qkv"]})
    words = "bad.h5: 'layers/0000/qkv', encoded as grouped: a scale is not a number above 0; convert the model again"
    with pytest.raises(InputError, match=words):
        tensors_of(tmp_path, "bad", "float64", tier)


@pytest.mark.parametrize("how", ["", "in parts", "decoded"])
@pytest.mark.parametrize("weights", [{"gpu": 100}, {"cpu": 100}, {"gpu": 50, "disk": 50}])
@pytest.mark.parametrize("model", ["wide", "wide-encoded"])
def test_the_bytes_that_are_planned_for_weights_are_those_that_are_held(folder, model, weights, how, monkeypatch):
    if how != "decoded":
        monkeypatch.setattr(search, "_coded_best", lambda tried, here: here)
    if how == "in parts":
        monkeypatch.setattr(building, "DECODING_SHARE", 1 << 60)
    run_file = config.load(
        None, {"model": "m", "prompts": "p", "output": "o", "weights": weights, "laps": 1, "device": "cpu"}
    )
    with extra_kinds(), open_checkpoint(folder / f"{model}.h5") as checkpoint:
        machine = Machine("cpu", 1 << 30, 1 << 30)
        problem = Problem(run_file, checkpoint.shape, checkpoint.blocks, "float64", 1, machine, 6, Workload(6, 10, 6))
        plan = planner.make(problem)
        held = load(plan, checkpoint, 0, CpuStreams(torch.device("cpu")), Meters(Traffic(), OFF, print), None)
        memory = plan.memory[0]
        of_weights = ("weights", "weight slots", "decoded weights")
        planned = sum(memory["gpu"].get(purpose, 0) for purpose in of_weights)
        in_place = memory["cpu"]["weights"] if plan.weight_tiers[0]["embed"] == "cpu" else 0  # with the embedding in it
        assert held.nbytes == planned + in_place
        in_host = sum(tier.nbytes for tier in held._tiers.values() if isinstance(tier, Cpu))
        assert in_host == memory["cpu"].get("weights", 0)
        streams = any(tier != "gpu" for name, tier in plan.weight_tiers[0].items() if name.startswith("layers/"))
        assert plan.decoded == (model == "wide-encoded" and how == "decoded" and "gpu" in weights)
        encoded = model == "wide-encoded" and (streams or not plan.decoded)
        assert ("decoded weights" in memory["gpu"]) == encoded
        largest = max(block.decoded_nbytes for block in checkpoint.blocks.values())
        assert not encoded or (memory["gpu"]["decoded weights"] < largest) == (how == "in parts")
        held.close()


def test_the_cost_model_moves_the_bytes_of_fields_and_multiplies_numbers(folder):
    found = {}
    for model in ("wide", "wide-encoded"):
        with extra_kinds(), open_checkpoint(folder / f"{model}.h5") as checkpoint:
            run_file = config.load(None, {"model": "m", "prompts": "p", "output": "o", "weights": {"cpu": 100}})
            machine = Machine("cuda", 1 << 30, 1 << 30)
            blocks, shape = checkpoint.blocks, checkpoint.shape
            problem = Problem(run_file, shape, blocks, "float64", 1, machine, 6, Workload(6, 10, 6))
            plan = planner.make(problem)
            streamed = [name for name in blocks if name != "embed"]
            moved = costs.weights_nbytes(plan, blocks, 0)["link"]
            assert moved == plan.groups * sum(blocks[name].nbytes for name in streamed)
            load = load_of(plan, problem.cut(plan.laps), 0)
            found[model] = costs.resources(plan, shape, load, rates.assumed("cuda"), costs.Round(8, 20))
    plain, encoded = found["wide"], found["wide-encoded"]
    assert encoded["matmul"] == plain["matmul"] and encoded["link"] < plain["link"]


@pytest.mark.parametrize("model", ["plain", "encoded"])
def test_an_expert_is_loaded_alone_by_one_read(folder, model, monkeypatch):
    dense = (
        decoded(folder / "encoded.h5") if model == "encoded" else {n: v.double().numpy() for n, v in state().items()}
    )
    with extra_kinds(), open_checkpoint(folder / f"{model}.h5") as checkpoint:
        block = checkpoint.blocks["layers/0002"].cast("float64")
        stored = next(one for one in checkpoint.blocks["layers/0002"].parameters if one.name == "experts")
        parameter = next(one for one in block.parameters if one.name == "experts")
        where, reads = checkpoint.piece("layers/0002", "experts", 4), []
        preadv = os.preadv
        monkeypatch.setattr(container.os, "preadv", lambda *given: (reads.append(given), preadv(*given))[1])
        content = torch.empty(where.nbytes, dtype=torch.uint8)
        container.read_full(where.fd, content.numpy().data, where.offset, where.path)
        assert len(reads) == 1 and where.nbytes * 6 == stored.nbytes
        into = {name: torch.empty(1, *shape[1:], dtype=torch.float64) for name, shape in parameter.computed.items()}
        encodings.decode(stored, content[None], into)
    gate_up, down = into["experts.gate_up"][0].numpy(), into["experts.down"][0].numpy()
    rows = np.random.default_rng(0).normal(size=(7, 32))
    gate, up = np.split(rows @ gate_up.T, 2, axis=1)
    top = "model.layers.2.mlp.experts.4."
    wanted = reference._mlp(dense, top, rows)
    np.testing.assert_allclose(gate / (1 + np.exp(-gate)) * up @ down.T, wanted, rtol=0, atol=1e-9)


def test_a_checkpoint_of_two_dtypes_is_of_version_2_and_one_of_a_single_dtype_of_version_1(folder):
    for model, version, dtype in (("plain", 2, np.float32), ("wide", 1, np.float64)):
        with h5py.File(folder / f"{model}.h5") as file:
            assert file.attrs["version"] == version and file["layers/0002/router_bias"].dtype == dtype
            assert "encoding" not in file["layers/0002/router_bias"].attrs


def test_random_weights_have_parameters_in_their_own_dtype():
    with extra_kinds():
        checkpoint = random_checkpoint(CONFIG, "bfloat16")
        block = checkpoint.blocks["layers/0001"]
        content = bytearray(block.nbytes)
        checkpoint.read_block("layers/0001", content)
    bias = next(one for one in block.parameters if one.name == "router_bias")
    values = np.frombuffer(content, np.float32, 6, bias.offset)
    assert bias.nbytes == 24 and values.std() > 0.002 and np.abs(values).max() < 0.2
