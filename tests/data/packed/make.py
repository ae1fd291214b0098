"""Makes packed.safetensors with the functions of those who publish such weights:

    pip install compressed-tensors==0.12.2 ml_dtypes==0.6.0 && python make.py

Of each case `weight_packed`, `weight_scale`, what else the format has, and `weight`, as the maker's own decompression gives
it. `e2m1.numbers` and `e2m1.codes`: numbers, and the codes of 4 bits that ml_dtypes casts them to.
"""

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors.quantized_compressors.nvfp4_quantized import NVFP4PackedCompressor
from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

OUTPUTS, INPUTS = 8, 96


def integers(bits, symmetric, group_size, actorder=None):
    """pack-quantized: codes in int32, zeros too."""
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
        actorder=actorder,
    )
    weight, size = torch.randn(OUTPUTS, INPUTS) * 0.02 + 0.002, group_size or INPUTS
    g_idx = torch.randperm(INPUTS) // size if actorder else None
    order = torch.arange(INPUTS) if g_idx is None else g_idx.argsort(stable=True)
    groups = weight[:, order].unflatten(1, (-1, size))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
    given = {"scale": scale, "zero_point": None if symmetric else zero, "g_idx": None if g_idx is None else g_idx.int()}
    found = PackedQuantizationCompressor().compress_weight(weight, quantization_args=args, **given)
    found |= {"weight_scale": scale} | ({} if g_idx is None else {"weight_g_idx": given["g_idx"]})
    codes = quantize(x=weight, args=args, dtype=torch.int8, **given)
    return found | {"weight": dequantize(x_q=codes, args=args, dtype=torch.float32, **given)}


def floats():
    """nvfp4-pack-quantized."""
    args = QuantizationArgs(num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16)
    weight = torch.randn(OUTPUTS, INPUTS) * 0.02
    of_tensor = generate_gparam(weight.min(), weight.max())
    groups = weight.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), args, of_tensor)
    compressor = NVFP4PackedCompressor()
    found = compressor.compress_weight(weight, scale.float(), of_tensor, args)
    found |= {"weight_scale": scale.to(torch.float8_e4m3fn), "weight_global_scale": of_tensor}
    weight = compressor.decompress_weight(found, args)
    return found | {"weight_scale": found["weight_scale"].view(torch.uint8), "weight": weight}


def nearest():
    numbers = np.concatenate([np.linspace(-8, 8, 257), np.random.default_rng(0).normal(size=300) * 3]).astype(
        np.float32
    )
    codes = numbers.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return {"numbers": torch.from_numpy(numbers), "codes": torch.from_numpy(codes)}


def main():
    torch.manual_seed(0)
    cases = {
        "int4.symmetric": integers(4, True, 32),
        "int4.zeros": integers(4, False, 32),
        "int4.channel": integers(4, True, None),
        "int4.actorder": integers(4, False, 32, "group"),
        "int8.zeros": integers(8, False, 32),
        "int8.channel": integers(8, True, None),
        "nvfp4": floats(),
        "e2m1": nearest(),
    }
    save_file(
        {f"{case}.{name}": its.contiguous() for case, found in cases.items() for name, its in found.items()},
        "packed.safetensors",
    )


main()
