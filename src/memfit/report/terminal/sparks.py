"""Live bytes over a step as a line of blocks: the plain step and the planned one on the same scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from memfit.report.categories import EITHER
from memfit.report.terminal.look import look_of
from memfit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.core.outline import Outline

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.:-=+*#"
_MOST_CELLS = 100
_ROWS = 3  # of the highest step


def sparkline(values: Sequence[float]) -> str:
    """Returns a line of blocks as high as ``values``, from the smallest to the largest of them."""
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)


def columns_of(values: Sequence[float], high: float, rows: int, *, blocks: bool = True) -> list[str]:
    """Returns lines that together show ``values`` as columns, of so many rows for ``high``; the top first."""
    bars = " " + (_BARS if blocks else _ASCII_BARS)
    levels = [round(value / (high or 1.0) * rows * (len(bars) - 1)) for value in values]
    found = []
    for row in reversed(range(rows)):
        below = row * (len(bars) - 1)
        found.append("".join(bars[min(max(level - below, 0), len(bars) - 1)] for level in levels))
    return found


def heights(drawn: Outline, end_s: float, cells: int) -> list[int]:
    """The highest live bytes in each of so many equal stretches of time; none after the step has ended."""
    width_s = end_s / cells or 1.0
    ends = chain((point.start_s for point in drawn.points[1:]), (drawn.end_s,))
    found = [0] * cells
    for point, stop_s in zip(drawn.points, ends, strict=True):
        first = min(int(point.start_s / width_s), cells - 1)
        last = min(max(first, -int(-stop_s // width_s) - 1), cells - 1)  # it ends before the next begins
        for cell in range(first, last + 1):
            found[cell] = max(found[cell], point.event.total_bytes)
    used = max(1, min(cells, -int(-drawn.end_s // width_s)))
    return found[:used]


@dataclass(frozen=True, slots=True)
class LiveBytes:
    """Named steps over the same time and the same memory, one under the other."""

    steps: tuple[tuple[str, Outline], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws them; memory from 0, so that heights compare."""
        look = look_of(console, options)
        end_s = max(drawn.end_s for _, drawn in self.steps)
        top_bytes = max(drawn.peak.event.total_bytes for _, drawn in self.steps)
        for name, drawn in self.steps:
            peak = format_bytes(drawn.peak.event.total_bytes)
            told = f"live bytes, {name}: peak {peak}, {format_seconds(drawn.end_s)}"
            found = heights(drawn, end_s, min(options.max_width, _MOST_CELLS))
            yield Text(told, style="dim")
            style = EITHER[1] if name != "plain" and look.has_colours else ""
            for line in columns_of(found, top_bytes, _ROWS, blocks=look.has_blocks):
                if line.strip():
                    yield Text(line, style=style)
