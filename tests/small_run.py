"""A run of a tiny model for the tests: its files, its command line and what its output holds."""

import json

import tiny_models
from noria.checkpoint.convert import convert
from noria.output.generations import open_generations

NUM_ROWS = 12
KEYS = ["--device", "cpu", "--max-new-tokens", "24", "--ignore-eos", "--temperature", "0.9", "--seed", "4"]


def write_files(folder):
    """model.h5 (3 layers) and prompts.jsonl (12 rows) in the folder."""
    write_model(folder, "model.h5")
    rows = [{"id": f"row {row}", "token_ids": [5 + row, 6, 7]} for row in range(NUM_ROWS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_model(folder, name, seed=0):
    """A checkpoint of this name, and its Hugging Face directory `hf`."""
    state = tiny_models.state(tiny_models.LLAMA, seed=seed)
    tiny_models.write_directory(folder / "hf", tiny_models.LLAMA, state)
    if not (folder / name).exists():
        convert(folder / "hf", folder / name)


def command(folder, output, *more):
    """The arguments of `noria` for this run; `more` goes last and wins."""
    files = ["--model", folder / "model.h5", "--prompts", folder / "prompts.jsonl", "--output", folder / output]
    return ["run", *map(str, files), *KEYS, *map(str, more)]


def rows_of(output):
    """(id, status, token ids) of every row."""
    with open_generations(output) as file:
        return [(row.id, row.status, row.token_ids.tolist()) for row in file.rows()]
