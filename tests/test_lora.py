"""noria convert --lora: W + scale B A by hand in float64, and peft's own merge_and_unload."""

import json
import math
import re

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import families
import small_run
from noria.__main__ import main
from noria.checkpoint import convert as convert_module
from noria.checkpoint import tensor_files
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.lora_patterns import answer
from noria.errors import InputError
from tiny_models import LLAMA, fused, state, write_directory

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "bias": "none",
    "peft_version": "0.21.2",
}
CONFIG |= {
    "target_modules": ["q_proj", "down_proj"],
    "lora_dropout": 0.1,
    "megatron_core": "megatron.core",
    "use_dora": False,
}
PREFIX = "base_model.model."
TIED = LLAMA | {"tie_word_embeddings": True}


def adapter(
    folder, model, config=CONFIG, targets=("q_proj", "down_proj"), rank=lambda name: 4, more=(), dtype=torch.float32
):
    """An adapter of these modules' names, all of whose numbers are random."""
    generator = torch.Generator().manual_seed(3)
    tensors = dict(more)
    for name, matrix in model.items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(targets)) and matrix.ndim == 2:
            for letter, shape in (("A", (rank(module), matrix.shape[1])), ("B", (matrix.shape[0], rank(module)))):
                values = torch.randn(shape, generator=generator).to(dtype)
                tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = values
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_by_hand(model, folder, scale):
    """W + scale B A in float64, of the tensors in the adapter's file."""
    factors, result = load_file(folder / "adapter_model.safetensors"), {}
    for name, matrix in model.items():
        module = PREFIX + name.removesuffix(".weight")
        result[name] = matrix.double().numpy().copy()
        if f"{module}.lora_A.weight" in factors:
            a, b = (factors[f"{module}.lora_{letter}.weight"].double().numpy() for letter in "AB")
            result[name] += scale(module.removeprefix(PREFIX)) * (b @ a)
    return {name: torch.from_numpy(values) for name, values in result.items()}


def values_of(path):
    """Every parameter by its path, as float64."""
    found = {}
    with open_checkpoint(path) as checkpoint:
        for name, block in checkpoint.blocks.items():
            content = torch.empty(block.nbytes, dtype=torch.uint8)
            checkpoint.read_block(name, content.numpy())
            dtype = getattr(torch, checkpoint.dtype)
            for one in block.parameters:
                found[f"{name}/{one.name}"] = (
                    content[one.offset : one.offset + one.nbytes].view(dtype).view(one.shape).double()
                )
    return found


