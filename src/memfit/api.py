"""The public functions. ``fit`` is profile, plan and step in a row, and holds no logic of its own."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from memfit.core.audit import Audit
from memfit.core.basis import what_changed
from memfit.core.batching import parts_for
from memfit.core.frontier import frontier
from memfit.core.graph import Profile
from memfit.core.plan import Plan, find_plan, simulate
from memfit.core.timeline import Timeline
from memfit.errors import InexactAccumulation, InfeasibleBudget, UnsupportedModel
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.arguments import check_micro_batch_size, check_type
from memfit.runtime.basis import basis_of
from memfit.runtime.batch import rows_of
from memfit.runtime.checkpointing import apply_gradient_checkpointing
from memfit.runtime.compiled import compiled_part, size_for_graphs
from memfit.runtime.count import COUPLED, Counter, counter_named
from memfit.runtime.engines import engine_of, job_of
from memfit.runtime.job import Job, Optimizers, check_model
from memfit.runtime.meter import device_memory
from memfit.runtime.micro import Loss, LossFn, OutputsFn, whole_loss
from memfit.runtime.normalisation import check_batch_norm
from memfit.runtime.profiling import profile, profile_job
from memfit.runtime.ranks import Ranks
from memfit.runtime.replicas import Engine
from memfit.runtime.rowwise import in_two_passes
from memfit.runtime.sharding import ONCE
from memfit.runtime.splitting import Splitting, copy_bytes
from memfit.runtime.step import Step, Verdict
from memfit.runtime.terms import audit
from memfit.runtime.windows import windows
from memfit.units import parse_memory
from memfit.workload import Workload

__all__ = [
    "Audit",
    "Plan",
    "Profile",
    "Step",
    "Timeline",
    "Verdict",
    "Workload",
    "apply_gradient_checkpointing",
    "audit",
    "find_plan",
    "fit",
    "frontier",
    "profile",
    "simulate",
    "windows",
]


_MOST_REFUSALS = 3
_OTHER_STATISTICS = (
    ", or say batch_norm='frozen' (its running statistics, as in eval mode) or batch_norm='ghost' (each "
    "micro-batch by its own statistics, which is another gradient)"
)


def fit(
    model: nn.Module,
    loss_fn: LossFn | Callable[[Any, Any], Loss],
    batch: Any,
    *,
    memory: str | int | None = None,
    optimizer: Optimizers = None,
    micro_batch_size: int | None = None,
    count: str | Counter | Mapping[str, str | Counter] = "auto",
    batch_norm: str = "exact",
    profile: Profile | None = None,
    outputs_fn: OutputsFn | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Step:
    """Returns a step that runs the effective batch within ``memory``, as fast as an exact plan can.

    Args:
        model: Any module in training mode, on the device it trains on.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``, the loss of a whole batch; or a mapping of terms,
            each a scalar tensor, whose sum is the loss (``step.terms`` has them afterwards). It runs once a
            micro-batch, and before that to profile and audit it. One that keeps notes may have a function
            ``loss_fn.on_batch_start``, called when a batch starts, and again if it must run again.
        batch: An example of the effective batch; its tensors share the first dimension.
        memory: ``"8GiB"``, ``"80%"`` of the device, or bytes: the peak of everything on the device. On CUDA
            it may be left out: what is free.
        optimizer: Counts its state and its step into the peak; a list of several, all of theirs.
        micro_batch_size: Pins the micro-batch instead of choosing it.
        count: What the mean in the loss is over: ``"rows"``, ``"labels"`` (those that are not -100),
            ``"shifted_labels"`` (causal language models), ``"sum"`` (no mean), or a function
            ``micro_batch -> number``; one for each term of a mapping. ``"auto"`` proves by an audit under
            which count the gradients of parts add up (``step.audit``), where the batch is to be split; what
            is not proved stays whole. ``"coupled"``: run in two passes (see ``outputs_fn``).
        batch_norm: ``"exact"``: BatchNorm in training mode sees the whole batch, which is not split.
            ``"frozen"``: it runs as in eval mode during a step. ``"ghost"``: each micro-batch is normalised
            by its own statistics, which is ANOTHER GRADIENT than the whole batch's (Hoffer et al. 2017,
            arXiv:1705.08741); running statistics are updated once a step, by those of the whole batch.
        profile: A stored one (``Profile.from_json``), such as ``step.profile`` of an earlier run, which its
            first steps have corrected. It is used if it was made for this model, batch, optimizer, device
            and version of torch; else a warning says what changed, and the step is profiled again.
        outputs_fn: ``outputs_fn(model, batch)``, a nesting of tensors that have one row a row of the batch;
            then it is ``loss_fn(outputs, batch)``. A loss that couples the rows (contrastive ones, Dice,
            normalised advantages) is then exact in micro-batches too: all outputs first, without a graph,
            and each forward once more for its gradient.
        scaler: Its scale multiplies the gradients of all micro-batches alike, as ``scaler.scale(loss)`` does,
            and not the loss that is returned. Unscale, clip, step and update it once a step, as ever.

    Raises:
        InfeasibleBudget: No plan fits; says the smallest memory that works.
        InexactAccumulation: The batch would have to be split, and no exact way is known; says why.
        UnsupportedModel: The model is on several devices, or a layer cannot be as ``batch_norm`` says.
        ValueError, TypeError: Something is not as described above.
    """
    engine = engine_of(model)

    def job() -> Job:
        return job_of(engine, whole_loss(loss_fn, outputs_fn), batch, optimizer, batch_norm)

    return _step(engine, job, _Wanted(memory, micro_batch_size, count, profile, scaler))


def _step(engine: Engine, make: Callable[[], Job], wanted: _Wanted) -> Step:
    """The step of a job, on one process or several."""
    fitted = _fitted if engine.ranks.size == 1 else _fitted_together
    job, splitting, plan, profile, find = fitted(make, wanted, engine.ranks)
    engine.sharding = job.sharding
    counter, is_two_pass = splitting.counter, splitting.is_two_pass
    run = Accumulation(
        job.model, job.loss_fn, counter, is_two_pass, wanted.scaler, job.batch_norm, job.sharding
    )
    return Step(run, plan, profile, optimizer=job.optimizer, find=find, engine=engine)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the user asked for beside the job."""

    memory: str | int | None
    micro_batch_size: int | None
    count: str | Counter | Mapping[str, str | Counter]
    profile: Profile | None
    scaler: torch.amp.GradScaler | None


