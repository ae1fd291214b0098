"""Model families: one file each, named after Hugging Face's `model_type`; plain functions of tensors.

A family knows nothing of ranks, streams or files. This file only finds the family of a config.json.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from noria import kinds
from noria.errors import InputError, require
from noria.model import ModelShape
from noria.models._config import MAX_SHOWN, UnknownKeys, shown
from noria.models._refused import OBSTACLES

# Of the first conversions of Llama; of the makers of Phi-3.5-MoE and of K-EXAONE.
SYNONYMS = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
}

# Models around the text models of these types: text with images. Their config.json has the text model's as text_config.
# The first is meant where it does not say its type.
WRAPPERS = {
    "llama4": ("llama4_text",),
    "kimi_k25": ("deepseek_v3", "kimi_k2"),
    "mistral3": ("mistral", "ministral3", "mistral4"),
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "gemma4_unified": ("gemma4_unified_text",),
    "qwen2_vl": ("qwen2_vl_text",),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "qwen3_vl": ("qwen3_vl_text",),
    "qwen3_vl_moe": ("qwen3_vl_moe_text",),
    "glm4v_moe": ("glm4v_moe_text",),
}
OF_IMAGES = ("vision_", "image_", "video_")  # how keys begin that the text model does not read
# Of these text_config may say tie_word_embeddings, which transformers writes and does not read.
OWN_HEAD = ("qwen3_vl_moe",)
FLAT = ("qwen2_vl", "qwen2_5_vl")  # of these it may have the text model's keys among its own
# Other names of a family. Where all is text, the three numbers of a position that models of images have are equal.
TYPES = {
    "kimi_k2": "deepseek_v3",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "glm4v_moe_text": "glm4_moe",
}


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a wrapper's text model; of any other model its own. Raises InputError."""
    known = WRAPPERS.get(str(config.get("model_type")))
    if known is None:
        return config
    flat = config["model_type"] in FLAT and "text_config" not in config
    its = {key: value for key, value in config.items() if not key.startswith(OF_IMAGES)}
    text = {**its, "model_type": None} if flat else config.get("text_config")
    if not isinstance(text, Mapping):
        raise InputError(
            f"config.json: text_config is {shown(text)}: it must be an object, the text model's config.json"
        )
    family = text.get("model_type") or known[0]
    require(
        family in known,
        f"config.json: model_type of text_config is {shown(family)}: not in this version of Noria; known: {', '.join(known)}",
    )
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    if config["model_type"] in OWN_HEAD:
        text, tied = {**text, "tie_word_embeddings": config.get("tie_word_embeddings", False)}, {}
    return {**tied, **text, "model_type": family, "architectures": None}


def for_config(config: Mapping[str, Any]) -> ModuleType:
    """The family that computes a model with this config.json.

    Found by `model_type`, or by `architectures` where that is missing. Raises InputError, with the known families,
    for a model that no family computes.
    """
    families = {name: kinds.load("models", name) for name in kinds.names("models")}
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    model_type = TYPES.get(model_type, model_type) if isinstance(model_type, str) else model_type
    listed = isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    require(listed, f"config.json: architectures is {shown(architectures)}: it must be a list of names")
    architectures = [SYNONYMS.get(name, name) for name in architectures]
    for name, family in families.items():
        right_type = model_type == name if model_type else bool(architectures)
        if right_type and all(architecture in family.ARCHITECTURES for architecture in architectures):
            return family
    obstacle = OBSTACLES.get(model_type) if isinstance(model_type, str) else None
    if obstacle:
        raise InputError(
            f"config.json: model_type {shown(model_type)} is not in this version of Noria: {obstacle}, which it does not compute"
        )
    known = ", ".join(families)
    wanted = ", ".join(architectures)[:MAX_SHOWN] or "no architectures"
    raise InputError(f"config.json: no model family for {wanted} (model_type {shown(model_type)}); known: {known}")


def shape_of(config: Mapping[str, Any], notes: list[str] | None = None) -> tuple[ModuleType, ModelShape]:
    """The family and the sizes of the (text) model with this config.json.

    Raises InputError for what no family computes, and for a key that nobody knows. With `notes` such keys are left out,
    and a line that names them is added there: for what an earlier version took.
    """
    text = text_of(config)
    family = for_config(text)
    while True:
        try:
            return family, family.shape(text)
        except UnknownKeys as unknown:
            rest = unknown.left_out(text)
            if notes is None or rest == text:
                raise
            text = rest
            notes.append(
                f"{unknown.words}: Noria does not know what it asks for in this family, and does not use it, like the earlier"
                " version that converted this model; if the model's numbers depend on it, its results are wrong"
            )
