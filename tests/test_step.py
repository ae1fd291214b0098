from dataclasses import replace

import numpy as np
import pytest
import torch

from noria.engine.batch import fed
from noria.step import NO_TOKEN, Admitted, Result, Run, Step, Word

STEP = Step(
    round=7,
    group=2,
    word=Word.RUN,
    released=(4, 5),
    admitted=(Admitted(9, (Run(3, 2), Run(11, 1)), {"temperature": 0.5, "seed": 2**62, "ignore_eos": True}),),
    slots=np.array([1, 9], np.int32),
    counts=np.array([1, 3], np.int32),
    positions=np.array([40, 0], np.int32),
    token_ids=np.array([5, 6, 7, 8], np.int32),
    borders=np.array([0, 1, 2], np.int32),
    sample_rows=np.array([0, 3], np.int32),
    sample_slots=np.array([1, 9], np.int32),
    uniforms=np.array([0.0, 1 - 2**-53]),
    masked=True,
    reads=np.array([7, -1], np.int32),
    writes=np.array([7, 12], np.int32),
    kept=np.array([1, 3], np.int32),
)


@pytest.mark.parametrize("step", [STEP, Step(0, 0), Step(3, 1, Word.STOP)], ids=["full", "empty", "stop"])
def test_a_header_decodes_to_the_step_that_it_encodes(step):
    again = Step.decode(step.encode())
    for name, value in vars(step).items():
        assert (
            np.array_equal(getattr(again, name), value)
            if isinstance(value, np.ndarray)
            else getattr(again, name) == value
        )


def test_a_result_keeps_every_token_id():
    ids = np.array([0, 2**31, -1])
    assert np.array_equal(Result.decode(Result(ids).encode()).token_ids, ids)


def test_a_step_that_was_composed_ahead_is_told_what_the_one_before_sampled():
    step = replace(STEP, token_ids=np.array([-3, 6, -1, -2], np.int32))
    sampled = np.array([40, NO_TOKEN, 2**31 - 1])
    assert step.awaits and not STEP.awaits
    assert step.told(sampled).token_ids.tolist() == [2**31 - 1, 6, 40, 0] == fed_ids(step, sampled)
    assert STEP.told(sampled) is STEP


def fed_ids(step, sampled):
    return fed(torch.from_numpy(step.token_ids.astype(np.int64)), torch.from_numpy(sampled)).tolist()