class _Fitted(NamedTuple):
    """What a step is made of; ``find`` plans again."""

    job: Job
    splitting: Splitting
    plan: Plan
    profile: Profile
    find: Callable[[Profile], Plan]


def _fitted(make: Callable[[], Job], wanted: _Wanted, ranks: Ranks) -> _Fitted:
    """Profiled, its accumulation proved where the batch is split, and planned; on one process."""
    _check(wanted)
    job = make()
    return _fitted_sharded(job, _checked(job, wanted), wanted)


def _fitted_together(make: Callable[[], Job], wanted: _Wanted, ranks: Ranks) -> _Fitted:
    """The same for several ranks: made on the one with most rows, within the least of all budgets."""
    with ranks.together():
        _check(wanted)
        job = make()
        own_bytes = _checked(job, wanted)
        rows = rows_of(job.batch)
    budget_bytes, root = int(ranks.least(own_bytes)), ranks.with_most(rows)

    def made() -> str:
        found = _fitted_sharded(job, budget_bytes, wanted)
        found.splitting.refuse_ranks(found.profile, job.batch, ranks.size)
        profile = found.splitting.settled(found.profile)
        return json.dumps([found.plan.to_json(), profile.to_json(), _reduces_once(found.job)])

    plan_text, profile_text, reduces_once = json.loads(ranks.made_by(root, made))
    profile = Profile.from_json(profile_text)
    job = _reducing(job, once=reduces_once)
    with ranks.together():
        audit = profile.audit if counter_named(wanted.count) is None else None
        splitting = Splitting(job, wanted.count, limit_bytes=budget_bytes, audit=audit)
        splitting.refuse_unknown()
    splitting.agree(ranks)
    plan = Plan.from_json(plan_text)
    return _Fitted(job, splitting, plan, profile, lambda now: splitting.find(now, budget_bytes))


