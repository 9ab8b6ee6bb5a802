"""Block-level Rotor: the fastest way to checkpoint a chain of blocks within a memory, by dynamic programming.

Pure: no torch, no clock. ``peer_ways.py`` measures the blocks and runs what is found.

Note [Rotor]
 1. A chain of blocks is processed from the front. Each block is either *kept* (its forward saves what its
    backward needs) or opens a *range*: blocks run without saving, only the input of the first remains, and
    when the backward comes back to them they are a chain of their own, processed in the same way. So a
    schedule is a nesting: numbers are kept blocks, tuples are ranges.
 2. This is the family of schedules of Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova ("Optimal
    checkpointing for heterogeneous chains", 2019), and the recursion is theirs: for each part of the chain
    and each memory, keep the first block or open a range of each length. The last block of a part is always
    kept, for its backward comes next.
 3. A range lies within one list of blocks: between lists runs code of the model itself.
 4. Memory is counted in slots: sizes are rounded up, the memory down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

SLOTS = 200
Schedule = tuple[Any, ...]  # of numbers and schedules


@dataclass(frozen=True, slots=True)
class Block:
    """What a block takes.

    Attributes:
        output_bytes: Its output, and the gradient of that.
        saved_bytes: What is alive after a forward that saves, its output included.
        forward_bytes: The highest alive within a forward that saves, above its start.
        bare_bytes: The same of a forward that does not save.
        backward_bytes: The highest alive within its backward, above its start, at which the gradient of its
            output is there.
        group: The list it is in.
    """

    forward_s: float
    output_bytes: int
    saved_bytes: int
    forward_bytes: int
    bare_bytes: int
    backward_bytes: int
    group: int = 0


def fastest(blocks: Sequence[Block], memory_bytes: int, slots: int = SLOTS) -> Schedule | None:
    """The schedule that recomputes least within a memory above the input of the chain; None if none fits."""
    unit = max(1, memory_bytes // slots)
    chain = tuple(_in_units(block, unit) for block in blocks)

    @cache
    def best(first: int, last: int, room: int) -> tuple[float, Schedule] | None:
        found = [_kept(first, last, room), *(_range(first, b, last, room) for b in range(first, last))]
        return min((f for f in found if f), key=lambda f: f[0], default=None)

    def _kept(first: int, last: int, room: int) -> tuple[float, Schedule] | None:
        block = chain[first]
        if room < max(
            _gradient(chain, first, last) + block.forward_bytes,
            block.saved_bytes + block.output_bytes + block.backward_bytes,
        ):
            return None
        if first == last:
            return 0.0, (first,)
        rest = best(first + 1, last, room - block.saved_bytes)
        return rest and (rest[0], (first, *rest[1]))

    def _range(first: int, end: int, last: int, room: int) -> tuple[float, Schedule] | None:
        if chain[first].group != chain[end].group or room < bare_peak(chain, first, end, last):
            return None
        rest = best(end + 1, last, room - chain[end].output_bytes)
        again = rest and best(first, end, room)
        if not rest or not again:
            return None
        cost_s = rest[0] + again[0] + sum(block.forward_s for block in chain[first : end + 1])
        return cost_s, (again[1], *rest[1])

    found = best(0, len(chain) - 1, memory_bytes // unit)
    return found and found[1]


def bare_peak(chain: Sequence[Block], first: int, end: int, last: int) -> int:
    """The highest alive while blocks run that save nothing: their input and output, one after the other."""
    held = [0, *(block.output_bytes for block in chain[first:end])]
    inner = max(h + block.bare_bytes for h, block in zip(held, chain[first : end + 1], strict=True))
    return _gradient(chain, first, last) + inner


def _gradient(chain: Sequence[Block], first: int, last: int) -> int:
    """The gradient of the end of a part, which is there while the part runs again."""
    return chain[last].output_bytes


def _in_units(block: Block, unit: int) -> Block:
    """Sizes in slots, rounded up."""
    names = ("output_bytes", "saved_bytes", "forward_bytes", "bare_bytes", "backward_bytes")
    return replace(block, **{name: math.ceil(getattr(block, name) / unit) for name in names})


def schedules(blocks: Sequence[Block], count: int) -> list[Schedule]:
    """The distinct schedules at memories from the least that works to that of keeping everything."""
    low, high = 0, keeping_all_bytes(blocks)
    top = high * 11 // 10  # for what rounding to slots takes
    while high - low > top // 500:
        middle = (low + high) // 2
        low, high = (low, middle) if fastest(blocks, middle) else (middle, high)
    levels = (
        high + (top - high) * i**2 // (count - 1) ** 2 for i in range(count)
    )  # denser where it is tight
    found = dict.fromkeys(s for level in levels if (s := fastest(blocks, level)))
    return [schedule for schedule in found if any(isinstance(item, tuple) for item in schedule)]


def keeping_all_bytes(blocks: Sequence[Block]) -> int:
    """The peak of a chain that recomputes nothing."""
    level = peak = 0
    for block in blocks:
        peak = max(peak, level + blocks[-1].output_bytes + block.forward_bytes)
        level += block.saved_bytes
        peak = max(peak, level + block.output_bytes + block.backward_bytes)
    return peak


def recomputed_s(blocks: Sequence[Block], schedule: Schedule) -> float:
    """Seconds of the forwards that a schedule runs again."""
    return sum(
        recomputed_s(blocks, item) + sum(blocks[i].forward_s for i in members(item))
        for item in schedule
        if isinstance(item, tuple)
    )


def members(schedule: Iterable[Any]) -> list[int]:
    """The blocks of a schedule, in order."""
    return [i for item in schedule for i in (members(item) if isinstance(item, tuple) else [item])]


def shown(schedule: Schedule) -> str:
    """A schedule for people: ``((0) 1) 2``."""
    return " ".join(f"({shown(item)})" if isinstance(item, tuple) else str(item) for item in schedule)
