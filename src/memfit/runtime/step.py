"""Runs the effective batch as its plan says, and holds the plan to its promise.

Note [Promise]
 1. The first steps are metered by the allocator's own account. What a later step would also hold
    (optimizer state that is not born yet) is added before comparing.
 2. Above the prediction: the difference goes into the profile, and the plan is made again from it.
 3. Where no plan fits then, the old one stays as long as the budget holds.
 4. Retries of CUDA's allocator break the promise too: the device had to be cleared of cached memory. No plan
    at this budget mends that and the result is right, so it is said, and the step goes on.
 5. Above the budget: the same batch runs again under the new plan, from its start: random streams,
    buffers and gradients are put back. The user sees one step.
 6. The first step after those is timed, and the seconds of profile and plan become those of a real step. The
    decisions stay: all seconds change by one factor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memfit.core.audit import Audit
from memfit.core.costs import at_speed
from memfit.core.graph import Profile
from memfit.core.plan import Plan
from memfit.errors import InfeasibleBudget, VerificationFailed
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.job import optimizer_state
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.runtime.preserve import Snapshot
from memfit.runtime.replay import decisions_of
from memfit.units import format_bytes

_log = logging.getLogger("memfit")

_VERIFIED_STEPS = 2  # the second finds gradients or optimizer state that the first did not have
_ATTEMPTS = 3
_CURE_OF_RETRIES = "PYTORCH_ALLOC_CONF=expandable_segments:True"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the allocator said of a step, beside what the plan had promised.

    Attributes:
        measured_peak_bytes: Of forward and backward; ``optimizer.step()`` is predicted, not measured.
        attempts: How often the batch was run; above 1 a broken promise was mended by planning again.
        alloc_retries: How often CUDA's allocator found no segment and gave its cache back first: the device
            is too small for what the step reserves, and the step is slow.
    """

    predicted_peak_bytes: int
    measured_peak_bytes: int
    budget_bytes: int
    attempts: int
    alloc_retries: int = 0

    @property
    def is_within_budget(self) -> bool:
        """Whether the measured peak stayed within the budget."""
        return self.measured_peak_bytes <= self.budget_bytes

    @property
    def held(self) -> bool:
        """Whether the step stayed within the budget, and the allocator could serve it at once."""
        return self.is_within_budget and not self.alloc_retries

    def __str__(self) -> str:
        """One line for people."""
        word = "held" if self.held else "BROKEN"
        line = (
            f"budget {format_bytes(self.budget_bytes)} {word}: predicted "
            f"{format_bytes(self.predicted_peak_bytes)}, measured {format_bytes(self.measured_peak_bytes)}"
        )
        return f"{line}, {self.alloc_retries} allocation retries" if self.alloc_retries else line


