"""noria convert --quantization: which parameters are stored in fewer bits, how near they stay, and what is said of it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import h5py
import pytest
import torch

import families
import mixtures
from noria import config, encodings, kinds
from noria.__main__ import main
from noria.checkpoint import random_weights
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.checkpoint.published import _groups
from noria.checkpoint.quantization import GROUP_SIZES, WORDS, quantization
from noria.checkpoint.random_weights import random_checkpoint
from noria.encodings import exponent
from noria.engine.decoding import Decoder
from noria.engine.parameters import Undecoded
from noria.errors import InputError
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.pieces import Matrix
from noria.run import run
from stored_weights import numbers_of

CPU = torch.device("cpu")
# The least that a weight may lose: relative Frobenius error of normal numbers, as in the literature on each form.
MOST = {"fp8": 0.03, "fp8_channel": 0.03, "int8": 0.006, "int4": 0.1}
BITS = {"fp8": (8, 8.3), "fp8_channel": (8, 9.1), "int8": (8, 9.1), "int4": (4, 5.1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantization")
    for name in ("llama", "qwen3_moe", "gpt2"):
        families.save(families.CONFIGS[name], folder / name)
        convert(folder / name, folder / f"{name}.h5")
    return folder


def tensors_of(path):
    """What a layer computes with, by block and name."""
    with open_checkpoint(path) as checkpoint:
        found = {}
        for name, block in checkpoint.blocks.items():
            buffer = torch.empty(block.nbytes, dtype=torch.uint8)
            checkpoint.read_block(name, buffer.numpy())
            held = Undecoded(block, buffer)
            its = Decoder(block.decoded_nbytes, CPU).parameters(name, held)
            for key, value in its.items():
                found[f"{name}/{key}"] = numbers_of(value).clone()
        return found


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_matrices_of_layers_are_stored_in_fewer_bits_and_stay_near(folder, tmp_path, name, word):
    assert main(["convert", str(folder / name), str(tmp_path / "small.h5"), "--quantization", word]) == 0
    before, after = tensors_of(folder / f"{name}.h5"), tensors_of(tmp_path / "small.h5")
    assert before.keys() == after.keys()
    encoded = set()
    for key, value in before.items():
        if torch.equal(value, after[key]):
            continue
        encoded.add(key.rpartition("/")[2])
        error = (value - after[key]).norm() / value.norm()
        assert 1e-4 < error < MOST[word], key
    experts = {"experts.gate_up", "experts.down"}
    kinds = {"gpt2": {"qkv", "out", "up", "down"}, "llama": {"qkv", "out", "gate_up", "down"}}
    assert encoded == kinds.get(name, {"qkv", "out"} | experts)
    with open_checkpoint(tmp_path / "small.h5") as checkpoint:
        assert checkpoint.version == 2
        for block in checkpoint.blocks.values():
            for parameter in block.encoded:
                assert parameter.encoding == WORDS[word]
                stored = 8 * sum(one.nbytes for one in parameter.piece.fields) / (parameter.numbers / parameter.pieces)
                assert BITS[word][0] <= stored <= BITS[word][1] + 3, parameter.name  # rows of 12 to 48 numbers


def test_groups_are_as_large_as_asked(folder, tmp_path):
    for size in GROUP_SIZES:
        path = tmp_path / f"{size}.h5"
        flags = ["--quantization", "int4", "--group-size", str(size)]
        assert main(["convert", str(folder / "llama"), str(path), *flags]) == 0
        with h5py.File(path) as file:
            assert json.loads(file["layers/0001/down"].attrs["settings"])["group_size"] == size


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--group-size", "64"], "--group-size 64 without --quantization"),
        (
            ["--quantization", "fp8", "--group-size", "64"],
            "--group-size 64 with --quantization fp8, which has no groups",
        ),
        (["--quantization", "int3"], "invalid choice: 'int3'"),
        (["--quantization", "int4", "--group-size", "48"], "invalid choice: '?48'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, tmp_path, capsys, flags, words):
    try:
        code = main(["convert", str(folder / "llama"), str(tmp_path / "small.h5"), *flags])
    except SystemExit as error:
        code = error.code
    assert code == 2 and re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "small.h5").exists()


@pytest.mark.parametrize("source", ["llama", "tiny"])
def test_a_model_without_matrices_that_are_stored_in_fewer_bits_is_told(folder, tmp_path, capsys, source):
    if source == "tiny":
        sizes = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
        families.save(families.CONFIGS["llama"] | sizes, folder / source)
    flags = {"llama": ["--compress-weights", "exponent"], "tiny": ["--quantization", "fp8"]}[source]
    assert main(["convert", str(folder / source), str(tmp_path / "model.h5"), *flags]) == 0
    words = (
        f"noria: {' '.join(flags)} changed nothing: no matrix of this model is of the kind that it stores in fewer bits"
    )
    assert words in capsys.readouterr().err


def test_a_number_that_is_none_is_refused_with_its_tensor(folder, tmp_path):
    model = families.save(families.CONFIGS["llama"], tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(
        InputError, match=r"layers/0001/gate_up, of model.layers.1.mlp.gate_proj.weight, .*up_proj.weight"
    ):
        convert(tmp_path / "hf", tmp_path / "small.h5", forms=quantization("int8"))
    assert not (tmp_path / "small.h5").exists()


def test_fields_do_not_depend_on_how_many_threads_make_them(monkeypatch):
    numbers, matrices = torch.randn(300, 96, generator=torch.Generator().manual_seed(1)), [Matrix("", (300, 96))]
    monkeypatch.setattr(encodings, "ENCODED_NUMBERS", 20_000)
    monkeypatch.setattr(exponent, "DECODED_NUMBERS", 8192)
    with ThreadPoolExecutor(3) as pool:
        for name in kinds.names("encodings"):
            settings = kinds.load("encodings", name).DEFAULTS
            its = numbers.bfloat16() if name == "exponent" else numbers
            whole = encodings.encode(name, matrices, [its], settings)
            parts = encodings.encode(name, matrices, [its], settings, pool)
            assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole), name


# ---- random weights

SAID = [
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
    ({"quant_method": "fp8", "weight_block_size": [16, 32], "scale_fmt": "ue8m0"}, "fp8_block"),
    ({"quant_method": "fbgemm_fp8"}, "fp8_channel"),
    ({"quant_method": "mxfp4"}, "mxfp4"),
    ({"quant_method": "nvfp4"}, "nvfp4"),
    ({"quant_method": "int4", "group_size": 32}, "int4"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}, "int4"),
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, "int4"),
    (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 8, "strategy": "channel"}}
            },
        },
        "int8",
    ),
]


@pytest.mark.parametrize(("said", "encoding"), SAID)
def test_random_weights_are_encoded_as_the_config_says(said, encoding):
    for name in ("llama", "qwen3_moe"):
        shape = families.CONFIGS[name] | {"hidden_size": 64, "quantization_config": said}
        checkpoint = random_checkpoint(shape, "bfloat16")
        block = checkpoint.blocks["layers/0001"]
        assert {one.encoding for one in block.encoded} == {encoding}
        assert not any(one.name == "router" or "norm" in one.name for one in block.encoded)
        content = [torch.full((block.nbytes,), 255 * number, dtype=torch.uint8) for number in range(2)]
        for buffer in content:
            checkpoint.read_block("layers/0001", buffer.numpy())
        assert torch.equal(*content)  # every byte is written
        encodings.check_block(block, content[0], "random")
        its = Decoder(block.decoded_nbytes, CPU).parameters("layers/0001", Undecoded(block, content[0]))
        for key in (key for one in block.encoded for key in one.computed):
            value = numbers_of(its[key])
            assert 0.015 < value.float().std() < 0.025 and abs(value.float().mean()) < 0.002, key


GROUPS = {"float": {"type": "float", "num_bits": 4}, "int": {"type": "int", "num_bits": 4}}
LISTS = [
    # gpt-oss-20b's own
    (
        "gpt_oss",
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        {"experts": "mxfp4"},
    ),
    ("gpt_oss", {"quant_method": "mxfp4"}, {"experts": "mxfp4"}),
    (
        "qwen3_moe",
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
        {"qkv": "fp8_block", "out": "fp8_block", "experts": "mxfp4"},
    ),
    ("llama", {"quant_method": "mxfp4"}, dict.fromkeys(("qkv", "out", "gate_up", "down"), "mxfp4")),
    (
        "qwen3_moe",
        {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1.self_attn.q_proj", "lm_head"]},
        {"out": "fp8_channel", "experts": "fp8_channel"},
    ),
    (
        "llama",
        {"quant_method": "awq", "bits": 4, "group_size": 64, "modules_to_not_convert": ["mlp", "self_attn.o"]},
        {"qkv": "int4", "out": "int4"},
    ),
    (
        "llama",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.1.mlp*"]},
        {"qkv": "nvfp4", "out": "nvfp4"},
    ),
    (
        "llama",
        {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["*.self_attn*"]}},
        {"gate_up": "fp8_block", "down": "fp8_block"},
    ),
    (
        "llama",
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "model.layers.1.self_attn.o_proj": {"quant_algo": "FP8"},
                "model.layers.1.mlp.down_proj": {"quant_algo": "NVFP4"},
                "model.layers.1.self_attn.q_proj": {"quant_algo": "FP8"},  # keys and values are not: they lie together
            },
        },
        {"out": "fp8_channel", "down": "nvfp4"},
    ),
    (
        "llama",
        {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "config_groups": {"a": {"targets": ["Linear"], "weights": GROUPS["float"] | {"group_size": 32}}},
            "ignore": ["lm_head", "re:.*self_attn.*"],
        },
        {"gate_up": "mxfp4", "down": "mxfp4"},
    ),
    (
        "qwen3_moe",
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"targets": ["re:.*experts.*"], "weights": GROUPS["float"] | {"group_size": 16}},
                "b": {"targets": ["Linear"], "weights": GROUPS["int"] | {"group_size": 32, "actorder": "group"}},
            },
        },
        {"qkv": "int4", "out": "int4", "experts": "nvfp4"},
    ),
]


@pytest.mark.parametrize(("family", "said", "encodings_of"), LISTS)
def test_random_weights_stay_plain_where_the_config_names_them(family, said, encodings_of):
    shape = (families.CONFIGS | mixtures.CONFIGS)[family] | {"quantization_config": said}
    block = random_checkpoint(shape, "bfloat16").blocks["layers/0001"]
    assert {one.name: one.encoding for one in block.encoded} == encodings_of
    assert all(one.settings["permuted"] for one in block.encoded if one.encoding == "int4" and "config_groups" in said)


@pytest.mark.parametrize(
    ("order", "permuted"),
    [(None, False), ("group", True), ("dynamic", True), (True, True), ("weight", False), ("static", False)],
)
def test_random_weights_are_permuted_where_files_of_that_order_have_a_g_idx(order, permuted):
    groups = {"a": {"targets": ["Linear"], "weights": GROUPS["int"] | {"group_size": 32, "actorder": order}}}
    said = {"quant_method": "compressed-tensors", "config_groups": groups}
    shape = families.CONFIGS["llama"] | {"quantization_config": said}
    encoded = random_checkpoint(shape, "bfloat16").blocks["layers/0001"].encoded
    assert encoded and all(one.settings["permuted"] == permuted for one in encoded)


def test_patterns_of_modules_are_tried_in_one_child_for_a_whole_model(monkeypatch):
    started = []
    helper = _groups.Helper
    monkeypatch.setattr(_groups, "Helper", lambda *arguments: started.append(arguments) or helper(*arguments))
    family, said, encodings_of = LISTS[-1]
    checkpoint = random_checkpoint(families.CONFIGS[family] | {"quantization_config": said}, "bfloat16")
    for name, block in checkpoint.blocks.items():
        assert {one.name: one.encoding for one in block.encoded} == (encodings_of if name.startswith("layers") else {})
    assert len(checkpoint.blocks) == 5 and len(started) == 1


def test_random_gpt_oss_takes_as_many_bytes_as_it_is_published_in():
    """openai/gpt-oss-20b: the sum of its files of safetensors is 13.76 GB."""
    sizes = {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "vocab_size": 201088,
        "head_dim": 64,
    }
    heads = {
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "experts_per_token": 4,
        "num_experts_per_tok": 4,
    }
    types = ["sliding_attention", "full_attention"] * 12
    shape = mixtures.CONFIGS["gpt_oss"] | sizes | heads | {"layer_types": types, "quantization_config": LISTS[0][1]}
    assert random_checkpoint(shape, "bfloat16").nbytes == pytest.approx(13.76e9, rel=0.002)


def test_what_the_text_config_of_a_wrapper_says_counts_where_the_config_says_nothing():
    text = mixtures.CONFIGS["deepseek_v3"] | {"quantization_config": {"quant_method": "int4", "group_size": 32}}
    wrapped = {"model_type": "kimi_k25", "text_config": text | {"moe_intermediate_size": 32}}
    for more, encoding in (({}, "int4"), ({"quantization_config": {"quant_method": "fp8"}}, "fp8_channel")):
        found = random_checkpoint(wrapped | more, "bfloat16").blocks["layers/0001"].encoded
        assert {one.encoding for one in found if one.name == "experts"} == {encoding}


def test_large_random_matrices_are_repetitions_of_some_outputs(monkeypatch):
    monkeypatch.setattr(random_weights, "PERIOD", 1000)
    said = {"quant_method": "fp8", "weight_block_size": [16, 64]}
    checkpoint = random_checkpoint(families.CONFIGS["llama"] | {"quantization_config": said}, "float32")
    block = checkpoint.blocks["layers/0000"]
    buffer = torch.empty(block.nbytes, dtype=torch.uint8)
    checkpoint.read_block("layers/0000", buffer.numpy())
    its = Decoder(block.decoded_nbytes, CPU).parameters("layers/0000", Undecoded(block, buffer))
    gate_up = numbers_of(its["gate_up"])
    assert torch.equal(gate_up[:32], gate_up[32:64]) and gate_up.std() > 0.015


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "3 bits"),
        ({"quant_method": "gptq"}, "'bits'"),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*mlp.*": {}}},
            "dynamic is .* modules differ",
        ),
        ({"quant_method": "fp8", "weight_block_size": 128}, "block_size is 128"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "cannot be made as quantization_config says"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP3"}, "quant_algo is 'NVFP3'"),
        ({"quant_method": "modelopt"}, "'quant_algo'"),
        ({"quant_method": "fp8", "modules_to_not_convert": [3]}, "are lists of names"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "a": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "group_size": 32}}
                },
            },
            "8 bits float by group",
        ),
        ("fp8", "it must be an object"),
    ],
)
def test_what_random_weights_cannot_be_made_as_is_refused(said, words):
    with pytest.raises(InputError, match=words):
        random_checkpoint(families.CONFIGS["llama"] | {"quantization_config": said}, "bfloat16")


@pytest.mark.slow
def test_random_encoded_weights_give_the_same_tokens_in_every_tier(tmp_path):
    said = {"quant_method": "int4", "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(families.CONFIGS["qwen3_moe"] | {"quantization_config": said}))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"token_ids": [5, 9, row]}) + "\n" for row in range(4)))
    found = []
    for name, keys in {
        "gpu": {},
        "cpu": {"weights": {"cpu": 100}},
        "mixed": {"weights": {"gpu": 50, "cpu": 50}},
    }.items():
        files = {"prompts": str(tmp_path / "prompts.jsonl"), "output": str(tmp_path / f"{name}.h5")}
        flags = {
            "random_weights": str(tmp_path / "config.json"),
            "dtype": "float64",
            "device": "cpu",
            "max_new_tokens": 5,
        }
        assert run(config.load(None, files | flags | keys), Solo()) == 0
        with open_generations(tmp_path / f"{name}.h5") as file:
            found.append([row.token_ids.tolist() for row in file.rows()])
    assert found[0] == found[1] == found[2] and len({tuple(row) for row in found[0]}) > 1


# ---- noria inspect


def test_inspect_shows_encoding_and_bits_of_each_kind_of_parameter(folder, tmp_path, capsys):
    path = tmp_path / "small.h5"
    convert(folder / "qwen3_moe", path, forms=quantization("int4", 32))
    capsys.readouterr()
    assert main(["inspect", str(path), "--verify"]) == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"qkv \[128, 32\] int4, 4\.\d\d bits", out) and "every checksum is right, and so is every code" in out
    )
    assert main(["inspect", str(path), "--json"]) == 0
    stored = {(row["block"], row["name"]): row for row in json.loads(capsys.readouterr().out)["stored"]}
    qkv, router = stored["layers", "qkv"], stored["layers", "router"]
    assert (qkv["encoding"], qkv["settings"]["group_size"], qkv["parameters"]) == ("int4", 32, 3)
    assert qkv["numbers"] == 3 * 128 * 32 and qkv["bits"] == pytest.approx(8 * qkv["nbytes"] / qkv["numbers"], abs=1e-3)
    assert (router["encoding"], router["bits"], router["dtype"]) == ("plain", 32.0, "float32")
    assert stored["head", "lm_head"]["encoding"] == "plain"


def test_verify_finds_fields_that_no_encoding_makes(folder, tmp_path, capsys, monkeypatch):
    kind = kinds.load("encodings", "fp8_channel")
    encode, path = kind.encode, tmp_path / "bad.h5"

    def spoilt(numbers, settings):
        fields = encode(numbers, settings)
        fields["scales"][0] = -1 if len(numbers) == 48 else fields["scales"][0]
        return fields

    monkeypatch.setattr(kind, "encode", spoilt)
    convert(folder / "llama", path, forms=quantization("fp8_channel"))
    assert main(["inspect", str(path), "--verify"]) == 2
    said = capsys.readouterr()
    assert "'layers/0000/gate_up', encoded as fp8_channel: 1 of" in said.out + said.err
    assert "3 of 5 blocks damaged: layers/0000, layers/0001, layers/0002" in said.err
