"""Text models in models with images, from directories that transformers saved: converted as the text model alone is."""

import h5py
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import families
from beside import CONFIGS
from families import MISTRAL, QWEN2, QWEN3
from mixtures import GLM4_MOE
from noria import models
from noria.__main__ import main
from noria.errors import InputError

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "patch_size": 4}
PIXTRAL = VISION | {"model_type": "pixtral", "patch_size": 8, "head_dim": 8}
GEMMA4_VISION = VISION | {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
TEXTS = CONFIGS | {
    "mistral": MISTRAL | {"sliding_window": None},
    "qwen2_5_vl_text": QWEN2 | {"rope_theta": None, "rope_parameters": MROPE, "tie_word_embeddings": False},
    "qwen3_vl_text": QWEN3 | {"rope_theta": None, "rope_parameters": MROPE | {"mrope_section": [4, 2, 2]}},
    "glm4v_moe_text": GLM4_MOE
    | {
        "torch_dtype": None,
        "use_qk_norm": None,
        "num_nextn_predict_layers": None,
        "rope_theta": None,
        "partial_rotary_factor": None,
    }
    | {"rope_parameters": MROPE | {"partial_rotary_factor": 0.5}},
}
# name: the text model's config, the wrapper's type and class, its own keys
WRAPPED = {
    "Gemma 3": ("gemma3_text", "gemma3", "Gemma3ForConditionalGeneration", {"vision_config": SIGLIP, "mm_tokens_per_image": 4}),
    "Gemma 4": ("gemma4_text of E2B's shape", "gemma4", "Gemma4ForConditionalGeneration", {"vision_config": GEMMA4_VISION, "audio_config": None}),
    "Mistral Small 3.1": ("mistral", "mistral3", "Mistral3ForConditionalGeneration", {"vision_config": PIXTRAL}),
    "Qwen2.5-VL": ("qwen2_5_vl_text", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", {"vision_config": QWEN_VISION}),
    "Qwen3-VL": ("qwen3_vl_text", "qwen3_vl", "Qwen3VLForConditionalGeneration", {"vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}}),
    "GLM-4.5V": ("glm4v_moe_text", "glm4v_moe", "Glm4vMoeForConditionalGeneration", {"vision_config": QWEN_VISION}),
    "Qwen3-VL-MoE": ("qwen3_vl_moe_text", "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", {"vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0]}}),
    "Ministral 3": ("ministral3", "mistral3", "Mistral3ForConditionalGeneration", {"vision_config": PIXTRAL}),
}  # fmt: skip


def settings(text):
    """What transformers makes a wrapper's text model of."""
    kind = text if text in models.TYPES else TEXTS[text]["model_type"]
    given = {key: value for key, value in TEXTS[text].items() if value is not None or key == "sliding_window"}
    return given | {"model_type": kind}


def wrapped(name, folder):
    """Saves the text model, and the model around it with the same numbers, by transformers."""
    text, kind, architecture, more = WRAPPED[name]
    inner = families.save(TEXTS[text], folder / "text")
    tied = TEXTS[text]["tie_word_embeddings"]
    config = transformers.AutoConfig.for_model(kind, text_config=settings(text), tie_word_embeddings=tied, **more)
    for its in (config, config.text_config):
        its._attn_implementation = its._experts_implementation = "eager"
    model = getattr(transformers, architecture)(config).eval()
    model.model.language_model.load_state_dict(getattr(inner.model, "language_model", inner.model).state_dict())
    model.lm_head.load_state_dict(inner.lm_head.state_dict())
    with torch.inference_mode():
        one, other = (its(torch.arange(5, 50)[None]).logits for its in (inner, model))
    torch.testing.assert_close(
        one, other, rtol=0, atol=1e-5
    )  # of text alone the wrapper makes what the text model does
    model.float().save_pretrained(folder / "wrapped")
    return sum("language_model" not in key and "lm_head" not in key for key in model.state_dict())


def numbers(path):
    """Every parameter of a checkpoint."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return {name: array for name, array in found.items() if name.startswith(("layers", "embed", "head"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_part_is_converted_and_the_rest_left_out_with_a_line(name, tmp_path, capsys):
    others = wrapped(name, tmp_path)
    for source in ("text", "wrapped"):
        assert main(["convert", str(tmp_path / source), str(tmp_path / f"{source}.h5")]) == 0
    said = capsys.readouterr().err
    assert f"{others} tensors left out, which {TEXTS[WRAPPED[name][0]]['model_type']} does not use" in said
    one, other = numbers(tmp_path / "text.h5"), numbers(tmp_path / "wrapped.h5")
    assert one.keys() == other.keys() and len(one) > 20
    assert all((one[key] == other[key]).all() for key in one)


@pytest.mark.slow
def test_keys_and_values_of_layers_that_read_earlier_ones_are_left_out_where_they_are_published(tmp_path, capsys):
    families.save(CONFIGS["gemma4_text of E2B's shape"], tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    more = {
        f"model.layers.{n}.self_attn.{name}.weight": torch.zeros(8, 32) for n in (3, 4) for name in ("k_proj", "v_proj")
    }
    save_file(state | more, tmp_path / "model.safetensors")
    assert main(["convert", str(tmp_path), str(tmp_path / "model.h5")]) == 0
    assert "4 tensors left out, which gemma4_text does not use" in capsys.readouterr().err
    save_file(state | {"model.layers.3.self_attn.sinks": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert main(["convert", str(tmp_path), str(tmp_path / "other.h5")]) == 2
    assert "would leave out 1 tensor of the layers that it computes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", ["language_model.model.norm.weight", "model.language_model.layers.1.mlp.gate_proj.weight"]
)
def test_a_tensor_under_two_names_is_refused(more, tmp_path, capsys):
    families.save(QWEN3 | {"tie_word_embeddings": False}, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {more: torch.zeros(3)}, tmp_path / "model.safetensors")
    assert main(["convert", str(tmp_path), str(tmp_path / "model.h5")]) == 2
    assert f"{more!r}: qwen3 as config.json describes it would leave out 1 tensor of" in capsys.readouterr().err


def test_a_head_of_its_own_in_a_tied_wrapper_is_refused(tmp_path, capsys):
    families.save(QWEN3 | {"tie_word_embeddings": True}, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    head = {"language_model.lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(state | head, tmp_path / "model.safetensors")
    assert main(["convert", str(tmp_path), str(tmp_path / "model.h5")]) == 0
    assert "left out" not in capsys.readouterr().err
    head["language_model.lm_head.weight"][0] += 1
    save_file(state | head, tmp_path / "model.safetensors")
    assert main(["convert", str(tmp_path), str(tmp_path / "other.h5")]) == 2
    assert "'language_model.lm_head.weight' differs from 'model.embed_tokens.weight'" in capsys.readouterr().err


def test_a_wrapper_says_which_text_models_it_may_hold():
    with pytest.raises(InputError, match="text_config is None: it must be an object"):
        models.text_of({"model_type": "gemma3"})
    with pytest.raises(
        InputError, match="model_type of text_config is 'gemma2': not in this version of Noria; known: gemma3_text"
    ):
        models.text_of({"model_type": "gemma3", "text_config": {"model_type": "gemma2"}})
    assert models.text_of({"model_type": "mistral3", "text_config": {}})["model_type"] == "mistral"


def test_keys_of_a_text_model_may_stand_beside_those_of_images():
    flat = {"model_type": "qwen2_5_vl", "hidden_size": 64, "vision_config": {"hidden_size": 5}}
    assert models.text_of(flat)["hidden_size"] == 64
    assert models.for_config(models.text_of(flat)).__name__ == "noria.models.qwen2"
    scaled = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}
    shapes = [models.for_config(QWEN2).shape(QWEN2 | keys) for keys in (scaled, {"rope_theta": 1e6})]
    assert shapes[0] == shapes[1]


def test_whether_the_head_is_the_embedding_is_what_the_text_says_else_what_the_model_around_it_does():
    outer = {"model_type": "qwen3_vl", "tie_word_embeddings": True}
    assert models.text_of(outer | {"text_config": {}})["tie_word_embeddings"] is True
    assert models.text_of(outer | {"text_config": {"tie_word_embeddings": False}})["tie_word_embeddings"] is False


def test_transformers_reads_whether_the_head_is_the_embedding_beside_the_text_of_qwen3_vl_moe_alone():
    text = {"tie_word_embeddings": True}  # the default of the text's class, which a saved model says
    for outer, tied in (({"tie_word_embeddings": False}, False), ({"tie_word_embeddings": True}, True), ({}, False)):
        found = models.text_of({"model_type": "qwen3_vl_moe", "text_config": text, **outer})
        assert found["tie_word_embeddings"] is tied
