"""The promise on real model families: the plain step to the bit, within the budget, near the prediction."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import memfit
from memfit.errors import InfeasibleBudget
from models import ZOO, Judged, ZooCase, budgets_of, judge

MOST_ABOVE = 1.02  # predicted over measured


# MKL-DNN's LSTM has a workspace that its fake kernel lacks and that does not grow in proportion to the rows.
UNPREDICTABLE = "recurrent"


# One network of each kind, the batch whole or split; make zoo has them all, at three budgets.
SPLIT = ["gpt2", "vit"]
WHOLE = ["llama", "encoder", "resnet", "convnet"]


def fitted(
    zoo: ZooCase,
    model: Any,
    batch: Any,
    budget: int,
    micro_batch_size: int,
    profile: memfit.Profile | None = None,
) -> memfit.Step:
    """The step at a budget, or at the least memory that works if that is more."""
    for _ in range(3):
        try:
            return memfit.fit(
                model,
                zoo.loss,
                batch,
                memory=budget,
                micro_batch_size=micro_batch_size,
                count=zoo.count or "auto",
                profile=profile,
            )
        except InfeasibleBudget as refused:
            budget = refused.needed_bytes
    raise AssertionError("the memory that a refusal named was refused again and again")


def assert_promise_kept(found: Judged) -> None:
    """Nothing differs, and measured <= predicted <= budget, at most 2 % apart."""
    assert found.differences == []
    assert found.measured_bytes <= found.predicted_bytes <= found.budget_bytes
    assert found.predicted_bytes <= MOST_ABOVE * found.measured_bytes


def check(zoo: ZooCase, micro_batch_size: int, budgets: int) -> None:
    """Each budget fitted, run and compared."""
    torch.manual_seed(4)
    model, batch = zoo.build(1).train(), zoo.batch(zoo.rows, 1)
    profile = memfit.profile(model, zoo.loss, batch, micro_batch_size=micro_batch_size)
    recomputed = []
    for budget in budgets_of(profile, budgets):
        twin = copy.deepcopy(model)
        step = fitted(zoo, twin, batch, budget, micro_batch_size, profile)
        found = judge(zoo, twin, batch, step)
        assert_promise_kept(found)
        recomputed.append(found.recomputes)
    assert recomputed[0] > recomputed[-1] == 0


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_batch_keeps_every_promise_at_every_budget(name: str) -> None:
    check(ZOO[name], ZOO[name].rows, 2)


@pytest.mark.parametrize("name", SPLIT)
def test_micro_batches_keep_every_promise_at_every_budget(name: str) -> None:
    check(ZOO[name], 5, 2)


def test_what_no_recording_of_few_rows_can_know_is_mended_in_the_first_step() -> None:
    torch.manual_seed(4)
    zoo = ZOO[UNPREDICTABLE]
    model, batch = zoo.build(1).train(), zoo.batch(zoo.rows, 1)
    profile = memfit.profile(model, zoo.loss, batch, micro_batch_size=zoo.rows)
    for budget in budgets_of(profile, 3)[1:]:
        twin = copy.deepcopy(model)
        step = fitted(zoo, twin, batch, budget, zoo.rows, profile)
        step(batch)
        twin.zero_grad()
        found = judge(zoo, twin, batch, step)
        assert found.differences == []
        assert found.measured_bytes <= found.predicted_bytes <= found.budget_bytes


@pytest.mark.parametrize(
    "broken",
    [
        Judged(100, 90, 91, [], 0),
        Judged(100, 101, 100, [], 0),
        Judged(100, 100, 97, [], 0),
        Judged(100, 90, 90, ["loss"], 0),
    ],
    ids=["above the prediction", "above the budget", "far below", "not the plain step"],
)
def test_a_broken_promise_is_noticed(broken: Judged) -> None:
    with pytest.raises(AssertionError):
        assert_promise_kept(broken)


def test_a_step_that_computes_something_else_is_noticed() -> None:
    torch.manual_seed(4)
    zoo = ZOO["convnet"]
    model, batch = zoo.build(1).train(), zoo.batch(zoo.rows, 1)

    def another_loss(m: Any, b: Any) -> Tensor:
        return zoo.loss(m, b) * 1.001

    step = memfit.fit(model, another_loss, batch, memory="1GiB")
    assert "loss" in judge(zoo, model, batch, step).differences
