"""The one definition of what a plan costs: live bytes at every moment of a step, and seconds.

Note [Simulation]
 1. The log is walked in order. A storage is alive while the program holds it (until ``FREE``) or
    something else does: a save of a kept value, or a pending replay that will read a kept value.
 2. A *dropped* value is not kept by its saves. When one is unpacked, the ops missing for it run once,
    in forward order; a replayed value lives until its last save is released and its last pending
    reader has been replayed. This is plain reference counting, as the replay does it.
 3. A replayed in-place op takes the old version over if nobody else wants it, else it copies it.
 4. At each op the peak counts inputs, outputs and the operator's own temporaries together.
 5. Unsharded parameters and what is communicated are temporaries: no plan changes them.
 6. With levels, a value may be made *in passing*: it lives until the last op of that replay has read it, and
    its op stays pending with all its inputs, to run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from memfit.core.graph import COMMUNICATION, Level, LogKind, Profile, StepGraph, in_blocks


class Moment(NamedTuple):
    """Live bytes while one op runs; residents (parameters and so on) are not among them."""

    op: int
    is_replay: bool
    activation_bytes: int
    replayed_bytes: int
    gradient_bytes: int
    temporary_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum over the categories."""
        return self.activation_bytes + self.replayed_bytes + self.gradient_bytes + self.temporary_bytes


class BlockKind(Enum):
    """What a block of memory is for; each kind has its own numbers."""

    STORAGE = "storage"
    REPLAYED = "replayed value"
    SEED = "seed of an op"
    TEMPORARY = "temporaries of an op"


class Run(NamedTuple):
    """A simulated micro-batch: each moment, and the ops that were replayed, in order."""

    moments: list[Moment]
    replayed_ops: list[int]

    @property
    def peak(self) -> Moment:
        """The highest moment, the first of equals."""
        return max(self.moments, key=lambda moment: moment.total_bytes)


@dataclass(frozen=True, slots=True)
class Event:
    """One moment of the step, every byte in a category.

    ``phase`` is "loss of all" (between two passes), "forward", "backward", "recompute" or "update"; ``owner``
    the call site that runs.
    """

    phase: str
    owner: str
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    activations_bytes: int
    replayed_bytes: int
    temporaries_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum over the categories."""
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.batch_bytes
            + self.activations_bytes
            + self.replayed_bytes
            + self.temporaries_bytes
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """Live bytes at every moment of one micro-batch and of the optimizer step."""

    events: tuple[Event, ...]

    @property
    def peak(self) -> Event:
        """The highest event, the first of equals."""
        return max(self.events, key=lambda event: event.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes at the highest event."""
        return self.peak.total_bytes


def droppable(graph: StepGraph) -> frozenset[int]:
    """The values a replay can make again.

    Their op may be replayed, and every input that is overwritten later (so that it cannot be kept)
    can itself be made again.
    """
    found: set[int] = set()
    for op in graph.ops[: graph.forward_ops]:
        if op.is_replayable and all(
            value in found for value in op.inputs if graph.values[value].is_overwritten
        ):
            found.update(op.outputs)
    return frozenset(found)


