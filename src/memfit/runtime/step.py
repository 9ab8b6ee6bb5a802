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

Note [Rescue]
 1. Memory may run out under a plan that holds its promise: another process took some, or what is free lies
    in pieces. Nothing has been stepped then, so what the step has changed is put back
    (``runtime/preserve.py``), and the same batch runs under a lower plan (``core/frontier.py``).
 2. The lower plans come first at the same micro-batch size: there the loss is the same to the bit.
 3. Putting back and running again happen after the error has been handled, with its frames emptied: they hold
    the tensors of the step. Cycles are collected too: that takes little beside planning again.
 4. The lower plan is not metered in that step, for the meter itself takes memory on a CPU. It stays for
    later steps.
 5. Where none is lower, or planning runs out of memory, too, the same plan runs once more, since memory has
    been given back.
 6. Where no plan is left, or something cannot be put back, the error itself is raised, with a note.

Note [Ranks]
 1. Ranks run the same step in the same way, as ``runtime/together.py`` has it. Whether a step is metered or
    timed on any rank is told in the meeting that opens it, and only then there is one more meeting after it.
 2. The highest peak of all ranks is held against the prediction, the slowest rank sets the seconds. Profile
    and plan are the same on all: what is planned again is planned on rank 0.
 3. Where memory has run out on one rank before the gradients come together, all are rescued.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from memfit.core.audit import Audit
from memfit.core.costs import at_speed
from memfit.core.frontier import fallbacks
from memfit.core.graph import Profile, in_blocks
from memfit.core.plan import Plan, find_plan
from memfit.core.saving import saved_in
from memfit.errors import InexactAccumulation, InfeasibleBudget, VerificationFailed
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.effective import Effective, Way, open_batch
from memfit.runtime.engines import together_of
from memfit.runtime.job import Optimizers, optimizer_state
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.runtime.preserve import Snapshot
from memfit.runtime.replay import Decisions, decisions_of
from memfit.runtime.replicas import Engine
from memfit.runtime.rescue import is_out_of_memory, let_go_of_frames
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


@dataclass(frozen=True, slots=True)
class Rescue:
    """A step that ran out of memory, and was run again under a lower plan.

    Attributes:
        error: The first line of the error.
        failed: The plan under which memory ran out.
        plan: The one under which the step was run to its end, and later steps are.
        attempts: How many plans were tried after that.
    """

    error: str
    failed: Plan
    plan: Plan
    attempts: int

    def __str__(self) -> str:
        """One line for people."""
        again = "the same, as none takes less"
        if self.plan.predicted_peak_bytes < self.failed.predicted_peak_bytes:
            again = f"a plan of {_in_short(self.plan)}; later steps stay with it"
        return (
            f"out of memory under a plan of {_in_short(self.failed)} ({self.error}); the batch was run again "
            f"from its start under {again}"
        )


