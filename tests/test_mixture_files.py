"""Mixtures as they are published: full sizes, experts in one tensor, wrappers around the text model."""

import json

import h5py
import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from mixtures import CONFIGS
from noria.__main__ import main
from noria.checkpoint.checkpoint import block_names, model_block, model_shape

# Of published config.json files, what differs from a family's defaults; billions of numbers by the models' cards.
GPT_OSS = {"hidden_size": 2880, "num_attention_heads": 64, "vocab_size": 201088}
SIZES = {
    "gpt-oss-120b": ("gpt_oss", GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}, 116.83),
    "gpt-oss-20b": ("gpt_oss", GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32}, 20.91),
    "GLM-4.5": (
        "glm4_moe",
        {"hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 92, "n_routed_experts": 160, "moe_intermediate_size": 1536, "first_k_dense_replace": 3, "num_attention_heads": 96, "head_dim": 128, "vocab_size": 151552},
        355,
    ),
    "GLM-4.5-Air": ("glm4_moe", {"hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96, "head_dim": 128, "vocab_size": 151552}, 106),
    "MiniMax-M2": ("minimax_m2", {"hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48, "vocab_size": 200064}, 230),
    "MiMo-V2-Flash": ("mimo_v2_flash", {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 64, "vocab_size": 152576}, 309),
    "Qwen2-57B-A14B": (
        "qwen2_moe",
        {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480, "num_experts": 64, "intermediate_size": 18944, "vocab_size": 151936},
        57.4,
    ),
    "Qwen3-VL-30B-A3B": (
        "qwen3_vl_moe_text",
        {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768, "vocab_size": 151936},
        30.5,
    ),
    "OLMoE-1B-7B": ("olmoe", {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 1024, "vocab_size": 50304}, 6.92),
    "Phi-3.5-MoE": ("phimoe", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32064}, 41.9),
    "ERNIE-4.5-21B-A3B": ("ernie4_5_moe", {"hidden_size": 2560, "num_hidden_layers": 28, "num_attention_heads": 20, "vocab_size": 103424}, 21.8),
    "K-EXAONE-236B-A23B": (
        "exaone_moe",
        {"hidden_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 2048, "intermediate_size": 18432, "vocab_size": 153600},
        236,
    ),
    "Beam-501B-A23B": ("beam", {"hidden_size": 5120, "num_hidden_layers": 52, "num_attention_heads": 48, "vocab_size": 151936}, 501),
    "Solar-Open-100B": ("solar_open", {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 64, "vocab_size": 196608}, 102),
    "Llama-4-Scout": ("llama4_text", {"hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "vocab_size": 202048}, 107.8),
    "DeepSeek-V3": ("deepseek_v3", {"hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "vocab_size": 129280}, 671),
    "Moonlight-16B-A3B": (
        "deepseek_v3",
        {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "vocab_size": 163840, "q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 1408, "intermediate_size": 11264, "n_shared_experts": 2, "first_k_dense_replace": 1},
        15.96,
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "vocab_size": 102400, "q_lora_rank": None, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "intermediate_size": 10944, "first_k_dense_replace": 1},
        15.7,
    ),
    "Mistral-Small-4-119B": (
        "mistral4",
        {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "vocab_size": 131072, "rope_parameters": {"type": "yarn", "factor": 128.0, "original_max_position_embeddings": 8192, "llama_4_scaling_beta": 0.1}},
        119,
    ),
    "GLM-5": ("glm_moe_dsa", {"hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64, "vocab_size": 154880}, 744),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_a_published_model_has_as_many_numbers_as_its_card_says(name):
    family, keys, billions = SIZES[name]
    module, shape = model_shape({"model_type": family, **keys}, name)
    found = sum(model_block(module, shape, block, "bfloat16").numbers for block in block_names(shape))
    counted = found - (shape.vocab_size * shape.hidden_size if shape.tied else 0)
    exact = billions != int(billions)
    assert abs(counted / 1e9 - billions) < (0.01 if exact and family == "gpt_oss" else 0.012 * billions)


def same(one, other):
    """Asserts that two checkpoints have the same numbers."""
    with h5py.File(one) as file, h5py.File(other) as twin:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        assert [name for name in names if "experts" in name]
        for name in names:
            if name.startswith(("layers", "embed", "head")):
                assert (file[name][()] == twin[name][()]).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "llama4_text", "qwen3_vl_moe_text"])
def test_experts_in_one_tensor_are_read_of_torchs_files_as_of_safetensors(name, tmp_path, capsys):
    families.save(CONFIGS[name], tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "one.h5")]) == 0
    state = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(state, tmp_path / "hf/pytorch_model.bin")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "other.h5")]) == 0
    same(tmp_path / "one.h5", tmp_path / "other.h5")
    (whole,) = [key for key in state if key.startswith("model.layers.1.") and state[key].ndim == 3][:1]
    torch.save(state | {whole: state[whole][:-1].clone()}, tmp_path / "hf/pytorch_model.bin")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "third.h5")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert whole in said and "weights and config.json belong to different models" in said


@pytest.mark.slow
def test_the_text_part_of_llama_4_is_converted_and_its_vision_left_out_with_a_line(tmp_path, capsys):
    families.save(CONFIGS["llama4_text"], tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "text.h5")]) == 0
    state = load_file(tmp_path / "hf/model.safetensors")
    wrapped = {f"language_model.{name}": tensor for name, tensor in state.items()}
    wrapped |= {f"vision_model.model.layers.{n}.mlp.fc1.weight": torch.zeros(3, 3) for n in range(4)}
    save_file(wrapped, tmp_path / "hf/model.safetensors")
    config = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "vision_config": {"a": 1}}
    config |= {"text_config": CONFIGS["llama4_text"] | {"architectures": None}, "boi_token_index": 5}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "wrapped.h5")]) == 0
    assert "4 tensors left out, which llama4_text does not use" in capsys.readouterr().err
    same(tmp_path / "text.h5", tmp_path / "wrapped.h5")
