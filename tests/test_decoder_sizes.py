"""Dense decoders in their published sizes: as many numbers as their cards say, and caches as wide."""

import pytest

from noria.checkpoint.checkpoint import block_names, model_block, model_shape

# Of published config.json files, what differs from a family's defaults; billions of numbers by the models' cards.
NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
GEMMA4 = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
ENCODERS = 0.45  # billions, of Gemma 4's small models: 0.15 of images, 0.3 of sounds, which their cards count
SIZES = {
    "OLMo-2-7B": ("olmo2", (4096, 11008, 32, 32, 32, 100352), {}, 7.3),
    "OLMo-3-32B": ("olmo3", (5120, 27648, 64, 40, 8, 100278), {}, 32.2),
    "Granite-3.3-8B": ("granite", (4096, 12800, 40, 32, 8, 49159), {"tie_word_embeddings": True}, 8.17),
    "SmolLM3-3B": ("smollm3", (2048, 11008, 36, 16, 4, 128256), {}, 3.08),
    "Seed-OSS-36B": ("seed_oss", (5120, 27648, 64, 80, 8, 155136), {}, 36.2),
    "EXAONE-4.0-32B": ("exaone4", (5120, 27392, 64, 40, 8, 102400), {}, 32.0),
    "Command-R": ("cohere", (8192, 22528, 40, 64, 64, 256000), {}, 35.0),
    "Command-A": ("cohere2", (12288, 36864, 64, 96, 8, 256000), {}, 111.1),
    "GLM-4-32B-0414": ("glm4", (6144, 23040, 61, 48, 2, 151552), {"attention_bias": False}, 32.6),
    "StableLM-2-12B": ("stablelm", (5120, 13824, 40, 32, 8, 100352), {"use_parallel_residual": True}, 12.14),
    "StarCoder2-3B": ("starcoder2", (3072, 12288, 30, 24, 2, 49152), {}, 3.03),
    "GPT-NeoX-20B": ("gpt_neox", (6144, 24576, 44, 64, None, 50432), {}, 20.55),
    "Phi-2": ("phi", (2560, 10240, 32, 32, 32, 51200), {"partial_rotary_factor": 0.4}, 2.78),
    "Minitron-8B": ("nemotron", (4096, 16384, 32, 48, 8, 256000), {"head_dim": 128}, 8.27),
    "Falcon-40B": ("falcon", (8192, None, 60, 128, None, 65024), {"new_decoder_architecture": True, "num_kv_heads": 8}, 41.3),
    "Falcon-7B": ("falcon", (4544, None, 32, 71, None, 65024), {"num_kv_heads": 71}, 6.92),
    "Gemma-2-27B": ("gemma2", (4608, 36864, 46, 32, 16, 256000), {"head_dim": 128}, 27.2),
    "Gemma-3-27B": ("gemma3_text", (5376, 21504, 62, 32, 16, 262208), {"head_dim": 128}, 27.0),
    "Ministral-3-8B": ("ministral3", (4096, 14336, 34, 32, 8, 131072), {}, 8.4),
    "Gemma-4-31B": ("gemma4_text", (5376, 21504, 60, 32, 16, 262144), GEMMA4 | {"num_global_key_value_heads": 4}, 30.7),
    "Gemma-4-26B-A4B": (
        "gemma4_text",
        (2816, 2112, 30, 16, 8, 262144),
        GEMMA4 | {"num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
        25.2,
    ),
    "Gemma-4-E2B": (
        "gemma4_text",
        (1536, 6144, 35, 8, 1, 262144),
        {"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "layer_types": ([*["sliding_attention"] * 4, "full_attention"] * 7)},
        5.1 - ENCODERS,
    ),
    "Gemma-4-E4B": ("gemma4_text", (2560, 10240, 42, 8, 2, 262144), {"num_kv_shared_layers": 18}, 8.0 - ENCODERS),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_published_model_has_as_many_numbers_as_its_card_says(name):
    family, sizes, keys, billions = SIZES[name]
    config = {"model_type": family, **dict(zip(NAMES, sizes, strict=True)), **keys}
    module, shape = model_shape(config, name)
    found = sum(model_block(module, shape, block, "bfloat16").numbers for block in block_names(shape))
    counted = found - (shape.vocab_size * shape.hidden_size if shape.tied else 0)
    assert abs(counted / 1e9 - billions) < 0.012 * billions, counted
