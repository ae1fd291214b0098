"""Is a layer of a large mixture converted as it is published, in little memory, and are its numbers the same to the bit?

    python jobs/bench/convert_layers.py deepseek-v3|gpt-oss|kimi-k2.5 [--layers 1] [--experts N] [--folder FOLDER]

Makes a directory with random codes in the shape of a layer of DeepSeek-V3 (FP8 in blocks of 128 x 128), gpt-oss-120b (MXFP4)
or Kimi K2.5 (whole numbers of 4 bits in groups of 32, with its text_config), converts it from a dropped page cache, and compares
each matrix of each expert: what numpy unpacks of the safetensors beside what numpy unpacks of the checkpoint, by the formats'
definitions, without Noria. Prints one JSON line: gigabytes, seconds, the peak of convert's resident memory in GiB, and how many
matrices were compared and how many differ in a bit. Needs twice the directory's size (11.6, 1.8, 9.8 GB a layer) on the disk
of FOLDER (Linux alone).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from convert_published import drop_cache, timed
from safetensors.torch import save_file

VOCAB, SHARD = 1024, 16  # token ids; experts in a file
MLA = {
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "quantization_status": "compressed",
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}
E2M1 = np.outer((1, -1), (0, 0.5, 1, 1.5, 2, 3, 4, 6)).ravel().astype(np.float32)
E4M3 = np.array(
    [(1 - 2 * (c >> 7)) * (c % 8 / 8 + (c % 128 > 7)) * 2.0 ** (max(c >> 3 & 15, 1) - 7) for c in range(256)],
    np.float32,
)
E2M1[8] = E4M3[128] = -0.0


# ---- the directory


def fp8(random, outputs, inputs):
    codes = random.integers(0, 256, (outputs, inputs), np.uint8)
    codes[(codes & 127) == 127] = 0  # no number
    scales = random.random((-(-outputs // 128), -(-inputs // 128)), np.float32) + 1e-3
    return {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale_inv": torch.from_numpy(scales)}


def int4(random, outputs, inputs):
    codes = random.integers(-(2**31), 2**31, (outputs, inputs // 8), np.int64).astype(np.int32)
    scales = torch.from_numpy(random.random((outputs, inputs // 32), np.float32) + 1e-3).bfloat16()
    shape = torch.tensor([outputs, inputs])
    return {"weight_packed": torch.from_numpy(codes), "weight_scale": scales, "weight_shape": shape}


def plain(random, outputs, inputs):
    return {"weight": torch.from_numpy(random.random((outputs, inputs), np.float32)).bfloat16()}


def named(prefix, tensors):
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def ends(random, prefix, hidden):
    tensors = named(f"{prefix}model.embed_tokens", plain(random, VOCAB, hidden))
    tensors |= named(f"{prefix}lm_head", plain(random, VOCAB, hidden))
    return tensors | {f"{prefix}model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}


def latent_files(random, config, prefix, attention, expert):
    """Shards of a model of latent attention; `attention` and `expert` make matrices."""
    yield ends(random, prefix, config["hidden_size"])
    hidden, inner, heads = config["hidden_size"], config["moe_intermediate_size"], config["num_attention_heads"]
    ups = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes = {
        "q_a_proj": (1536, hidden),
        "q_b_proj": (heads * 192, 1536),
        "kv_a_proj_with_mqa": (576, hidden),
        "kv_b_proj": (heads * 256, 512),
        "o_proj": (hidden, heads * 128),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    for layer in range(config["num_hidden_layers"]):
        top = f"{prefix}model.layers.{layer}"
        tensors = {f"{top}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        tensors |= named(f"{top}.mlp.gate", plain(random, config["n_routed_experts"], hidden))
        tensors[f"{top}.mlp.gate.e_score_correction_bias"] = torch.zeros(config["n_routed_experts"])
        for name, shape in shapes.items():
            tensors |= named(f"{top}.self_attn.{name}", attention(random, *shape))
        for name, shape in ups.items():
            tensors |= named(f"{top}.mlp.shared_experts.{name}", attention(random, *shape))
        for number in range(config["n_routed_experts"]):
            for name, shape in ups.items():
                tensors |= named(f"{top}.mlp.experts.{number}.{name}", expert(random, *shape))
            if number % SHARD == SHARD - 1 or number == config["n_routed_experts"] - 1:
                yield tensors
                tensors = {}


def gpt_oss_files(random, config):
    yield ends(random, "", 2880)
    heads = {"q_proj": (4096, 2880), "k_proj": (512, 2880), "v_proj": (512, 2880), "o_proj": (2880, 4096)}
    experts = config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        top, tensors = f"model.layers.{layer}", {}
        for name, shape in {f"self_attn.{name}": shape for name, shape in heads.items()}.items():
            tensors |= named(f"{top}.{name}", plain(random, *shape))
            tensors[f"{top}.{name}.bias"] = torch.zeros(shape[0], dtype=torch.bfloat16)
        tensors |= named(f"{top}.mlp.router", plain(random, experts, 2880))
        tensors[f"{top}.mlp.router.bias"] = torch.zeros(experts, dtype=torch.bfloat16)
        tensors[f"{top}.self_attn.sinks"] = torch.zeros(64, dtype=torch.bfloat16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{top}.{name}.weight"] = torch.ones(2880, dtype=torch.bfloat16)
        for name, outputs in (("gate_up_proj", 5760), ("down_proj", 2880)):
            place = f"{top}.mlp.experts.{name}"
            blocks = random.integers(0, 256, (experts, outputs, 90, 16), np.uint8)
            scales = random.integers(110, 130, (experts, outputs, 90), np.uint8)
            tensors |= {f"{place}_blocks": torch.from_numpy(blocks), f"{place}_scales": torch.from_numpy(scales)}
            tensors[f"{place}_bias"] = torch.zeros(experts, outputs, dtype=torch.bfloat16)
        yield tensors


def directory_of(name, layers, experts):
    """config.json, the shards, and the text model's config."""
    random = np.random.default_rng(0)
    if name == "gpt-oss":
        config = GPT_OSS | {"num_hidden_layers": layers, "num_local_experts": experts or 128}
        config["layer_types"] = ["sliding_attention", "full_attention"] * layers
        config["layer_types"] = config["layer_types"][:layers]
        return config, gpt_oss_files(random, config)
    sizes = MLA | {"num_hidden_layers": layers}
    if name == "deepseek-v3":
        more = {"n_routed_experts": experts or 256, "num_attention_heads": 128, "num_key_value_heads": 128}
        more |= {
            "n_group": 1 if experts else 8,
            "topk_group": 1 if experts else 4,
            "routed_scaling_factor": 2.5,
            "model_type": "deepseek_v3",
        }
        config = sizes | more | {"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": FP8}
        return config, latent_files(random, config, "", fp8, fp8)
    more = {"n_routed_experts": experts or 384, "num_attention_heads": 64, "num_key_value_heads": 64}
    more |= {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "model_type": "kimi_k2"}
    text = sizes | more | {"quantization_config": INT4}
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}
    return config, latent_files(random, text, "language_model.", plain, int4)


