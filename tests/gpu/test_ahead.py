"""Steps composed ahead on a GPU: every row has the tokens and log-probabilities that it has without."""

import json

import numpy as np
import pytest
from worker import generate

from noria.checkpoint.convert import convert
from noria.engine.stage import Stage
from noria.launch.mpi import Solo
from noria.output.generations import open_generations
from noria.step import Step
from test_sampling_runs import DEMO, ROWS, RUN

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("graphs", [True, False])
def test_tokens_are_the_same_with_and_without(tmp_path, monkeypatch, graphs):
    convert(DEMO, tmp_path / "model.h5")
    rows = [row | {"max_new_tokens": 40 + 7 * place, "temperature": 1.0} for place, row in enumerate(ROWS[:9] * 4)]
    constrained = {"prompt": "And the LORD", "structured_outputs": {"regex": "([a-z]{3,9} ){4,40}"}, "n": 5}
    rows.append(constrained | {"max_new_tokens": 90, "temperature": 1.2})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(RUN.replace("float64", "bfloat16").replace('"cpu"', '"cuda"'))
    awaited, told, found = [], Step.told, {}
    monkeypatch.setattr(Step, "told", lambda step, ids: awaited.append(step.awaits) or told(step, ids))
    for name in ("ahead", "in turn"):
        if name == "in turn":
            assert sum(awaited) > 20, "no step was composed ahead"
            monkeypatch.setattr(Stage, "feeds", False)
        assert generate(tmp_path, name, {"groups": 1, "graphs": graphs}, Solo()) == 0
        with open_generations(tmp_path / f"{name}.h5") as file:
            found[name] = list(file.rows())
    for one, other in zip(found["ahead"], found["in turn"], strict=True):
        assert (one.row, one.sample, one.token_ids.tolist()) == (other.row, other.sample, other.token_ids.tolist())
        assert (one.finish_reason, one.text, one.error) == (other.finish_reason, other.text, other.error)
        if one.logprobs is not None:
            assert np.array_equal(one.logprobs, other.logprobs)
