"""A family for the tests: Qwen3-MoE whose router has a bias, in float32 whatever the model's dtype."""

import torch.nn.functional as F

from noria.models import _decoder, _experts, qwen3_moe
from noria.models._decoder import *  # noqa: F403 - what it does not define itself
from noria.models._linear import linear
from noria.pieces import Wanted

ARCHITECTURES = ("BiasedMoeForCausalLM",)


def shape(config):
    found = qwen3_moe.shape(config)
    return type(found)(**(vars(found) | {"family": "biased_moe"}))


def layer_parameters(shape, layer):
    wanted = _decoder.layer_parameters(shape, layer)
    return wanted | {"router_bias": Wanted(wanted["router"][:1], "float32")}


def sources(shape, block_name):
    names = _decoder.sources(shape, block_name)
    if block_name.startswith("layers/"):
        layer = int(block_name.removeprefix("layers/"))
        names["router_bias"] = (f"model.layers.{layer}.mlp.gate.bias",)
    return names


def layer(shape, index, parameters, hidden, positional, cache):
    size, details = shape.hidden_size, shape.details
    normed = F.rms_norm(hidden, (size,), parameters["attention_norm"], details["norm_eps"])
    attended = _decoder._attention(shape, index, parameters, normed, positional, cache)
    hidden = linear(attended, parameters["out"], parameters.get("out_bias")).add_(hidden)
    normed = F.rms_norm(hidden, (size,), parameters["mlp_norm"], details["norm_eps"])
    bias = parameters["router_bias"]
    scores = F.linear(normed.to(bias.dtype), parameters["router"].to(bias.dtype), bias)
    chosen, weights = _experts.choose(scores, details["experts"]["chosen"], details["experts"]["normalized"])
    experts = parameters["experts.gate_up"], parameters["experts.down"]
    return _experts.mixture(normed, chosen, weights.to(hidden.dtype), *experts).add_(hidden)
