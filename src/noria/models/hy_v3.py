"""Hunyuan 3 (Hy3): norms of heads, a mixture with a shared expert in most layers; as transformers' modeling_hy_v3 has it."""

from collections.abc import Mapping
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _routing
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts
from noria.models._sources import Itself

ARCHITECTURES = ("HYV3ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 13312,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 11_158_840.0,
    "moe_intermediate_size": 1536,
    "num_experts": 192,
    "num_experts_per_tok": 8,
}
SYNONYMS = {"num_local_experts": "num_experts"}
MODULES = _decoder.MODULES | {
    "router": ("mlp.router.gate",),
    "correction": (Itself("mlp.expert_bias"),),
    "shared_gate_up": ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
    "shared_down": ("mlp.shared_mlp.down_proj",),
}


# What published config.json files say beside, and the value that means this family.
FIXED = {
    "mlp_bias": False,
    "qk_norm": True,
    "route_norm": True,
    "moe_router_use_sigmoid": True,
    "moe_router_enable_expert_bias": True,
}
# Of drafts; of kernels, and of where other programs compute in float32: attention and logits. A sum of two numbers of a half
# precision is rounded once in either way of enable_moe_fp32_combine.
WITHOUT_EFFECT = (
    "num_nextn_predict_layers use_grouped_mm enable_attention_fp32_softmax enable_lm_head_fp32 enable_moe_fp32_combine"
)


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    read.fixed(keys, FIXED)
    number, chosen = _routing.counts(keys, "num_experts")
    routing = _routing.Routing(
        chosen,
        before="sigmoid",
        normalized=True,
        least=_routing.LEAST_SUM,
        scaling=read.number(keys, "router_scaling_factor", 2.826),
    )
    inner = read.integer(keys, "moe_intermediate_size")
    read.only(keys, "expert_hidden_dim", inner, f"moe_intermediate_size is {inner}: they must be equal")
    shared = inner * read.whole(keys, "num_shared_experts", 1)
    layers = _decoder.sparse_layers(keys, first=read.whole(keys, "first_k_dense_replace", 1))
    biases = read.flag(keys, "attention_bias", False)
    experts = Experts(number, inner, layers, routing, shared, corrected=True, wide=True)
    variant = _decoder.Variant(qkv_bias=biases, out_bias=biases, head_norms=True, experts=experts)
    found = _decoder.shape("hy_v3", keys, variant)
    keys.refuse_others(*WITHOUT_EFFECT.split())
    return found


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES)
