"""One judge for every model: the plain step to the bit, and the allocator, at budgets from least to most."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import memfit
from memfit.core.plan import Planner
from memfit.errors import MemfitError, VerificationFailed
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.meter import PeakMeter, resident_bytes
from models import LossFn, differences, outcome_of

_MOST_CORRECTIONS = 4


@dataclass(frozen=True)
class Specimen:
    """A model to be judged, whatever it comes from."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module], Any]
    loss: LossFn
    raises: str | None = None
    seed: int = 4


@dataclass(frozen=True)
class Run:
    """One budget.

    Attributes:
        is_mended: The prediction was too low, and the first step noticed: it planned again, or, where no plan
            fits then, was put back and named the memory that is enough, which was given to it.
        first_ratio: Predicted over measured bytes before any correction.
    """

    budget_bytes: int
    predicted_bytes: int
    measured_bytes: int
    differences: list[str]
    recompute_share: float
    first_ratio: float
    is_mended: bool = False

    @property
    def is_kept(self) -> bool:
        """Whether every promise was."""
        within = self.measured_bytes <= self.predicted_bytes <= self.budget_bytes
        return within and not self.differences


@dataclass(frozen=True)
class Judgement:
    """What became of a model.

    Attributes:
        status: ``planned``; ``refused`` by memfit; ``raises``: an error of the plain step that memfit raises
            too; ``unlike``: two plain steps differ; ``not built``: the plain step cannot be run;
            ``failed``: memfit raised what it does not raise by design.
        reason: The error's first words.
    """

    status: str
    reason: str = ""
    owner: str = ""
    runs: list[Run] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether no promise was broken."""
        return self.status != "failed" and all(run.is_kept for run in self.runs)


def seeded() -> None:
    """Every generator at its start, Python's and NumPy's too."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)


def judged(specimen: Specimen, budgets: int = 3) -> Judgement:
    """Builds a model and judges it at some budgets, the batch whole."""
    try:
        torch.manual_seed(specimen.seed)
        model = specimen.build().train()
        batch = specimen.batch(model)
        plain, again = _plain(specimen, model, batch), _plain(specimen, model, batch)
    except Exception as error:
        if specimen.raises is not None and specimen.raises in str(error):
            return _judged_error(specimen, model, batch)
        return Judgement("not built", told(error))
    if found := differences(plain, again):
        return Judgement("unlike", f"two plain steps differ in {found[0]}")
    return judged_beside(specimen, model, batch, plain, budgets)


def judged_beside(specimen: Specimen, model: nn.Module, batch: Any, plain: Any, budgets: int) -> Judgement:
    """Runs at each budget, each beside the outcome of the plain step."""
    runs: list[Run] = []
    try:
        roomy = memfit.fit(model, specimen.loss, batch, memory="64GiB", micro_batch_size=rows_of(batch))
        for plan in plans(roomy.profile, budgets):
            runs.append(_run(specimen, model, batch, plain, roomy.profile, plan))
    except MemfitError as error:
        return Judgement("refused", told(error), getattr(error, "owner", ""), runs)
    except Exception as error:
        return Judgement("failed", told(error), "", runs)
    return Judgement("planned", runs=runs)


def plans(profile: memfit.Profile, budgets: int) -> Iterator[memfit.Plan]:
    """Plans from the least peak there is to no recomputation, at equal steps of the budget between."""
    planner = Planner(profile)
    lowest = planner.lowest()
    yield lowest
    least_bytes = lowest.predicted_peak_bytes
    plain_bytes = memfit.find_plan(profile, memory=2**50).predicted_peak_bytes
    for number in range(1, budgets):
        budget_bytes = least_bytes + (plain_bytes - least_bytes) * number // (budgets - 1)
        yield planner.fastest(budget_bytes) or planner.least(budget_bytes)


def _plain(specimen: Specimen, model: nn.Module, batch: Any) -> Any:
    """The outcome of the plain step of a copy."""
    twin, part = copy.deepcopy((model, batch))
    seeded()
    loss = specimen.loss(twin, part)
    loss.backward()
    return outcome_of(twin, loss)


def _judged_error(specimen: Specimen, model: nn.Module, batch: Any) -> Judgement:
    """What the plain step raises, memfit must raise too, and not hide under a gradient of its own."""
    try:
        step = memfit.fit(model, specimen.loss, batch, memory="1GiB", micro_batch_size=rows_of(batch))
        step(batch)
    except MemfitError as error:
        return Judgement("refused", told(error), getattr(error, "owner", ""))
    except Exception as error:
        same = specimen.raises is not None and specimen.raises in str(error)
        return Judgement("raises" if same else "failed", told(error))
    return Judgement("failed", "the plain step raises an error that memfit does not")


def _run(
    specimen: Specimen, model: nn.Module, batch: Any, plain: Any, profile: memfit.Profile, plan: memfit.Plan
) -> Run:
    """One budget, with the prediction as it is before any step has corrected it."""
    twin = copy.deepcopy(model)
    step = _fitted(specimen, twin, batch, profile, plan)
    seeded()
    held = [*twin.parameters(), *twin.buffers(), *(leaf for _, leaf in tensors_of(batch))]
    resident = resident_bytes(held)
    with PeakMeter("cpu") as meter:
        loss = step(batch)
    measured_bytes = resident + meter.peak_bytes
    ratio = step.plan.predicted_peak_bytes / measured_bytes
    run = _ran(step, measured_bytes, differences(plain, outcome_of(twin, loss)), ratio)
    if run.differences or measured_bytes <= run.predicted_bytes:
        return run
    return _mended(specimen, model, batch, plain, profile, plan, ratio)


def _ran(step: memfit.Step, measured_bytes: int, found: list[str], ratio: float, **more: Any) -> Run:
    plan = step.plan
    share = plan.recompute_s / plan.forward_s if plan.forward_s else 0.0
    return Run(plan.budget_bytes, plan.predicted_peak_bytes, measured_bytes, found, share, ratio, **more)


def _mended(
    specimen: Specimen,
    model: nn.Module,
    batch: Any,
    plain: Any,
    profile: memfit.Profile,
    plan: memfit.Plan,
    ratio: float,
) -> Run:
    """A step that meters itself, as a user's first one does, plans again or names the memory it needs."""
    for _ in range(_MOST_CORRECTIONS):
        twin = copy.deepcopy(model)
        step = _fitted(specimen, twin, batch, profile, plan)
        seeded()
        try:
            loss = step(batch)
        except VerificationFailed as error:
            assert all(p.grad is None for p in twin.parameters())
            profile = step.profile
            plan = memfit.find_plan(profile, memory=error.needed_bytes or 2 * error.measured_bytes)
            continue
        assert step.verdict is not None
        found = differences(plain, outcome_of(twin, loss))
        return _ran(step, step.verdict.measured_peak_bytes, found, ratio, is_mended=True)
    raise AssertionError("the memory that a refusal named was refused again and again")


def _fitted(
    specimen: Specimen, model: nn.Module, batch: Any, profile: memfit.Profile, plan: memfit.Plan
) -> memfit.Step:
    """The step of a whole batch under a plan; what ``fit`` makes of it."""

    def find(current: memfit.Profile) -> memfit.Plan:
        return memfit.find_plan(current, memory=plan.budget_bytes)

    return memfit.Step(Accumulation(model, specimen.loss, None), plan, profile, optimizer=None, find=find)


def told(error: BaseException) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
