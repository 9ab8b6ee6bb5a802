"""The frontier: what each amount of memory buys."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfit.cli import main
from memfit.core.frontier import _budgets, frontier, undominated
from memfit.core.graph import Profile, Residents
from memfit.core.plan import find_plan, simulate
from memfit.errors import InfeasibleBudget
from strategies import chains, profiles

FEW = settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(st.one_of(profiles(6, tidy=True), chains(6)))
def test_more_memory_is_faster_and_less_memory_peaks_lower(profile: Profile) -> None:
    found = frontier(profile, plans=6)
    for one, two in pairwise(found):  # by undominated(); that planning itself is so: tests/test_ladder.py
        assert one.predicted_peak_bytes < two.predicted_peak_bytes
        assert one.predicted_step_s > two.predicted_step_s
    for plan in found:
        assert simulate(profile, plan).peak_bytes == plan.predicted_peak_bytes == plan.budget_bytes


@FEW
@given(st.one_of(profiles(6, tidy=True), chains(6)))
def test_a_frontier_goes_from_the_least_memory_to_no_recomputation(profile: Profile) -> None:
    found = frontier(profile, plans=4)
    plenty = find_plan(profile, memory=1 << 50)
    assert found[-1].predicted_step_s == plenty.predicted_step_s
    with pytest.raises(InfeasibleBudget) as refused:
        find_plan(profile, memory=1)
    assert found[0].predicted_peak_bytes == refused.value.needed_bytes


@FEW
@given(chains(6), st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4))
def test_a_frontier_holds_what_is_best_at_each_budget_of_interest(
    profile: Profile, shares: list[float]
) -> None:
    low, *_, high = (plan.predicted_peak_bytes for plan in [*frontier(profile, plans=2)] * 2)
    budgets = [round(low + share * (high - low)) for share in shares]
    found = frontier(profile, plans=2 + len(budgets), budgets_bytes=budgets)
    assert found[0].predicted_peak_bytes == low
    assert found[-1].predicted_peak_bytes == high
    for budget in budgets:
        best = max(
            (p for p in found if p.predicted_peak_bytes <= budget), key=lambda p: p.predicted_peak_bytes
        )
        assert best.predicted_step_s <= find_plan(profile, memory=budget).predicted_step_s


def test_gaps_between_budgets_of_interest_are_halved_by_ratio() -> None:
    assert _budgets((100, 1600), 0, 3, [400, 50, 1600]) == [400, 200, 800]
    assert _budgets((100, 1600), 0, 3, []) == [200, 400, 800]
    assert _budgets((100, 1600), 0, 2, range(101, 111)) == [101, 106]


@FEW
@given(chains(6))
def test_no_plan_of_a_frontier_is_beaten_by_another(profile: Profile) -> None:
    found = frontier(profile, plans=5)
    beaten = [
        (one, two)
        for one in found
        for two in found
        if one is not two
        and two.predicted_peak_bytes <= one.predicted_peak_bytes
        and two.predicted_step_s <= one.predicted_step_s
    ]
    assert beaten == []
    assert undominated(found[::-1]) == found
    assert undominated([*found, *found]) == found


def test_a_frontier_needs_two_ends() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        frontier(Profile(1, (), None), plans=1)  # type: ignore[arg-type]


def test_a_profile_without_a_step_is_refused() -> None:
    empty = Profile(1, (), Residents(0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"no recorded step.*profile again"):
        frontier(empty)
    with pytest.raises(ValueError, match=r"no recorded step.*profile again"):
        find_plan(empty, memory=1)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["frontier", "memfit.workloads.images:workload", "--batch-size", "4", "--plans", "3"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "micro-batches" in table
    assert "1 x 4 rows" in table  # BatchNorm keeps the batch whole
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    plans = printed["plans"]
    assert len(plans) == 3
    assert plans[0]["predicted_peak_bytes"] < plans[-1]["predicted_peak_bytes"]
    assert {strategy["name"] for strategy in printed["strategies"]} > {
        "plain",
        "every block",
        "matmuls saved",
    }
    assert all(f"{strategy['name']} " in table for strategy in printed["strategies"][:2])


def test_the_command_says_where_there_are_no_blocks_to_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", "jobs:tiny", "--plans", "2"]) == 0
    table = capsys.readouterr().out
    assert "plain" in table
    assert "no repeated blocks" in table
