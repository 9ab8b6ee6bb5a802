"""The peak as one bar: what it is made of, against the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from memfit.report.categories import CATEGORIES, EITHER, LETTERS, sizes_of
from memfit.report.terminal.look import Look, flowing, look_of, stacked
from memfit.units import format_bytes

if TYPE_CHECKING:
    from memfit.core.timeline import Event

_MOST_CELLS = 72
_SQUEEZED = 3  # a budget this many times the peak would leave no room to tell categories apart


@dataclass(frozen=True, slots=True)
class PeakBar:
    """The bytes of one moment, stacked; free memory up to the budget, if any; what each category takes."""

    peak: Event
    budget_bytes: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it."""
        look = look_of(console, options)
        what = "peak" if self.peak.phase == "update" else f"peak in the {self.peak.phase},"
        yield Text.assemble(
            (f"{what} at {self.peak.owner}\n", "dim"), self._bar(look, min(options.max_width, _MOST_CELLS))
        )
        yield from flowing([*self._legend(look), Text(self._left(), style="bold")], options.max_width)

    def _left(self) -> str:
        """What is left of the budget; without one, the peak itself."""
        total = self.peak.total_bytes
        if self.budget_bytes is None:
            return f"{format_bytes(total)} in all"
        left = self.budget_bytes - total
        free = f"{format_bytes(left)} free" if left >= 0 else f"{format_bytes(-left)} TOO MUCH"
        return f"{free} of {format_bytes(self.budget_bytes)}"

    def _bar(self, look: Look, width: int) -> Text:
        """The bar; where the budget is far off, an arrow stands for the way there."""
        total = self.peak.total_bytes
        budget = total if self.budget_bytes is None else self.budget_bytes
        is_far = budget > _SQUEEZED * total
        end = ("─→│" if look.has_blocks else "->|") if is_far else "│" if look.has_blocks else "|"
        cells = width - len(end)
        scale = total if is_far else max(total, budget)
        bar = Text()
        sizes = sizes_of(self.peak)
        for name, letter, count in zip(CATEGORIES, LETTERS, stacked(sizes, scale, cells), strict=True):
            bar.append(_cell(look, letter) * count, style=_style(look, name))
        free = ("·" if look.has_blocks else ".") * (cells - len(bar))
        if total <= budget:
            return bar.append(free, style="dim").append(end, style="bold")
        line = round(budget * cells / total)
        return Text.assemble(bar[:line], (end, "bold"), bar[line:])

    def _legend(self, look: Look) -> list[Text]:
        """The categories that take anything, in their order."""
        return [
            Text.assemble(
                (_cell(look, letter), _style(look, name)), f" {name} ", (format_bytes(size), "bold")
            )
            for name, letter, size in zip(CATEGORIES, LETTERS, sizes_of(self.peak), strict=True)
            if size
        ]


def _cell(look: Look, letter: str) -> str:
    return "█" if look.has_colours and look.has_blocks else letter


def _style(look: Look, name: str) -> str:
    return EITHER[CATEGORIES.index(name)] if look.has_colours else ""
