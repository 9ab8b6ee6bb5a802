"""What a terminal can show, and how lines are filled: every picture asks here.

Note [Plain]
 1. Without colours (a pipe, ``NO_COLOR``, a dumb terminal) letters say what colours would; with an encoding
    that has no blocks, ASCII does. Nothing is told by colour alone.
 2. No text is cut off: what is too long goes on in the next line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text


class Look(NamedTuple):
    """What can be shown."""

    has_colours: bool
    has_blocks: bool


def look_of(console: Console, options: ConsoleOptions) -> Look:
    """What a console can show. See Note [Plain] 1."""
    return Look(console.color_system is not None and not console.no_color, not options.ascii_only)


def flowing(parts: Iterable[Text], width: int, gap: str = "   ") -> Iterator[Text]:
    """Lines of parts that stay whole where they can: each line takes as many as it has room for."""
    line = Text()
    for part in parts:
        if line and line.cell_len + len(gap) + part.cell_len > width:
            yield line
            line = Text()
        line = part.copy() if not line else Text.assemble(line, gap, part)
    if line:
        yield line


def fitting(parts: Sequence[str], width: int, gap: str = "  ") -> list[str]:
    """As many of the parts, the first ones, as one line has room for."""
    kept: list[str] = []
    left = width
    for part in parts:
        left -= cell_len(part) + (len(gap) if kept else 0)
        if left < 0:
            break
        kept.append(part)
    return kept


def stacked(sizes: Sequence[int], scale: int, cells: int) -> list[int]:
    """Cells for each of some sizes on top of each other, each edge rounded by itself.

    >>> stacked((1, 1, 1), scale=3, cells=10)
    [3, 4, 3]

    Args:
        scale: What all of the cells stand for, at least the sum.
    """
    edges, total = [0], 0
    for size in sizes:
        total += size
        edges.append(round(total * cells / max(scale, 1)))
    return [end - start for start, end in pairwise(edges)]
