"""Mixtures of experts against transformers in float64, its own casts to float32 raised (wide.py), and in float32."""

import copy

import pytest
import torch

import beside
import wide
from beside import shape_of
from mixtures import CONFIGS, GLM4_MOE
from noria import models
from noria.blocks import lay_out
from noria.errors import InputError
from noria.models._refused import OBSTACLES
from noria.step import Run
from whole import Whole, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")
THETAS = {"full_attention": {"rope_theta": 700.0}, "sliding_attention": {"rope_theta": 90.0}}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name):
    beside.check(name)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("gpt_oss", {"layer_types": ["sliding_attention"] * 2}, "layer_types is ['sliding_attention', 'sliding_attention']"),
        ("gpt_oss", {"layer_types": ["linear_attention"] * 3}, "it must be a list of 3 of full_attention, sliding_attention"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit is 0: it must be a number above 0"),
        ("gpt_oss", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gpt_oss", {"experts_per_token": 4}, "experts_per_token is 4"),
        ("glm4_moe", {"n_group": 3}, "the number of experts (8) is not a multiple of n_group (3)"),
        ("glm4_moe", {"index_topk": 2048}, "index_topk is 2048: Noria does not know what it asks for in this family"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func is 'softmax': Noria computes this family only with 'sigmoid'"),
        ("minimax_m2", {"attn_type_list": [1, 0, 1]}, "attn_type_list is [1, 0, 1]: every layer must be of type 1"),
        ("minimax_m2", {"shared_intermediate_size": 64}, "shared_intermediate_size is 64"),
        ("hy_v3", {"mlp_bias": True}, "mlp_bias is True"),
        ("hy_v3", {"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid is False: Noria computes this family only with True"),
        ("hy_v3", {"expert_hidden_dim": 24}, "expert_hidden_dim is 24: moe_intermediate_size is 12: they must be equal"),
        ("hy_v3", {"mlp_layer_types": ["dense", "sparse", "moe"]}, "it must be a list of 3 of dense, sparse"),
        ("mimo_v2_flash", {"hybrid_layer_pattern": [0, 1]}, "hybrid_layer_pattern is [0, 1]: it must be 3 times 0 or 1"),
        ("mimo_v2_flash", {"swa_head_dim": 32}, "swa_head_dim is 32: it must be head_dim, 24"),
        ("mimo_v2_flash", {"add_full_attention_sink_bias": True}, "add_full_attention_sink_bias is True"),
        ("mimo_v2_flash", {"swa_num_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of swa_num_key_value_heads (3)"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias is True"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "mlp_only_layers is 'all'"),
        ("qwen3_vl_moe_text", {"norm_topk_prob": False}, "norm_topk_prob is False: Noria computes this family only with True"),
        ("qwen3_vl_moe_text", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok is 3: Noria computes this family only with 2"),
        ("llama4_text", {"moe_layers": [0, 3]}, "moe_layers is [0, 3]: it must be a list of layers"),
        ("llama4_text", {"no_rope_layers": [2, 0, 1]}, "no_rope_layers is [2, 0, 1]"),
        ("beam", {"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": None}}, "rope_theta of sliding_attention in rope_parameters is missing"),
        ("laguna", {"rope_parameters": THETAS, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: full_attention of rope_parameters does not say its own"),
        ("mimo_v2_flash", {"rope_parameters": THETAS, "partial_rotary_factor": None}, "partial_rotary_factor is 0.334: full_attention of rope_parameters does not say its own"),
        ("beam", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is {'rope_theta': 10000.0}: it must have an object full_attention"),
        ("laguna", {"rope_parameters": THETAS | {"rope_type": "ntk"}}, "rope_type of rope_parameters is 'ntk': no object of a kind of layers"),
        ("laguna", {"gating": "per-token"}, "gating is 'per-token'"),
        ("laguna", {"num_attention_heads_per_layer": [4, 5, 4]}, "num_attention_heads_per_layer (5) is not a multiple"),
        ("laguna", {"moe_apply_router_weight_on_input": True}, "moe_apply_router_weight_on_input is True"),
        ("laguna", {"swa_attention_sink_enabled": True}, "swa_attention_sink_enabled is True"),
        ("laguna", {"gating_types": ["per_head", "per_element", "per_head"], "gating": "per-head"}, "gating_types is ['per_head', 'per_element', 'per_head']: all layers must be as gating says, 'per-head'"),
        ("laguna", {"mlp_only_layers": [0, 1]}, "mlp_only_layers is [0, 1]: mlp_layer_types says otherwise"),
        ("exaone_moe", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("exaone_moe", {"first_last_k_dense_replace": 2}, "first_last_k_dense_replace is 2: Noria knows it with 1 alone"),
        ("exaone_moe", {"is_moe_layer": [False, True, False]}, "is_moe_layer is [False, True, False]: mlp_layer_types, or"),
        ("olmoe", {"rope_scaling": {"rope_type": "default", "beta": 0.1}}, "beta of rope_scaling is 0.1"),
        ("olmoe", {"clip_qkv": -1}, "clip_qkv is -1"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads is 2: latent attention has as many as"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"head_dim": 7}, "head_dim is 7: it must be qk_rope_head_dim, 8, qk_nope_head_dim, 12, or their sum"),
        ("deepseek_v3", {"index_topk": 2048}, "index_topk is 2048: Noria does not know what it asks for"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2: 1 layers are without experts"),
        ("mistral4", {"rope_parameters": None}, "rope_parameters is None: it must be an object"),
        ("deepseek_v32", {"rope_interleave": False}, "rope_interleave is False"),
        ("glm_moe_dsa", {"layer_types": ["full_attention"] * 3}, "it must be a list of 3 of indexed_attention"),
        ("glm_moe_dsa", {"moe_router_dtype": "bfloat16"}, "moe_router_dtype is 'bfloat16': Noria computes this family only with 'float32'"),
    ],
)  # fmt: skip
def test_what_a_config_asks_for_beside_is_refused_by_key_and_value(name, keys, words):
    beside.check_refused(name, keys, words)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name == CONFIGS[name]["model_type"]])
def test_a_key_that_no_family_knows_is_refused_by_its_name_and_value(name):
    beside.check_unknown_key(name)


def test_the_makers_names_of_a_family_that_is_not_computed_are_known():
    for name in ("minimax", "minimax_text_01", "minimax_m1"):
        with pytest.raises(InputError, match="lightning attention"):
            models.for_config({"model_type": name, "architectures": ["X"]})


@pytest.mark.parametrize("name", OBSTACLES)
def test_families_that_are_known_and_not_computed_are_refused_with_their_obstacle(name):
    with pytest.raises(InputError) as error:
        models.for_config({"model_type": name, "architectures": ["X"]})
    assert f"{name!r} is not in this version of Noria: {OBSTACLES[name]}" in str(error.value)


def test_a_rope_of_a_kind_of_layers_has_the_theta_of_all_if_it_has_none_of_its_own():
    ropes = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_theta": 90.0}}
    turns = shape_of("beam", rope_theta=700.0, rope_parameters=ropes).details["turns"]
    assert [theta for theta, *_ in turns] == [700, 90, 700]


def test_an_empty_rope_is_as_none():
    assert shape_of("gpt_oss", rope_scaling={}) == shape_of("gpt_oss", rope_scaling=None)


def test_llama_4_ends_where_its_first_chunk_does():
    shape = shape_of("llama4_text", max_position_embeddings=10_485_760, attention_chunk_size=8192)
    assert shape.max_positions == 8192 and "chunks of 8192 tokens" in shape.end_words
    assert shape_of("llama4_text", attention_chunk_size=None).max_positions == 128


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_a_model_with_an_indexer_ends_where_the_indexer_would_leave_keys_out(name):
    shape = shape_of(name, max_position_embeddings=163_840, index_topk=2048)
    assert shape.max_positions == 2048 and "selects 2048 of the keys" in shape.end_words
    shape = shape_of(name, max_position_embeddings=64, index_topk=64, rope_scaling=None)
    assert shape.max_positions == 64 and not shape.end_words


def test_a_latent_cache_has_one_vector_a_token():
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128}
    shape = models.for_config(config).shape(config | {"vocab_size": 129280})
    assert shape.cache_nbytes([range(1)], "bfloat16") == 1152
    assert {entry[0].row for entry in shape.cache} == {(576,)}


def test_the_text_of_wrappers_is_found_by_its_own_type():
    text = CONFIGS["mistral4"]
    assert models.text_of({"model_type": "mistral3", "text_config": text})["model_type"] == "mistral4"
    assert models.for_config({"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}).__name__.endswith(
        "v3"
    )
    with pytest.raises(InputError, match="model_type of text_config is 'mamba': not in this version"):
        models.text_of({"model_type": "mistral3", "text_config": text | {"model_type": "mamba"}})


def test_layers_that_differ_have_caches_of_their_own():
    rows = [[array.row for array in entry] for entry in shape_of("mimo_v2_flash").cache]
    assert rows == [[(2, 24), (2, 10)], [(4, 24), (4, 10)], [(4, 24), (4, 10)]]
    assert [entry[0].window for entry in shape_of("mimo_v2_flash").cache] == [None, 9, 9]
    assert [entry[1].window for entry in shape_of("gpt_oss").cache] == [9, None, 9]


def test_corrections_and_routers_stay_float32_in_a_half_precision():
    shape = shape_of("glm4_moe")
    wanted = models.for_config(GLM4_MOE).layer_parameters(shape, 1)
    layout = {one.name: one.dtype for one in lay_out("layers/0001", wanted, "bfloat16").parameters}
    assert (layout["router"], layout["correction"], layout["experts"]) == ("float32", "float32", "bfloat16")


@pytest.mark.parametrize("name", ["gpt_oss", "glm4_moe", "phimoe", "deepseek_v3"])
def test_bfloat16_is_as_near_as_transformers_bfloat16(name):
    config, token_ids = CONFIGS[name], tokens_of(7, 60)
    model, state = beside.made(name)
    half = copy.deepcopy(model).bfloat16()
    rounded = {key: tensor.bfloat16() for key, tensor in state.items()}
    exact = wide.logits(wide.wide_model(config, half), token_ids)
    theirs = half(torch.tensor([token_ids]), use_cache=False).logits[0]
    found = Whole(config, rounded, torch.bfloat16).logits([(token_ids, 0, (Run(0, 4),))])[0]
    # the mean: a token whose expert is another one in a half precision differs by more
    error, their_error = ((logits.double() - exact).abs().mean() for logits in (found, theirs))
    assert found.dtype == torch.bfloat16 and 0 < error <= 1.3 * their_error
