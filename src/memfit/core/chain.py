"""The fastest way through a chain of segments in a given memory, recomputing in levels where that pays.

Note [The chain]
 1. ``first[s]`` says, for each memory, the least seconds of replay from segment s on, s being entered in the
    forward of the program itself. ``again[s, t]`` the same for the segments s to t when they are run again from
    the entry of s because the backward of t is next. Memory counts in ``units``, sizes rounded up.
 2. A segment is passed in one of two ways. *Choice*: it keeps what one of its choices keeps, and its
    backward replays the rest. *Jump*: only its entry stays; the segments up to a later one are run again
    when the backward gets there, in the same two ways. A jump within a jump is the next level.
 3. A segment that was run again has its last choice in its hands: what it drops is never kept at all.
 4. With the sizes rounded down instead, the same recursion bounds from below every way through the chain
    that is made of these choices.

Sources: the recursion over "keep the entry or all of it" is that of Rotor (Beaumont et al., arXiv:1911.13214)
and of Revolve (Griewank and Walther, 2000); choices of ops inside a segment in place of "all of it" as in
Rockmate (Zhao et al., arXiv:2307.01236).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memfit.core.choices import Choice
from memfit.core.segments import Segment

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Link:
    """One segment with its choices and what it takes to run it again.

    Attributes:
        again_s: Seconds to run it as far as the entry of the next.
        everything: The choice that drops all it can, of least peak.
    """

    segment: Segment
    choices: tuple[Choice, ...]
    entry_bytes: int
    again_s: float

    @property
    def everything(self) -> Choice:
        """The choice that keeps least; the faster of two."""
        return min(self.choices, key=lambda c: (c.kept_bytes, c.peak_bytes, c.seconds))


@dataclass(frozen=True, slots=True)
class Way:
    """How one segment is passed for the last time.

    Attributes:
        choice: What it drops.
        made_for: The segment whose backward its kept values are made for; -1: kept from the forward on.
    """

    choice: Choice
    made_for: int


class Chain:
    """The tables of one memory; see Note [The chain]."""

    def __init__(
        self, links: Sequence[Link], memory_bytes: int, units: int, *, round_up: bool = True
    ) -> None:
        self.links = links
        self.units = units
        self.unit_bytes = max(1, -(-memory_bytes // units))
        self.round: Callable[[float], int] = math.ceil if round_up else math.floor
        self._classes: dict[str, _Table] = {}
        self.tables = [self._table(link) for link in links]
        self.again: dict[tuple[int, int], FloatArray] = {}
        self.first: dict[int, FloatArray] = {}

    def _table(self, link: Link) -> _Table:
        """The sizes of a link in units."""
        s = link.segment
        return _Table(
            [self._units(c.kept_bytes) for c in link.choices],
            [
                max(
                    self._units(c.peak_bytes + s.backward_extra_bytes),
                    self._units(c.forward_peak_bytes + s.forward_extra_bytes),
                )
                for c in link.choices
            ],
            [c.seconds for c in link.choices],
            self._units(link.entry_bytes),
        )

    def _units(self, size_bytes: int) -> int:
        return max(0, self.round(size_bytes / self.unit_bytes))

    # ---- tables ----------------------------------------------------------------------------------

    def solve(self) -> float:
        """Fills the tables; the least seconds in all the memory, infinite if nothing fits."""
        last = len(self.links) - 1
        for length in range(1, last + 1):
            for s in range(0, last - length + 1):
                self.again[s, s + length - 1] = self._again(s, s + length - 1)
        for s in range(last, -1, -1):
            self.first[s] = self._first(s)
        return float(self.first[0][self.units])

    def _choose(self, s: int, rest: FloatArray | None) -> FloatArray:
        """The least seconds if a segment takes one of its choices; ``rest`` is what follows it."""
        table = self.tables[s]
        best = np.full(self.units + 1, np.inf)
        for kept, peak, seconds in zip(table.kept, table.peak, table.seconds, strict=True):
            low = max(peak, kept)
            if low > self.units:
                continue
            if rest is None:
                np.minimum(best[low:], seconds, out=best[low:])
            else:
                np.minimum(best[low:], rest[low - kept : self.units + 1 - kept] + seconds, out=best[low:])
        return best

    def _jump(self, s: int, t: int, rest: Callable[[int], FloatArray], again: bool) -> FloatArray:
        """The least seconds if only the entry of ``s`` stays, up to some later segment."""
        best = np.full(self.units + 1, np.inf)
        entry = self.tables[s].entry
        if entry > self.units:
            return best
        run_s = 0.0
        for nearer in range(s + 1, t + 1):
            run_s += self.links[nearer - 1].again_s if again else 0.0
            ahead, behind = rest(nearer), self.again[s, nearer - 1]
            np.minimum(
                best[entry:], ahead[: self.units + 1 - entry] + behind[entry:] + run_s, out=best[entry:]
            )
        return best

    def _again(self, s: int, t: int) -> FloatArray:
        """``again[s, t]``."""
        if s == t:
            link = self.links[s]
            best = np.full(self.units + 1, np.inf)
            peak = self.tables[s].peak[link.choices.index(link.everything)]
            best[min(peak, self.units + 1) :] = link.everything.seconds
            return best
        chosen = self._choose(s, self.again[s + 1, t]) + self.links[s].again_s
        return np.minimum(chosen, self._jump(s, t, lambda nearer: self.again[nearer, t], True))

    def _first(self, s: int) -> FloatArray:
        """``first[s]``."""
        last = len(self.links) - 1
        if s == last:
            return self._choose(s, None)
        return np.minimum(
            self._choose(s, self.first[s + 1]), self._jump(s, last, lambda nearer: self.first[nearer], False)
        )

    # ---- the way back ----------------------------------------------------------------------------

    def ways(self, memory_units: int | None = None) -> list[Way]:
        """How each segment is passed in the fastest way; the tables must be solved and feasible."""
        found: dict[int, Way] = {}
        pending = [(0, len(self.links) - 1, self.units if memory_units is None else memory_units, True)]
        while pending:
            s, t, memory, is_first = pending.pop()
            pending.extend(self._step(s, t, memory, is_first, found))
        return [found[s] for s in range(len(self.links))]

    def _step(
        self, s: int, t: int, memory: int, is_first: bool, found: dict[int, Way]
    ) -> list[tuple[int, int, int, bool]]:
        """Decides one segment of a stretch; returns the stretches that remain."""
        link, table = self.links[s], self.tables[s]
        made_for = -1 if is_first else t
        if s == t and not is_first:
            found[s] = Way(link.everything, t)
            return []
        rest = (lambda at: self.first[at]) if is_first else (lambda at: self.again[at, t])
        run_s = 0.0 if is_first else link.again_s
        options: list[tuple[float, int, int]] = []
        for i, (kept, peak, seconds) in enumerate(zip(table.kept, table.peak, table.seconds, strict=True)):
            if max(peak, kept) <= memory:
                ahead_s = float(rest(s + 1)[memory - kept]) if s < t else 0.0
                options.append((ahead_s + seconds + run_s, 0, i))
        run_s = 0.0
        for nearer in range(s + 1, t + 1):
            run_s += 0.0 if is_first else self.links[nearer - 1].again_s
            if table.entry <= memory:
                ahead_s = float(rest(nearer)[memory - table.entry])
                options.append((ahead_s + float(self.again[s, nearer - 1][memory]) + run_s, 1, nearer))
        _, is_jump, which = min(options)
        if is_jump:
            return [(which, t, memory - table.entry, is_first), (s, which - 1, memory, False)]
        found[s] = Way(link.choices[which], made_for)
        return [(s + 1, t, memory - table.kept[which], is_first)] if s < t else []


@dataclass(frozen=True, slots=True)
class _Table:
    """A link's sizes in units."""

    kept: list[int]
    peak: list[int]
    seconds: list[float]
    entry: int