class Step:
    """One call runs forward and backward of an effective batch; made by :func:`memfit.fit`.

    Attributes:
        plan: The plan in use.
        profile: What it was made from.
        verdict: The last measurement, None before the first step.
    """

    def __init__(
        self,
        accumulation: Accumulation,
        plan: Plan,
        profile: Profile,
        *,
        optimizer: torch.optim.Optimizer | None,
        find: Callable[[Profile], Plan],
    ) -> None:
        self.plan = plan
        self.profile = profile
        self.verdict: Verdict | None = None
        self._model = accumulation.model
        self._accumulation = accumulation
        self._optimizer = optimizer
        self._find = find
        self._decisions = decisions_of(plan.recompute, plan.levels)
        self._unverified = _VERIFIED_STEPS
        self._untimed = True
        self._most_items = 0

    @property
    def audit(self) -> Audit | None:
        """What was found out about splitting a batch; None where nothing had to be."""
        return getattr(self._accumulation.counter, "audit", self.profile.audit)

    def __call__(self, batch: Any) -> Tensor:
        """Returns the loss of the whole batch, detached; adds its gradient to ``.grad``.

        Raises:
            InexactAccumulation: The batch cannot be split.
            ValueError: The batch is empty, or the loss is no scalar.
            VerificationFailed: The peak broke the budget, and planning again could not mend it.
        """
        items = sum(tensor.numel() for _, tensor in tensors_of(batch))
        if items > self._most_items:  # longer than any so far: what held for those may not hold for it
            self._most_items, self._unverified = items, max(1, self._unverified)
        if torch._C._autograd._profiler_enabled():
            return self._run(batch)
        if self._unverified:
            self._unverified -= 1
            return self._run_verified(batch)
        if self._untimed and rows_of(batch) == self.plan.rows:
            self._untimed = False
            return self._run_timed(batch)
        return self._run(batch)

    def _run_timed(self, batch: Any) -> Tensor:
        """A step by the clock. See Note [Promise] 6."""
        place = next(self._model.parameters()).device
        _wait(place)
        start_s = time.perf_counter()
        loss = self._run(batch)
        _wait(place)
        measured_s = time.perf_counter() - start_s
        update_s = self.profile.update_s
        factor = measured_s / max(self.plan.predicted_step_s - update_s, 1e-12)
        self.profile = at_speed(self.profile, factor)
        self.plan = self.plan.at_speed(factor, update_s)
        return loss

    def _run(self, batch: Any) -> Tensor:
        """The batch under the plan."""
        return self._accumulation.run(batch, self.plan.micro_batch_size, self._decisions)

    # ---- the promise --------------------------------------------------------------------------------

    def _run_verified(self, batch: Any) -> Tensor:
        """A step under the meter; see Note [Promise]."""
        snapshot = Snapshot(self._model)
        for attempt in range(1, _ATTEMPTS + 1):
            loss, measured_bytes, retries = self._metered(batch)
            self.verdict = Verdict(
                self.plan.predicted_peak_bytes, measured_bytes, self.plan.budget_bytes, attempt, retries
            )
            if retries:
                _log.warning("%s; give less memory, or set %s", self.verdict, _CURE_OF_RETRIES)
            excess_bytes = measured_bytes - self.plan.predicted_peak_bytes
            if excess_bytes <= 0:
                return loss
            _log.info("%s; planning again", self.verdict)
            unexplained_bytes = self.profile.unexplained_bytes + excess_bytes
            self.profile = replace(self.profile, unexplained_bytes=unexplained_bytes)
            mended = self._plan_again()
            if self.verdict.is_within_budget:
                return loss
            del loss
            snapshot.restore()
            if not mended:
                break
        assert self.verdict is not None
        raise VerificationFailed(
            f"{self.verdict}, after planning {attempt} times. The gradients are as before the step. Give "
            "more memory, or report the model",
            predicted_bytes=self.verdict.predicted_peak_bytes,
            measured_bytes=self.verdict.measured_peak_bytes,
            budget_bytes=self.verdict.budget_bytes,
        )

    def _plan_again(self) -> bool:
        """Plans from the corrected profile; False where nothing fits any more."""
        try:
            self.plan = self._find(self.profile)
        except InfeasibleBudget as error:
            _log.info("planning again: %s", error)
            return False
        self.profile = replace(self.profile, audit=self.audit)
        self._decisions = decisions_of(self.plan.recompute, self.plan.levels)
        return True

    def _metered(self, batch: Any) -> tuple[Tensor, int, int]:
        """The loss, the peak of everything on the device once the optimizer has stepped, and the retries."""
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        place = parameters[0].device
        state = [t for t in optimizer_state(self._optimizer) if t.device == place]
        before = [*parameters, *self._model.buffers(), *gradients, *state]
        before += [t for _, t in tensors_of(batch) if t.device == place]
        level_bytes = torch.cuda.memory_allocated(place) if place.type == "cuda" else resident_bytes(before)
        unborn_bytes = max(0, self.profile.residents.optimizer_bytes - resident_bytes(state))
        with PeakMeter(place, held=gradients) as meter:
            loss = self._run(batch)
        return loss, level_bytes + unborn_bytes + meter.peak_bytes, meter.alloc_retries


def _wait(place: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
