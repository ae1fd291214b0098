"""Dense decoders against transformers in float64, its own casts to float32 raised, and what their configs ask for beside."""

import copy

import pytest
import torch

import beside
import families
import wide
from beside import shape_of
from counts import some
from decoders import COHERE, CONFIGS, FULL, SLIDING
from noria import models
from noria.checkpoint.checkpoint import model_block
from noria.checkpoint.quantization import takes
from noria.errors import InputError
from noria.step import Run
from whole import Whole, tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name):
    beside.check(name)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("olmo2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("olmo2", {"clip_qkv": 8}, "clip_qkv is 8: Noria does not know what it asks for"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 3}, "it must be a list of 3 of full_attention, sliding_attention"),
        ("olmo3", {"sliding_window": 0}, "sliding_window is 0"),
        ("olmo3", {"rope_scaling": {"rope_type": "ntk"}}, "rope type 'ntk' is not in this version of Noria"),
        ("granite", {"residual_multiplier": -1}, "residual_multiplier is -1: it must be a number above 0"),
        ("smollm3", {"no_rope_layers": [1, 2, 1]}, "no_rope_layers is [1, 2, 1]: it must be 3 times 0 or 1"),
        ("smollm3", {"layer_types": [SLIDING] * 3}, "layer_types has sliding_attention where use_sliding_window is false"),
        ("seed_oss", {"attention_out_bias": "yes"}, "attention_out_bias is 'yes': it must be true or false"),
        ("exaone4", {"layer_types": None}, "sliding_window_pattern is 'LLLG': it must be a whole number of at least 1"),
        ("cohere", {"logit_scale": 0}, "logit_scale is 0: it must be a number above 0"),
        ("cohere", {"hidden_act": "gelu"}, "hidden_act is 'gelu': Noria computes this family only with silu"),
        ("cohere", {"use_parallel_block": False}, "use_parallel_block is False: Noria does not know what it asks for"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block is False: Noria computes this family only with True"),
        ("cohere2", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ("cohere2", {"layer_switch": 4}, "layer_switch is 4: sliding_window_pattern is 2: they must be equal"),
        ("cohere2", {"head_dim": 16}, "head_dim is 16: Noria computes this family only with hidden_size / num_attention_heads, 8"),
        ("cohere2", {"use_embedding_sharing": False}, "use_embedding_sharing is False: tie_word_embeddings says otherwise"),
        ("glm4", {"partial_rotary_factor": 0.75}, "9 of head_dim 12 are rotated: rotary positions need an even number"),
        ("stablelm", {"rope_pct": 0.5}, "rope_pct is 0.5: Noria does not know what it asks for"),
        ("stablelm", {"layer_norm_eps": 0}, "layer_norm_eps is 0: it must be a number above 0"),
        ("starcoder2", {"norm_type": "rms_norm"}, "norm_type is 'rms_norm': Noria computes this family only with 'layer_norm'"),
        ("starcoder2", {"hidden_act": "mish"}, "hidden_act is 'mish': not in this version of Noria"),
        ("gpt_neox", {"use_parallel_residual": 1}, "use_parallel_residual is 1: it must be true or false"),
        ("phi", {"qk_layernorm": "no"}, "qk_layernorm is 'no'"),
        ("nemotron", {"normalization": "rms"}, "normalization is 'rms'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True: Noria computes this family only as a decoder"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0: it must be a number above 0"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_activation is 'mish': not in this version of Noria"),
        ("gemma2", {"sliding_window_size": 5}, "sliding_window_size is 5: Noria does not know what it asks for"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0: Noria computes this family only without"),
        ("gemma3_text", {"rope_parameters": {FULL: 8}}, "full_attention of rope_parameters is 8: no object"),
        ("gemma3_text", {"rope_scaling": None, "rope_parameters": {"rope_theta": 9.0}}, "it must have an object full_attention or sliding_attention"),
        ("gemma3_text", {"rope_parameters": {FULL: {"rope_type": "default"}}}, "rope_scaling is {'factor': 8.0, 'rope_type': 'linear'}: rope_parameters says otherwise"),
        ("gemma3_text", {"rope_scaling": [1], "rope_parameters": {FULL: {}}}, "rope_scaling is [1]: rope_parameters says otherwise"),
        ("gemma3_text", {"rope_local_base_freq": -1}, "rope_theta is -1: it must be a number above 0"),
        ("ministral3", {"rope_parameters": {"rope_type": "yarn"}}, "llama_4_scaling_beta is missing"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all': Noria computes this family only"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "num_kv_shared_layers is 1: no layer of each kind is before them"),
        ("gemma4_text", {"num_global_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of num_global_key_value_heads (3)"),
        ("gemma4_text", {"global_head_dim": 15}, "global_head_dim is 15: rotary positions need an even number"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 16}}}, "per_layer_config is {'1': {'head_dim': 16}}: it must say the same"),
        ("gemma4_text", {"per_layer_config": {"2": {"sliding_window": 5}}}, "per_layer_config is {'2': {'sliding_window': 5}}"),
        ("gemma4_text", {"rope_parameters": {FULL: {"rope_theta": 1e6}}}, "it must have an object sliding_attention"),
        ("gemma3_text as transformers writes it", {"rope_parameters": {FULL: {"rope_theta": 1e6}, "factor": 8.0}}, "factor of rope_parameters is 8.0: no object of a kind of layers"),
        ("gemma4_text", {"rope_parameters": {FULL: {}}}, "rope_theta of full_attention in rope_parameters is missing"),
        ("gemma4_unified_text", {"enable_moe_block": True}, "enable_moe_block is True: Noria computes this family only with False"),
        ("gemma4_unified_text", {"hidden_size_per_layer_input": 4}, "hidden_size_per_layer_input is 4"),
        ("gemma4_text of E2B's shape", {"vocab_size_per_layer_input": 50}, "vocab_size_per_layer_input is 50: Noria knows only that of vocab_size"),
        ("gemma4_text of 26B-A4B's shape", {"hidden_activation": "silu"}, "hidden_activation is 'silu': Noria computes this mixture only with"),
        ("gemma4_text of 26B-A4B's shape", {"top_k_experts": 9}, "num_experts_per_tok (9) is more than num_experts (8)"),
        ("falcon", {"alibi": True}, "alibi is True: Noria computes this family only with rotary positions"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2: Noria computes this only with new_decoder_architecture"),
        ("falcon", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
        ("falcon of 40B's shape", {"num_kv_heads": 3}, "num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        ("falcon of 40B's shape", {"parallel_attn": False}, "new_decoder_architecture is True: Noria computes it only with parallel_attn"),
    ],
)  # fmt: skip
def test_what_a_config_asks_for_beside_is_refused_by_key_and_value(name, keys, words):
    beside.check_refused(name, keys, words)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name == CONFIGS[name]["model_type"]])
def test_a_key_that_no_family_knows_is_refused_by_its_name_and_value(name):
    beside.check_unknown_key(name)


@pytest.mark.parametrize(
    "name", ["olmo3", "cohere with norms of heads (R+)", "nemotron", "falcon", "gemma2", "gemma3_text"]
)
def test_bfloat16_is_as_near_as_transformers_bfloat16(name):
    config, token_ids = CONFIGS[name], tokens_of(7, 60)
    model, state = beside.made(name)
    half = copy.deepcopy(model).bfloat16()
    rounded = {key: tensor.bfloat16() for key, tensor in state.items()}
    exact = wide.logits(wide.wide_model(config, half), token_ids)
    theirs = half(torch.tensor([token_ids]), use_cache=False).logits[0]
    found = Whole(config, rounded, torch.bfloat16).logits([(token_ids, 0, (Run(0, 4),))])[0]
    error, their_error = ((logits.double() - exact).abs().mean() for logits in (found, theirs))
    assert found.dtype == torch.bfloat16 and 0 < error <= 1.3 * their_error


def test_a_context_that_is_scaled_already_is_not_scaled_again():
    assert shape_of("gemma3_text", max_position_embeddings=131072).max_positions == 131072
    assert shape_of("ministral3", max_position_embeddings=262144).max_positions == 262144
    assert shape_of("cohere", model_max_length=131072).max_positions == 131072
    assert (
        shape_of("olmo3", max_position_embeddings=40).max_positions == 4 * 32
    )  # of the rope of layers without windows


def test_layers_that_attend_in_a_window_say_so_of_their_cache():
    assert [entry[0].window for entry in shape_of("gemma3_text").cache] == [9, None, 9]
    assert [entry[1].window for entry in shape_of("cohere2").cache] == [9, None, 9]
    assert [entry[0].window for entry in shape_of("smollm3").cache] == [None] * 3


@pytest.mark.parametrize(
    "name", ["olmo3", "cohere2", "exaone4", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"]
)
def test_a_window_is_without_effect_where_no_layer_has_one(name):
    full = shape_of(name, layer_types=[FULL] * 3, sliding_window=None)
    assert shape_of(name, layer_types=[FULL] * 3, sliding_window=7).cache == full.cache
    assert [entry[0].window for entry in full.cache] == [None] * 3


def test_layers_of_gemma_4_have_their_own_heads_and_read_those_of_earlier_ones():
    rows = [[array.row for array in entry] for entry in shape_of("gemma4_text").cache]
    assert rows == [[(2, 8), (2, 8)], [(2, 8), (2, 8)], [(1, 16), (1, 16)]]
    small = shape_of("gemma4_text of E2B's shape")
    assert small.cache[3:] == (1, 1, 2) and small.tied_layers == ((1, 3, 4), (2, 5))
    assert [[array.row for array in border] for border in small.bundle] == [[(n, 4)] for n in range(6, 0, -1)] + [[]]
    assert (
        shape_of("gemma4_text", layer_types=[SLIDING] * 3).cache == shape_of("gemma4_text").cache
    )  # the last is global


def test_other_names_of_nemotron_s_keys_mean_the_same():
    assert shape_of("nemotron", head_dim=None, kv_channels=12) == shape_of("nemotron")
    assert shape_of("nemotron", norm_eps=None, layer_norm_eps=1e-5, rope_percent=0.5) == shape_of("nemotron")
    with pytest.raises(InputError, match="kv_channels is 16: Noria does not know what it asks for"):
        shape_of("nemotron", kv_channels=16)


@pytest.mark.parametrize(
    ("name", "theta"), [("cohere", 500000), ("cohere2", 10000), ("olmo3", 500000), ("seed_oss", 10000)]
)
def test_a_theta_that_is_left_out_is_transformers_own(name, theta):
    config = {key: value for key, value in CONFIGS[name].items() if key != "rope_theta"}
    details = models.for_config(config).shape(config).details
    assert details.get("rope_theta") == theta or {turn[0] for turn in details["turns"]} == {theta}
    rope = families.empty_model(config).config.rope_parameters
    assert {its["rope_theta"] for its in rope.values() if isinstance(its, dict)} in (set(), {theta})
    assert rope.get("rope_theta", theta) == theta


def test_norms_of_heads_have_two_axes_and_stay_as_they_are_in_fewer_bits():
    wide = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32}
    shape = shape_of("cohere with norms of heads (R+)", **wide)
    block = model_block(models.for_config(COHERE), shape, "layers/0000", "bfloat16")
    taken = [parameter.name for parameter in block.parameters if takes(block.name, parameter)]
    assert taken == ["qkv", "out", "gate_up", "down"]


ODD = (
    [],
    {},
    -1,
    0,
    "x",
    float("inf"),
    float("nan"),
    True,
    None,
    2**40,
    [None],
    [1, 2, 3],
    1.5,
    {FULL: 5},
    {"rope_type": {}},
)
ASKED = (
    "layer_types",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "head_dim",
    "partial_rotary_factor",
    "per_layer_config",
)


def test_odd_values_of_any_key_are_taken_or_refused_in_one_line():
    keys = {name: {*ASKED, *CONFIGS[name]} - {"model_type", "architectures"} for name in CONFIGS}
    cases = [(name, key, odd) for name in CONFIGS for key in sorted(keys[name]) for odd in ODD]
    refused = 0
    for name, key, odd in some(cases):
        try:
            shape_of(name, **{key: odd})
        except InputError as error:
            refused += 1
            assert len(str(error)) < 400 and "\n" not in str(error)
    assert refused > len(some(cases)) / 4