def write_directory(folder, config, files):
    folder.mkdir()
    weight_map, written = {}, 0
    for number, tensors in enumerate(files):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        written += (folder / name).stat().st_size
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return written


# ---- readers of their own


DTYPES = {"F8_E4M3": "u1", "U8": "u1", "I32": "<i4", "F32": "<f4", "BF16": "<u2", "I64": "<i8"}


class Safetensors:
    """The tensors of a directory, as the format says where they lie; bfloat16 as uint16, e4m3 as uint8."""

    def __init__(self, folder):
        self._found = {}
        for path in sorted(folder.glob("*.safetensors")):
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            for name, its in header.items():
                if name != "__metadata__":
                    self._found[name] = path, 8 + size + its["data_offsets"][0], its["dtype"], its["shape"]

    def __getitem__(self, name):
        path, offset, dtype, shape = self._found[name]
        count = int(np.prod(shape, dtype=np.int64))
        return np.fromfile(path, DTYPES[dtype], count, offset=offset).reshape(shape)

    def of_expert(self, name, number):
        """One of a tensor that has all experts."""
        path, offset, dtype, shape = self._found[name]
        count = int(np.prod(shape[1:], dtype=np.int64))
        its = np.dtype(DTYPES[dtype])
        return np.fromfile(path, its, count, offset=offset + number * count * its.itemsize).reshape(shape[1:])


def wide(bfloat16):
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def of_blocks(codes, scales):
    numbers = E4M3[codes]
    for row in range(len(scales)):
        numbers[row * 128 : row * 128 + 128] *= scales[row].repeat(128)[: codes.shape[1]]
    return numbers


def of_groups(codes, zero, scales, size):
    """Whole numbers less a zero times scales, groups of inputs."""
    numbers = (codes.astype(np.int8) - np.int8(zero)).astype(np.float32)
    return (numbers.reshape(len(codes), -1, size) * scales[:, :, None]).reshape(codes.shape)


