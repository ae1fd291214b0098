import numpy as np
import pytest

from noria.step import Admitted, Result, Run, Step, Word

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
