"""Makes quantized.safetensors with the functions of those who publish quantized models:

    pip install compressed-tensors==0.20.1 gptqmodel==7.7.0 autoawq==0.2.9 nvidia-modelopt==0.47.0 transformers==5.24.0
    python make.py

Of each case the tensors of a module `it`, as the makers name and pack them, and `weight of it`: what the makers' own
dequantization gives, in float32.
"""

from types import SimpleNamespace

import torch
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

OUTPUTS, INPUTS, GROUP = 32, 64, 32


def weight():
    return torch.randn(OUTPUTS, INPUTS) * 0.02 + 0.002


def fp8(scale_fmt):
    """transformers, blocks of 16 x 32."""
    settings = SimpleNamespace(weight_block_size=[16, 32], scale_fmt=scale_fmt)
    quantizer = SimpleNamespace(quantization_config=settings)
    found = Fp8Quantize(quantizer).convert({"it.weight": weight()})
    scales = found["it.weight_scale_inv"]
    return found, Fp8Dequantize(quantizer)._dequantize_one(found["it.weight"], scales, torch.float32)


def compressed(form, **arguments):
    """compressed-tensors: naive, int- and mxfp4-quantized."""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    its = weight()
    if args.strategy == "block":
        rows, columns = args.block_structure
        parts = its.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
        least, most = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "tensor":
        least, most = its.amin().view(1), its.amax().view(1)
    else:
        groups = its.unflatten(1, (-1, args.group_size if (args.group_size or -1) > 0 else INPUTS))
        least, most = groups.amin(2), groups.amax(2)
    scale, zero = calculate_qparams(least, most, args)
    state = {"weight": its, "weight_scale": scale.float() if form.startswith("mx") else scale.bfloat16()}
    state |= {} if args.symmetric else {"weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    found = compressor.compress(state, scheme)
    back = compressor.decompress(dict(found) | {"weight_scale": found["weight_scale"]}, scheme)
    return {f"it.{name}": its for name, its in found.items()}, exact(found, args, back["weight"])


def exact(found, args, theirs):
    """The product of code and scale in float32, which their own, in bfloat16, rounds."""
    if args.num_bits == 4:  # mxfp4: exact in bfloat16
        return theirs.float()
    codes, scale, zero = (found.get(name) for name in ("weight", "weight_scale", "weight_zero_point"))
    if args.strategy == "block":
        scale = scale.repeat_interleave(args.block_structure[0], 0).repeat_interleave(args.block_structure[1], 1)
    made = (codes.float() - (0 if zero is None else zero.float())) * scale.float()
    torch.testing.assert_close(made, theirs.float(), rtol=2**-7, atol=0)
    return made


def gptq(bits, symmetric, ordered, older):
    """GPTQModel: its own packing, and its own dequantization."""
    its = weight()
    g_idx = torch.randperm(INPUTS) // GROUP if ordered else torch.arange(INPUTS) // GROUP
    top = 2**bits - 1
    groups = torch.stack([its[:, g_idx == one] for one in range(INPUTS // GROUP)], 1)
    groups[0, 0] = groups[0, 0].abs()  # a zero of 0
    its[0, g_idx == 0] = groups[0, 0]
    least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if symmetric:
        scales, zeros = groups.abs().amax(2) * 2 / top, torch.full(least.shape, 2.0 ** (bits - 1))
    else:
        scales = (most - least) / top
        zeros = (-least / scales).round()
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = its
    module = TorchLinear(
        bits=bits, group_size=GROUP, sym=symmetric, desc_act=ordered, in_features=INPUTS, out_features=OUTPUTS
    )
    module.pack(linear, scales.half(), zeros, g_idx.int())
    module.post_init()
    module.dequant_dtype = torch.int16
    module.scales = module.scales.float()
    made = module.dequantize_weight().T.clone()
    if older:
        convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    names = ("qweight", "qzeros", "scales", "g_idx")
    return {f"it.{name}": getattr(module, name) for name in names} | {"it.scales": module.scales.half()}, made


def awq():
    """AutoAWQ, layout GEMM."""
    groups = (its := weight()).unflatten(1, (-1, GROUP))
    least, most = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((most - least) / 15).half()
    zeros = (-least / scales).round().clamp(0, 15)
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = its
    module = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    made = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, GROUP)
    return {f"it.{name}": getattr(module, name) for name in ("qweight", "qzeros", "scales")}, made.T


def modelopt():
    """NVIDIA's ModelOpt, NVFP4."""
    its = weight()
    made, scale, whole = NVFP4QTensor.quantize(its, 16)
    back = made.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    return {"it.weight": made._quantized_data, "it.weight_scale": scale, "it.weight_scale_2": whole}, back


def gpt_oss():
    """gpt-oss: two experts, packed by ModelOpt, unpacked by transformers."""
    its = torch.stack([weight(), weight()])
    made, scales = MXFP4QTensor.quantize(its, 32)
    blocks = made._quantized_data.view(2, OUTPUTS, INPUTS // 32, 16)
    scales = scales.view(2, OUTPUTS, INPUTS // 32)
    unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    return {"it_blocks": blocks, "it_scales": scales}, unpacked


def main():
    torch.manual_seed(0)
    float8 = {"num_bits": 8, "type": "float", "symmetric": True}
    cases = {
        "fp8": fp8("float"),
        "fp8, e8m0": fp8("ue8m0"),
        "compressed, float channel": compressed("float-quantized", strategy="channel", **float8),
        "compressed, float tensor": compressed("float-quantized", strategy="tensor", **float8),
        "compressed, float block": compressed("float-quantized", strategy="block", block_structure=[16, 32], **float8),
        "compressed, bytes": compressed("int-quantized", strategy="channel", num_bits=8, type="int"),
        "compressed, bytes with zeros": compressed(
            "int-quantized", strategy="channel", num_bits=8, type="int", symmetric=False
        ),
        "compressed, mxfp4": compressed(
            "mxfp4-pack-quantized", strategy="group", group_size=32, num_bits=4, type="float", scale_dtype="torch.uint8"
        ),
        "gptq": gptq(4, True, False, True),
        "gptq, zeros": gptq(4, False, False, True),
        "gptq, zeros as they are": gptq(4, False, False, False),
        "gptq, ordered": gptq(4, True, True, True),
        "gptq, 8 bits": gptq(8, False, True, True),
        "awq": awq(),
        "modelopt": modelopt(),
        "gpt_oss": gpt_oss(),
    }
    found = {}
    for case, (tensors, its) in cases.items():
        found |= {f"{case}: {name}": one.contiguous().clone() for name, one in tensors.items()}
        found[f"{case}: weight of it"] = its.float().contiguous().clone()
    save_file(found, "quantized.safetensors")


main()
