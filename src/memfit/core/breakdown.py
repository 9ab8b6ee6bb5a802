"""Where the memory and the seconds of the plain step go: the peak, the tensors kept, the ops.

Note [Breakdown]
 1. *Plain* is the largest recorded micro-batch (the whole batch, where it was recorded) without any
    recomputation, in the higher of its first step, which makes the optimizer's state, and a later one.
 2. Kept is what autograd saves of forward ops, each storage once, under the op that made it last.
 3. Call sites that differ in numbers only, such as those of ``layers.0`` and ``layers.1``, are one entry.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from memfit.core.graph import OpKey, Profile, StepGraph
from memfit.core.timeline import Event, Timeline, events

_LOSS = "loss"
_NUMBER = re.compile(r"\b\d+\b")


@dataclass(frozen=True, slots=True)
class Kept:
    """Alike tensors that autograd keeps: where they are made, how many there are, and their bytes in all."""

    module: str
    op: str
    tensors: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Alike ops: where they run, how often in a micro-batch, and their seconds in all."""

    module: str
    op: str
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """What the plain step takes. See Note [Breakdown].

    Attributes:
        rows: Of the micro-batch it is of.
        peak: The highest moment, every byte in a category.
        peak_step: 1 if the peak is in the step in which the optimizer's state is born, else 2.
        kept: Most bytes first.
        costs: Ops of forward and backward, and the update, most seconds first.
        step_s: Seconds of the whole step, the update included.
    """

    rows: int
    peak: Event
    peak_step: int
    kept: tuple[Kept, ...]
    costs: tuple[Cost, ...]
    step_s: float

    @property
    def kept_bytes(self) -> int:
        """Bytes of all tensors that autograd keeps."""
        return sum(entry.total_bytes for entry in self.kept)


def breakdown(profile: Profile) -> Breakdown:
    """Returns where the memory and the seconds of the plain step go.

    Cost: two simulations of a micro-batch.
    """
    graph = max(profile.graphs, key=lambda graph: graph.rows)
    peaks = [Timeline(tuple(events(profile, graph, {}, first_step=first))).peak for first in (True, False)]
    peak_step = 1 if peaks[0].total_bytes > peaks[1].total_bytes else 2
    return Breakdown(
        rows=graph.rows,
        peak=peaks[peak_step - 1],
        peak_step=peak_step,
        kept=_kept(graph),
        costs=_costs(profile, graph),
        step_s=graph.seconds + profile.update_s,
    )


def _kept(graph: StepGraph) -> tuple[Kept, ...]:
    """What autograd saves of forward ops. See Note [Breakdown] 2 and 3."""
    last: dict[int, int] = {}  # the op that wrote a storage last, of those whose output is saved
    for value in {graph.values[save.value] for save in graph.saves}:
        if 0 <= value.producer < graph.forward_ops:
            last[value.storage] = max(value.producer, last.get(value.storage, 0))
    found: dict[tuple[str, str], list[int]] = {}
    for storage, op in last.items():
        found.setdefault(_site(graph.ops[op].key), []).append(graph.storages[storage].size_bytes)
    entries = (Kept(*site, len(sizes), sum(sizes)) for site, sizes in found.items())
    return tuple(sorted(entries, key=lambda entry: (-entry.total_bytes, entry.module, entry.op)))


def _costs(profile: Profile, graph: StepGraph) -> tuple[Cost, ...]:
    """What the ops of forward and backward take, and the update as one entry."""
    found: dict[tuple[str, str], list[float]] = {}
    for op in graph.ops:
        found.setdefault(_site(op.key), []).append(op.seconds)
    if profile.update.ops:
        found["optimizer.step()", f"{len(profile.update.ops)} ops"] = [profile.update_s]
    entries = (Cost(*site, len(seconds), sum(seconds)) for site, seconds in found.items())
    return tuple(sorted(entries, key=lambda entry: (-entry.seconds, entry.module, entry.op)))


def _site(key: OpKey) -> tuple[str, str]:
    """The module and the op of a call site, without its numbers. See Note [Breakdown] 3."""
    module = key.frame.partition("#")[0]
    op, of, _ = key.op.partition(" of ")
    op = op.removeprefix("aten.").removesuffix(".default")
    is_said = not of or op.endswith("_backward")
    return _NUMBER.sub("*", module) or _LOSS, op if is_said else f"{op} (backward)"


def bytes_by_category(event: Event) -> dict[str, int]:
    """The bytes of a moment by category, most first."""
    found = {
        "parameters": event.parameters_bytes,
        "gradients": event.gradients_bytes,
        "optimizer state": event.optimizer_bytes,
        "batch": event.batch_bytes,
        "activations": event.activations_bytes + event.replayed_bytes,
        "temporaries": event.temporaries_bytes,
    }
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))
