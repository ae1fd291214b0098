"""Model families against transformers in float32, and against the dense float64 reference."""

import numpy as np
import pytest
import reference
import torch

from noria import models
from noria.attention import sdpa
from noria.blocks import layer_name
from noria.config import InputError
from noria.models._linear import linear
from noria.step import PAGE_TOKENS, Run, Span

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
OPT = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": LLAMA,
    "llama without groups": LLAMA | {"num_key_value_heads": 4},
    "llama with one key head": LLAMA | {"num_key_value_heads": 1},
    "llama tied": LLAMA | {"tie_word_embeddings": True},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama with its own head dim": LLAMA | {"head_dim": 12},
    "llama linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama dynamic": LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama 3": LLAMA | {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "llama 3 as written now": LLAMA
    | {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 500.0, "original_max_position_embeddings": 32}},
    "opt": OPT,
    "opt untied": OPT | {"tie_word_embeddings": False},
    "opt without biases": OPT | {"enable_bias": False},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def random_model(config: dict, seed: int = 0) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of transformers and its state dict in float64; everything random, norms and biases too."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "opt": (OPTConfig, OPTForCausalLM)}
    config_class, model_class = kinds[config["model_type"]]
    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    settings = {key: value for key, value in settings.items() if value is not None}
    model = model_class(config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model, {name: tensor.double() for name, tensor in model.state_dict().items()}


class Whole:
    """A model on one device, without engine: its blocks gathered by `sources`, one cache per layer."""

    def __init__(self, config, state, dtype, num_pages=64):
        self.model = models.for_config(config)
        self.shape = self.model.shape(config)
        self.dtype = dtype
        self.embed = self.block(state, "embed", self.model.embed_parameters(self.shape))
        self.head = self.block(state, "head", self.model.head_parameters(self.shape))
        self.layers = [
            self.block(state, layer_name(layer), self.model.layer_parameters(self.shape, layer))
            for layer in range(self.shape.num_layers)
        ]
        size = (2, self.shape.num_layers, num_pages * PAGE_TOKENS, self.shape.num_kv_heads, self.shape.head_dim)
        self.cache = torch.full(size, torch.nan, dtype=dtype)

    def block(self, state, name, shapes):
        sources = self.model.sources(self.shape, name)
        assert list(sources) == list(shapes)
        block = {parameter: torch.cat([state[tensor] for tensor in tensors]) for parameter, tensors in sources.items()}
        assert {parameter: tuple(tensor.shape) for parameter, tensor in block.items()} == shapes
        return {parameter: tensor.to(self.dtype) for parameter, tensor in block.items()}

    def logits(self, parts: list[tuple[list[int], int, tuple[Run, ...]]]) -> list[torch.Tensor]:
        """One forward call. `parts`: new tokens, position of the first, pages of each sequence. Logits of each part."""
        spans, rows, first = [], [], 0
        for tokens, start, runs in parts:
            spans.append(Span(first, len(tokens), start + len(tokens), runs))
            pages = [page for run in runs for page in range(run.start, run.start + run.count)]
            positions = range(start, start + len(tokens))
            rows += [pages[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS for p in positions]
            first += len(tokens)
        token_ids = torch.tensor([token for tokens, _, _ in parts for token in tokens])
        positions = torch.cat([torch.arange(start, start + len(tokens)) for tokens, start, _ in parts])
        positional = self.model.positional(self.shape, positions, self.dtype)
        plan = sdpa.prepare(spans, torch.device("cpu"))
        hidden = self.model.embed(self.shape, self.embed, token_ids, positions)
        for parameters, key_cache, value_cache in zip(self.layers, *self.cache, strict=True):

            def attend(queries, keys, values, *, scale=None, window=None, key_cache=key_cache, value_cache=value_cache):
                key_cache[rows], value_cache[rows] = keys, values
                scale = self.shape.head_dim**-0.5 if scale is None else scale
                return sdpa.attention(plan, queries, key_cache, value_cache, scale, window)

            before = hidden.clone()
            after = self.model.layer(self.shape, parameters, hidden, positional, attend)
            assert torch.equal(before, hidden), "a layer must not write into its input"
            hidden = after
        logits = self.model.head(self.shape, self.head, hidden)
        return list(logits.split([len(tokens) for tokens, _, _ in parts]))


def tokens_of(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, count).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_in_float32(name):
    config, token_ids = MODELS[name], tokens_of(1, 100)
    model, state = random_model(config)
    expected = model(torch.tensor([token_ids])).logits[0]
    found = Whole(config, state, torch.float32).logits([(token_ids, 0, (Run(3, 7),))])[0]
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_dense_reference_in_float64(name):
    config, token_ids = MODELS[name], tokens_of(2, 60)
    _, state = random_model(config)
    found = Whole(config, state, torch.float64).logits([(token_ids, 0, (Run(0, 4),))])[0]
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), reference.logits(config, state, token_ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["llama", "llama 3", "opt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_prompt_in_chunks_beside_decoding_rows_gives_what_it_gives_whole(name, dtype):
    config = MODELS[name]
    _, state = random_model(config)
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


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_tokens_generated_with_the_cache_are_those_of_the_reference_without_one(name):
    config, prompt = MODELS[name], tokens_of(6, 15)
    _, state = random_model(config)
    whole, tokens = Whole(config, state, torch.float64), list(prompt)
    logits = whole.logits([(prompt, 0, (Run(1, 1), Run(0, 1), Run(2, 1)))])[0]
    for _ in range(12):
        tokens.append(int(logits[-1].argmax()))
        logits = whole.logits([(tokens[-1:], len(tokens) - 1, (Run(1, 1), Run(0, 1), Run(2, 1)))])[0]
    assert tokens[15:] == reference.generate(config, state, prompt, 12)


@pytest.mark.parametrize("name", ["llama 3", "opt"])
def test_bfloat16_is_as_near_to_float64_as_transformers_bfloat16(name):
    config, token_ids = MODELS[name], tokens_of(7, 90)
    model, state = random_model(config)
    exact = reference.logits(config, {key: tensor.bfloat16().double() for key, tensor in state.items()}, token_ids)
    theirs = model.bfloat16()(torch.tensor([token_ids])).logits[0].double().numpy()
    found = Whole(config, state, torch.bfloat16).logits([(token_ids, 0, (Run(0, 6),))])[0]
    assert found.dtype == torch.bfloat16
    error, their_error = (np.abs(logits - exact).mean() for logits in (found.double().numpy(), theirs))
    assert 0 < error <= 1.5 * their_error


def test_the_rope_of_a_checkpoint_may_stand_in_either_key():
    old = models.for_config(LLAMA).shape(MODELS["llama 3"])
    new = models.for_config(LLAMA).shape(MODELS["llama 3 as written now"])
    assert old == new
    assert old.details["rope_scaling"] == ("llama3", 8.0, 1.0, 4.0, 32.0)


def test_llama3_without_its_own_context_uses_the_models():
    shape = models.for_config(LLAMA).shape(LLAMA | {"rope_scaling": LLAMA3})
    assert shape.details["rope_scaling"][-1] == 128.0


def test_shapes_count_heads_positions_and_ties():
    llama, opt = models.for_config(LLAMA).shape(LLAMA), models.for_config(OPT).shape(OPT)
    assert (llama.num_heads, llama.num_kv_heads, llama.head_dim, llama.tied) == (4, 2, 8, False)
    assert (opt.num_heads, opt.num_kv_heads, opt.head_dim, opt.tied, opt.max_positions) == (4, 4, 8, True, 128)
    assert models.for_config(OPT).embed_parameters(opt)["positions"] == (130, 32)


def test_the_head_of_a_tied_model_is_its_embedding():
    for config in (MODELS["llama tied"], OPT):
        model = models.for_config(config)
        shape = model.shape(config)
        assert model.sources(shape, "head")["lm_head"] == model.sources(shape, "embed")["tokens"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA | {"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["yarn", "llama3"]),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, ["factor", "missing"]),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
        (LLAMA | {"num_key_value_heads": 3}, ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        (LLAMA | {"head_dim": 7}, ["head_dim", "7", "even"]),
        (LLAMA | {"hidden_size": 34}, ["hidden_size (34)", "num_attention_heads (4)"]),
        (LLAMA | {"vocab_size": "many"}, ["vocab_size", "many"]),
        (LLAMA | {"intermediate_size": None}, ["intermediate_size", "missing"]),
        (LLAMA | {"mlp_bias": "yes"}, ["mlp_bias", "yes"]),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
        (OPT | {"do_layer_norm_before": False}, ["do_layer_norm_before", "350m"]),
        (OPT | {"word_embed_proj_dim": 16}, ["word_embed_proj_dim", "16", "350m"]),
        (OPT | {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm"]),
        (OPT | {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
        (OPT | {"activation_function": "gelu"}, ["activation_function", "gelu", "relu"]),
        (OPT | {"num_attention_heads": 5}, ["hidden_size (32)", "num_attention_heads (5)"]),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_name(config, words):
    with pytest.raises(InputError) as error:
        models.for_config(config).shape(config)
    assert all(word in str(error.value) for word in words), error.value


def test_the_family_is_found_by_model_type_or_by_architecture():
    assert models.for_config({"model_type": "opt"}).__name__ == "noria.models.opt"
    assert models.for_config({"architectures": ["LlamaForCausalLM"]}).__name__ == "noria.models.llama"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "mamba", "architectures": ["MambaForCausalLM"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "opt", "architectures": ["LlamaForCausalLM"]},
    ],
)
def test_an_unknown_architecture_is_refused_with_the_known_ones(config):
    with pytest.raises(InputError, match="known: .*LlamaForCausalLM.*OPTForCausalLM") as error:
        models.for_config(config)
    assert all(architecture in str(error.value) for architecture in config.get("architectures", []))


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
