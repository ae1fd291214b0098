"""A family for the tests: Qwen3-MoE whose router has a bias, in float32 whatever the model's dtype."""

from noria.models import _decoder, _experts, _heads, _routing, qwen3_moe
from noria.models._decoder import *  # noqa: F403 - what it does not define itself
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
    normed = _heads.norm(shape, parameters["attention_norm"], hidden)
    attended = _decoder.attend(shape, index, parameters, normed, positional, cache)
    hidden = _heads.project_out(parameters, attended).add_(hidden)
    normed = _heads.norm(shape, parameters["mlp_norm"], hidden)
    bias = parameters["router_bias"]
    scores = _routing.scores_of(normed, parameters["router"], bias)
    chosen, weights = _routing.choose(shape.details["experts"].routing, scores)
    experts = parameters["experts.gate_up"], parameters["experts.down"]
    return _experts.mixture(normed, chosen, weights, *experts).add_(hidden)
