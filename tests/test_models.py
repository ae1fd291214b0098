"""Model families against transformers in float32, and against the dense float64 reference."""

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import safetensors
import torch
from transformers.activations import ACT2FN

import beside
import families
import reference
from families import CONFIGS, GPT2, LLAMA, LLAMA3, MISTRAL, MIXTRAL, OPT, QWEN2, QWEN3_MOE, SLIDING
from noria import models
from noria.errors import InputError
from noria.models import _experts, _routing
from noria.models._linear import ACTIVATIONS, linear
from noria.models._sources import Transposed
from noria.step import Run
from whole import Whole, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")

# One of each family, for the tests that need not see every setting.
FAMILIES = [name for name in CONFIGS if name == CONFIGS[name]["model_type"]]


@cache
def random_model(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of transformers, and its tensors in float64 under the names with which transformers saves them."""
    with TemporaryDirectory() as folder:
        model = families.save(CONFIGS[name], Path(folder))
        with safetensors.safe_open(f"{folder}/model.safetensors", "pt") as file:
            return model, {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_in_float32(name):
    config, token_ids = CONFIGS[name], tokens_of(1, 100)
    model, state = random_model(name)
    expected = model(torch.tensor([token_ids])).logits[0]
    found = Whole(config, state, torch.float32).logits([(token_ids, 0, (Run(3, 7),))])[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_dense_reference_in_float64(name):
    config, token_ids = CONFIGS[name], tokens_of(2, 60)
    _, state = random_model(name)
    found = Whole(config, state, torch.float64).logits([(token_ids, 0, (Run(0, 4),))])[0]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), reference.logits(config, state, token_ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "name", [*FAMILIES, "llama 3", "qwen2 with windows in its upper layers", "mixtral with a window"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_prompt_in_chunks_beside_decoding_rows_gives_what_it_gives_whole(name, dtype):
    config = CONFIGS[name]
    _, state = random_model(name)
    whole = Whole(config, state, dtype)
    long, other, third = tokens_of(3, 75), tokens_of(4, 40), tokens_of(5, 9)
    expected = {id(tokens): reference.logits(config, state, tokens) for tokens in (long, other, third)}
    # Pages of the long one lie in three runs, the last before the first; its second run touches the other's pages.
    runs = {id(long): (Run(20, 1), Run(22, 2), Run(5, 3)), id(other): (Run(24, 3),), id(third): (Run(9, 1),)}
    steps = [
        [(other, 0, 30)],
        [(long, 0, 17), (other, 30, 31)],
        [(other, 31, 32), (long, 17, 50), (third, 0, 4)],
        [(third, 4, 5), (long, 50, 74), (other, 32, 33)],
        [(other, 33, 34), (third, 5, 6), (long, 74, 75)],
        [(third, 6, 9), (other, 34, 40)],
    ]
    for step in steps:
        found = whole.logits([(tokens[first:last], first, runs[id(tokens)]) for tokens, first, last in step])
        for (tokens, first, last), logits in zip(step, found, strict=True):
            atol = 1e-11 if dtype == torch.float64 else 1e-4
            np.testing.assert_allclose(logits.numpy(), expected[id(tokens)][first:last], rtol=0, atol=atol)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_generated_with_the_cache_are_those_of_the_reference_without_one(name):
    config, prompt = CONFIGS[name], tokens_of(6, 15)
    _, state = random_model(name)
    whole, tokens = Whole(config, state, torch.float64), list(prompt)
    logits = whole.logits([(prompt, 0, (Run(1, 1), Run(0, 1), Run(2, 1)))])[0]
    for _ in range(12):
        tokens.append(int(logits[-1].argmax()))
        logits = whole.logits([(tokens[-1:], len(tokens) - 1, (Run(1, 1), Run(0, 1), Run(2, 1)))])[0]
    assert tokens[15:] == reference.generate(config, state, prompt, 12)


@pytest.mark.parametrize("name", ["llama 3", "opt"])
def test_bfloat16_is_as_near_to_float64_as_transformers_bfloat16(name):
    config, token_ids = CONFIGS[name], tokens_of(7, 90)
    model, state = random_model(name)
    exact = reference.logits(config, {key: tensor.bfloat16().double() for key, tensor in state.items()}, token_ids)
    theirs = copy.deepcopy(model).bfloat16()(torch.tensor([token_ids])).logits[0].double().numpy()
    found = Whole(config, state, torch.bfloat16).logits([(token_ids, 0, (Run(0, 6),))])[0]
    assert found.dtype == torch.bfloat16
    error, their_error = (np.abs(logits - exact).mean() for logits in (found.double().numpy(), theirs))
    assert 0 < error <= 1.5 * their_error


def test_the_rope_of_a_checkpoint_may_stand_in_either_key():
    old = models.for_config(LLAMA).shape(CONFIGS["llama 3"])
    new = models.for_config(LLAMA).shape(CONFIGS["llama 3 as written now"])
    assert old == new
    assert old.details["rope_scaling"] == ("llama3", 8.0, 1.0, 4.0, 32.0)


def test_llama3_without_its_own_context_uses_the_models():
    shape = models.for_config(LLAMA).shape(LLAMA | {"rope_scaling": LLAMA3})
    assert shape.details["rope_scaling"][-1] == 128.0


def test_the_context_of_yarn_is_its_factor_times_the_old_and_that_of_longrope_ends_before_the_long_factors():
    shape = models.for_config(LLAMA).shape
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    assert shape(LLAMA | {"rope_scaling": yarn}).max_positions == 400
    assert shape(LLAMA | {"rope_scaling": yarn, "max_position_embeddings": 500}).max_positions == 500
    assert shape(LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}).max_positions == 512
    old = {"rope_scaling": families.LONGROPE | {"type": "su"}}
    phi3 = models.for_config(families.PHI3).shape(families.PHI3 | families.LONG_PHI3 | old)
    assert phi3 == models.for_config(families.PHI3).shape(CONFIGS["phi3 longrope"])
    assert phi3.max_positions == 100


def test_shapes_count_heads_positions_and_ties():
    llama, opt = models.for_config(LLAMA).shape(LLAMA), models.for_config(OPT).shape(OPT)
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim, llama.tied) == (4, 2, 8, False)
    assert (opt.num_heads, opt.num_kv_heads, opt.head_dim, opt.tied, opt.max_positions) == (4, 4, 8, True, 128)
    assert models.for_config(OPT).embed_parameters(opt)["positions"] == (130, 32)


def test_the_head_of_a_tied_model_is_its_embedding():
    for config in (CONFIGS["llama tied"], OPT):
        model = models.for_config(config)
        shape = model.shape(config)
        assert model.sources(shape, "head")["lm_head"] == model.sources(shape, "embed")["tokens"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        (LLAMA | {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, ["'ntk'", "yarn, longrope"]),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, ["factor is missing"]),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 1e9}}, ["factor is 1e+09", "too long"]),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_slow": 50}}, ["beta_slow (50)"]),
        (LLAMA | {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}}, ["rope_theta is 1"]),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, ["factor", "missing"]),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        (LLAMA | {"num_key_value_heads": 3}, ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        (LLAMA | {"head_dim": 7}, ["head_dim", "7", "even"]),
        (LLAMA | {"hidden_size": 34}, ["hidden_size (34)", "num_attention_heads (4)"]),
        (LLAMA | {"vocab_size": "many"}, ["vocab_size", "many"]),
        (LLAMA | {"intermediate_size": None}, ["intermediate_size", "missing"]),
        (LLAMA | {"mlp_bias": "yes"}, ["mlp_bias", "yes"]),
        (OPT | {"activation_function": "quick_gelu"}, ["activation_function", "quick_gelu", "relu"]),
        (OPT | {"activation_function": ["relu"]}, ["activation_function", "['relu']"]),
        (OPT | {"do_layer_norm_before": 1}, ["do_layer_norm_before is 1: it must be true or false"]),
        (GPT2 | {"add_cross_attention": True}, ["add_cross_attention is True", "only as a decoder"]),
        (GPT2 | {"n_embd": 30}, ["n_embd (30) is not a multiple of n_head (4)"]),
        (MISTRAL | {"sliding_window": -1}, ["sliding_window is -1"]),
        (QWEN2 | {"use_sliding_window": "no"}, ["use_sliding_window is 'no'"]),
        (QWEN2 | families.SLIDING | {"max_window_layers": -1}, ["max_window_layers is -1"]),
        (
            QWEN2 | families.SLIDING | {"layer_types": ["full_attention"]},
            ["layer_types must be 3 times full_ or sliding"],
        ),
        (QWEN2 | families.SLIDING | {"layer_types": ["linear_attention"] * 3}, ["layer_types must be 3 times"]),
        (MIXTRAL | {"num_local_experts": 10**6}, ["num_local_experts is 1000000: it must be at most 4096"]),
        (MIXTRAL | {"num_experts_per_tok": 6}, ["num_experts_per_tok (6) is more than num_local_experts (5)"]),
        (QWEN3_MOE | {"mlp_only_layers": ["one"]}, ["mlp_only_layers is ['one']"]),
        (families.PHI3 | {"rope_scaling": {"type": "longrope"}}, ["short_factor is None"]),
        (families.PHI3 | {"rope_scaling": {"type": "su", "short_factor": [1, 2]}}, ["short_factor has 2 numbers", "4"]),
        (families.PHI3 | {"rope_scaling": {"type": "su", "short_factor": [1, "2"] * 2}}, ["short_factor is '2'"]),
        (families.PHI3 | {"partial_rotary_factor": 0.9}, ["7 of head_dim 8 are rotated"]),
        (LLAMA | {"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000: it must be at most 10000"]),
        (LLAMA | {"hidden_size": 2**31}, ["hidden_size is 2147483648: it must be at most 2147483647"]),
        (LLAMA | {"hidden_size": 10**5000}, ["hidden_size is a int too long to print: it must be at most"]),
        (LLAMA | {"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        (LLAMA | {"rope_theta": 10**400}, ["rope_theta is 1000", "..."]),
        (LLAMA | {"hidden_act": "x" * 10**6}, ["hidden_act is 'xxx", "..."]),
        (OPT | {"num_attention_heads": 5}, ["hidden_size (32)", "num_attention_heads (5)"]),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_name(config, words):
    with pytest.raises(InputError) as error:
        models.for_config(config).shape(config)
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_found_by_model_type_or_by_architecture(name):
    config = CONFIGS[name]
    for found in (config, {"model_type": name}, {"architectures": config["architectures"]}):
        assert models.for_config(found).__name__ == f"noria.models.{name}"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "opt", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "_decoder"},
        {"model_type": ["llama"]},
    ],
)
def test_an_unknown_architecture_is_refused_with_the_known_families(config):
    with pytest.raises(InputError) as error:
        models.for_config(config)
    known = str(error.value).partition("known: ")[2].split(", ")
    assert sorted(known) == sorted({one["model_type"] for one in (CONFIGS | beside.CONFIGS).values()})
    assert all(architecture in str(error.value) for architecture in config.get("architectures", []))


def test_the_first_name_of_llama_s_architecture_is_known():
    for more in ({}, {"model_type": "llama"}):
        assert models.for_config({"architectures": ["LLaMAForCausalLM"]} | more).__name__ == "noria.models.llama"


def test_swish_is_silu():
    for config, key in ((LLAMA, "hidden_act"), (OPT, "activation_function"), (GPT2, "activation_function")):
        values = torch.linspace(-4, 4, 99)
        shape = models.for_config(config).shape(config | {key: "swish"})
        named = ACTIVATIONS[shape.details.get("activation", "swish")]
        torch.testing.assert_close(named(values.clone()), ACT2FN["swish"](values), rtol=0, atol=0)


IGNORING = {
    name: CONFIGS[name] | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]} | SLIDING
    for name in ("llama", "mistral", "mixtral", "phi3", "qwen3_moe")
}


@pytest.mark.parametrize("name", IGNORING)
def test_layer_types_are_read_by_the_families_alone_that_read_them_in_transformers(name):
    config, token_ids = IGNORING[name], tokens_of(8, 40)
    with TemporaryDirectory() as folder:
        model = families.save(config, Path(folder))
        with safetensors.safe_open(f"{folder}/model.safetensors", "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    expected = model(torch.tensor([token_ids])).logits[0]
    found = Whole(config, state, torch.float32).logits([(token_ids, 0, (Run(0, 3),))])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_architectures_that_are_no_names_are_refused():
    for wrong in (3, "LlamaForCausalLM", [3], {"a": 1}):
        with pytest.raises(InputError, match="architectures is .*: it must be a list of names"):
            models.for_config({"architectures": wrong})


# ---- mixtures of experts


def experts_of(dtype, num_experts=6, hidden=16, inner=8):
    generator = torch.Generator().manual_seed(1)
    size = (num_experts, 3 * inner, hidden)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype), generator


def mixture(hidden, chosen, weights, experts, transposed=True):
    """_experts.mixture of experts [X, 3 * I, E]; not `transposed`: its down matrices lie [E, I]."""
    inner = experts.shape[1] // 3
    down = experts[:, 2 * inner :].transpose(1, 2)
    return _experts.mixture(hidden, chosen, weights, experts[:, : 2 * inner], down if transposed else down.contiguous())


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_mixture_is_the_weighted_sum_over_each_token_s_experts_whichever_way_a_matrix_lies(count, transposed):
    experts, generator = experts_of(torch.float64)
    hidden = torch.randn(21, 16, generator=generator, dtype=torch.float64)
    chosen, weights = _routing.choose(
        _routing.Routing(count, "softmax", normalized=True),
        torch.randn(21, 6, generator=generator, dtype=torch.float64),
    )
    found = mixture(hidden, chosen, weights, experts, transposed)
    for token in range(21):
        expected = torch.zeros(16, dtype=torch.float64)
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            gate, up, down = experts[expert].split(8)
            expected += weight * (torch.nn.functional.silu(hidden[token] @ gate.T) * (hidden[token] @ up.T)) @ down
        torch.testing.assert_close(found[token], expected, rtol=0, atol=1e-12)


def test_a_token_s_mixture_does_not_depend_on_the_tokens_beside_it():
    experts, generator = experts_of(torch.float64)
    hidden = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    chosen, weights = _routing.choose(
        _routing.Routing(3, "softmax", normalized=False), torch.randn(40, 6, generator=generator, dtype=torch.float64)
    )
    whole = mixture(hidden, chosen, weights, experts)
    order = torch.randperm(40, generator=generator)
    shuffled = mixture(hidden[order], chosen[order], weights[order], experts)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-13)
    alone = [mixture(hidden[t : t + 1], chosen[t : t + 1], weights[t : t + 1], experts) for t in range(40)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-13)


def test_tokens_that_all_choose_one_expert_and_no_tokens_at_all_are_computed():
    experts, generator = experts_of(torch.float32)
    hidden, chosen = torch.randn(5, 16, generator=generator), torch.full((5, 1), 4)
    found = mixture(hidden, chosen, torch.ones(5, 1), experts)
    one = mixture(hidden, torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), experts[4:5])
    torch.testing.assert_close(found, one)
    assert mixture(hidden[:0], chosen[:0], torch.ones(0, 1), experts).shape == (0, 16)


def test_an_expert_is_one_run_of_bytes_in_its_layer_s_block():
    shape = models.for_config(MIXTRAL).shape(MIXTRAL)
    parameters = models.for_config(MIXTRAL).layer_parameters(shape, 0)
    assert parameters["experts"].shape == (5, 3 * 24, 32) and parameters["router"] == (5, 32)
    sources = models.for_config(MIXTRAL).sources(shape, "layers/0002")["experts"]
    assert sources[3:6] == tuple(f"model.layers.2.block_sparse_moe.experts.1.{w}.weight" for w in ("w1", "w3", "w2"))
    assert [isinstance(source, Transposed) for source in sources[3:6]] == [False, False, True]


@pytest.mark.parametrize("outputs", [4096, 5000])
@pytest.mark.parametrize("num_tokens", [1, 2, 64, 300])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_product_in_tiles_is_the_product(outputs, num_tokens, threads):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(num_tokens, 24, generator=generator), torch.randn(outputs, 24, generator=generator)
    for bias in (None, torch.randn(outputs, generator=generator)):
        expected = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(linear(hidden, weight, bias).double(), expected, rtol=0, atol=1e-4)


def test_the_number_of_experts_is_read_under_both_of_its_names():
    newer = {name: value for name, value in QWEN3_MOE.items() if name != "num_experts"} | {"num_local_experts": 8}
    family = models.for_config(QWEN3_MOE)
    assert family.shape(newer) == family.shape(QWEN3_MOE | {"num_experts": 8})
