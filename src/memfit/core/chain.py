"""The fastest way through a chain of segments in a given memory, recomputing in levels where that pays.

Note [The chain]
 1. ``first[s]`` says, for each memory, the least seconds of replay from segment s on, s being entered in the
    forward of the program itself. ``again[s, t]`` is the same for the segments s to t when they are run again
    from the entry of s because the backward of t is next. Memory counts in units, sizes rounded.
 2. A segment is passed in one of two ways. *Choice*: it keeps what one of its choices keeps, and its
    backward replays the rest. *Jump*: only its entry stays; the segments up to a later one are run again
    when the backward gets there, in the same two ways. A jump within a jump is the next level.
 3. The segment for whose backward a stretch is run again keeps nothing: it replays what it needs there.
 4. What the program holds until the whole forward is over is no less for being dropped (Note [Segments] 5).
    ``first`` therefore knows a second number, how much of that lies behind: it counts against the forward of
    a segment, not against its backward. It is counted coarsely, in *layers*; chains without it have one.
 5. With the sizes rounded down, the same recursion bounds from below every way through the chain that is
    made of these choices.

Sources: the recursion over "keep the entry or all of it" is that of Rotor (Beaumont et al., arXiv:1911.13214)
and of Revolve (Griewank and Walther, 2000); choices of ops inside a segment in place of "all of it" as in
Rockmate (Zhao et al., arXiv:2307.01236).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memfit.core.choices import Choice
from memfit.core.segments import Segment

FloatArray = NDArray[np.float64]

_LAYERS = 80  # of what the program holds: two a segment, as key and value have


@dataclass(frozen=True, slots=True)
class Link:
    """One segment with its choices and what it takes to run it again.

    Attributes:
        path: The values of the segment's graph from which the entry of the next is made, and that entry.
        again_s: Seconds to make them again, and what each choice keeps.
        pass_s: Seconds to make them again and keep nothing.
        everything: The choice that keeps least.
        stuck_bytes: What is kept beside the entry if everything is dropped: generator states, results of ops
            that cannot be run again.
        held_bytes: What is there beside that until the whole forward is over.
        forward_peak_bytes: The peak of the forward then.
        last: What the segment is if everything is dropped and it is the one whose backward is next.
    """

    segment: Segment
    choices: tuple[Choice, ...]
    path: frozenset[int]
    again_s: tuple[float, ...]
    pass_s: float
    everything: Choice
    stuck_bytes: int
    held_bytes: int
    forward_peak_bytes: int
    last: Choice


class Way(NamedTuple):
    """How one segment is passed for the last time.

    Attributes:
        choice: What it drops.
        made_for: The segment whose backward its kept values are made for; -1: kept from the forward on.
        entry_for: The same for its entry.
    """

    choice: Choice
    made_for: int
    entry_for: int


def _most_held_bytes(link: Link) -> int:
    """What the program holds of a segment of which nothing else is left."""
    most = max(link.held_bytes, *(choice.held_bytes for choice in link.choices))
    return most + link.segment.held_entry_bytes


class _Stretch(NamedTuple):
    """Segments ``s`` to ``t`` to be passed in some memory; in the forward itself, or run again for ``t``.

    ``layer`` says how much the program holds of what lies before it in the forward.
    """

    s: int
    t: int
    memory: int
    layer: int
    is_first: bool


class _Option(NamedTuple):
    """A choice with its sizes: in units, ``held`` in layers."""

    which: int
    kept: int
    peak: int
    forward_peak_bytes: int
    held: int
    seconds: float
    again_s: float


class _Leap(NamedTuple):
    """A jump to segment ``to``: units and layers it leaves behind, seconds to run what is passed.

    ``forward_peak_bytes`` is what the forward of the passed segments takes.
    """

    to: int
    kept: int
    forward_peak_bytes: int
    held: int
    run_s: float


class Chain:
    """The tables of one memory; see Note [The chain].

    Args:
        units: How many parts the memory is counted in.
        bound: Round sizes down, so that no way through the chain is faster than :meth:`solve` says.

    Cost: about ``links**2 * units`` times the number of choices and of links; with layers, ``links * units``
    times their number more.
    """

    def __init__(
        self, links: Sequence[Link], memory_bytes: float, units: int, *, bound: bool = False
    ) -> None:
        self._links = links
        self._units = units
        self._unit_bytes = memory_bytes / units
        self._round: Callable[[float], int] = math.floor if bound else round
        held_bytes = [_most_held_bytes(link) for link in links[:-1]]
        layers = min(_LAYERS, 2 * sum(most > 0 for most in held_bytes))
        self._layer_bytes = max(1.0, sum(held_bytes) / max(1, layers))
        self._layers = [0, *accumulate(self._in_layers(most) for most in held_bytes)]
        self._tables = [self._options(link) for link in links]
        self._again: dict[tuple[int, int], FloatArray] = {}
        self._first: dict[int, FloatArray] = {}

    def _options(self, link: Link) -> list[_Option]:
        """The choices of a link with their sizes."""
        s = link.segment
        return [
            _Option(
                which=index,
                kept=self._in_units(c.kept_bytes),
                peak=self._in_units(max(c.peak_bytes + s.backward_extra_bytes, c.kept_bytes)),
                forward_peak_bytes=c.forward_peak_bytes + s.forward_extra_bytes,
                held=self._in_layers(c.held_bytes),
                seconds=c.seconds,
                again_s=link.again_s[index],
            )
            for index, c in enumerate(link.choices)
        ]

    def _in_units(self, size_bytes: float) -> int:
        return max(0, self._round(size_bytes / self._unit_bytes))

    def _in_layers(self, size_bytes: int) -> int:
        return max(0, self._round(size_bytes / self._layer_bytes))

    def _least(self, option: _Option, layer: int) -> int:
        """The units a choice cannot do without, so much being held already."""
        return max(option.peak, self._in_forward(option.forward_peak_bytes, layer))

    def _in_forward(self, peak_bytes: int, layer: int) -> int:
        """Units of a peak of the forward, so much being held already."""
        return self._in_units(peak_bytes + layer * self._layer_bytes)

    # ---- tables -------------------------------------------------------------------------------------

    def solve(self) -> FloatArray:
        """Fills the tables; the least seconds by units of memory, infinite where nothing fits."""
        last = len(self._links) - 1
        for length in range(1, last + 1):
            for s in range(last - length + 1):
                self._again[s, s + length - 1] = self._run_again(s, s + length - 1)
        for s in range(last, -1, -1):
            self._first[s] = self._enter(s)
        seconds: FloatArray = self._first[0][0]
        return seconds

    def _never(self) -> FloatArray:
        return np.full(self._units + 1, np.inf)

    def _choose(self, s: int, layer: int, rest: FloatArray | None, *, again: bool = False) -> FloatArray:
        """The least seconds if a segment takes one of its choices; ``rest`` is what follows it, by layer."""
        best = self._never()
        for option in self._tables[s]:
            seconds = option.seconds + (option.again_s if again else 0.0)
            least = option.peak if again else self._least(option, layer)
            if least <= self._units:
                ahead = None if rest is None else rest[min(layer + option.held, len(rest) - 1)]
                after = 0.0 if ahead is None else ahead[least - option.kept : self._units + 1 - option.kept]
                np.minimum(best[least:], after + seconds, out=best[least:])
        return best

    def _leaps(self, s: int, t: int, is_first: bool) -> Iterator[_Leap]:
        """The jumps from ``s``."""
        kept_bytes = peak_bytes = held_bytes = 0
        run_s = 0.0
        for to in range(s + 1, t + 1):
            link = self._links[to - 1]
            own_bytes = link.forward_peak_bytes + link.segment.forward_extra_bytes
            peak_bytes = max(peak_bytes, kept_bytes + held_bytes + own_bytes)
            is_inner = to - 1 > s
            kept_bytes += link.stuck_bytes + (0 if is_inner else link.segment.entry_bytes)
            held_bytes += link.held_bytes + (link.segment.held_entry_bytes if is_inner else 0)
            run_s += 0.0 if is_first else link.pass_s
            kept = self._in_units(kept_bytes)
            if kept > self._units:
                return
            yield _Leap(to, kept, peak_bytes, self._in_layers(held_bytes), run_s)

    def _run_again(self, s: int, t: int) -> FloatArray:
        """``again[s, t]``."""
        link = self._links[s]
        if s == t:
            best = self._never()
            peak_bytes = max(link.last.peak_bytes + link.segment.backward_extra_bytes, link.last.kept_bytes)
            best[self._in_units(peak_bytes) :] = link.last.seconds
            return best
        best = self._choose(s, 0, self._again[s + 1, t][np.newaxis], again=True)
        for leap in self._leaps(s, t, False):
            ahead = self._again[leap.to, t][: self._units + 1 - leap.kept]
            whole = ahead + self._again[s, leap.to - 1][leap.kept :]
            np.minimum(best[leap.kept :], whole + leap.run_s, out=best[leap.kept :])
        return best

    def _enter(self, s: int) -> FloatArray:
        """``first[s]``, a row a layer."""
        last = len(self._links) - 1
        if s == last:
            return np.stack([self._choose(s, layer, None) for layer in range(self._layers[s] + 1)])
        ahead = self._first[s + 1]
        table = np.stack([self._choose(s, layer, ahead) for layer in range(self._layers[s] + 1)])
        for leap in self._leaps(s, last, True):
            behind = self._again[s, leap.to - 1]
            for layer, best in enumerate(table):
                least = max(leap.kept, self._in_forward(leap.forward_peak_bytes, layer))
                if least <= self._units:
                    ahead = self._ahead(leap, layer)[least - leap.kept : self._units + 1 - leap.kept]
                    np.minimum(best[least:], ahead + behind[least:], out=best[least:])
        return table

    def _ahead(self, leap: _Leap, layer: int) -> FloatArray:
        """``first`` of the segment a jump lands on."""
        table = self._first[leap.to]
        ahead: FloatArray = table[min(layer + leap.held, len(table) - 1)]
        return ahead

    # ---- the way back -------------------------------------------------------------------------------

    def ways(self, units: int | None = None) -> list[Way]:
        """How each segment is passed in the fastest way; the tables must be solved and feasible.

        Args:
            units: Of the memory; None: all of it.
        """
        found: dict[int, Way] = {}
        entries: dict[int, int] = {}
        pending = [_Stretch(0, len(self._links) - 1, self._units if units is None else units, 0, True)]
        while pending:
            stretch = pending.pop()
            entries.setdefault(stretch.s, -1 if stretch.is_first else stretch.t)
            pending.extend(self._decide(stretch, entries[stretch.s], found))
        return [found[s] for s in range(len(self._links))]

    def _decide(self, stretch: _Stretch, entry_for: int, found: dict[int, Way]) -> list[_Stretch]:
        """Decides the first segment of a stretch; returns the stretches that remain."""
        s, t, memory, layer, is_first = stretch
        link = self._links[s]
        if s == t and not is_first:
            found[s] = Way(link.everything, t, entry_for)
            return []
        options: list[tuple[float, int, int, _Stretch]] = []
        for option in self._tables[s]:
            if (self._least(option, layer) if is_first else option.peak) <= memory:
                rest = _Stretch(s + 1, t, memory - option.kept, layer + option.held, is_first)
                seconds = option.seconds + (0.0 if is_first else option.again_s)
                options.append((self._ahead_s(rest) + seconds, 0, option.which, rest))
        for leap in self._leaps(s, t, is_first):
            least = max(leap.kept, self._in_forward(leap.forward_peak_bytes, layer) if is_first else 0)
            if least <= memory:
                rest = _Stretch(leap.to, t, memory - leap.kept, layer + leap.held, is_first)
                behind_s = float(self._again[s, leap.to - 1][memory])
                options.append((self._ahead_s(rest) + behind_s + leap.run_s, 1, leap.to, rest))
        _, is_jump, which, rest = min(options)
        if is_jump:
            return [_Stretch(s, which - 1, memory, 0, False), rest]
        found[s] = Way(link.choices[which], -1 if is_first else t, entry_for)
        return [rest] if s < t else []

    def _ahead_s(self, rest: _Stretch) -> float:
        """Seconds of a stretch, nothing if it is empty."""
        if rest.s > rest.t:
            return 0.0
        if not rest.is_first:
            return float(self._again[rest.s, rest.t][rest.memory])
        table = self._first[rest.s]
        return float(table[min(rest.layer, len(table) - 1), rest.memory])
