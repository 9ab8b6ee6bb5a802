"""Chooses which values to keep and which to replay: a mixed integer program for HiGHS.

Note [The program]
 Symbols: v value, o op, g slot. A *slot* is a stretch of the backward that begins where autograd first
 unpacks something; replays happen at its start.
 1. ``keep[v]`` is 1 if v is held from the forward on. ``made[o, g]`` is 1 if o has been replayed by slot g;
    it never falls. An op is replayed at most once, not earlier than ``window`` slots before its own
    backward, and not later than the last moment anything could need it.
 2. Need: a save of v first unpacked in slot g demands ``keep[v] + made[producer(v), g] >= 1``.
 3. Reach: replaying o by slot g demands the same of each of its inputs.
 4. Memory: at the start of each slot and at its highest moment, the bytes that live whatever the plan
    says, plus the kept values not yet released, plus the replayed ones, are at most the budget; and in
    the forward, the kept values whose program life is over.
 5. Cost: the seconds of the ops replayed by the end.
 Only ``keep`` is integer: given it, the least ``made`` is integral by itself. The program leaves out what
 lives within one replay, so ``core/plan.py`` lets ``core/timeline.py`` judge, and corrects the budget.

Source: the retention intervals are those of Moccasin (arXiv:2304.14463) cut at backward moments, in place
of Checkmate's per-op schedule (arXiv:1910.02653), whose relaxation is weak.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, hstack

from memfit.core.graph import LogKind, StepGraph
from memfit.core.timeline import droppable

FloatArray = NDArray[np.float64]

# The tree is cut by its size, so that a plan does not depend on the machine; time only guards against hangs.
_LIMITS = {"node_limit": 1, "time_limit": 120.0}


@dataclass(slots=True)
class _Rows:
    """Sparse rows under construction: sum of coefficients times columns >= lower."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)

    def add(self, terms: list[tuple[int, float]], lower: float) -> None:
        """One more row."""
        number = len(self.lower)
        for column, coefficient in terms:
            self.rows.append(number)
            self.columns.append(column)
            self.coefficients.append(coefficient)
        self.lower.append(lower)

    def matrix(self, width: int) -> csr_array:
        """The rows as a matrix."""
        return csr_array((self.coefficients, (self.rows, self.columns)), shape=(len(self.lower), width))


