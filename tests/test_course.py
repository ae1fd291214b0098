"""The points of a job's tokens over time: few, in order, and right at both ends."""

import json

import numpy as np
import pytest

from noria.output.course import MOST, Course
from noria.output.parts import Parts
from noria.output.segments import read_segments


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("steps", "seconds"), [(0, 1), (1, 0.01), (50, 0.25), (1000, 0.01), (5000, 0.3), (300, 700.0)])
def test_points_are_few_and_in_order_and_each_is_a_sum_of_its_time(steps, seconds):
    clock = Clock()
    course, known = Course(clock), {0.0: (0, 0)}
    for step in range(steps):
        clock.now += seconds
        course.add(step % 3, 2)
        known[round(clock.now - 100.0, 2)] = (sum(n % 3 for n in range(step + 1)), 2 * (step + 1))
    points = course.points()
    assert len(points) <= MOST + 1 and points[0] == [0.0, 0, 0] and points[-1][1:] == list(known[max(known)])
    assert (np.diff([point[0] for point in points]) > 0).all() and all(known[at] == tuple(sums) for at, *sums in points)
    gaps = np.diff([point[0] for point in points[:-1]])
    assert len(gaps) < 2 or gaps.max() <= 2.01 * gaps.min() + seconds, "points are about equally far apart"
    if steps * seconds > 60:
        assert len(points) > MOST // 2


def test_a_job_s_record_has_them_and_what_was_computed_since_the_last_seal(tmp_path):
    parts = Parts(tmp_path / "run.h5", {"run": 1})
    parts.begin({"start": "2026-11-29T03:15:02Z"})
    clock = parts.segment.course._clock = Clock()
    parts.segment.course._began = clock.now
    clock.now += 3
    parts.computed(7, 5)
    parts.end("finished")
    [found] = read_segments(parts.folder)
    assert found["course"] == [[0.0, 0, 0], [3.0, 7, 5]] and found["prompt_tokens"] == 7
    assert json.loads(json.dumps(found)) == found
