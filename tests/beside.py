"""A family beside transformers in float64, its own casts to float32 raised (wide.py), and in float32; what its config asks for."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors
import torch

import decoders
import families
import mixtures
import wide
from noria import models
from noria.errors import InputError
from noria.model import ModelShape
from noria.step import Run
from whole import Whole, tokens_of

CONFIGS = mixtures.CONFIGS | decoders.CONFIGS
TOLERANCE = 1e-8


@cache
def made(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of transformers, and its tensors under the names with which checkpoints are published."""
    with TemporaryDirectory() as folder:
        model = families.save(CONFIGS[name], Path(folder))
        with safetensors.safe_open(f"{folder}/model.safetensors", "pt") as file:
            return model, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def check(name: str) -> None:
    """Asserts that logits are those of transformers, whole and in chunks, and prints the largest difference."""
    config, token_ids = CONFIGS[name], tokens_of(1, 60)
    model, state = made(name)
    exact = wide.logits(wide.wide_model(config, model), token_ids)
    assert exact.std() > 0.3
    whole = [(token_ids, 0, (Run(3, 4),))]
    model64 = Whole(config, state, torch.float64)
    error = (model64.logits(whole)[0] - exact).abs().max()
    print(f"{name}: {error:.1e}")
    assert error <= TOLERANCE
    _in_chunks(model64, token_ids, TOLERANCE, exact)
    narrow = Whole(config, state, torch.float32).logits(whole)[0]  # transformers as it is, beside it
    theirs = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    error, their_error = ((logits.double() - exact).abs().max() for logits in (narrow, theirs))
    assert error <= max(2 * their_error, 1e-5)


def shape_of(name: str, **keys: object) -> ModelShape:
    """The sizes of a config with other keys."""
    config = CONFIGS[name] | keys
    return models.for_config(config).shape(config)


def check_refused(name: str, keys: dict[str, object], words: str) -> None:
    """Asserts that a config with these keys is refused in a line with these words."""
    with pytest.raises(InputError) as error:
        shape_of(name, **keys)
    assert words in str(error.value) and len(str(error.value)) < 300


def check_unknown_key(name: str) -> None:
    """Asserts that a key that the family does not know is refused by its name and value, unless it asks for nothing."""
    assert shape_of(name, unheard_of=None) == shape_of(name)
    with pytest.raises(InputError, match=r"config.json: unheard_of is \[1\]: Noria does not know"):
        shape_of(name, unheard_of=[1])


def _in_chunks(whole, token_ids, atol, exact):
    """Two rows of the same tokens, in chunks of their own beside each other, pages in several runs."""
    rows = {"one": (Run(20, 1), Run(22, 2), Run(5, 2)), "other": (Run(9, 2), Run(30, 3))}
    steps = [
        [("one", 0, 17), ("other", 0, 5)],
        [("other", 5, 41), ("one", 17, 50)],
        [("one", 50, 51), ("other", 41, 42)],
        [("other", 42, 43), ("one", 51, 60)],
        [("other", 43, 60)],
    ]
    for step in steps:
        found = whole.logits([(token_ids[first:last], first, rows[row]) for row, first, last in step])
        for (_, first, last), logits in zip(step, found, strict=True):
            torch.testing.assert_close(logits.double(), exact[first:last], rtol=0, atol=atol)
