"""When things happen in a step graph, as the planner needs it: slots, needs, lives, high moments.

Note [Slots]
 1. A *slot* is a stretch of the backward that begins where autograd first unpacks something after an op ran.
    Replays happen at its start, before its ops.
 2. The *home* of a forward op is the last slot that unpacks something packed after the op ran: its own
    backward, or as near as the log tells.
 3. *Natural* bytes are alive whatever a plan says: what the program itself holds, and temporaries.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass, field

from memfit.core.graph import LogKind, StepGraph
from memfit.core.timeline import droppable


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment that can be the peak: its place in the log, its slot (-1: forward), its natural bytes."""

    position: int
    slot: int
    natural_bytes: int


@dataclass(slots=True)
class Moments:
    """The facts of one graph; :func:`read_moments` fills it.

    Attributes:
        sizes: Bytes of each storage as the allocator rounds them.
        slots: Log position at which each slot begins.
        freed_at: Log position at which the program lets go of each storage.
        first_need: Slot in which each saved value is first unpacked.
        released_at: Log position of the last release of each saved value.
        readers: Replayable ops that read each value and may be needed.
        early, late: First and last slot in which each op may be replayed.
        peaks: The moments that can be the peak, in order.
    """

    graph: StepGraph
    sizes: list[int]
    droppable: frozenset[int]
    slots: list[int] = field(default_factory=list)
    freed_at: list[int] = field(default_factory=list)
    first_need: dict[int, int] = field(default_factory=dict)
    released_at: dict[int, int] = field(default_factory=dict)
    readers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    early: dict[int, int] = field(default_factory=dict)
    late: dict[int, int] = field(default_factory=dict)
    peaks: list[Moment] = field(default_factory=list)

    def ending(self, value: int, *, certain: bool) -> int:
        """The last log position at which a kept value is wanted: at least (certain), or at most.

        A saved value surely lives until its release and maybe no longer: who reads it need not be replayed.
        """
        released_at = self.released_at.get(value, -1)
        if certain and released_at >= 0:
            return released_at
        chosen = self.early if certain else self.late
        replays = [self.slots[chosen[reader]] for reader in self.readers[value]]
        return max(released_at, (min if certain else max)(replays, default=-1))


def read_moments(graph: StepGraph, *, alignment_bytes: int, window: int) -> Moments:
    """Reads a graph. No op is replayed more than ``window`` slots before its home.

    Cost: linear in the log, but for sorting.
    """
    sizes = [-(-s.size_bytes // alignment_bytes) * alignment_bytes for s in graph.storages]
    found = Moments(graph, sizes, droppable(graph), freed_at=[len(graph.log)] * len(sizes))
    homes, op_positions, heights = _read_log(found)
    _find_ranges(found, homes, op_positions, window)
    found.peaks = [*_forward_peaks(found, heights), *_backward_peaks(found, heights)]
    return found


def _read_log(found: Moments) -> tuple[list[tuple[int, int]], list[int], list[tuple[int, int]]]:
    """Slots, needs and lives; returns (packed at, slot) of each save, positions of ops, natural bytes."""
    graph = found.graph
    packed_at = [0] * len(graph.saves)
    homes: list[tuple[int, int]] = []
    op_positions: list[int] = [0] * len(graph.ops)
    heights: list[tuple[int, int]] = []
    live_bytes, op_since_unpack = 0, True
    for position, (kind, item) in enumerate(graph.log):
        if kind == LogKind.OP:
            live_bytes += sum(found.sizes[s] for s in graph.ops[item].allocates)
            heights.append((position, live_bytes + graph.ops[item].temporary_bytes))
            op_positions[item] = position
            op_since_unpack = True
        elif kind == LogKind.FREE:
            live_bytes -= found.sizes[item]
            found.freed_at[item] = position
        elif kind == LogKind.PACK:
            packed_at[item] = position
        elif kind == LogKind.RELEASE:
            value = graph.saves[item].value
            found.released_at[value] = max(position, found.released_at.get(value, -1))
        else:
            if op_since_unpack:
                found.slots.append(position)
                op_since_unpack = False
            found.first_need.setdefault(graph.saves[item].value, len(found.slots) - 1)
            homes.append((packed_at[item], len(found.slots) - 1))
    return sorted(homes), op_positions, heights


def _find_ranges(found: Moments, homes: list[tuple[int, int]], op_positions: list[int], window: int) -> None:
    """The slots in which each op may be replayed, the last op of the forward first."""
    latest_after = [slot for _, slot in homes]
    for i in range(len(latest_after) - 2, -1, -1):
        latest_after[i] = max(latest_after[i], latest_after[i + 1])
    for index in range(found.graph.forward_ops - 1, -1, -1):
        op = found.graph.ops[index]
        if found.droppable.isdisjoint(op.outputs):
            continue
        needs = [found.first_need[v] for v in op.outputs if v in found.first_need]
        readers = [reader for v in op.outputs for reader in found.readers[v]]
        if not needs and not readers:
            continue
        after = bisect.bisect_left(homes, (op_positions[index], -1))
        home = latest_after[after] if after < len(homes) else 0
        found.late[index] = max([*needs, *(found.late[r] for r in readers)])
        earliest = min([*needs, *(found.early[r] for r in readers)])
        found.early[index] = min(max(earliest, home - window), found.late[index])
        for value in op.inputs:
            found.readers[value].append(index)


def _forward_peaks(found: Moments, heights: list[tuple[int, int]]) -> list[Moment]:
    """The forward moments that can be its peak, in about as many stretches as there are slots.

    Kept bytes only grow in the forward, so a moment followed by a higher one in its stretch is left out.
    """
    end = found.slots[0] if found.slots else len(found.graph.log)
    forward = [height for height in heights if height[0] < end]
    stretch = max(1, len(forward) // max(1, len(found.slots)))
    peaks: list[Moment] = []
    for start in range(0, len(forward), stretch):
        highest, tops = -1, []
        for position, natural_bytes in reversed(forward[start : start + stretch]):
            if natural_bytes > highest:
                highest = natural_bytes
                tops.append(Moment(position, -1, natural_bytes))
        peaks.extend(reversed(tops))
    return peaks


def _backward_peaks(found: Moments, heights: list[tuple[int, int]]) -> list[Moment]:
    """The first and the naturally highest op of each slot."""
    positions = [position for position, _ in heights]
    ends = [*found.slots[1:], len(found.graph.log)] if found.slots else []
    peaks: list[Moment] = []
    for slot, (start, end) in enumerate(zip(found.slots, ends, strict=True)):
        low, high = bisect.bisect_left(positions, start), bisect.bisect_left(positions, end)
        if low < high:
            top = max(range(low, high), key=lambda i: heights[i][1])
            peaks.extend(Moment(heights[i][0], slot, heights[i][1]) for i in sorted({low, top}))
    return peaks
