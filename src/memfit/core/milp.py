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
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from memfit.core.graph import LogKind, StepGraph
from memfit.core.timeline import droppable


@dataclass(frozen=True, slots=True)
class Choice:
    """What the program found: values to drop, and the seconds no choice of this kind can undercut."""

    dropped: frozenset[int]
    lower_bound_s: float


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
        self._memory = _Rows()
        self._add_memory()

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

    def _add_memory(self) -> None:
        """Rule 4: each row says natural bytes + plan's bytes <= budget, written as -plan >= natural - budget."""
        first_backward = self.slots[0] if self.slots else len(self.graph.log)
        for position, natural in self._forward_moments(first_backward):
            self._memory.add(self._kept_terms(position), natural)
        ends = [*self.slots[1:], len(self.graph.log)]
        moments = np.array([p for p, _ in self.natural])
        heights = np.array([b for _, b in self.natural])
        for slot, (start, end) in enumerate(zip(self.slots, ends, strict=True)):
            low, high = np.searchsorted(moments, [start, end])
            if low == high:
                continue
            top = low + int(np.argmax(heights[low:high]))
            before = int(heights[low - 1]) if low else 0
            self._memory.add(
                self._kept_terms(start) + self._made_terms(start, slot),
                min(before, int(heights[low])),
            )
            position = int(moments[top])
            self._memory.add(
                self._kept_terms(position) + self._made_terms(position, slot), int(heights[top])
            )

    def _forward_moments(self, first_backward: int) -> list[tuple[int, int]]:
        """The highest moment of each stretch of the forward, as many stretches as slots."""
        forward = [m for m in self.natural if m[0] < first_backward]
        stretch = max(1, len(forward) // max(1, len(self.slots)))
        tops = [
            max(forward[i : i + stretch], key=lambda m: m[1]) for i in range(0, len(forward), stretch)
        ]
        return [*tops, *forward[-1:]]

    def _ending(self, value: int) -> int:
        """The last position at which a value may still be wanted."""
        replays = [self.slots[self.late[r]] for r in self.readers[value]]
        return max([self.end.get(value, 0), *replays])

    def _kept_terms(self, position: int) -> list[tuple[int, float]]:
        """Bytes of kept values that only the plan keeps alive at a position."""
        found = []
        for value, column in self.keep.items():
            storage = self.graph.values[value].storage
            if self.freed_at[storage] < position <= self._ending_of[value]:
                found.append((column, -float(self._sizes[storage])))
        return found

    def _made_terms(self, position: int, slot: int) -> list[tuple[int, float]]:
        """Bytes of replayed values still wanted at a position of a slot."""
        found: dict[int, float] = defaultdict(float)
        for op in self.made:
            column = self._made(op, slot)
            if column is None:
                continue
            for value in self.graph.ops[op].outputs:
                size = self._sizes[self.graph.values[value].storage]
                if value in self.end:
                    if position <= self._ending_of.get(value, -1):
                        found[column] -= size
                elif self.readers[value]:
                    last = max(self.readers[value], key=lambda r: self.late[r])
                    reader = self._made(last, slot)
                    if reader is not None and slot <= self.late[last]:
                        found[column] -= size
                        found[reader] += size
        return list(found.items())

    @property
    def _ending_of(self) -> dict[int, int]:
        """Cached endings."""
        if not hasattr(self, "_endings"):
            self._endings = {v: self._ending(v) for v in self.keep}
        return self._endings

    # ---- solving ------------------------------------------------------------------------------------

    def _costs(self) -> np.ndarray:
        """Rule 5."""
        cost = np.zeros(self.width)
        for op in self.made:
            column = self._made(op, self.late[op])
            assert column is not None
            cost[column] = self.graph.ops[op].seconds + self._overhead_s
        return cost

    def solve(self, budget_bytes: int, *, integer: bool = True, gap: float = 1e-3, limit_s: float = 20) -> Choice | None:
        """The cheapest choice within a budget on plan-dependent and natural bytes, None if there is none."""
        constraints = [LinearConstraint(self._constraints.matrix(self.width), np.array(self._constraints.lower))]
        if self._memory.lower:
            natural = np.array(self._memory.lower)
            scale = max(1.0, float(budget_bytes)) / 100
            constraints.append(
                LinearConstraint(self._memory.matrix(self.width) / scale, (natural - budget_bytes) / scale)
            )
        integrality = np.zeros(self.width)
        integrality[: len(self.keep)] = integer
        upper = np.ones(self.width)
        for value, column in self.keep.items():
            if self.graph.values[value].is_overwritten:
                upper[column] = 0
        cost = self._costs()
        unit = max(float(cost.max(initial=0.0)), 1e-12)
        result = milp(
            cost / unit,
            constraints=constraints,
            integrality=integrality,
            bounds=Bounds(0, upper),
            options={"mip_rel_gap": gap, "time_limit": limit_s},
        )
        if result.x is None:
            return None
        bound = result.mip_dual_bound if integer else result.fun
        return Choice(self._dropped(result.x), max(0.0, float(bound) * unit))

    def _dropped(self, x: np.ndarray) -> frozenset[int]:
        """The values to drop, and those that must be replayed to make them."""
        kept = {v for v, column in self.keep.items() if x[column] > 0.5}
        dropped: set[int] = set()
        stack = [v for v in self.first_need if v not in kept and v in self.droppable]
        while stack:
            value = stack.pop()
            if value in dropped:
                continue
            dropped.add(value)
            for needed in self.graph.ops[self.graph.values[value].producer].inputs:
                if needed not in kept and needed in self.droppable:
                    stack.append(needed)
        return frozenset(dropped)
