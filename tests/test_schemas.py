"""Rows of many schemas, judged by a validator of JSON schemas that knows nothing of how they were made."""

import json
import time
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
from tokenizers import Tokenizer
from worker import generate

import schemas
import tiny_models
from counts import full, some
from noria.checkpoint.convert import convert
from noria.launch.mpi import Solo
from noria.output.generations import open_generations

DEMO = Path(__file__).parent.parent / "inputs" / "demo" / "model"
TEXT = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
CONFIG = tiny_models.LLAMA | {
    "vocab_size": 2048,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 1,
    "eos_token_id": 1,
}
# A random model closes nothing by itself and writes blanks wherever it may: it is made as ready to end what it has begun as
# a trained one, by biases.
VOCAB = TEXT.get_vocab()
BIASES = {id: 7.0 for piece, id in VOCAB.items() if piece[:1] in ('"', "}", "]") and len(piece) <= 2}
BIASES |= {id: -7.0 for piece, id in VOCAB.items() if set(piece) <= set("ĠĊčĉ")}
BIASES |= {1: 7.0, VOCAB["@"]: 6.0, VOCAB["."]: 3.0, VOCAB["x"]: 3.0}
SAMPLES, LIMIT, SECONDS = 4, 1024, 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schemas")
    tiny_models.write_directory(folder / "hf", CONFIG, tiny_models.state(CONFIG))
    (folder / "hf" / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    convert(folder / "hf", folder / "model.h5")
    (folder / "run.toml").write_text('dtype = "float32"\ndevice = "cpu"\n[pipeline]\ngroups = 1\nstep_tokens = 512\n')
    return folder


def run(folder, name, cases):
    rows = [
        {
            "id": one.name,
            "prompt": "A",
            "structured_outputs": {"json": one.schema},
            "n": SAMPLES,
            "temperature": 1,
            "max_new_tokens": LIMIT,
            "logit_bias": {str(id): bias for id, bias in BIASES.items()},
        }
        for one in cases
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.monotonic()
    assert generate(folder, name, {"seed": 3}, Solo(), prompts=f"{name}.jsonl") in (0, 65)
    assert time.monotonic() - began < SECONDS
    with open_generations(folder / f"{name}.h5") as file:
        return list(file.rows())


def fits(schema, text):
    validator = jsonschema.Draft202012Validator
    return validator(schema, format_checker=validator.FORMAT_CHECKER).is_valid(json.loads(text))


@pytest.mark.slow
def test_every_text_that_ends_is_an_instance_of_its_schema_and_most_of_them_end(folder):
    cases = some(schemas.cases())
    rows = run(folder, "all", cases)
    refused = {row.id: row.error for row in rows if row.status == "error"}
    by_name = {one.name: one for one in cases}
    wrong = [
        (row.id, row.text[:200])
        for row in rows
        if row.finish_reason == "stop" and not fits(by_name[row.id].schema, row.text)
    ]
    assert not wrong
    expected = [row for row in rows if by_name[row.id].fits]
    ended = sum(row.finish_reason == "stop" for row in expected)
    missed = Counter(row.id for row in expected if row.finish_reason != "stop")
    print(
        f"{len(cases)} schemas, {len(rows)} rows, {ended} of {len(expected)} ended; refused {refused}; not ended {missed}"
    )
    assert ended >= 0.95 * len(expected), missed
    said = (
        "structured_outputs.json: llguidance cannot do #",
        "structured_outputs: llguidance gave up, because no text fits",
    )
    assert all(error.startswith(said) for error in refused.values())
    assert len(refused) <= 0.03 * len(cases) or not full(), refused
