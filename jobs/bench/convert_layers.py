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
from convert_published import drop_cache, timed
from layer_files import SHAPES, directory_of, write_directory

E2M1 = np.outer((1, -1), (0, 0.5, 1, 1.5, 2, 3, 4, 6)).ravel().astype(np.float32)
E4M3 = np.array(
    [(1 - 2 * (c >> 7)) * (c % 8 / 8 + (c % 128 > 7)) * 2.0 ** (max(c >> 3 & 15, 1) - 7) for c in range(256)],
    np.float32,
)
E2M1[8] = E4M3[128] = -0.0


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
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, help="fewer than the model has")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, model = Path(name) / "hf", Path(name) / "model.h5"
        config, files, experts = directory_of(arguments.shape, arguments.layers, arguments.experts)
        nbytes = write_directory(source, config, files)
        drop_cache(source)
        seconds, most = timed([sys.executable, "-m", "noria", "convert", source, model])
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
