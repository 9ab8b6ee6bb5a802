"""Plans on a fixed ladder of memories, so that more memory is never slower.

Note [The ladder]
 1. Solving for the very budget that was asked for is a little better here and a little worse there, so a
    larger budget could end with a slower plan. The plans of a ladder do not depend on the budget: each *rung*
    is what is proposed for some memory. The answer is the fastest plan of all rungs that really fits, of
    equally fast ones that of least peak. More memory only adds plans, which peak above the smaller budget.
 2. *Of a chain.* One table answers for all memories below its own, so the rungs are the steps of few tables:
    one for all the memory that the step would take, one for half of it, and so on to the least; one more is
    fine there. Few rungs are looked at: those a little above the budget (sizes were rounded), and from there
    down to the first that fits. A lower one takes as many seconds as its table says or more, that is, longer.
    Where a proposal overshoots by much, half of that is skipped.
 3. *Of a program.* A rung is the relaxation for its memory, rounded in several ways, and on some rungs the
    program solved, each with a few more values kept one by one. Rungs are looked at from the budget down,
    until the bound says that none below can be faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from memfit.core.chain import Chain, Link
from memfit.core.graph import Level
from memfit.core.links import levels_of
from memfit.core.milp import Program

_ABOVE = 0.003  # of the budget: proposals for so much more may fit it all the same
_STRIDE = 2  # units from one rung to the next, at least
_NEAR = 8  # units of overshoot below which no rung is skipped
_LEAST = 1.1  # of the least memory: where the last table begins
_RATIO = 0.98  # from one rung of a program to the next
_REACH = 1.04  # how far above its rung a plan may peak
_SOLVED = 2  # the program is solved on every second rung
_GAP = 5e-3
_MORE = 8  # values kept in addition, one by one
_OVERLAP = 0.99  # of where the next table begins, in case it finds no way there


Dropped = Mapping[int, Level]


def single(dropped: frozenset[int]) -> Dropped:
    """Values that are made once each."""
    return dict.fromkeys(sorted(dropped), Level())


class Judged(NamedTuple):
    """A choice of values to drop, as the simulation sees it."""

    dropped: Dropped
    peak_bytes: int
    seconds: float


def _is_better(one: Judged, other: Judged) -> bool:
    """Faster, or as fast with a lower peak."""
    return (one.seconds, one.peak_bytes) < (other.seconds, other.peak_bytes)


class _Table:
    """A chain solved in some memory, and its least seconds by unit of it."""

    def __init__(self, links: Sequence[Link], memory_bytes: float, units: int, *, bound: bool) -> None:
        self.chain = Chain(links, memory_bytes, units, bound=bound)
        self.seconds = self.chain.solve()
        self.memory_bytes = memory_bytes
        self.unit_bytes = memory_bytes / units
        feasible = np.flatnonzero(np.isfinite(self.seconds))
        self.least_unit = int(feasible[0]) if len(feasible) else None

    @property
    def last_bytes(self) -> float | None:
        """The memory of one more table, the last; None if the next has half the memory, or there is none."""
        if self.least_unit is None or 2 * self.least_unit <= len(self.seconds) - 1:
            return None
        return min(self.memory_bytes, _LEAST * (self.least_unit + 1) * self.unit_bytes)

    def steps(self, low_bytes: float, high_bytes: float) -> Iterator[int]:
        """The least unit of each step of the table between two memories, the highest first."""
        unit = min(len(self.seconds) - 1, int(high_bytes / self.unit_bytes))
        while self.least_unit is not None and unit >= self.least_unit and unit * self.unit_bytes > low_bytes:
            unit -= unit % _STRIDE
            if not math.isfinite(self.seconds[unit]):
                return
            # The table falls as memory grows: the first unit with no more seconds than this one.
            step = int(np.argmax(self.seconds <= self.seconds[unit]))
            yield step
            unit = step - 1


class ChainLadder:
    """The rungs of one chain. See Note [The ladder].

    Args:
        most_bytes: The peak without any recomputation.
        units: How finely each table counts memory.
        judge: Simulates a choice.
    """

    def __init__(
        self,
        links: Sequence[Link],
        most_bytes: int,
        units: int,
        judge: Callable[[Dropped], Judged],
    ) -> None:
        self._links = links
        self._most_bytes = most_bytes
        self._units = units
        self._judge = judge
        self._tables: dict[tuple[float, bool], _Table] = {}
        self._judged: dict[tuple[float, int], Judged] = {}

    def bound_s(self, free_bytes: int) -> float:
        """No way through the chain within some memory takes fewer seconds; infinite if there is none."""
        table = self._table(self._octave_bytes(free_bytes), True)
        if table.last_bytes is not None and free_bytes <= table.last_bytes:
            table = self._table(table.last_bytes, True)
        return float(table.seconds[min(self._units, math.ceil(free_bytes / table.unit_bytes))])

    def best(self, free_bytes: int) -> Judged | None:
        """The fastest rung that fits, None if none does."""
        best: Judged | None = None
        skipped_to = math.inf
        for table, unit in self._rungs(free_bytes * (1 + _ABOVE)):
            memory_bytes = unit * table.unit_bytes
            if best is not None and table.seconds[unit] >= best.seconds:
                break
            if memory_bytes > skipped_to:
                continue
            rung = self._rung(table, unit)
            over_bytes = rung.peak_bytes - free_bytes
            if over_bytes > _NEAR * table.unit_bytes:
                skipped_to = memory_bytes - over_bytes / 2
            elif over_bytes <= 0 and (best is None or _is_better(rung, best)):
                best = rung
        return best or next((rung for rung in self.least() if rung.peak_bytes <= free_bytes), None)

    def least(self) -> list[Judged]:
        """The lowest rungs of the last two tables, that of least peak first."""
        coarse = self._table(self._most_bytes, False)
        if coarse.least_unit is None:
            return []
        about_bytes = _LEAST * (coarse.least_unit + 1) * coarse.unit_bytes
        tables = [table for table, _ in self._tables_from(min(about_bytes, self._most_bytes))][-2:]
        found = [self._rung(table, table.least_unit) for table in tables if table.least_unit is not None]
        return sorted(found, key=lambda rung: (rung.peak_bytes, rung.seconds))

    def _rungs(self, limit_bytes: float) -> Iterator[tuple[_Table, int]]:
        """The rungs below a memory, the highest first."""
        for table, low_bytes in self._tables_from(limit_bytes):
            for unit in table.steps(low_bytes, limit_bytes):
                yield table, unit

    def _rung(self, table: _Table, unit: int) -> Judged:
        """One rung, simulated."""
        key = table.memory_bytes, unit
        if key not in self._judged:
            self._judged[key] = self._judge(levels_of(self._links, table.chain.ways(unit)))
        return self._judged[key]

    def _tables_from(self, memory_bytes: float) -> Iterator[tuple[_Table, float]]:
        """The tables for some memory and for less, each with the memory down to which its rungs count."""
        octave_bytes = self._octave_bytes(memory_bytes)
        while True:
            table = self._table(octave_bytes, False)
            last_bytes = table.last_bytes
            if last_bytes is not None:
                yield table, last_bytes
                yield self._table(last_bytes, False), 0.0
                return
            yield table, _OVERLAP * octave_bytes / 2
            if table.least_unit is None:
                return
            octave_bytes /= 2

    def _octave_bytes(self, memory_bytes: float) -> float:
        """All the memory, or half, or half of that: the least that is enough."""
        halvings = max(0, math.floor(math.log2(self._most_bytes / memory_bytes)))
        return float(self._most_bytes / 2**halvings)

    def _table(self, memory_bytes: float, bound: bool) -> _Table:
        """A table, solved once."""
        key = memory_bytes, bound
        if key not in self._tables:
            self._tables[key] = _Table(self._links, memory_bytes, self._units, bound=bound)
        return self._tables[key]


class ProgramLadder:
    """The rungs of one program. See Note [The ladder] 3.

    Args:
        most_bytes: The peak without any recomputation.
        judge: Simulates a choice.
    """

    def __init__(self, program: Program, most_bytes: int, judge: Callable[[Dropped], Judged]) -> None:
        self._program = program
        self._most_bytes = most_bytes
        self._judge = judge
        self._bounds: dict[int, float] = {}
        self._rungs: dict[int, list[Judged]] = {}

    def bound_s(self, free_bytes: int) -> float:
        """No plan of the program within some memory takes fewer seconds; infinite if there is none."""
        if free_bytes not in self._bounds:
            bound_s = self._program.bound_s(free_bytes)
            self._bounds[free_bytes] = math.inf if bound_s is None else bound_s
        return self._bounds[free_bytes]

    def best(self, free_bytes: int, known: Judged | None) -> Judged | None:
        """The fastest plan that fits, of the rungs and one known already; None if none does."""
        best = known
        rung = math.ceil(math.log(self._most_bytes / free_bytes) / -math.log(_RATIO))
        while True:
            bound_s = self.bound_s(min(free_bytes, int(self._memory_bytes(rung) * _REACH)))
            if math.isinf(bound_s) or (best is not None and bound_s >= best.seconds):
                return best
            for plan in self._plans(rung):
                if plan.peak_bytes <= free_bytes and (best is None or _is_better(plan, best)):
                    best = plan
            rung += 1

    def least(self) -> list[Judged]:
        """Choices of which one peaks lowest, as far as is known."""
        found = [self._judge(single(d)) for d in (self._program.least(), self._program.closure(set()))]
        return sorted(found, key=lambda plan: (plan.peak_bytes, plan.seconds))

    def _memory_bytes(self, rung: int) -> int:
        return int(self._most_bytes * _RATIO**rung)

    def _plans(self, rung: int) -> list[Judged]:
        """The plans of one rung; none reaches far above it."""
        if rung not in self._rungs:
            memory_bytes = self._memory_bytes(rung)
            relaxed = self._program.relax(memory_bytes)
            found = [] if relaxed is None else self._rounded(memory_bytes, relaxed)
            if relaxed is not None and rung % _SOLVED == 0:
                found += self._solved(memory_bytes, relaxed)
            self._rungs[rung] = [plan for plan in found if plan.peak_bytes <= memory_bytes * _REACH]
        return self._rungs[rung]

    def _rounded(self, memory_bytes: int, relaxed: list[float]) -> list[Judged]:
        """As many of the relaxation's wishes granted as fit, and a few more."""
        wishes = self._program.wishes(relaxed)
        low, high = 0, len(wishes)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._keeping(wishes[:middle]).peak_bytes <= memory_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return [self._keeping(wishes[:some]) for some in range(low, min(low + _MORE, len(wishes)) + 1)]

    def _solved(self, memory_bytes: int, relaxed: list[float]) -> list[Judged]:
        """What the program says, and the same with a few more of the wishes granted."""
        dropped = self._program.solve(memory_bytes, relaxed, gap=_GAP)
        if dropped is None:
            return []
        wishes = self._program.wishes(relaxed)
        kept = [value for value in wishes if value not in dropped]
        more = [value for value in wishes if value in dropped][:_MORE]
        return [self._keeping([*kept, *more[:some]]) for some in range(len(more) + 1)]

    def _keeping(self, kept: Sequence[int]) -> Judged:
        return self._judge(single(self._program.closure(set(kept))))
