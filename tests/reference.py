"""The slow and obvious truth about memory: a set of named blocks, worked out from scratch at every moment.

Nothing here counts references. What is alive is what can be reached: from what the program still holds,
from what autograd still saves, and, through records of ops to be replayed, from those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import NamedTuple

from memfit.core.graph import LogKind, Profile, StepGraph
from memfit.core.timeline import droppable


class Block(NamedTuple):
    """Live memory: a ``storage`` of the program, a ``replayed`` value, or the ``seed`` kept for an op."""

    kind: str
    item: int


class Live(NamedTuple):
    """What one moment of the step holds, by category."""

    op: int
    is_replay: bool
    activation_bytes: int
    replayed_bytes: int
    gradient_bytes: int
    temporary_bytes: int


@dataclass
class World:
    """The facts of one moment; what is alive follows from them by :meth:`blocks`."""

    graph: StepGraph
    dropped: frozenset[int]
    held_by_the_program: set[int] = field(default_factory=set)
    saved: set[int] = field(default_factory=set)
    to_replay: set[int] = field(default_factory=set)
    replayed: set[int] = field(default_factory=set)
    is_forward: bool = True

    def blocks(self) -> set[Block]:
        """Everything alive."""
        found = {Block("storage", storage) for storage in self.held_by_the_program}
        values = [self.graph.saves[save].value for save in self.saved]
        records = list(self.to_replay) if self.is_forward else []  # the forward knows every record it left
        seen: set[int] = set()
        while values or records:
            if values:
                value = values.pop()
                if value not in self.dropped:
                    found.add(Block("storage", self.graph.values[value].storage))
                elif value in self.replayed:
                    found.add(Block("replayed", value))
                else:
                    records.append(self.graph.values[value].producer)
            else:
                record = records.pop()
                if record not in seen:
                    seen.add(record)
                    found.add(Block("seed", record))
                    values.extend(self.graph.ops[record].inputs)
        return found

    def missing(self, value: int) -> list[int]:
        """The ops to replay, in forward order, before a value is there."""
        if value not in self.dropped or value in self.replayed:
            return []
        producer = self.graph.values[value].producer
        before = (op for read in self.graph.ops[producer].inputs for op in self.missing(read))
        return sorted({producer, *before})

    def replay(self, op: int) -> set[Block]:
        """Runs an op again; returns everything alive while it runs."""
        during = self.blocks() | {Block("replayed", output) for output in self.graph.ops[op].outputs}
        self.to_replay.discard(op)
        self.replayed.update(self.graph.ops[op].outputs)
        afterwards = self.blocks()
        old = {Block("replayed", value) for value in self.graph.ops[op].overwrites}
        return during - (old - afterwards)  # what nobody else wants is written over


def live_bytes(graph: StepGraph, dropped: Iterable[int] = (), alignment_bytes: int = 1) -> list[Live]:
    """What is alive at every moment of a micro-batch in which the given values are replayed."""
    return list(_moments(graph, frozenset(dropped), alignment_bytes))


def _moments(graph: StepGraph, dropped: frozenset[int], alignment_bytes: int) -> Iterator[Live]:
    world = World(graph, dropped)
    for kind, item in graph.log:
        if kind == LogKind.OP:
            world.is_forward = item < graph.forward_ops
            world.held_by_the_program.update(graph.ops[item].allocates)
            is_planned = not dropped.isdisjoint(graph.ops[item].outputs)
            seed = {Block("seed", item)} if is_planned else set()
            yield _weighed(graph, item, False, world.blocks() | seed, alignment_bytes)
            if is_planned:
                world.to_replay.add(item)
        elif kind == LogKind.PACK:
            world.saved.add(item)
        elif kind == LogKind.UNPACK:
            for op in world.missing(graph.saves[item].value):
                yield _weighed(graph, op, True, world.replay(op), alignment_bytes)
        elif kind == LogKind.RELEASE:
            world.saved.remove(item)
        else:
            world.held_by_the_program.remove(item)


def _weighed(graph: StepGraph, op: int, is_replay: bool, blocks: set[Block], alignment_bytes: int) -> Live:
    """The bytes of some blocks, by category."""
    forward = {s for one in graph.ops[: graph.forward_ops] for s in one.allocates}
    kept = replayed = gradients = temporaries = 0
    for block in blocks:
        if block.kind == "seed":
            kept += graph.ops[block.item].seed_bytes
            continue
        storage = block.item if block.kind == "storage" else graph.values[block.item].storage
        size_bytes = -(-graph.storages[storage].size_bytes // alignment_bytes) * alignment_bytes
        if block.kind == "replayed":
            replayed += size_bytes
        elif storage in forward:
            kept += size_bytes
        elif graph.storages[storage].persists:
            gradients += size_bytes
        else:
            temporaries += size_bytes
    temporaries += graph.ops[op].temporary_bytes + (graph.ops[op].scratch_bytes if is_replay else 0)
    return Live(op, is_replay, kept, replayed, gradients, temporaries)


def total_bytes(live: Live) -> int:
    """The sum over the categories."""
    return live.activation_bytes + live.replayed_bytes + live.gradient_bytes + live.temporary_bytes


def peak_bytes(graph: StepGraph, dropped: Iterable[int] = (), alignment_bytes: int = 1) -> int:
    """The highest moment of a micro-batch, residents not counted."""
    return max(total_bytes(live) for live in live_bytes(graph, dropped, alignment_bytes))


def step_peak_bytes(profile: Profile, graph: StepGraph, dropped: Iterable[int]) -> int:
    """The highest moment of the whole step, residents and optimizer included."""
    always = profile.residents.parameters_bytes + profile.residents.optimizer_bytes
    always += profile.residents.batch_bytes + profile.unexplained_bytes
    update = always + profile.residents.gradients_bytes
    later = _flat_bytes(profile.update, profile.alignment_bytes)
    born = sum(storage.size_bytes for storage in profile.first_update.storages)
    first = _flat_bytes(profile.first_update, profile.alignment_bytes) - born
    if graph.gradients_resident:
        always += profile.residents.gradients_bytes
    return max(update + later, update + first, always + peak_bytes(graph, dropped, profile.alignment_bytes))


def _flat_bytes(update: StepGraph, alignment_bytes: int) -> int:
    """What an optimizer step of one op (or none) allocates."""
    born = sum(-(-s.size_bytes // alignment_bytes) * alignment_bytes for s in update.storages)
    return born + sum(op.temporary_bytes for op in update.ops)


def is_valid(graph: StepGraph, dropped: frozenset[int]) -> bool:
    """Whether a replay finds all it reads: what is overwritten is there only if it is replayed too."""
    read = {v for value in dropped for v in graph.ops[graph.values[value].producer].inputs}
    return all(v in dropped for v in read if graph.values[v].is_overwritten)


class Choice(NamedTuple):
    """One set of values to replay, what it peaks at, and the seconds its replays take."""

    dropped: frozenset[int]
    peak_bytes: int
    recompute_s: float


def all_choices(profile: Profile, graph: StepGraph) -> list[Choice]:
    """Every valid choice there is; for graphs with few droppable values."""
    values = sorted(droppable(graph))
    assert len(values) <= 8, "too many choices to try them all"
    subsets = chain.from_iterable(combinations(values, size) for size in range(len(values) + 1))
    return [_choice(profile, graph, d) for d in map(frozenset, subsets) if is_valid(graph, d)]


def _choice(profile: Profile, graph: StepGraph, dropped: frozenset[int]) -> Choice:
    moments = live_bytes(graph, dropped, profile.alignment_bytes)
    again = [graph.ops[live.op].replay_s for live in moments if live.is_replay]
    return Choice(dropped, max(map(total_bytes, moments)), sum(again))


def best_plan_by_brute_force(choices: Iterable[Choice], free_bytes: int) -> Choice | None:
    """The valid choice that recomputes least within some bytes; None if none fits."""
    fitting = [choice for choice in choices if choice.peak_bytes <= free_bytes]
    return min(fitting, key=lambda choice: choice.recompute_s, default=None)
