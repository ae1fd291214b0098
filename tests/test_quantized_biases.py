"""Which parameters Noria's own quantization leaves as they are, where a bias has two axes."""

import mixtures
from noria.checkpoint.random_weights import random_checkpoint


def test_biases_of_experts_stay_as_they_are():
    config = mixtures.GPT_OSS | {"quantization_config": {"quant_method": "int8"}}
    layer = random_checkpoint(config, "float32").blocks["layers/0000"].parameters
    assert {one.name for one in layer if not one.plain} == {"qkv", "out", "experts"}
    assert {"experts_gate_up_bias", "experts_down_bias"} <= {one.name for one in layer}
