"""Parameters with a dtype of their own, in pieces, encoded: from the directory to the tokens, against the dense model."""

import json

import h5py
import numpy as np
import parameters_worker
import pytest
import torch

import reference
import tiny_models
import world
from extra_kinds import extra_kinds
from noria import config
from noria.checkpoint.convert import convert
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.run import run

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