class Walk:
    """The reference counting of Note [Simulation], one instance a run; ``core/regions.py`` adds to it."""

    def __init__(self, graph: StepGraph, levels: Mapping[int, Level], alignment_bytes: int) -> None:
        self.graph = graph
        self.levels = levels
        self.dropped = frozenset(levels)
        align = alignment_bytes
        self.sizes = [-(-s.size_bytes // align) * align for s in graph.storages]
        self.alignment_bytes = align
        self.holders = [0] * len(self.sizes)
        self.named = [False] * len(self.sizes)
        self.wanted = [0] * len(graph.values)
        self.made = [False] * len(graph.values)
        self.pending: set[int] = set()
        self.passing: Counter[int] = Counter()
        self.activations = self.replayed = self.gradients = self.temporaries = 0
        self.first_backward = graph.forward_ops
        self.is_forward = True
        self.is_activation = [True] * len(self.sizes)  # an op of the forward made it
        for index, op in enumerate(graph.ops):
            if index >= self.first_backward or op.key.frame == COMMUNICATION:
                for storage in op.allocates:
                    self.is_activation[storage] = False
        self.moments: list[Moment] = []
        self.replayed_ops: list[int] = []

    # ---- the program's own storages -----------------------------------------------------------------

    def _count(self, storage: int, sign: int) -> None:
        """Adds or removes a storage from its category."""
        size = sign * self.sizes[storage]
        self._moved(BlockKind.STORAGE, storage, size)
        if self.is_activation[storage]:
            self.activations += size
        elif self.graph.storages[storage].persists:
            self.gradients += size
        else:
            self.temporaries += size

    def _count_seed(self, op: int, sign: int) -> None:
        """Adds or removes the generator state that a replay of an op needs."""
        size = sign * self.graph.ops[op].seed_bytes
        self.activations += size
        self._moved(BlockKind.SEED, op, size)

    def _count_replayed(self, value: int, sign: int) -> None:
        """Adds or removes the memory of a replayed value."""
        size = sign * self.sizes[self.graph.values[value].storage]
        self.replayed += size
        self._moved(BlockKind.REPLAYED, value, size)

    def _moved(self, kind: BlockKind, item: int, size_bytes: int) -> None:
        """Told of each block that comes (or, with a negative size, goes), for ``core/reserved.py``."""

    def _took_over(self, old: int, new: int) -> None:
        """Told that a replayed value has the block of an old version from now on."""

    def _release(self, storage: int) -> None:
        """One holder less."""
        self.holders[storage] -= 1
        if not self.holders[storage] and not self.named[storage]:
            self._count(storage, -1)

    def run_op(self, index: int) -> None:
        """An op of the program runs; a planned one leaves a record that pins what it will read."""
        op = self.graph.ops[index]
        for storage in op.allocates:
            self.named[storage] = True
            self._count(storage, 1)
        is_planned = index < self.first_backward and not self.dropped.isdisjoint(op.outputs)
        if is_planned:
            self._count_seed(index, 1)
        self._note(index, False, op.temporary_bytes)
        if is_planned:
            self.pending.add(index)
            for value in op.inputs:
                if value in self.dropped:
                    self.wanted[value] += 1
                else:
                    self.holders[self.graph.values[value].storage] += 1

    def free(self, storage: int) -> None:
        """The program lets go of a storage."""
        self.named[storage] = False
        if not self.holders[storage]:
            self._count(storage, -1)

    def _note(self, op: int, is_replay: bool, temporary_bytes: int) -> None:
        """A moment at which memory may be highest."""
        self.moments.append(
            Moment(
                op,
                is_replay,
                self.activations,
                self.replayed,
                self.gradients,
                self.temporaries + temporary_bytes,
            )
        )

    # ---- saves --------------------------------------------------------------------------------------

    def pack(self, save: int) -> None:
        """A save holds its storage, or wants its value made again."""
        value = self.graph.saves[save].value
        if value in self.dropped:
            self.wanted[value] += 1
        else:
            self.holders[self.graph.values[value].storage] += 1

    def unpack(self, save: int) -> None:
        """The backward needs a save: what is missing is replayed."""
        value = self.graph.saves[save].value
        if value in self.dropped and not self.made[value]:
            missing = self._missing(value)
            self.passing = self._in_passing(missing, value)
            for op in missing:
                self._replay(op)

    def release(self, save: int) -> None:
        """The backward is done with a save."""
        value = self.graph.saves[save].value
        if value in self.dropped:
            self._unwant(value)
        else:
            self._release(self.graph.values[value].storage)

    # ---- replay -------------------------------------------------------------------------------------

    def _missing(self, value: int) -> list[int]:
        """The pending ops a value depends on, in forward order."""
        found: set[int] = set()
        stack = [self.graph.values[value].producer]
        while stack:
            op = stack.pop()
            if op in found:
                continue
            found.add(op)
            stack.extend(
                self.graph.values[v].producer
                for v in self.graph.ops[op].inputs
                if v in self.dropped and not self.made[v]
            )
        return sorted(found)

    def _in_passing(self, missing: list[int], target: int) -> Counter[int]:
        """The values a replay makes only in passing, and how many of its ops read each."""
        segment = self.levels[target].segment
        ops = [self.graph.ops[index] for index in missing]
        found = Counter(
            {
                value: 0
                for op in ops
                for value in op.outputs
                if value in self.dropped
                and not self.made[value]
                and value != target
                and self.levels[value].retained_from < segment
            }
        )
        found.update(value for op in ops for value in set(op.inputs) if value in found)
        return found

    def _replay(self, index: int) -> None:
        """Runs one missing op and lets go of what only it was waiting for."""
        op = self.graph.ops[index]
        stays = any(value in self.passing and self.wanted[value] for value in op.outputs)
        self.replayed_ops.append(index)
        taken = set()
        doubled = [value for value in op.outputs if self.made[value]]
        for output in op.outputs:
            old = self._overwritten(index, output)
            if old is not None and self._may_take(old, stays):
                taken.add(old)
                self._took_over(old, output)
            else:
                self._count_replayed(output, 1)
            self.made[output] = True
        state_bytes = op.seed_bytes if stays else 0  # what it used stays while the stream is put back
        self._note(index, True, op.temporary_bytes + op.scratch_bytes + state_bytes)
        for value in op.inputs:
            if value in self.passing:
                self.passing[value] -= 1
                self._pass(value, is_taken=value in taken)
        if not stays:
            self._finish(index, taken)
        for output in op.outputs:
            if output in doubled or not self.wanted[output]:
                self._count_replayed(output, -1)
            elif output in self.passing:
                self._pass(output)

    def _may_take(self, old: int, stays: bool) -> bool:
        """Whether a replayed write may take over the old version of its storage."""
        if old in self.passing:
            return self.passing[old] == 1
        return not stays and self.wanted[old] == 1

    def _pass(self, value: int, *, is_taken: bool = False) -> None:
        """Lets go of a value made in passing once nothing in this replay reads it any more."""
        if not self.passing[value]:
            self.made[value] = False
            if not is_taken:
                self._count_replayed(value, -1)

    def _finish(self, index: int, taken: set[int]) -> None:
        """An op has been replayed for good."""
        op = self.graph.ops[index]
        self.pending.discard(index)
        self._count_seed(index, -1)
        for value in op.inputs:
            if value in taken and value not in self.passing:
                self.wanted[value] = 0
            elif value in self.dropped:
                self._unwant(value)
            else:
                self._release(self.graph.values[value].storage)

    def _overwritten(self, index: int, output: int) -> int | None:
        """The old version that an output of an in-place op replaces."""
        storage = self.graph.values[output].storage
        for old in self.graph.ops[index].overwrites:
            if self.graph.values[old].storage == storage:
                return old
        return None

    def _unwant(self, value: int) -> None:
        """One reason less to have a value; without any it dies, and so does a record nobody needs."""
        stack = [value]
        while stack:
            value = stack.pop()
            self.wanted[value] -= 1
            if self.wanted[value]:
                continue
            producer = self.graph.values[value].producer
            if self.made[value]:
                self._count_replayed(value, -1)
            elif not self.is_forward and self._is_unwanted(producer):
                stack.extend(self._abandon(producer))

    def _is_unwanted(self, op: int) -> bool:
        """Whether an op waits to be replayed and nobody wants an output of it."""
        outputs = self.graph.ops[op].outputs
        return op in self.pending and not any(self.wanted[v] and not self.made[v] for v in outputs)

    def _abandon(self, op: int) -> list[int]:
        """A record nobody needs is gone; returns the dropped values it wanted."""
        self.pending.discard(op)
        self._count_seed(op, -1)
        for value in self.graph.ops[op].inputs:
            if value not in self.dropped:
                self._release(self.graph.values[value].storage)
        return [value for value in self.graph.ops[op].inputs if value in self.dropped]

    def end_forward(self) -> None:
        """The forward kept every record; now those of which nobody wants an output go."""
        self.is_forward = False
        for op in sorted(self.pending, reverse=True):
            if self._is_unwanted(op):
                for value in self._abandon(op):
                    self._unwant(value)


def run(
    graph: StepGraph, dropped: Iterable[int] | Mapping[int, Level] = (), *, alignment_bytes: int = 1
) -> Run:
    """Simulates one micro-batch in which the given values are replayed instead of kept.

    Args:
        dropped: The values, or their levels by value.

    Cost: linear in the log and the replayed ops.
    """
    levels = dropped if isinstance(dropped, Mapping) else dict.fromkeys(dropped, Level())
    return play(Walk(graph, levels, alignment_bytes))


def play(walk: Walk) -> Run:
    """Walks through the log of a walk's graph."""
    graph = walk.graph
    act: dict[int, Callable[[int], None]] = {
        LogKind.OP: walk.run_op,
        LogKind.PACK: walk.pack,
        LogKind.UNPACK: walk.unpack,
        LogKind.RELEASE: walk.release,
        LogKind.FREE: walk.free,
    }
    for kind, index in graph.log:
        if kind == LogKind.OP and index == graph.forward_ops:
            walk.end_forward()
        act[kind](index)
    return Run(walk.moments, walk.replayed_ops)


def base_bytes(profile: Profile, graph: StepGraph) -> int:
    """Bytes alive under every moment of a micro-batch: with one micro-batch gradients grow in the run."""
    residents = profile.residents
    gradients = (residents.resident_gradients[0] if graph.gradients_resident else 0) + graph.held_bytes
    return residents.total_bytes - residents.gradients_bytes + gradients + profile.unexplained_bytes


def floors(profile: Profile) -> dict[bool, Event]:
    """The highest moment that no plan changes: of the optimizer step, and of the loss of all in two passes.

    By whether there are two passes.
    """
    update = _update_peak(profile)
    both = [update, *_loss_events(profile, first=False)] if profile.loss_of_all.ops else [update]
    return {False: update, True: max(both, key=lambda event: event.total_bytes)}


def _update_peak(profile: Profile) -> Event:
    """The highest moment of the optimizer step."""
    found = [event for first in (True, False) for event in update_events(profile, first=first)]
    return max(found, key=lambda event: event.total_bytes)


def events(
    profile: Profile, graph: StepGraph, dropped: Mapping[int, Level], *, first_step: bool = False
) -> Iterator[Event]:
    """Every moment of one micro-batch and of the optimizer step, with all categories.

    Args:
        first_step: The optimizer's state is born in this step, so it weighs nothing before the update.
    """
    residents = profile.residents
    resident_gradients = residents.resident_gradients[0] if graph.gradients_resident else 0
    resident_gradients += graph.held_bytes
    if graph.held_bytes:
        yield from _loss_events(profile, first=first_step)
    for moment in run(graph, dropped, alignment_bytes=profile.alignment_bytes).moments:
        forward = moment.op < graph.forward_ops
        yield Event(
            phase="recompute" if moment.is_replay else "forward" if forward else "backward",
            owner=str(graph.ops[moment.op].key),
            parameters_bytes=residents.parameters_bytes,
            gradients_bytes=resident_gradients + moment.gradient_bytes,
            optimizer_bytes=old_state_bytes(profile) if first_step else residents.optimizer_bytes,
            batch_bytes=residents.batch_bytes,
            activations_bytes=moment.activation_bytes,
            replayed_bytes=moment.replayed_bytes,
            temporaries_bytes=moment.temporary_bytes + profile.unexplained_bytes,
        )
    yield from update_events(profile, first=first_step)


def _loss_events(profile: Profile, *, first: bool) -> Iterator[Event]:
    """Every moment at which the loss of all outputs is taken, before there are gradients of parameters."""
    residents, graph = profile.residents, profile.loss_of_all
    for moment in run(graph, alignment_bytes=profile.alignment_bytes).moments:
        yield Event(
            phase="loss of all",
            owner=str(graph.ops[moment.op].key),
            parameters_bytes=residents.parameters_bytes,
            gradients_bytes=moment.gradient_bytes,
            optimizer_bytes=old_state_bytes(profile) if first else residents.optimizer_bytes,
            batch_bytes=residents.batch_bytes,
            activations_bytes=moment.activation_bytes,
            replayed_bytes=0,
            temporaries_bytes=moment.temporary_bytes + profile.unexplained_bytes,
        )


def update_events(profile: Profile, *, first: bool) -> Iterator[Event]:
    """Every moment of ``optimizer.step()``; without an optimizer the one moment after the backward."""
    residents = profile.residents
    graph = profile.first_update if first else profile.update
    state_bytes = old_state_bytes(profile) if first else residents.optimizer_bytes
    moments = run(graph, alignment_bytes=profile.alignment_bytes).moments
    for moment in moments or [_IDLE]:
        yield Event(
            phase="update",
            owner=f"optimizer.step, {graph.ops[moment.op].key.op}" if moments else "optimizer.step",
            parameters_bytes=residents.parameters_bytes,
            gradients_bytes=residents.gradients_bytes,
            optimizer_bytes=state_bytes + moment.gradient_bytes,
            batch_bytes=residents.batch_bytes,
            activations_bytes=0,
            replayed_bytes=0,
            temporaries_bytes=moment.temporary_bytes + profile.unexplained_bytes,
        )


def old_state_bytes(profile: Profile) -> int:
    """Bytes of the optimizer's state that are there before the first update."""
    born = (storage.size_bytes for storage in profile.first_update.storages if storage.persists)
    born_bytes = in_blocks(born, profile.alignment_bytes)
    return max(0, profile.residents.optimizer_bytes - born_bytes)


_IDLE = Moment(0, False, 0, 0, 0, 0)
