"""Live bytes over a step as a line of blocks: the plain step and the planned one on the same scales."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from memfit.report.terminal.look import look_of
from memfit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.core.outline import Outline

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.:-=+*#"
_MOST_CELLS = 100


def sparkline(values: Sequence[float], *, blocks: bool = True) -> str:
    """Returns a line of blocks as high as ``values``, from the smallest to the largest of them."""
    return scaled(values, min(values), max(values), blocks=blocks) if values else ""


def scaled(values: Iterable[float], low: float, high: float, *, blocks: bool = True) -> str:
    """Returns a line of blocks as high as ``values`` are between two limits."""
    bars, span = _BARS if blocks else _ASCII_BARS, (high - low) or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)


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
        blocks = look_of(console, options).has_blocks
        end_s = max(drawn.end_s for _, drawn in self.steps)
        top_bytes = max(drawn.peak.event.total_bytes for _, drawn in self.steps)
        for name, drawn in self.steps:
            peak = format_bytes(drawn.peak.event.total_bytes)
            told = f"live bytes, {name}: peak {peak}, {format_seconds(drawn.end_s)}"
            line = scaled(
                heights(drawn, end_s, min(options.max_width, _MOST_CELLS)), 0, top_bytes, blocks=blocks
            )
            yield Text(f"{told}\n", style="dim") + Text(line, style="not dim")
