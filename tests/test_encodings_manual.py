"""What src/noria/encodings/README.md shows of reading each form by h5py and numpy, run on a checkpoint of each."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from noria import encodings, kinds
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from tiny_models import LLAMA, state, write_directory

MANUAL = (Path(encodings.__file__).parent / "README.md").read_text()
FIRST, *OTHERS = re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)
NAMES = re.findall(r"^`(\w+)`.*:\n", MANUAL, re.MULTILINE)
CODED = [name for name in kinds.names("encodings") if name != "plain"]
SETTINGS = {
    "fp8_block": [{}, {"block_size": [5, 7], "scale_dtype": "e8m0"}],
    "fp8_channel": [{}, {"scale_dtype": "e8m0"}],
    "int8": [{"group_size": 16}, {"symmetric": False, "group_size": -1}, {"permuted": True, "group_size": 16}],
    "int4": [{"group_size": 16}, {"symmetric": True, "group_size": -1}, {"permuted": True, "group_size": 16}],
    "nvfp4": [{}, {"tensor_scale": "divides"}],
}


def test_every_form_is_shown_in_five_lines():
    assert sorted(NAMES) == sorted(CODED) and len(OTHERS) == len(NAMES)
    assert all(len(text.strip().splitlines()) <= 5 for text in OTHERS)
    assert all(f"| `{name}`" in MANUAL or f"`{name}`, " in MANUAL or f", `{name}`" in MANUAL for name in CODED)


@pytest.mark.parametrize("encoding", CODED)
def test_the_lines_read_what_noria_decodes(tmp_path, monkeypatch, encoding):
    source = write_directory(tmp_path / "hf", LLAMA, state(LLAMA, torch.bfloat16))
    monkeypatch.chdir(tmp_path)
    for settings in SETTINGS.get(encoding, [{}]):
        convert(source, "model.h5", overwrite=True, forms={"down": (encoding, settings)})
        with open_checkpoint("model.h5") as checkpoint:
            block = checkpoint.blocks["layers/0000"]
            buffer = torch.empty(block.nbytes, dtype=torch.uint8)
            checkpoint.read_block("layers/0000", buffer.numpy())
        (parameter,) = block.encoded
        wanted = torch.empty(parameter.shape, dtype=torch.float64)
        pieces = buffer[parameter.offset : parameter.offset + parameter.nbytes].view(1, -1)
        encodings.decode(parameter, pieces, {"down": wanted})
        names = {}
        exec(FIRST + OTHERS[NAMES.index(encoding)], names)
        assert names["numbers"].std() > 0.001
        np.testing.assert_allclose(names["numbers"], wanted.numpy(), rtol=1e-14, atol=0)
        assert isinstance(names["data"], h5py.Dataset)
        names["data"].file.close()