def assert_near(found, expected, within=1e-6):
    """Each number within this share of itself, or of the largest of its matrix where sums cancel."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        largest = values.abs().max().item()
        assert torch.allclose(found[name], values.double(), rtol=within, atol=within * largest), name


@pytest.fixture
def model(tmp_path):
    tensors = state(LLAMA)
    write_directory(tmp_path / "hf", LLAMA, tensors, num_shards=2)
    return tensors


def test_the_merge_is_w_plus_alpha_over_r_times_b_a(tmp_path, model):
    lora = adapter(tmp_path / "lora", model)
    made = convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    assert made.dtype == "float32"
    assert_near(values_of(tmp_path / "model.h5"), fused(LLAMA, merged_by_hand(model, lora, lambda module: 1.5)))


def test_the_merge_does_not_depend_on_where_chunks_end(tmp_path, model, monkeypatch):
    lora = adapter(tmp_path / "lora", model)
    convert(tmp_path / "hf", tmp_path / "whole.h5", lora=lora)
    for module in (tensor_files, convert_module):
        monkeypatch.setattr(module, "CHUNK_NBYTES", 4 * 37)  # rows have 32 and 44 numbers
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    assert_near(values_of(tmp_path / "model.h5"), values_of(tmp_path / "whole.h5"))


def test_rslora_divides_by_the_root_of_the_rank(tmp_path, model):
    lora = adapter(tmp_path / "lora", model, CONFIG | {"use_rslora": True})
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    assert_near(values_of(tmp_path / "model.h5"), fused(LLAMA, merged_by_hand(model, lora, lambda module: 3.0)))


def test_ranks_and_alphas_are_by_the_first_pattern_that_matches(tmp_path, model):
    config = CONFIG | {
        "rank_pattern": {r"layers\.1\.self_attn.q_proj": 2, "q_proj": 3},
        "alpha_pattern": {"^.*down_proj": 20},
    }

    def rank(module):
        return 2 if "layers.1.self_attn" in module else 3 if module.endswith("q_proj") else 4

    lora = adapter(tmp_path / "lora", model, config, rank=rank)
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    scale = lambda module: 20 / 4 if module.endswith("down_proj") else 6 / rank(module)  # noqa: E731
    assert_near(values_of(tmp_path / "model.h5"), fused(LLAMA, merged_by_hand(model, lora, scale)))


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        ({"target_modules": r".*layers\.[02]\.mlp\.(gate|up)_proj"}, ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.2.mlp.gate_proj", "layers.2.mlp.up_proj"]),
        ({"layers_to_transform": [1]}, ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]),
        ({"layers_to_transform": 2, "layers_pattern": "layers"}, ["layers.2.self_attn.q_proj", "layers.2.mlp.down_proj"]),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, ["1.self_attn.q_proj", "2.self_attn.q_proj", "down_proj"]),
        ({"target_modules": "all-linear"}, ["v_proj", "gate_proj"]),
    ],
    ids=str,
)  # fmt: skip
def test_modules_are_named_as_peft_names_them_and_others_are_missed(tmp_path, model, config, targets):
    lora = adapter(tmp_path / "lora", model, CONFIG | config, targets)
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    assert_near(values_of(tmp_path / "model.h5"), fused(LLAMA, merged_by_hand(model, lora, lambda module: 1.5)))
    adapter(tmp_path / "more", model, CONFIG | config, [*targets, "o_proj"])
    adapter(tmp_path / "fewer", model, CONFIG | config, targets[1:])
    if config.get("target_modules") != "all-linear":
        refused(tmp_path, "more", "changes model.layers.0.self_attn.o_proj, which target_modules")
        refused(tmp_path, "fewer", "does not change model.layers.", "download it again")


def test_modules_that_were_saved_whole_stand_in_the_place_of_the_model_s(tmp_path, model):
    generator = torch.Generator().manual_seed(5)
    saved = {
        name: torch.randn(model[name].shape, generator=generator) for name in ("lm_head.weight", "model.norm.weight")
    }
    more = {PREFIX + name: tensor for name, tensor in saved.items()}
    lora = adapter(tmp_path / "lora", model, CONFIG | {"modules_to_save": ["lm_head", "norm"]}, more=more)
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    expected = merged_by_hand(model | saved, lora, lambda module: 1.5)
    assert_near(values_of(tmp_path / "model.h5"), fused(LLAMA, expected))


def test_an_embedding_that_was_saved_and_changed_gets_its_change(tmp_path, model):
    table, a, b = torch.randn(101, 32), torch.randn(4, 101), torch.randn(32, 4)
    name = f"{PREFIX}model.embed_tokens"
    more = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b, f"{name}.base_layer.weight": table}
    lora = adapter(
        tmp_path / "lora", model, CONFIG | {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, more=more
    )
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    expected = merged_by_hand(model, lora, lambda module: 1.5)
    expected["model.embed_tokens.weight"] = table.double() + 1.5 * (b.double() @ a.double()).T
    assert_near(values_of(tmp_path / "model.h5"), fused(LLAMA, expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("of_adapter", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_is_made_in_float32_and_rounded_once(tmp_path, dtype, of_adapter):
    tensors = state(LLAMA, getattr(torch, dtype))
    write_directory(tmp_path / "hf", LLAMA, tensors)
    lora = adapter(tmp_path / "lora", tensors, dtype=of_adapter)
    made = convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    assert made.dtype == dtype, "the adapter's dtype is not the model's"
    expected = fused(LLAMA, merged_by_hand(tensors, lora, lambda module: 1.5))
    found = values_of(tmp_path / "model.h5")
    step = torch.finfo(getattr(torch, dtype)).eps
    for name, values in expected.items():
        assert ((found[name] - values).abs() <= values.abs() * step / 2 * 1.01 + 2e-5 * (step > 1e-8) + 1e-12).all(), (
            name
        )


@pytest.mark.slow
def test_matrices_that_are_stored_the_other_way_are_merged_that_way(tmp_path):
    config = families.GPT2
    families.save(config, tmp_path / "hf")
    plain = load_file(tmp_path / "hf" / "model.safetensors")
    more, expected, generator = {}, dict(plain), torch.Generator().manual_seed(1)
    for name, matrix in plain.items():
        if name.endswith(("attn.c_attn.weight", "attn.c_proj.weight")):
            a, b = (torch.randn(shape, generator=generator) for shape in ((2, matrix.shape[0]), (matrix.shape[1], 2)))
            module = "transformer." + name.removeprefix("transformer.").removesuffix(".weight")
            more |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
            expected[name] = (matrix.double() + 3 * (b.double() @ a.double()).T).float()
    keys = CONFIG | {"target_modules": ["c_attn", "attn.c_proj"], "r": 2, "fan_in_fan_out": True}
    lora = adapter(tmp_path / "lora", {}, keys, more=more)
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=lora)
    save_file(expected, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "merged.h5")
    assert_near(values_of(tmp_path / "model.h5"), values_of(tmp_path / "merged.h5"))


# What says where the weights are from.


@pytest.mark.slow
def test_the_adapter_is_in_the_checkpoint_and_in_what_it_generates(tmp_path, capsys):
    small_run.write_files(tmp_path)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    lora = adapter(tmp_path / "my-lora", tensors)
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "model.h5"), "--overwrite", "--lora", str(lora)]) == 0
    capsys.readouterr()
    main(["inspect", "--json", str(tmp_path / "model.h5")])
    said = json.loads(capsys.readouterr().out)["adapter"]
    assert re.fullmatch("my-lora [0-9a-f]{32}", said)
    main(["inspect", str(tmp_path / "model.h5")])
    assert f"adapter     {said}, merged\n" in capsys.readouterr().out
    assert main(small_run.command(tmp_path, "run.h5")) == 0
    with h5py.File(tmp_path / "run.h5") as file:
        assert file.attrs["adapter"] == said
    (lora / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 7}))
    convert(tmp_path / "hf", tmp_path / "other.h5", lora=lora)
    with open_checkpoint(tmp_path / "other.h5") as other, open_checkpoint(tmp_path / "model.h5") as one:
        assert other.adapter != one.adapter and other.header_hash != one.header_hash


def test_without_an_adapter_nothing_is_said_of_one(tmp_path, model):
    convert(tmp_path / "hf", tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5") as file:
        assert "adapter" not in file.attrs


def test_an_adapter_beside_its_model_is_merged_and_a_tokenizer_of_its_own_is_told(tmp_path, model):
    lora = adapter(tmp_path / "hf", model)
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    made = convert(lora, tmp_path / "model.h5", lora=lora)
    assert not [note for note in made.notes if "is not taken" in note]
    other = adapter(tmp_path / "lora", model)
    (other / "tokenizer.json").write_text("{}")
    assert any("tokenizer.json is not taken" in note for note in convert(lora, tmp_path / "b.h5", lora=other).notes)


# What is refused.


def refused(tmp_path, name, *words):
    with pytest.raises(InputError) as error:
        convert(tmp_path / "hf", tmp_path / "refused.h5", lora=tmp_path / name)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "refused.h5").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'", "merge it by peft"]),
        ({"peft_type": None}, ["peft_type is None"]),
        ({"use_dora": True}, ["use_dora is 'True'", "does not merge"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"bias": "all"}, ["bias is 'all'"]),
        ({"bias": ["x"]}, ["bias is"]),
        ({"layer_replication": [[0, 4], [2, 5]]}, ["layer_replication"]),
        ({"target_parameters": ["mlp.experts"]}, ["target_parameters"]),
        ({"trainable_token_indices": [5]}, ["trainable_token_indices"]),
        ({"megatron_config": {"a": 1}}, ["megatron_config"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens"]),
        ({"ensure_weight_tying": True}, ["ensure_weight_tying"]),
        ({"a_new_kind": {"x": 1}}, ["a_new_kind"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights is 'pissa'", "the model's own weights"]),
        ({"init_lora_weights": ["x"]}, ["init_lora_weights"]),
        ({"r": 0}, ["r is '0'", "an integer from 1"]),
        ({"r": "8"}, ["r is '8'"]),
        ({"r": True}, ["r is 'True'"]),
        ({"r": 5}, ["of rank 5", "do not fit"]),
        ({"lora_alpha": None}, ["lora_alpha is 'None'"]),
        ({"lora_alpha": math.inf}, ["lora_alpha"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern", "a table of numbers"]),
        ({"rank_pattern": {"q_proj": 2.5}}, ["rank_pattern"]),
        ({"alpha_pattern": {"q_proj": "8"}}, ["alpha_pattern"]),
        ({"alpha_pattern": {"q_(proj": 8}}, ["patterns of modules cannot be used"]),
        ({"target_modules": [7]}, ["target_modules", "a list of names"]),
        ({"target_modules": None}, ["which target_modules"]),
        ({"layers_to_transform": ["a"]}, ["layers_to_transform"]),
        ({"modules_to_save": ["lm_head"]}, ["has no tensors of lm_head, which modules_to_save"]),
        ({"modules_to_save": "lm_head"}, ["modules_to_save", "a list of names"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_merged_is_refused_by_its_key(tmp_path, model, keys, words):
    adapter(tmp_path / "lora", model, CONFIG | keys)
    refused(tmp_path, "lora", *words)


@pytest.mark.slow
def test_a_pattern_that_comes_to_no_end_is_refused(tmp_path, model):
    adapter(tmp_path / "lora", model, CONFIG | {"target_modules": "(.*)*" * 20 + "!"})
    refused(tmp_path, "lora", "patterns of modules cannot be used")


ONE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {f"{ONE}.lora_A.weight": None},
            ["has half of the change of model.layers.0.self_attn.q_proj: lora_A is missing"],
        ),
        ({f"{ONE}.lora_A.weight": torch.zeros(4, 31)}, ["A [4, 31]", "do not fit", "[32, 32]"]),
        ({f"{ONE}.lora_B.weight": torch.zeros(31, 4)}, ["B [31, 4]"]),
        ({f"{ONE}.lora_A.weight": torch.zeros(4)}, ["A [4]"]),
        ({f"{ONE}.lora_magnitude_vector": torch.zeros(32)}, ["lora_magnitude_vector", "does not have"]),
        ({f"{ONE}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int8)}, ["'int8'", "Noria reads"]),
        ({"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, ["model.layers.9", "does not have"]),
        ({"score.weight": torch.zeros(2, 32)}, ["'score.weight', which the model does not have", "of another task"]),
        ({"lm_head.weight": torch.zeros(103, 32)}, ["[103, 32]", "[101, 32]", "the vocabulary was changed"]),
    ],
    ids=list("abcdefghi"),
)
def test_tensors_that_do_not_fit_the_model_are_refused_by_their_name(tmp_path, model, change, words):
    lora = adapter(tmp_path / "lora", model)
    tensors = load_file(lora / "adapter_model.safetensors") | {PREFIX + name: tensor for name, tensor in change.items()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, lora / "adapter_model.safetensors"
    )
    refused(tmp_path, "lora", *words)


def test_an_adapter_of_another_model_or_form_is_refused(tmp_path, model):
    lora = adapter(tmp_path / "lora", {f"vision.{name}": tensor for name, tensor in model.items()})
    refused(tmp_path, "lora", "'vision.model.layers.0.mlp.down_proj.weight', which the model does not have")
    save_file({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, lora / "adapter_model.safetensors")
    refused(tmp_path, "lora", "does not begin with base_model.model.")
    (lora / "adapter_model.safetensors").write_bytes(b"damaged")
    refused(tmp_path, "lora", "is not a safetensors file")
    (lora / "adapter_model.safetensors").unlink()
    refused(tmp_path, "lora", "has no weights of an adapter")
    (lora / "adapter_config.json").write_text("[]")
    refused(tmp_path, "lora", "adapter_config.json")
    (lora / "adapter_config.json").unlink()
    refused(tmp_path, "lora", "has no adapter_config.json")
    refused(tmp_path, "nothing", "nothing does not exist")


def test_a_change_of_an_embedding_that_is_the_head_too_is_refused_unless_it_is_none(tmp_path):
    tensors = state(TIED)
    write_directory(tmp_path / "hf", TIED, tensors)
    table = f"{PREFIX}model.embed_tokens.weight"
    adapter(tmp_path / "same", tensors, more={table: tensors["model.embed_tokens.weight"].clone()})
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=tmp_path / "same")
    adapter(tmp_path / "other", tensors, more={table: torch.zeros(101, 32)})
    refused(tmp_path, "other", "changes the embedding, which is the head too")
    factors = {
        f"{PREFIX}lm_head.lora_{letter}.weight": torch.zeros(shape)
        for letter, shape in (("A", (4, 32)), ("B", (101, 4)))
    }
    adapter(tmp_path / "head", tensors, CONFIG | {"target_modules": ["q_proj", "down_proj", "lm_head"]}, more=factors)
    refused(tmp_path, "head", "lm_head", "tie_word_embeddings")


def test_an_adapter_saved_by_torch_is_merged_too(tmp_path, model):
    lora = adapter(tmp_path / "lora", model)
    convert(tmp_path / "hf", tmp_path / "one.h5", lora=lora)
    torch.save(load_file(lora / "adapter_model.safetensors"), lora / "adapter_model.bin")
    (lora / "adapter_model.safetensors").unlink()
    convert(tmp_path / "hf", tmp_path / "other.h5", lora=lora)
    assert_near(values_of(tmp_path / "other.h5"), values_of(tmp_path / "one.h5"), 0)


def test_numbers_beyond_the_dtype_are_refused_after_the_merge(tmp_path):
    tensors = state(LLAMA, torch.float16)
    write_directory(tmp_path / "hf", LLAMA, tensors)
    adapter(tmp_path / "lora", tensors, CONFIG | {"lora_alpha": 1e6})
    refused(tmp_path, "lora", "float16 ends at", "--dtype bfloat16")


# What peft itself does.


def targets_of(patterns, modules):
    defaults = {"exclude_modules": None, "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None}
    request = {"modules": modules, "patterns": defaults | patterns, "ranks": ["q_proj", r"\d\.mlp.*"], "alphas": []}
    return answer(request)


@pytest.mark.slow
@pytest.mark.parametrize(
    "patterns",
    [
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.[13]\.self_attn\.(q|k)_proj"},
        {"target_modules": r"q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 3]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", "layers.2"]},
    ],
    ids=str,
)
def test_patterns_name_the_modules_that_peft_names(patterns):
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    modules = [
        f"model.layers.{layer}.{name}"
        for layer in range(4)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    ]
    modules += ["lm_head", "model.embed_tokens"]
    config = peft.LoraConfig(**patterns)
    if not isinstance(config.target_modules, str):
        config.target_modules = list(patterns["target_modules"])
    ranks = ["q_proj", r"\d\.mlp.*"]
    expected = [
        (bool(check_target_module_exists(config, module)), get_pattern_key(ranks, module)) for module in modules
    ]
    found = [
        (target, rank or module)
        for module, (target, rank, _) in zip(modules, targets_of(patterns, modules), strict=True)
    ]
    assert found == expected


SAVED = ["lm_head"]
OF_PEFT = {
    "llama": (families.LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama, rslora, patterns": (families.LLAMA, {"target_modules": r".*layers\.\d\.mlp\.\w+_proj", "use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 30}}),
    "qwen3, saved": (families.QWEN3, {"target_modules": "all-linear", "modules_to_save": SAVED}),
    "phi3": (families.PHI3, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "gpt2": (families.GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "opt": (families.OPT, {"target_modules": ["q_proj", "fc1", "fc2"], "layers_to_transform": [0, 2]}),
    "llama, embedding": (families.LLAMA, {"target_modules": ["embed_tokens", "o_proj"]}),
    "qwen2, bfloat16, tied": (families.QWEN2 | {"dtype": "bfloat16"}, {"target_modules": ["k_proj", "gate_proj"]}),
    "mixtral": (families.MIXTRAL, {"target_modules": ["q_proj", "o_proj"]}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PEFT)
def test_the_checkpoint_is_that_of_what_peft_merges(tmp_path, name):
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    config, keys = OF_PEFT[name]
    torch.manual_seed(0)
    dtype = getattr(torch, config.get("dtype", "float32"))
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(dtype)
    plain.save_pretrained(tmp_path / "hf")
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **keys))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * (0.1 if "lora" in parameter_name else 1.0))
    adapted.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "lora")
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    convert(tmp_path / "hf", tmp_path / "model.h5", lora=tmp_path / "lora")
    convert(tmp_path / "merged", tmp_path / "merged.h5")
    found, expected, untouched = (values_of(tmp_path / one) for one in ("model.h5", "merged.h5", "model.h5"))
    assert_near(found, expected, 1e-6)
    convert(tmp_path / "hf", tmp_path / "plain.h5")
    untouched = values_of(tmp_path / "plain.h5")
    assert any(not torch.equal(found[one], untouched[one]) for one in found)
    assert np.isfinite(max(values.abs().max().item() for values in found.values()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.lora_B.weight", "model.norm.weight"])
def test_an_adapter_with_numbers_that_are_not_finite_is_refused_by_its_tensors_name(tmp_path, name, value):
    model = state(LLAMA)
    write_directory(tmp_path / "hf", LLAMA, model)
    saved = {f"{PREFIX}model.norm.weight": torch.ones_like(model["model.norm.weight"])}
    adapter(tmp_path / "lora", model, CONFIG | {"modules_to_save": ["norm"]}, more=saved)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    tensors[PREFIX + name].view(-1)[1] = value
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=re.escape(f"'{PREFIX}{name}' has numbers that are not finite")):
        convert(tmp_path / "hf", tmp_path / "model.h5", lora=tmp_path / "lora")
    assert not (tmp_path / "model.h5").exists()