def _checked(job: Job, wanted: _Wanted) -> int:
    """The budget in bytes of a job that can be profiled."""
    place = check_model(job.model)
    check_batch_norm(job.model, job.batch_norm, compiled_part(job.model))
    return _budget_bytes(wanted.memory, place)


def _fitted_sharded(job: Job, budget_bytes: int, wanted: _Wanted) -> _Fitted:
    """The job, planned; under FSDP in the quicker of both ways to reduce gradients that fit."""
    if job.sharding is None:
        return _fitted_within(job, budget_bytes, wanted)
    if wanted.profile is not None:  # it is of one way
        once = dict(wanted.profile.basis).get("sharding", "").endswith(ONCE)
        return _fitted_within(_reducing(job, once=once), budget_bytes, wanted)
    found: list[_Fitted] = []
    refused: list[InfeasibleBudget] = []
    for once in (False, True) if job.sharding.may_reduce_once else (False,):
        try:
            found.append(_fitted_within(_reducing(job, once=once), budget_bytes, wanted))
        except InfeasibleBudget as error:
            refused.append(error)
        if found and found[0].plan.gradient_accumulation_steps == 1:
            break
    if not found:
        raise min(refused, key=lambda error: error.needed_bytes)
    # With as many micro-batches both do the same, but for what they recompute and communicate.
    alike = len({way.plan.gradient_accumulation_steps for way in found}) == 1
    return min(found, key=partial(_seconds, alike=alike))


def _seconds(way: _Fitted, *, alike: bool) -> float:
    """Seconds in which ways to reduce gradients differ."""
    assert way.job.sharding is not None
    computed_s = way.plan.recompute_s if alike else way.plan.predicted_step_s
    return computed_s + way.job.sharding.reduce_s(way.plan.gradient_accumulation_steps)


def _reduces_once(job: Job) -> bool:
    """Whether FSDP reduces gradients only after the last micro-batch."""
    return job.sharding is not None and job.sharding.reduces_once


def _reducing(job: Job, *, once: bool) -> Job:
    """The job with gradients reduced after the last micro-batch, or after each."""
    return job if job.sharding is None else job._replace(sharding=replace(job.sharding, reduces_once=once))


def _fitted_within(job: Job, budget_bytes: int, wanted: _Wanted) -> _Fitted:
    """The job, profiled, proved and planned."""
    micro_batch_size, count, stored = wanted.micro_batch_size, wanted.count, wanted.profile
    place, rows = next(job.model.parameters()).device, rows_of(job.batch)
    check_micro_batch_size(micro_batch_size, rows)
    micro_batch_size = size_for_graphs(job.model, place, rows, micro_batch_size)
    audit = None
    if micro_batch_size is None or micro_batch_size < rows or count == COUPLED:
        largest_bytes = copy_bytes(job.model, budget_bytes)
        job, audit = in_two_passes(job, count, stored, largest_copy_bytes=largest_bytes)
    splitting = Splitting(job, count, limit_bytes=budget_bytes, stored=stored, audit=audit)
    if micro_batch_size is not None and micro_batch_size < rows:
        splitting.demand(job.batch, micro_batch_size)

    def profiled_within(limit_bytes: int, stored: Profile | None = None) -> Profile:
        found = _usable(stored, job, micro_batch_size, limit_bytes)
        return _uncoupled(found, job.batch_norm, pinned=micro_batch_size is not None)

    def find(current: Profile, example: Any = None) -> Plan:
        return splitting.find(current, budget_bytes, example)

    profile = profiled_within(budget_bytes, stored)
    _bar_coupled(profile, splitting)
    _bar_graphs(job.model, place, splitting)
    free_bytes = device_memory(place)[0]
    plan, profile = _planned(profile, lambda current: find(current, job.batch), profiled_within, free_bytes)
    return _Fitted(job, splitting, plan, splitting.settled(profile), find)


def _check(wanted: _Wanted) -> None:
    """Refuses, before anything runs, what would fail at the first step.

    Raises:
        TypeError, ValueError: One of them is not as :func:`fit` has it.
    """
    counter_named(wanted.count)
    if wanted.profile is not None:
        check_type("profile", wanted.profile, Profile, "a memfit.Profile, such as step.profile")
    if wanted.scaler is not None:
        check_type("scaler", wanted.scaler, torch.amp.GradScaler, "a torch.amp.GradScaler")