class Program:
    """The program of one graph, built once; :meth:`solve` takes the budget. See Note [The program]."""

    def __init__(
        self, graph: StepGraph, *, alignment_bytes: int, replay_overhead_s: float, window: int
    ) -> None:
        self.graph = graph
        self.window = window
        self._sizes = [-(-s.size_bytes // alignment_bytes) * alignment_bytes for s in graph.storages]
        self._overhead_s = replay_overhead_s
        self.droppable = droppable(graph)
        self._read_log()
        self._find_needs()
        self._number_columns()
        self._constraints = _Rows()
        self._add_needs()
        self._endings = {value: self._ending(value) for value in self.keep}
        self._certain_endings = {value: self._certain_ending(value) for value in self.keep}
        self._expected = self._memory_rows(certain=False)
        self._certain = self._memory_rows(certain=True)

    # ---- what the log says --------------------------------------------------------------------------

    def _read_log(self) -> None:
        """Positions of everything, slots, and the bytes alive whatever the plan says."""
        graph = self.graph
        self.position_of_op = [0] * len(graph.ops)
        self.freed_at = [len(graph.log)] * len(graph.storages)
        self.packed_at = [0] * len(graph.saves)
        self.unpacked_at: dict[int, int] = {}
        self.released_at = [len(graph.log)] * len(graph.saves)
        self.slots: list[int] = []
        self.natural: list[tuple[int, int]] = []  # (position, bytes) of each op
        live, op_since_unpack = 0, True
        for position, (kind, index) in enumerate(graph.log):
            if kind == LogKind.OP:
                op = graph.ops[index]
                live += sum(self._sizes[s] for s in op.allocates)
                self.natural.append((position, live + op.temporary_bytes))
                self.position_of_op[index] = position
                op_since_unpack = True
            elif kind == LogKind.FREE:
                live -= self._sizes[index]
                self.freed_at[index] = position
            elif kind == LogKind.PACK:
                self.packed_at[index] = position
            elif kind == LogKind.RELEASE:
                self.released_at[index] = position
            else:
                self.unpacked_at.setdefault(index, position)
                if op_since_unpack:
                    self.slots.append(position)
                    op_since_unpack = False

    def _slot(self, position: int) -> int:
        """The slot a position of the backward lies in."""
        return bisect.bisect_right(self.slots, position) - 1

    def _find_needs(self) -> None:
        """First need and end of each value, and the slots in which each op may be replayed."""
        graph = self.graph
        self.first_need: dict[int, int] = {}
        self.end: dict[int, int] = {}
        homes = []
        for save, value in enumerate(s.value for s in graph.saves):
            if save in self.unpacked_at:
                slot = self._slot(self.unpacked_at[save])
                self.first_need[value] = min(slot, self.first_need.get(value, slot))
                homes.append((self.packed_at[save], slot))
            self.end[value] = max(self.released_at[save], self.end.get(value, 0))
        self._homes = sorted(homes)
        latest_after = np.maximum.accumulate([slot for _, slot in reversed(self._homes)] or [0])[::-1]
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.early: dict[int, int] = {}
        self.late: dict[int, int] = {}
        for index in range(graph.forward_ops - 1, -1, -1):
            op = graph.ops[index]
            if self.droppable.isdisjoint(op.outputs):
                continue
            needs = [self.first_need[v] for v in op.outputs if v in self.first_need]
            readers = [r for v in op.outputs for r in self.readers[v]]
            if not needs and not readers:
                continue
            after = bisect.bisect_left(self._homes, (self.position_of_op[index], -1))
            home = int(latest_after[after]) if after < len(self._homes) else 0
            self.late[index] = max(needs + [self.late[r] for r in readers])
            earliest = min(needs + [self.early[r] for r in readers])
            self.early[index] = min(max(earliest, home - self.window), self.late[index])
            for value in op.inputs:
                self.readers[value].append(index)

    # ---- columns and rows ---------------------------------------------------------------------------

    def _number_columns(self) -> None:
        """``keep`` columns first, then ``made`` columns op by op."""
        values = sorted(set(self.first_need) | {v for v in self.readers if self.readers[v]})
        self.keep = {v: i for i, v in enumerate(values) if self.graph.values[v].producer >= 0}
        self.keep = {v: i for i, v in enumerate(self.keep)}
        self.made: dict[int, int] = {}
        column = len(self.keep)
        for op in sorted(self.late):
            self.made[op] = column
            column += self.late[op] - self.early[op] + 1
        self.width = column

    def _made(self, op: int, slot: int) -> int | None:
        """The column that says whether an op has been replayed by a slot; None: never so early."""
        if op not in self.made or slot < self.early[op]:
            return None
        return self.made[op] + min(slot, self.late[op]) - self.early[op]

    def _have(self, value: int, slot: int) -> list[tuple[int, float]]:
        """Terms whose sum is at least 1 if a value is there in a slot."""
        terms = [(self.keep[value], 1.0)]
        column = self._made(self.graph.values[value].producer, slot) if value in self.droppable else None
        return terms if column is None else [*terms, (column, 1.0)]

    def _add_needs(self) -> None:
        """Rules 1 to 3."""
        for value, slot in self.first_need.items():
            self._constraints.add(self._have(value, slot), 1.0)
        for op in self.made:
            for slot in range(self.early[op], self.late[op] + 1):
                column = self._made(op, slot)
                assert column is not None
                if slot > self.early[op]:
                    self._constraints.add([(column, 1.0), (column - 1, -1.0)], 0.0)
                for value in self.graph.ops[op].inputs:
                    if value in self.keep:
                        self._constraints.add([*self._have(value, slot), (column, -1.0)], 0.0)

    def _memory_rows(self, *, certain: bool) -> _Rows:
        """Rule 4, each row as: minus the plan's bytes >= natural bytes (minus the budget).

        ``certain`` rows count only what is alive under every plan with these columns, so that their
        relaxation bounds every plan from below; the others also count what is expected to be.
        """
        rows = _Rows()
        first_backward = self.slots[0] if self.slots else len(self.graph.log)
        for position, natural in self._forward_moments(first_backward):
            rows.add(self._kept_terms(position, certain), natural)
        ends = [*self.slots[1:], len(self.graph.log)]
        moments = np.array([p for p, _ in self.natural])
        heights = np.array([b for _, b in self.natural])
        for slot, (start, end) in enumerate(zip(self.slots, ends, strict=True)):
            low, high = np.searchsorted(moments, [start, end])
            if low == high:
                continue
            for moment in {int(low), int(low) + int(np.argmax(heights[low:high]))}:
                position = int(moments[moment])
                terms = self._kept_terms(position, certain) + self._made_terms(position, slot, certain)
                rows.add(terms, int(heights[moment]))
        return rows

    def _forward_moments(self, first_backward: int) -> list[tuple[int, int]]:
        """The moments of the forward that can be its peak: kept bytes only grow, so a lower one
        followed within its stretch by a higher one is left out. As many stretches as slots."""
        forward = [m for m in self.natural if m[0] < first_backward]
        stretch = max(1, len(forward) // max(1, len(self.slots)))
        found = []
        for start in range(0, len(forward), stretch):
            highest = -1
            for moment in reversed(forward[start : start + stretch]):
                if moment[1] > highest:
                    highest = moment[1]
                    found.append(moment)
        return found

    def _ending(self, value: int) -> int:
        """The last position at which a value may still be wanted."""
        replays = [self.slots[self.late[r]] for r in self.readers[value]]
        return max([self.end.get(value, 0), *replays])

    def _certain_ending(self, value: int) -> int:
        """A position up to which a value that was worth keeping surely lives."""
        replays = [self.slots[self.early[r]] for r in self.readers[value]]
        return max(self.end.get(value, 0), min(replays, default=0))

    def _kept_terms(self, position: int, certain: bool) -> list[tuple[int, float]]:
        """Bytes of kept values that only the plan keeps alive at a position."""
        endings = self._certain_endings if certain else self._endings
        found = []
        for value, column in self.keep.items():
            storage = self.graph.values[value].storage
            if self.freed_at[storage] < position <= endings.get(value, -1):
                found.append((column, -float(self._sizes[storage])))
        return found

    def _made_terms(self, position: int, slot: int, certain: bool) -> list[tuple[int, float]]:
        """Bytes of replayed values still wanted at a position of a slot."""
        found: dict[int, float] = defaultdict(float)
        for op in self.made:
            column = self._made(op, slot)
            if column is None:
                continue
            for value in self.graph.ops[op].outputs:
                size = float(self._sizes[self.graph.values[value].storage])
                if certain:
                    if position <= self.end.get(value, -1):
                        found[column] -= size
                        if len(self.graph.ops[op].outputs) > 1:
                            found[self.keep[value]] += size  # replayed for a sibling, not retained
                elif value in self.end:
                    if position <= self._endings.get(value, -1):
                        found[column] -= size
                elif self.readers[value]:
                    last = max(self.readers[value], key=lambda r: self.late[r])
                    reader = self._made(last, slot)
                    if reader is not None and slot <= self.late[last]:
                        found[column] -= size
                        found[reader] += size
        return list(found.items())

    # ---- solving ------------------------------------------------------------------------------------

    def _costs(self) -> np.ndarray:
        """Rule 5."""
        cost = np.zeros(self.width)
        for op in self.made:
            column = self._made(op, self.late[op])
            assert column is not None
            cost[column] = self.graph.ops[op].seconds + self._overhead_s
        return cost

    def bound_s(self, budget_bytes: int) -> float | None:
        """Seconds that every choice within a budget recomputes at least; None if none can exist."""
        result = self._milp(self._costs(), self._certain, budget_bytes, integer=False)
        return None if result.x is None else max(0.0, float(result.fun))

    def relax(self, budget_bytes: int) -> list[float] | None:
        """How much of each value (by column) the relaxation keeps; None if it is infeasible."""
        result = self._milp(self._costs(), self._expected, budget_bytes, integer=False)
        return None if result.x is None else [round(float(part), 6) for part in result.x[: len(self.keep)]]

    def wishes(self, relaxed: list[float]) -> list[int]:
        """The values in the order in which a relaxation wants them kept, dearest per byte first."""
        return sorted(self.keep, key=lambda value: (-relaxed[self.keep[value]], -self._density(value)))

    def _density(self, value: int) -> float:
        """Seconds of replay that a kept byte saves."""
        seconds = self.graph.ops[self.graph.values[value].producer].seconds
        return seconds / max(1, self.graph.size_bytes(value))

    def solve(self, budget_bytes: int, relaxed: list[float], *, gap: float) -> frozenset[int] | None:
        """The values to drop in the cheapest choice found; None if none was.

        Only values that the relaxation keeps at least in part may be kept: that leaves few, and
        measured on transformers it costs at most 0.5 % of a forward.

        Args:
            gap: Stop when no choice can be cheaper by more than this part of the cost.
        """
        upper = self._upper()
        upper[: len(self.keep)] *= np.array(relaxed) > 0
        result = self._milp(self._costs(), self._expected, budget_bytes, integer=True, gap=gap, upper=upper)
        return None if result.x is None else self._dropped(self._kept(result.x))

    def least(self) -> frozenset[int]:
        """The values to drop so that the peak is lowest, whatever that costs."""
        rows, needs = self._expected, self._constraints
        unit = max(1.0, max(rows.lower, default=1.0))
        peak = csr_array(np.ones((len(rows.lower), 1)))
        nothing = csr_array((len(needs.lower), 1))
        constraints = [
            LinearConstraint(hstack([needs.matrix(self.width), nothing]), np.array(needs.lower)),
            LinearConstraint(hstack([rows.matrix(self.width) / unit, peak]), np.array(rows.lower) / unit),
        ]
        cost = self._costs()
        total = max(float(cost.sum()), 1e-12)
        result = milp(
            np.append(cost / total * 1e-3, 1.0),
            constraints=constraints,
            integrality=np.append(self._integrality(), 0),
            bounds=Bounds(0, np.append(self._upper(), np.inf)),
            options=_LIMITS | {"mip_rel_gap": 2e-2},
        )
        return self.closure(set()) if result.x is None else self._dropped(self._kept(result.x))

    def _milp(
        self,
        cost: FloatArray,
        memory: _Rows,
        budget_bytes: int,
        *,
        integer: bool,
        gap: float = 0.0,
        upper: FloatArray | None = None,
    ) -> OptimizeResult:
        """Hands the program to HiGHS, scaled so that seconds and bytes are of the size of one."""
        unit_s, unit_bytes = max(float(cost.max(initial=0.0)), 1e-12), max(1.0, budget_bytes / 100)
        constraints = [
            LinearConstraint(self._constraints.matrix(self.width), np.array(self._constraints.lower))
        ]
        if memory.lower:
            slack = (np.array(memory.lower) - budget_bytes) / unit_bytes
            constraints.append(LinearConstraint(memory.matrix(self.width) / unit_bytes, slack))
        result = milp(
            cost / unit_s,
            constraints=constraints,
            integrality=self._integrality() if integer else None,
            bounds=Bounds(0, self._upper() if upper is None else upper),
            options=_LIMITS | {"mip_rel_gap": gap},
        )
        if result.fun is not None:
            result.fun *= unit_s
        return result

    def _integrality(self) -> FloatArray:
        """Only ``keep`` is integer."""
        return np.array([1.0] * len(self.keep) + [0.0] * (self.width - len(self.keep)))

    def _upper(self) -> FloatArray:
        """A version that is overwritten cannot be kept."""
        upper = np.ones(self.width)
        for value, column in self.keep.items():
            upper[column] = not self.graph.values[value].is_overwritten
        return upper

    def _kept(self, x: FloatArray) -> set[int]:
        """The values a solution keeps."""
        return {v for v, column in self.keep.items() if x[column] > 0.5}

    def closure(self, kept: set[int]) -> frozenset[int]:
        """The values to drop if only these are kept: what is saved, and what replaying it takes."""
        return self._dropped(kept)

    def _dropped(self, kept: set[int]) -> frozenset[int]:
        """The saved values that are not kept, and those that must be replayed to make them."""
        dropped: set[int] = set()
        stack = [v for v in self.first_need if v not in kept and v in self.droppable]
        while stack:
            value = stack.pop()
            if value not in dropped:
                dropped.add(value)
                inputs = self.graph.ops[self.graph.values[value].producer].inputs
                stack.extend(v for v in inputs if v not in kept and v in self.droppable)
        return frozenset(dropped)
