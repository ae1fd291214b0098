"""DeepSeek-V2, V2.5, V2-Lite, Coder-V2: latent attention and mixtures by softmax; as transformers' modeling_deepseek_v2."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _experts, _latent, _routing
from noria.models._latent import *  # noqa: F403 - all that a family has beside its shape

ARCHITECTURES = ("DeepseekV2ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 2048,
}
SYNONYMS = {"num_experts": "n_routed_experts"}
# What Noria knows with one value only.
ONLY = {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1, "mlp_bias": False}
WITHOUT_EFFECT = ("aux_loss_alpha", "seq_aux", "ep_size")  # of training


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.fixed(keys, ONLY)
    inner, shared = read.integer(keys, "moe_intermediate_size"), read.whole(keys, "n_shared_experts", 2)
    number, chosen = _routing.counts(keys, "n_routed_experts")
    layers = range(read.whole(keys, "first_k_dense_replace", 0), _decoder.num_layers(keys))
    routing = _routing_of(keys, number, chosen)
    experts = _experts.Experts(number, inner, layers, routing, shared * inner, wide=True)
    found = _latent.shape("deepseek_v2", keys, experts)
    keys.refuse_others(*WITHOUT_EFFECT)
    return found


def _routing_of(config: Mapping[str, Any], number: int, chosen: int) -> _routing.Routing:
    """Softmax over all experts, of the best groups where `topk_method` says so: those that have the best experts."""
    method = read.one_of(config, "topk_method", "greedy", ("greedy", "group_limited_greedy"))
    grouped = method == "group_limited_greedy"
    groups, kept = _routing.groups_of(config, number, chosen)  # read by both, used by one
    return _routing.Routing(
        chosen,
        before="softmax",
        groups=groups if grouped else 1,
        kept=kept if grouped else 1,
        best=1,
        scaling=read.number(config, "routed_scaling_factor", 1.0),
    )
