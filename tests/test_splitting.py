"""fit(count="auto"): an audit is made where parts are wanted, proves what they weigh, and is kept."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import audits
import memfit
from audits import Case, gradient
from memfit.core.audit import Audit, Kind
from memfit.errors import InexactAccumulation, InfeasibleBudget
from memfit.runtime.batch import rows_of, split

CASES = {case.name: case for case in [*audits.REPORT, *audits.MORE]}
RANDOM = {"dropout", "depth drawn by row"}  # parts draw other numbers than the whole
EXACT = [case for case in CASES.values() if case.counter and case.name not in {*RANDOM, "scaling hook"}]
# A parameter's hook runs once, on the whole gradient, so a step may be split where it is not linear.
REFUSED = [c for c in CASES.values() if not c.counter and c.kind is not Kind.GRADIENT_HOOK]


def made(case: Case) -> tuple[nn.Module, audits.Batch]:
    """A model in float64 and its batch."""
    torch.manual_seed(5)
    batch = {name: t.double() if t.is_floating_point() else t for name, t in case.batch().items()}
    return case.model().double(), batch


def error_of(step: memfit.Step, model: nn.Module, loss: Any, batch: Any) -> float:
    """The relative error of the gradient that a step leaves, against one plain backward of the batch."""
    plain = gradient(model, loss, batch)
    model.zero_grad()
    step(batch)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float((found - plain).norm() / plain.norm())


def ragged(batch: audits.Batch) -> list[audits.Batch]:
    """A batch, a shorter one, one smaller than the micro-batch, and one with rows without any valid label."""
    found = [batch, split(batch, (7, 1))[0], split(batch, (2, 6))[0]]
    if bool((batch.get("labels", torch.zeros(1)) == -100).any()):
        found.append({**batch, "labels": batch["labels"].clone()})
        found[-1]["labels"][3:6] = -100
    return found


@pytest.mark.parametrize("case", EXACT, ids=[case.name for case in EXACT])
def test_what_an_audit_proves_is_exact_for_batches_of_any_size_and_labels(case: Case) -> None:
    model, batch = made(case)
    step = memfit.fit(model, case.loss, batch, memory="1GiB", micro_batch_size=3)
    assert step.audit is not None
    assert (step.audit.kind, step.audit.counter) == (case.kind, case.counter)
    assert step.plan.gradient_accumulation_steps == 3
    for other in ragged(batch):
        assert error_of(step, model, case.loss, other) <= 1e-12


@pytest.mark.parametrize("case", REFUSED, ids=[case.name for case in REFUSED])
def test_what_is_not_proved_is_refused_with_the_reason_or_stays_whole(case: Case) -> None:
    model, batch = made(case)
    with pytest.raises(InexactAccumulation, match="micro-batches of 3 of 8 rows") as refused:
        memfit.fit(model, case.loss, batch, memory="1GiB", micro_batch_size=3)
    found = memfit.audit(model, case.loss, batch)
    assert refused.value.owner == found.owner
    assert all(text in str(refused.value) for text in (found.reason, *found.cures))


def test_a_batch_that_stays_whole_costs_no_audit() -> None:
    model, batch = made(CASES["token ce"])
    step = memfit.fit(model, audits.tokens, batch, memory="1GiB")
    assert step.plan.gradient_accumulation_steps == 1
    assert step.audit is None
    assert error_of(step, model, audits.tokens, batch) <= 1e-12
    assert step.audit is None


@pytest.mark.parametrize("rows", [2, 8])
def test_a_larger_batch_is_audited_when_it_comes(rows: int) -> None:
    model, batch = made(CASES["token ce"])
    step = memfit.fit(
        model, audits.tokens, split(batch, (rows, 8 - rows))[0] if rows < 8 else batch, memory="1GiB"
    )
    twice = {name: torch.cat([t, t.flip(0)])[:13] for name, t in batch.items()}
    assert error_of(step, model, audits.tokens, twice) <= 1e-12
    assert step.audit is not None
    assert step.audit.counter == "labels"


def test_a_larger_batch_of_a_coupled_loss_is_refused_with_the_reason() -> None:
    model, batch = made(CASES["InfoNCE"])
    step = memfit.fit(model, audits.info_nce, batch, memory="1GiB")
    twice = {name: torch.cat([t, t]) for name, t in batch.items()}
    with pytest.raises(InexactAccumulation, match=r"16 rows in 2 parts .* couples the rows"):
        step(twice)


class Deep(nn.Module):
    """Layers whose activations are most of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        out: Tensor = self.layers(x)
        return out


def least_memory(fitted: Any) -> memfit.Step:
    """The step at the smallest memory that works."""
    try:
        fitted(1)
    except InfeasibleBudget as refused:
        step: memfit.Step = fitted(refused.needed_bytes)
    return step


