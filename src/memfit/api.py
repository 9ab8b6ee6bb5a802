"""The public functions. ``fit`` is profile, plan and step in a row, and holds no logic of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memfit.core.audit import Audit
from memfit.core.basis import what_changed
from memfit.core.batching import parts_for
from memfit.core.frontier import frontier
from memfit.core.graph import Profile
from memfit.core.plan import Plan, find_plan, simulate
from memfit.core.timeline import Timeline
from memfit.errors import InexactAccumulation, InfeasibleBudget
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.audit import audit
from memfit.runtime.basis import basis_of
from memfit.runtime.batch import rows_of
from memfit.runtime.checkpointing import apply_gradient_checkpointing
from memfit.runtime.count import Counter
from memfit.runtime.job import Job, check_model
from memfit.runtime.meter import device_memory
from memfit.runtime.micro import LossFn
from memfit.runtime.profiling import profile
from memfit.runtime.profiling import profile as record_profile
from memfit.runtime.splitting import Splitting
from memfit.runtime.step import Step, Verdict
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


def fit(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    memory: str | int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    micro_batch_size: int | None = None,
    count: str | Counter = "auto",
    profile: Profile | None = None,
) -> Step:
    """Returns a step that runs the effective batch within ``memory``, as fast as an exact plan can.

    Args:
        model: Any module in training mode, on the device it trains on.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``, the loss of a whole batch.
        batch: An example of the effective batch; its tensors share the first dimension.
        memory: ``"8GiB"``, ``"80%"`` of the device, or bytes: the peak of everything on the device. On CUDA
            it may be left out: what is free.
        optimizer: Counts its state and its step into the peak.
        micro_batch_size: Pins the micro-batch instead of choosing it.
        count: What the mean in the loss is over: ``"rows"``, ``"labels"`` (those that are not -100),
            ``"shifted_labels"`` (causal language models), ``"sum"`` (no mean), or a function
            ``micro_batch -> number``. ``"auto"`` proves by an audit under which count the gradients of parts
            add up (``step.audit``), where the batch is to be split; what is not proved stays whole.
        profile: A stored one (``Profile.from_json``), such as ``step.profile`` of an earlier run, which its
            first steps have corrected. It is used if it was made for this model, batch, optimizer, device
            and version of torch; else a warning says what changed, and the step is profiled again.

    Raises:
        InfeasibleBudget: No plan fits; says the smallest memory that works.
        InexactAccumulation: The batch would have to be split, and no exact way is known; says why.
        UnsupportedModel: The model is on several devices.
        ValueError, TypeError: Something is not as described above.
    """
    place = check_model(model)
    budget_bytes = _budget_bytes(memory, place)
    rows = rows_of(batch)
    job = Job(model, loss_fn, batch, optimizer)
    splitting = Splitting(job, count, limit_bytes=budget_bytes, stored=profile)
    _bar_hooked(model, splitting)
    if micro_batch_size is not None and micro_batch_size < rows:
        splitting.demand(batch, micro_batch_size)
    size = rows if splitting.counter is None and micro_batch_size is None else micro_batch_size

    def profiled_within(limit_bytes: int, stored: Profile | None = None) -> Profile:
        found = _usable(stored, job, size, limit_bytes)
        return _uncoupled(found, pinned=micro_batch_size is not None)

    def find(current: Profile, example: Any = None) -> Plan:
        return splitting.find(current, budget_bytes, example)

    profile = profiled_within(budget_bytes, profile)
    _bar_coupled(profile, splitting)
    free_bytes = device_memory(place)[0]
    plan, profile = _planned(profile, lambda current: find(current, batch), profiled_within, free_bytes)
    accumulation = Accumulation(model, loss_fn, splitting.counter)
    return Step(accumulation, plan, splitting.settled(profile), optimizer=optimizer, find=find)


def _bar_hooked(model: nn.Module, splitting: Splitting) -> None:
    """A gradient hook would see the gradient of every micro-batch."""
    hooked = next((name for name, p in model.named_parameters() if p._backward_hooks), None)
    if hooked is not None:
        splitting.bar(hooked, f"'{hooked}' has a gradient hook, which must see the final gradient")


def _bar_coupled(profile: Profile, splitting: Splitting) -> None:
    """Where a layer looks across the rows, a later, larger batch must not be split either."""
    coupled = next((name for graph in profile.graphs for name in graph.coupled), None)
    if coupled is not None:
        splitting.bar(coupled, f"{coupled} computes its statistics over the rows it sees")


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
    return record_profile(
        job.model,
        job.loss_fn,
        job.batch,
        optimizer=job.optimizer,
        micro_batch_size=micro_batch_size,
        limit_bytes=limit_bytes,
    )


def _budget_bytes(memory: str | int | None, place: torch.device) -> int:
    """The budget in bytes; a share is of the device's memory."""
    if memory is None:
        if place.type != "cuda":
            raise ValueError("say how much memory the step may take on a CPU, as in memory='8GiB'")
        free_bytes, _ = device_memory(place)
        return free_bytes + torch.cuda.memory_reserved(place)
    is_share = isinstance(memory, str) and memory.strip().endswith("%")
    return parse_memory(memory, total_bytes=device_memory(place)[1] if is_share else None)


def _uncoupled(profiled: Profile, *, pinned: bool) -> Profile:
    """Only micro-batches under which no layer sees fewer rows than it would in the whole batch."""
    coupled = next((name for graph in profiled.graphs for name in graph.coupled), None)
    if coupled is None:
        return profiled
    whole = tuple(graph for graph in profiled.graphs if graph.rows >= profiled.rows)
    if not whole:
        assert pinned
        raise InexactAccumulation(
            f"{coupled} computes its statistics over the rows it sees, so micro-batches would change the "
            f"gradient: leave micro_batch_size out (memfit then keeps the batch of {profiled.rows} whole and "
            "recomputes instead), or put the layer into eval mode",
            owner=coupled,
        )
    return replace(profiled, graphs=whole)