def of_powers(codes, exponents):
    numbers = E2M1[codes].reshape(len(codes), -1, 32)
    return (numbers * np.exp2(exponents.astype(np.float32) - 127)[:, :, None]).reshape(codes.shape)


def halves(pairs):
    """Two codes of 4 bits a byte, the first in the low half."""
    return np.stack((pairs & 15, pairs >> 4), -1).reshape(len(pairs), -1)


def published(name, tensors, layer, number):
    """The numbers of an expert's matrices, as its makers' format has them."""
    if name == "gpt-oss":
        for module in ("gate_up_proj", "down_proj"):
            place = f"model.layers.{layer}.mlp.experts.{module}"
            blocks, scales = (tensors.of_expert(f"{place}_{ending}", number) for ending in ("blocks", "scales"))
            yield of_powers(halves(blocks.reshape(len(blocks), -1)), scales)
        return
    prefix = "language_model." if name == "kimi-k2.5" else ""
    for module in ("gate_proj", "up_proj", "down_proj"):
        place = f"{prefix}model.layers.{layer}.mlp.experts.{number}.{module}"
        if name == "deepseek-v3":
            yield of_blocks(tensors[f"{place}.weight"], tensors[f"{place}.weight_scale_inv"])
        else:
            words = tensors[f"{place}.weight_packed"].view(np.uint32)
            codes = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(len(words), -1)
            yield of_groups(codes, 8, wide(tensors[f"{place}.weight_scale"]), 32)


def converted(data, number):
    """The numbers of an expert's matrices in a checkpoint, as src/noria/encodings/README.md has them."""
    settings, fields = json.loads(data.attrs["settings"]), json.loads(data.attrs["fields"])
    content = data[number].tobytes()
    found = {}
    for one in fields:
        dtype = {"uint8": "u1", "int32": "<i4", "float32": "<f4", "bfloat16": "<u2"}[one["dtype"]]
        count = int(np.prod(one["shape"]))
        found[one["name"]] = np.frombuffer(content, dtype, count, one["offset"]).reshape(one["shape"])
    for place, matrix in enumerate(json.loads(data.attrs["matrices"])):
        codes, scales = found[f"{place}.codes"], found[f"{place}.scales"]
        if data.attrs["encoding"] == "fp8_block":
            assert settings["block_size"] == [128, 128] and settings["scale_dtype"] == "float32", settings
            numbers = of_blocks(codes, scales)
        elif data.attrs["encoding"] == "mxfp4":
            numbers = of_powers(halves(codes), scales)
        else:
            assert settings["symmetric"] and settings["group_size"] == 32, settings
            numbers = of_groups(halves(codes), 8, wide(scales), 32)
        yield numbers.T if matrix["transposed"] else numbers


def compare(name, folder, model, layers, experts):
    """How many matrices of experts were compared, and how many differ in a bit."""
    tensors, compared, different = Safetensors(folder), 0, 0
    with h5py.File(model) as file:
        for layer in range(layers):
            data = file[f"layers/{layer:04d}/experts"]
            for number in range(experts):
                pairs = zip(published(name, tensors, layer, number), converted(data, number), strict=True)
                for theirs, ours in pairs:
                    compared += 1
                    different += theirs.shape != ours.shape or not np.array_equal(
                        theirs.view(np.uint32), np.ascontiguousarray(ours).view(np.uint32)
                    )
    return compared, different


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=("deepseek-v3", "gpt-oss", "kimi-k2.5"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, help="fewer than the model has")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, model = Path(name) / "hf", Path(name) / "model.h5"
        config, files = directory_of(arguments.shape, arguments.layers, arguments.experts)
        nbytes = write_directory(source, config, files)
        drop_cache(source)
        seconds, most = timed([sys.executable, "-m", "noria", "convert", source, model])
        text = config.get("text_config", config)
        experts = text.get("num_local_experts") or text["n_routed_experts"]
        compared, different = compare(arguments.shape, source, model, arguments.layers, experts)
        found = {
            "shape": arguments.shape,
            "gigabytes": round(nbytes / 1e9, 2),
            "convert_seconds": round(seconds, 2),
            "convert_GB_per_s": round(nbytes / 1e9 / seconds, 2),
            "peak_GiB": round(most / 2**30, 2),
            "matrices_compared": compared,
            "matrices_different": different,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