@pytest.mark.parametrize(("loss", "kind"), [(audits.mse, Kind.ROWS), (audits.rmse, Kind.STATISTIC)])
def test_where_memory_wants_parts_the_audit_decides(loss: Any, kind: Kind) -> None:
    torch.manual_seed(1)
    model, batch = Deep().double(), {"x": torch.randn(64, 16, dtype=torch.float64)}
    step = least_memory(lambda memory: memfit.fit(model, loss, batch, memory=memory))
    assert step.audit is not None
    assert step.profile.audit == step.audit
    assert step.audit.kind is kind
    assert (step.plan.gradient_accumulation_steps > 1) == step.audit.is_exact
    assert all(graph.rows == 64 for graph in step.profile.graphs) != step.audit.is_exact
    assert error_of(step, model, loss, batch) <= 1e-12


def test_a_model_in_bfloat16_is_split() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16()
    batch = {"x": torch.randn(8, 6).bfloat16(), "labels": torch.tensor([0, 1, 2, -100, 3, 0, 1, 2])}
    step = memfit.fit(model, audits.ce, batch, memory="1GiB", micro_batch_size=3)
    assert step.audit is not None
    assert step.audit.counter == "labels"
    assert error_of(step, model, lambda m, b: audits.ce(m, {**b, "x": b["x"].double()}), batch) <= 0.05


# ---- kept with the profile -----------------------------------------------------------------------


class Counted:
    """A loss that counts how often it is called."""

    def __init__(self, loss: Any) -> None:
        self.calls, self.loss = list[int](), loss

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """The loss."""
        self.calls.append(rows_of(batch))
        loss: Tensor = self.loss(model, batch)
        return loss


def test_a_resumed_run_does_not_repeat_the_audit() -> None:
    model, batch = made(CASES["class-weighted ce"])
    loss = Counted(audits.weighted)
    step = memfit.fit(model, loss, batch, memory="1GiB", micro_batch_size=3)
    assert loss.calls
    stored = memfit.Profile.from_json(step.profile.to_json())
    assert stored.audit == step.audit
    loss.calls.clear()
    resumed = memfit.fit(model, loss, batch, memory="1GiB", micro_batch_size=3, profile=stored)
    assert loss.calls == []
    assert resumed.audit == step.audit
    assert error_of(resumed, model, audits.weighted, batch) <= 1e-12


def test_a_counter_that_is_not_found_again_is_looked_for_again() -> None:
    model, batch = made(CASES["token ce"])
    step = memfit.fit(model, audits.tokens, batch, memory="1GiB", micro_batch_size=3)
    assert step.audit is not None
    lost = replace(step.profile, audit=replace(step.audit, counter="sum of gone[batch['labels']]"))
    again = memfit.fit(model, audits.tokens, batch, memory="1GiB", micro_batch_size=3, profile=lost)
    assert again.audit == step.audit


def test_an_audit_is_not_believed_of_another_criterion() -> None:
    model, batch = made(CASES["ce mean"])

    def around(criterion: nn.Module) -> Any:
        return lambda m, b: criterion(m(b["x"]), b["labels"])

    mean, total = around(nn.CrossEntropyLoss()), around(nn.CrossEntropyLoss(reduction="sum"))
    stored = memfit.fit(model, mean, batch, memory="1GiB", micro_batch_size=3).profile
    with pytest.warns(UserWarning, match="the loss was"):
        step = memfit.fit(model, total, batch, memory="1GiB", micro_batch_size=3, profile=stored)
    assert step.audit is not None
    assert step.audit.counter == "sum"
    assert error_of(step, model, total, batch) <= 1e-12


def test_an_audit_without_an_error_is_stored_too() -> None:
    model, batch = made(CASES["mse mean"])
    profile = memfit.fit(model, audits.mse, batch, memory="1GiB").profile
    empty = Audit(Kind.UNDECIDED, None, float("nan"), "loss_fn", ("a cure",), ("a reason",))
    read = memfit.Profile.from_json(replace(profile, audit=empty).to_json()).audit
    assert str(read) == str(empty)


# ---- counters that are alike ---------------------------------------------------------------------


def test_two_counters_that_part_later_are_refused_only_where_the_weights_differ() -> None:
    def flat(m: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b["x"]), b["kind"])

    torch.manual_seed(1)
    model = nn.Linear(6, 4).double()
    batch = {"x": torch.randn(8, 6).double(), "kind": torch.arange(8) % 4, "group": torch.arange(8)}
    step = memfit.fit(model, flat, batch, memory="1GiB", micro_batch_size=4)
    later = copy.deepcopy(batch)
    later["kind"][2] = later["kind"][6] = -100  # one in each part
    assert error_of(step, model, flat, later) <= 1e-12
    later["kind"][3] = -100
    with pytest.raises(InexactAccumulation, match="counted alike in the example batch"):
        step(later)


def test_a_batch_without_the_counted_leaf_is_refused_by_name() -> None:
    model, batch = made(CASES["masked mean"])
    step = memfit.fit(model, audits.masked_error, batch, memory="1GiB", micro_batch_size=3)
    with pytest.raises(InexactAccumulation, match=r"the batch has no batch\['mask'\]"):
        step({"ids": batch["ids"]})
