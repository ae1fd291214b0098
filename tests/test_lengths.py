import json
from dataclasses import dataclass, field
from datetime import datetime

from noria import config
from noria.desk.lengths import LOOKED_AT, look
from noria.model import ModelShape
from noria.rows.chat import encoder_of
from noria.rows.prompt_files import PromptFiles
from noria.rows.tokenizer import tokenizer_of


@dataclass
class Model:
    """A checkpoint without a tokenizer: prompts are token ids."""

    shape: ModelShape = ModelShape("llama", 2, 8, 2, 2, 4, 100, 64, False)
    tokenizer: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    generation_config: dict = field(default_factory=dict)


def looked(tmp_path, rows, max_positions=64, **flags):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = config.load(None, {"model": "m", "prompts": str(path), "output": "o", "max_new_tokens": 8, **flags})
    encode = encoder_of(Model(), tokenizer_of(Model()), run.sampling, datetime.now(), print)
    return look(run, PromptFiles((str(path),)), max_positions, len(rows), encode)


def row(length, **keys):
    return {"token_ids": [1] * length, **keys}


def test_the_lengths_are_those_of_the_rows(tmp_path):
    load = looked(tmp_path, [row(8), row(24, max_new_tokens=40)], n=2)
    assert (load.num_rows, load.prompt_tokens, load.new_tokens, load.total_pages) == (4, 16, 24, 2 * (4 + 4))


def test_a_row_reserves_no_more_than_the_models_context(tmp_path):
    assert looked(tmp_path, [row(60)]).total_pages == 4


def test_rows_that_cannot_run_are_left_out(tmp_path):
    load = looked(tmp_path, [row(8), row(65), {"token_ids": [1000]}, {"prompt": "no tokenizer"}])
    assert (load.num_rows, load.total_pages) == (1, 4)


def test_of_many_rows_only_the_first_are_read_and_the_others_get_a_margin(tmp_path):
    load = looked(tmp_path, [row(8)] * (4 * LOOKED_AT))
    assert (load.num_rows, load.prompt_tokens) == (4 * LOOKED_AT, 8)
    assert load.total_pages == round(4 * 4 * LOOKED_AT * 1.1)


def test_what_prompts_have_in_common_is_counted_once(tmp_path):
    """Of 200 tokens 192 can be shared: by all rows but the first, and of this one by its second sample."""
    alike = [row(200, n=2), row(200), {"token_ids": [2] * 70}, row(100, prompt_logprobs=True)]
    wide = {"max_positions": 400}
    assert looked(tmp_path, alike, **wide).shared_tokens == (192 + 192) / 5
    assert looked(tmp_path, alike, prefix_sharing=False, **wide).shared_tokens == 0


def test_a_shard_counts_its_own_rows(tmp_path):
    assert looked(tmp_path, [row(8), row(24), row(8), row(24)], shard="2/2").prompt_tokens == 24


def test_without_a_row_that_can_run_there_is_still_a_load(tmp_path):
    assert looked(tmp_path, [{"prompt": "x"}]).pages == 4


def test_the_longest_row_is_known_where_all_have_been_read(tmp_path):
    few, many = (looked(tmp_path, [row(8)] * count) for count in (LOOKED_AT, LOOKED_AT + 1))
    assert few.whole and not many.whole and few.longest_pages == many.longest_pages == 4
