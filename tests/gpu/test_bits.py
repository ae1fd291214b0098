"""The same bits in bfloat16 whatever a run is like: a hash of tokens and log-probabilities, at true widths and 4 layers.

One process a rank count runs all cases one after another; runs that are stopped and killed are processes of their own.
"""

import json
import signal
import subprocess
import sys
import time

import bits_worker
import numpy as np
import pytest
import torch

import world
from bits import FAMILIES, RUN, hashes
from noria.output.parts import part_files, parts_folder

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.world]
RANKS = [1, pytest.param(2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))]
LONG = 600  # tokens of the rows that are stopped


def rows():
    """Prompts of 1 to 1,500 tokens, some of three shared beginnings; one in two is sampled, by a seed of its own."""
    random = np.random.default_rng(1)
    beginnings = [random.integers(10, 31000, length).tolist() for length in (192, 1100, 70)]
    for row in range(48):
        length = [1, 7, 64, 65, 130, 400, 1025, 1500][row % 8]
        ids = beginnings[row % 3] * (row % 4 > 1) + random.integers(10, 31000, length).tolist()
        yield {"token_ids": ids, **({"temperature": 1.0, "top_p": 0.95, "seed": row} if row % 2 else {})}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp(request.param), [json.dumps(row) + "\n" for row in rows()]
    (folder / "config.json").write_text(json.dumps(FAMILIES[request.param]))
    (folder / "run.toml").write_text(RUN)
    (folder / "prompts.jsonl").write_text("".join(lines))
    for row in bits_worker.ALONE:
        (folder / f"row-{row}.jsonl").write_text(lines[row])
    return folder


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_row_has_the_same_bits_in_every_run(folder, num_ranks):
    world.call(num_ranks, bits_worker.work, folder, timeout=400)
    if not (folder / f"{bits_worker.WHOLE}.h5").exists():
        world.call(1, bits_worker.work, folder, bits_worker.WHOLE, timeout=400)
    expected, said = hashes(folder / f"{bits_worker.WHOLE}.h5")
    assert said == "yes" and len({*expected}) == len(expected)
    otherwise = {}
    for name in bits_worker.cases(num_ranks):
        found, said = hashes(folder / f"{name}.h5")
        assert said == "yes", name
        wanted = [expected[int(name.removeprefix("row-"))]] if name.startswith("row-") else expected
        if differing := [row for row, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other]:
            otherwise[name] = differing
    print(
        json.dumps(
            {"bench": "bits", "ranks": num_ranks, "cases": len(bits_worker.cases(num_ranks)), "differ": otherwise}
        )
    )
    assert not otherwise


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(folder, how):
    names = ["undisturbed", how.name.lower()]
    for name in names:
        if (folder / f"{name}.h5").exists():
            continue
        flags = bits_worker.flags(folder, name, "prompts.jsonl", {"max_new_tokens": LONG, "seal_seconds": 1})
        words = [word for key, value in flags.items() for word in ("--" + key.replace("_", "-"), str(value))]
        command = [sys.executable, "-m", "noria", "run", str(folder / "run.toml"), *words]
        if name != "undisturbed":
            stopped = subprocess.Popen(command)
            parts = parts_folder(folder / f"{name}.h5")
            while stopped.poll() is None and not (parts.exists() and part_files(parts)):
                time.sleep(0.05)
            time.sleep(0.1)
            assert stopped.poll() is None, "it ended before it was stopped"
            stopped.send_signal(how)
            assert stopped.wait(60) in (75, -signal.SIGKILL)
        subprocess.run(command, check=True, timeout=200)
    expected, found = (hashes(folder / f"{name}.h5") for name in names)
    assert found == expected
