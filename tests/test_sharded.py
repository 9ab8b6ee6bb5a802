"""FSDP2: gradients, peaks, barriers and refusals, judged by one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shards
from processes import on_ranks
from shards import Case, Trained

_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
_TWO = [Case(2, None), Case(2, 0.4, dtype=torch.float64), Case(3, 0.0, dtype=torch.float64)]
_FOUR = [Case(1, 0.3, dtype=torch.float64)]


@pytest.fixture(scope="module")
def of_two() -> list[Any]:
    return on_ranks("shards:everything", _TWO)


@pytest.fixture(scope="module")
def of_four() -> list[Any]:
    return on_ranks("shards:each_case", 4, _FOUR, ranks=4)


@pytest.fixture(scope="module")
def trained(of_two: list[Any], of_four: list[Any]) -> list[tuple[Case, list[Trained]]]:
    """Each case with what its ranks found."""
    ways = [*zip(_TWO, *(two[0] for two in of_two), strict=True), *zip(_FOUR, *of_four, strict=True)]
    return [(case, ranks) for case, *ranks in ways]


def test_weights_after_ten_steps_are_those_of_one_process(trained: list[tuple[Case, list[Trained]]]) -> None:
    for case, ranks in trained:
        losses, weights = shards.alone(case.dtype)
        for found in ranks:
            assert found.losses == pytest.approx(losses, rel=_CLOSE[case.dtype])
            for one, other in zip(found.weights, weights, strict=True):
                assert (one - other).norm() <= _CLOSE[case.dtype] * other.norm()


def test_no_rank_peaks_higher_than_predicted_nor_two_percent_lower(
    trained: list[tuple[Case, list[Trained]]],
) -> None:
    for _, ranks in trained:
        for found in ranks:
            for predicted, measured in zip(found.predicted_bytes, found.measured_bytes, strict=True):
                assert measured <= predicted
        highest = max(max(found.measured_bytes) for found in ranks)
        assert ranks[0].plan.predicted_peak_bytes <= 1.02 * highest


def test_all_ranks_run_one_plan_and_its_promise_held_at_once(
    trained: list[tuple[Case, list[Trained]]],
) -> None:
    for _, ranks in trained:
        assert all(found.plan == ranks[0].plan for found in ranks)
        assert all(found.attempts == 1 for found in ranks)


def test_memory_decides_whether_gradients_are_kept_whole_and_what_is_recomputed(
    trained: list[tuple[Case, list[Trained]]],
) -> None:
    no_limit, middle, least, _ = (ranks[0] for _, ranks in trained)
    assert no_limit.once
    assert not no_limit.plan.recompute
    assert not middle.once
    assert not least.once
    assert 0 < middle.plan.recomputed_bytes < least.plan.recomputed_bytes


def test_a_plan_that_crosses_every_module_still_gives_the_gradient(of_two: list[Any]) -> None:
    for _, errors, _, _ in of_two:
        assert max(errors) <= 1e-12


def test_casts_of_parameters_and_gradients_are_predicted(of_two: list[Any]) -> None:
    for _, _, peaks, _ in of_two:
        for predicted, measured in peaks:
            assert measured <= predicted <= 1.02 * measured


def test_ways_of_sharding_that_are_not_known_are_refused_with_a_cure(of_two: list[Any]) -> None:
    for *_, refusals in of_two:
        part, quiet, ahead, narrow, replicated, offloaded, uncounted, nothing, compiled, audited = refusals
        assert "shard it last" in part
        assert "leave FSDP's set_* methods" in quiet
        assert "leave set_modules_to_*_prefetch out" in ahead
        assert "MixedPrecisionPolicy(param_dtype=...)" in narrow
        assert "give a 1-D mesh" in replicated
        assert "leave offload_policy out" in offloaded
        assert "count='labels'" in uncounted
        assert "nothing counts" in nothing
        assert "leave torch.compile out" in compiled
        assert "audit it before fully_shard" in audited
