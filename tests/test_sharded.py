"""FSDP2: gradients, peaks, barriers and refusals, judged by one process with the whole batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import sharded
import torch
from processes import on_ranks
from sharded import Case

_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
_TWO = [
    Case(2, None),
    Case(2, 0.4, dtype=torch.float64),
    Case(6, 0.0),
    Case(3, 0.0, dtype=torch.float64),
]


@pytest.fixture(scope="module")
def of_two():
    return on_ranks("sharded:each_case", 2, _TWO)


def test_weights_after_ten_steps_are_those_of_one_process(of_two):
    for trained in of_two:
        for case, found in zip(_TWO, trained, strict=True):
            losses, weights = sharded.alone(case.dtype)
            assert found.losses == pytest.approx(losses, rel=_CLOSE[case.dtype])
            for one, other in zip(found.weights, weights, strict=True):
                assert (one - other).norm() <= _CLOSE[case.dtype] * other.norm()


def test_no_rank_peaks_higher_than_predicted_nor_two_percent_lower(of_two):
    for trained in of_two:
        for found in trained:
            for predicted, measured in zip(found.predicted_bytes, found.measured_bytes, strict=True):
                assert measured <= predicted
    highest = [max(max(t.measured_bytes) for t in ways) for ways in zip(*of_two, strict=True)]
    for way, measured in zip(of_two[0], highest, strict=True):
        assert way.plan.predicted_peak_bytes <= 1.02 * measured


def test_all_ranks_run_one_plan(of_two):
    for one, other in pairwise(of_two):
        assert [t.plan for t in one] == [t.plan for t in other]


def test_memory_decides_whether_gradients_are_kept_whole_and_what_is_recomputed(of_two):
    no_limit, middle, least, several = of_two[0]
    assert no_limit.once
    assert not no_limit.plan.recompute
    assert not middle.once
    assert least.plan.recompute
    assert several.plan.recompute
    assert middle.plan.recompute_s < several.plan.recompute_s
