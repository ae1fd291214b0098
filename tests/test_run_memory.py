"""Each rank's memory holds its own layers only: what the operating system counts against the sizes of the shards."""

import json

import pytest

import tiny_models
from mpirun import describe, mpirun
from noria.output.generations import open_generations

MiB = 2**20
# 12 layers of 27 MiB in float32, and next to nothing beside them.
LARGE = tiny_models.LLAMA | {
    "num_hidden_layers": 12,
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
SMALL = LARGE | {"intermediate_size": 8, "hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
BESIDES = 40 * MiB  # work space, cache, the random numbers that several threads draw and tile, and the allocator's own


def measured(folder, name, config, num_ranks, *more):
    """(bytes of weights, peak bytes in host memory) of each rank of a run with random weights."""
    (folder / f"{name}.json").write_text(json.dumps(config))
    (folder / "prompts.jsonl").write_text('{"token_ids": [5, 6, 7]}\n{"token_ids": [8, 9]}\n')
    files = ["--random-weights", folder / f"{name}.json", "--prompts", folder / "prompts.jsonl"]
    keys = ["--output", folder / f"{name}.h5", "--device", "cpu", "--max-new-tokens", 2, "--step-tokens", 64, *more]
    done = mpirun(num_ranks, ["noria", "run", *files, *keys], timeout=120)
    assert done.returncode == 0, describe(done)
    with open_generations(folder / f"{name}.h5") as output:
        assert (output.file["timing/peak_device_nbytes"][:] == 0).all()
        weights = [memory["gpu"]["weights"] for memory in json.loads(output.attrs["plan"])["memory"]]
        return weights, output.file["timing/peak_host_nbytes"][:].tolist()


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("laps", [1, 3])
def test_four_ranks_hold_one_model_together_and_each_its_own_layers(tmp_path, laps):
    _, empty = measured(tmp_path, "small", SMALL, 4, "--laps", laps)
    shards, full = measured(tmp_path, "large", LARGE, 4, "--laps", laps)
    model = sum(shards)
    assert 300 * MiB < model < 400 * MiB and max(shards) < model / 3.9
    growth = [peak - base for peak, base in zip(full, empty, strict=True)]
    for rank, (shard, grown) in enumerate(zip(shards, growth, strict=True)):
        # Less than the shard would say that the figure does not count what it is here to count.
        assert 0.8 * shard < grown < shard + BESIDES, f"rank {rank} grew by {grown / MiB:.0f} MiB for {shard / MiB:.0f}"
    assert sum(growth) < model + 4 * BESIDES < 2 * model