def _bar_coupled(profile: Profile, splitting: Splitting) -> None:
    """Where a layer looks across the rows, a later, larger batch must not be split either."""
    coupled = next((name for graph in profile.graphs for name in graph.coupled), None)
    if coupled is not None:
        splitting.bar(coupled, f"{coupled} computes its statistics over the rows it sees")


def _bar_graphs(model: nn.Module, place: torch.device, splitting: Splitting) -> None:
    """Nor where CUDA graphs would overwrite the gradients of its first part."""
    if size_for_graphs(model, place, 1, None) is not None:
        name = compiled_part(model) or type(model).__name__
        splitting.bar(name, f"{name} runs as CUDA graphs, which overwrite the gradients of the last replay")


def _planned(
    profile: Profile,
    find: Callable[[Profile], Plan],
    profiled_within: Callable[[int], Profile],
    free_bytes: int,
) -> tuple[Plan, Profile]:
    """The plan; what a refusal names is worked out again from a profile measured within that much.

    More memory lets more rows be measured, which may show that an op takes a little more.
    """
    named_bytes = 0
    for _ in range(_MOST_REFUSALS):
        try:
            return find(profile), profile
        except InfeasibleBudget as refused:
            if refused.needed_bytes == named_bytes or refused.needed_bytes > free_bytes:
                raise
            named_bytes = refused.needed_bytes
        profile = profiled_within(named_bytes)
    return find(profile), profile


def _usable(stored: Profile | None, job: Job, micro_batch_size: int | None, limit_bytes: int) -> Profile:
    """The stored profile if it still holds, with a warning that says why not; else a new one."""
    if stored is not None:
        changed = what_changed(stored.basis, basis_of(job))
        sizes = [graph.rows for graph in stored.graphs]
        if changed is None and micro_batch_size is None:
            return stored
        if changed is None and micro_batch_size is not None:
            size = parts_for(stored.rows, micro_batch_size)[0]
            if size in sizes:
                return replace(stored, graphs=(stored.graph(size),))
            changed = f"it holds micro-batches of {sizes} rows, and {size} are asked for"
        warnings.warn(f"the stored profile is not used: {changed}; profiling again", stacklevel=3)
    return profile_job(job, micro_batch_size=micro_batch_size, limit_bytes=limit_bytes)


def _budget_bytes(memory: str | int | None, place: torch.device) -> int:
    """The budget in bytes; a share is of the device's memory."""
    if memory is None:
        if place.type != "cuda":
            raise ValueError("say how much memory the step may take on a CPU, as in memory='8GiB'")
        free_bytes, _ = device_memory(place)
        return free_bytes + torch.cuda.memory_reserved(place)
    is_share = isinstance(memory, str) and memory.strip().endswith("%")
    return parse_memory(memory, total_bytes=device_memory(place)[1] if is_share else None)


def _uncoupled(profiled: Profile, batch_norm: str, *, pinned: bool) -> Profile:
    """Only micro-batches under which no layer sees fewer rows than it would in the whole batch."""
    coupled = next((name for graph in profiled.graphs for name in graph.coupled), None)
    if coupled is None:
        return profiled
    if batch_norm == "frozen":
        raise UnsupportedModel(
            f"{coupled} computes its statistics over the rows it sees and is no BatchNorm module, so it "
            "cannot be frozen: use torch.nn.BatchNorm, or training=False there, or batch_norm='exact'",
            owner=coupled,
        )
    whole = tuple(graph for graph in profiled.graphs if graph.rows >= profiled.rows)
    if not whole:
        assert pinned
        raise InexactAccumulation(
            f"{coupled} computes its statistics over the rows it sees, so micro-batches would change the "
            f"gradient: leave micro_batch_size out (memfit then keeps the batch of {profiled.rows} whole and "
            f"recomputes instead){_OTHER_STATISTICS if batch_norm == 'exact' else ''}",
            owner=coupled,
        )
    return replace(profiled, graphs=whole)
