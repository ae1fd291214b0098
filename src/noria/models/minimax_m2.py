"""MiniMax-M2: a mixture in every layer, norms across heads, heads rotated in part; as transformers' modeling_minimax_m2."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from noria.model import ModelShape
from noria.models import _config as read
from noria.models import _decoder, _heads, _routing
from noria.models._decoder import *  # noqa: F403 - all that a family has beside its shape
from noria.models._experts import Experts
from noria.models._sources import Itself
from noria.models.mixtral import EXPERTS
from noria.pieces import Wanted

ARCHITECTURES = ("MiniMaxM2ForCausalLM",)
# What a config.json that leaves them out means.
DEFAULTS = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "rope_theta": 5e6,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
}
SYNONYMS = {"num_experts": "num_local_experts"}
MODULES = _decoder.MODULES | {
    "router": ("block_sparse_moe.gate",),
    "correction": (Itself("block_sparse_moe.e_score_correction_bias"),),
}
# What published config.json files say of other models of their maker's program, and the value that means this one.
FIXED = {
    "scoring_func": "sigmoid",
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
}
# Of drafts, of a shared expert that there is not, of training.
WITHOUT_EFFECT = (
    "use_mtp num_mtp_modules mtp_transformer_layers shared_moe_mode mlp_intermediate_size router_jitter_noise"
)


def shape(config: Mapping[str, Any]) -> ModelShape:
    """The sizes in a config.json. Raises InputError, naming the key, for what this family cannot compute."""
    keys = read.keys_of(config, DEFAULTS, SYNONYMS)
    layers = range(_decoder.num_layers(keys))
    read.fixed(keys, FIXED)
    read.only(keys, "attn_type_list", [1] * len(layers), "every layer must be of type 1, softmax attention")
    read.only(keys, "sliding_window", None, "Noria computes this family only without windows")
    number, chosen = _routing.counts(keys, "num_local_experts")
    routing = _routing.Routing(chosen, before="sigmoid", normalized=True, least=_routing.LEAST_SUM)
    experts = Experts(number, read.integer(keys, "intermediate_size"), layers, routing, corrected=True)
    if keys.get("rotary_dim") is not None and keys.get("partial_rotary_factor") is None:
        factor = read.integer(keys, "rotary_dim") / read.integer(keys, "head_dim")
        keys = keys.having(partial_rotary_factor=factor)
    variant = _decoder.Variant(head_norms=True, experts=experts, partly_rotated=True)
    found = _decoder.shape("minimax_m2", keys, variant)
    keys.refuse_others(*WITHOUT_EFFECT.split())
    return found


def layer_parameters(shape: ModelShape, layer: int) -> dict[str, tuple[int, ...] | Wanted]:  # type: ignore[no-redef]
    """In stored order, as the decoder's, but that norms of queries and keys are of all heads."""
    norms = {"query_norm": (shape.num_heads * shape.head_dim,), "key_norm": (shape.num_kv_heads * shape.head_dim,)}
    return _decoder.layer_parameters(shape, layer) | norms


def sources(shape: ModelShape, block_name: str) -> dict[str, tuple[str, ...]]:  # type: ignore[no-redef]  # its own
    """Each parameter's tensors in a Hugging Face checkpoint, to be concatenated along dim 0."""
    return _decoder.sources(shape, block_name, MODULES, EXPERTS)


layer = partial(_decoder.layer, attention=_heads.attend_across)