class Step:
    """One call runs forward and backward of an effective batch; made by :func:`memfit.fit`.

    Attributes:
        plan: The plan in use.
        profile: What it was made from.
        verdict: The last measurement; None before the first, and after a rescue until the next.
        terms: Of the last batch, where the loss is a mapping of terms: each one's part of it, detached.
        rescues: The steps that ran out of memory and were run again, the oldest first.
    """

    def __init__(
        self,
        accumulation: Accumulation,
        plan: Plan,
        profile: Profile,
        *,
        optimizer: Optimizers,
        find: Callable[[Profile], Plan],
        engine: Engine | None = None,
    ) -> None:
        self.plan = plan
        self.profile = profile
        self.verdict: Verdict | None = None
        self.terms: dict[str, Tensor] = {}
        self._model = accumulation.model
        self._accumulation = accumulation
        self._optimizer = optimizer
        self._find = find
        self._engine = engine or Engine(self._model)
        self._ranks = self._engine.ranks
        self._together = together_of(accumulation, self._engine)
        self._effective: Effective | None = None
        self._decisions = self._decided(plan)
        self._unverified = _VERIFIED_STEPS
        self._untimed = True
        self._most_items = 0
        self._asleep = [(name, m) for name, m in self._model.named_modules() if not m.training]
        self._circumstances = _circumstances(self._model)
        self._written: set[str] = set()
        self.rescues: list[Rescue] = []

    @property
    def held_bytes(self) -> int:
        """What is there throughout beside model, optimizer, gradients and batch: the buckets of DDP."""
        return sum(self._engine.held_sizes)

    @property
    def audit(self) -> Audit | None:
        """What was found out about splitting a batch; None where nothing had to be."""
        return getattr(self._accumulation.counter, "audit", self.profile.audit)

    def __call__(self, batch: Any) -> Tensor:
        """Returns the loss of the whole batch, detached; adds its gradient to ``.grad``.

        Gradient hooks of parameters and inputs run once, on the gradient of the whole batch.

        Parameters in bfloat16 or float16: gradients of micro-batches are added up in float32 and rounded to
        the parameter's type once. To get the float32 sums themselves, for an optimizer that takes them, set
        ``parameter.grad_dtype = torch.float32`` before ``fit``.

        An error, also of the loss or a hook, leaves gradients, buffers and random numbers as they were.

        Raises:
            InexactAccumulation: The batch cannot be split.
            UnsupportedModel: A hook would see each micro-batch.
            ValueError: The batch is empty, the loss is no scalar, or autograd is off.
            VerificationFailed: The peak broke the budget, and planning again could not mend it.
        """
        before: Snapshot | None = None
        failure: Exception | None = None
        way, self._effective = Way(), None
        try:
            try:
                way = self._way(batch)
                before = self._snapshot(batch, is_complete=way.is_metered)
            except Exception as error:
                failure = error
            way = self._open(batch, way, failure)
            if way.is_metered:
                assert before is not None
                return self._run_verified(batch, before)
            return self._run_timed(batch) if way.is_timed else self._run(batch)
        except BaseException as error:
            if not self._can_rescue(error):
                if before is not None and self._is_alone_in_error:
                    before.restore()  # whatever went wrong, such as in the user's own loss or hooks
                    self._unverified += way.is_metered
                raise
            out_of_memory = error
        finally:
            del failure  # it may hold this frame, and this frame would hold it
        try:
            return self._rescue(batch, before, out_of_memory)
        finally:
            del out_of_memory

    @property
    def _is_alone_in_error(self) -> bool:
        """Whether no other rank waits in the middle of the step for what this one cannot give."""
        return self._engine.may_wait and not self._engine.is_broken

    def _can_rescue(self, error: BaseException) -> TypeGuard[Exception]:
        """Whether an error says that memory has run out, and the step can be run again."""
        return self._is_alone_in_error and isinstance(error, Exception) and is_out_of_memory(error)

    def _way(self, batch: Any) -> Way:
        """How a batch is to be run, as far as this rank knows."""
        self._engine.check()
        if self._engine.sharding is not None:
            self._engine.sharding.free()
        items = sum(tensor.numel() for _, tensor in tensors_of(batch))
        if items > self._most_items:  # longer than any so far: what held for those may not hold for it
            self._most_items, self._unverified = items, max(1, self._unverified)
        self._refuse_woken(batch)
        circumstances = _circumstances(self._model)
        if circumstances != self._circumstances:  # what was promised was promised for others
            _log.warning("the step was planned for %s and runs with %s", self._circumstances, circumstances)
            self._circumstances, self._unverified = circumstances, max(1, self._unverified)
        if self._is_verified():
            return Way(is_metered=True)
        return Way(is_timed=self._untimed and rows_of(batch) == self.plan.rows and not _is_profiled())

    def _open(self, batch: Any, way: Way, failure: Exception | None) -> Way:
        """Opens the step on all ranks; how it is run there.

        Raises:
            Exception: What went wrong before, here or on another rank.
        """
        if self._together is None:
            if failure is not None:
                raise failure
            return way
        self._effective = open_batch(self._engine, self._accumulation.counter, batch, way, failure)
        self._engine.begin()
        return self._effective.way

    def _is_verified(self) -> bool:
        """Whether this step is metered; one fewer is to be then. There can be only one profiler."""
        if _is_profiled() or not self._unverified:
            return False
        self._unverified -= 1
        return True

    def _refuse_woken(self, batch: Any) -> None:
        """Refuses to split a batch for layers that did not mix its rows before only because they were off."""
        woken = next((name for name, module in self._asleep if module.training), None)
        if woken is not None and rows_of(batch) > self.plan.micro_batch_size:
            raise InexactAccumulation(
                f"'{woken}' was in eval mode when memfit.fit looked at the model, and trains now, so "
                "it is not known whether micro-batches are exact: fit again in the mode to train in",
                owner=woken,
            )

    def _run_timed(self, batch: Any) -> Tensor:
        """A step by the clock. See Note [Promise] 6."""
        place = next(self._model.parameters()).device
        _wait(place)
        start_s = time.perf_counter()
        loss = self._run(batch)
        _wait(place)
        measured_s = self._ranks.most(time.perf_counter() - start_s)
        update_s = self.profile.update_s
        factor = measured_s / max(self.plan.predicted_step_s - update_s, 1e-12)
        self.profile = at_speed(self.profile, factor)
        self.plan = self.plan.at_speed(factor, update_s)
        self._untimed = False
        return loss

    def _run(self, batch: Any) -> Tensor:
        """The batch under the plan."""
        return self._run_under(batch, self.plan.micro_batch_size, self._decisions)

    def _run_under(self, batch: Any, micro_batch_size: int, decisions: Decisions) -> Tensor:
        """The batch under any plan."""
        if self._together is None:
            loss = self._accumulation.run(batch, micro_batch_size, decisions)
        else:
            assert self._effective is not None
            loss = self._together.run(batch, micro_batch_size, decisions, self._effective)
        self.terms = loss.terms
        return loss.total

    # ---- the promise --------------------------------------------------------------------------------

    def _run_verified(self, batch: Any, before: Snapshot) -> Tensor:
        """A step under the meter; see Note [Promise]."""
        for attempt in range(1, _ATTEMPTS + 1):
            loss, *own = self._metered(batch, before)
            measured_bytes, retries = self._of_all(*own)
            self._written |= before.written()
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
            needed_bytes = self._plan_again()
            if self.verdict.is_within_budget:
                return loss
            del loss
            before.restore()
            if needed_bytes is not None:
                break
            self._engine.begin()
        assert self.verdict is not None
        enough = f"{needed_bytes:,} B should be enough" if needed_bytes else "give more memory"
        raise VerificationFailed(
            f"{self.verdict}, after planning {attempt} times. The gradients are as before the step. By what "
            f"was measured, {enough}; with profile=step.profile it need not be measured again",
            needed_bytes=needed_bytes,
            predicted_bytes=self.verdict.predicted_peak_bytes,
            measured_bytes=self.verdict.measured_peak_bytes,
            budget_bytes=self.verdict.budget_bytes,
        )

    def _plan_again(self) -> int | None:
        """Plans from the corrected profile; where nothing fits any more, the bytes that would do."""
        try:
            self.plan = self._same_plan(lambda: self._find(self.profile))
        except InfeasibleBudget as error:
            _log.info("planning again: %s", error)
            return error.needed_bytes
        self.profile = replace(self.profile, audit=self.audit)
        self._decisions = self._decided(self.plan)
        return None

    def _same_plan(self, find: Callable[[], Plan]) -> Plan:
        """The plan that is found on rank 0: a solver that is out of time may find others elsewhere."""
        if self._ranks.size == 1:
            return find()
        return Plan.from_json(self._ranks.made_by(0, lambda: find().to_json()))

    def _of_all(self, measured_bytes: int, retries: int) -> tuple[int, int]:
        """The most of all ranks."""
        measured, retried = zip(*self._ranks.table([measured_bytes, retries]), strict=True)
        return int(max(measured)), int(max(retried))

    def _metered(self, batch: Any, before: Snapshot) -> tuple[Tensor, int, int]:
        """The loss, the peak of everything on the device once the optimizer has stepped, and the retries.

        Copies of ``before`` count if every later step holds them too.
        """
        parameters = list(self._model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        place = parameters[0].device
        state = [t for t in optimizer_state(self._optimizer) if t.device == place]
        present = [*parameters, *self._model.buffers(), *gradients, *state]
        present += [t for _, t in tensors_of(batch) if t.device == place]
        if place.type == "cuda":
            passing_bytes = in_blocks(before.passing_sizes, self.profile.alignment_bytes)
            level_bytes = torch.cuda.memory_allocated(place) - passing_bytes
        else:
            level_bytes = resident_bytes(present) + sum(before.lasting_sizes)
            in_held = gradients if self._engine.owns_gradients else []
            level_bytes += max(0, sum(self._engine.held_sizes) - resident_bytes(in_held))
        unborn_bytes = max(0, self.profile.residents.optimizer_bytes - resident_bytes(state))
        if _is_profiled():  # on this rank, and not on another, which measures
            return self._run(batch), 0, 0
        with self._engine.metered(), PeakMeter(place, held=gradients) as meter:
            loss = self._run(batch)
        return loss, level_bytes + unborn_bytes + meter.peak_bytes, meter.alloc_retries

    # ---- the rescue ---------------------------------------------------------------------------------

    def _snapshot(self, batch: Any, *, is_complete: bool = False) -> Snapshot:
        """What the step may change. A verified step copies all of it: its promise may have to be mended."""
        inputs = (tensor for _, tensor in tensors_of(batch))
        spare_bytes = 0 if self.rescues else self.plan.budget_bytes - self.plan.predicted_peak_bytes
        room_bytes = None if is_complete else spare_bytes
        return Snapshot(self._model, inputs, room_bytes=room_bytes, written=self._written)

    def _rescue(self, batch: Any, before: Snapshot | None, error: Exception) -> Tensor:
        """The loss under the first lower plan that has enough memory. See Note [Rescue].

        Raises:
            Exception: ``error``, with a note, if none has, or the step cannot be put back to its start.
        """
        failed, attempts = self.plan, 0
        let_go_of_frames(error)
        self._make_room()
        with self._ranks.together():
            if before is None:  # memory had run out before anything was changed
                before = self._snapshot(batch)
            _put_back(before, error)
        if self._together is not None:
            self._together.is_cautious = True
            if self._effective is None:  # memory had run out before the step was opened
                self._open(batch, Way(), None)
        for plan in self._lower_plans(failed):
            attempts += 1
            loss = self._tried(batch, plan)
            if loss is not None:
                self._settle(plan)
                self.rescues.append(Rescue(_first_line(error), failed, self.plan, attempts))
                _log.warning("%s.", self.rescues[-1])
                return loss
            with self._ranks.together():
                _put_back(before, error)
        error.add_note(
            f"memfit ran the batch again under {attempts} plans, down to the least memory possible, and none "
            "had enough. Gradients, buffers and random numbers are as before the step: free memory and call "
            "it again."
        )
        raise error

    def _lower_plans(self, failed: Plan) -> Iterator[Plan]:
        """The lower plans, the highest first; the same on all ranks."""
        lower = self._plans_below(failed)
        plans = chain([next(lower, failed)], lower) if self._ranks.rank == 0 else iter(())
        if self._ranks.size == 1:
            yield from plans
            return

        def following() -> str:
            found = next(plans, None)
            return "" if found is None else found.to_json()

        while text := self._ranks.made_by(0, following):
            yield Plan.from_json(text)

    def _plans_below(self, failed: Plan) -> Iterator[Plan]:
        """The lower plans as this rank finds them. See Note [Rescue] 5."""
        try:
            yield from fallbacks(self.profile, failed)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.info("out of memory while planning again")
            let_go_of_frames(error)
            yield failed

    def _tried(self, batch: Any, plan: Plan) -> Tensor | None:
        """The batch under a plan; None if memory has run out again."""
        try:
            decisions = self._decided(plan)
            self._engine.begin()
            return self._run_under(batch, plan.micro_batch_size, decisions)
        except InexactAccumulation as error:
            _log.info("no exact way to run micro-batches of %d rows: %s", plan.micro_batch_size, error)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.info("out of memory again, under a plan of %s", format_bytes(plan.predicted_peak_bytes))
            let_go_of_frames(error)
        self._make_room()
        return None

    def _settle(self, plan: Plan) -> None:
        """Stays with a lower plan: what is planned later takes as little. The promise is the old one."""
        budget_bytes, size = self.plan.budget_bytes, plan.micro_batch_size

        def find(profile: Profile) -> Plan:
            lower = find_plan(profile, memory=plan.budget_bytes, micro_batch_size=size)
            return replace(lower, budget_bytes=budget_bytes)

        self._find = find
        self.verdict = None  # it was about another plan
        self.plan = replace(plan, budget_bytes=budget_bytes)
        self.profile = replace(self.profile, audit=self.audit)  # it may have been made for the lower plan
        self._decisions = self._decided(plan)

    def _decided(self, plan: Plan) -> Decisions:
        """A plan for the hot path."""
        graph = self.profile.graph(plan.micro_batch_size)
        return decisions_of(plan.recompute, plan.levels, saved_in(graph, plan.recompute))

    def _make_room(self) -> None:
        """Gives back what nobody uses any more."""
        gc.collect()
        if next(self._model.parameters()).device.type == "cuda":
            torch.cuda.empty_cache()


def _put_back(before: Snapshot, error: Exception) -> None:
    """Puts the step back to its start; raises ``error`` with a note where that cannot be done."""
    lost = before.lost()
    if lost is not None:
        error.add_note(
            f"memfit could not run the batch again: {lost} had been changed by then, and there was no "
            "memory to keep a copy of it from before the step. Nothing was put back: drop the gradients "
            "before you go on, or give less memory= to fit."
        )
        raise error
    before.restore()


def _in_short(plan: Plan) -> str:
    """A plan in a few words."""
    peak, parts = format_bytes(plan.predicted_peak_bytes), plan.gradient_accumulation_steps
    return f"{peak}, {parts} x {plan.micro_batch_size} rows, {plan.recomputes} tensors recomputed"


def _first_line(error: Exception) -> str:
    """What an error says first, or what it is if it says nothing."""
    lines = str(error).splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _is_profiled() -> bool:
    """Whether a torch profiler is running."""
    return bool(torch._C._autograd._profiler_enabled())


def _circumstances(model: nn.Module) -> str:
    """What decides how much memory the same ops take, beside the batch."""
    parameters = list(model.parameters())
    place = parameters[0].device
    dtype = torch.get_autocast_dtype(place.type) if torch.is_autocast_enabled(place.type) else None
    autocast = "" if dtype is None else f" under autocast to {dtype}"
    return f"{sum(p.nbytes for p in parameters):,} B of parameters on {place.type}{autocast}"


def _wait(place: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
