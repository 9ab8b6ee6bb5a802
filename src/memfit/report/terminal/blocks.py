"""The model as a line of cells, one a block, as dark as its share that is recomputed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from memfit.report.terminal.look import look_of

if TYPE_CHECKING:
    from memfit.core.strip import Block

_SHADES = "·░▒▓█"
_ASCII_SHADES = ".:+%#"
_TOLD = ("none", "up to a third", "up to two thirds", "more", "all")


@dataclass(frozen=True, slots=True)
class BlockStrip:
    """One cell for each block, with names at both ends.

    Attributes:
        blocks: Of the model, in order.
        shares: Of the bytes that autograd saves in each, how much is recomputed, from 0 to 1.
    """

    blocks: tuple[Block, ...]
    shares: tuple[float, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it; names that leave no room for the cells get lines of their own."""
        look = look_of(console, options)
        shades = _SHADES if look.has_blocks else _ASCII_SHADES
        cells = "".join(shades[shade_of(share)] for share in self.shares)
        legend = ", ".join(f"{shade} {told}" for shade, told in zip(shades, _TOLD, strict=True))
        yield Text(f"recomputed in each of {len(self.blocks)} blocks ({legend})", style="dim")
        first, last = self.blocks[0].name, self.blocks[-1].name
        names = [first] if len(self.blocks) == 1 else [first, last]
        room = options.max_width - sum(len(name) + 1 for name in names)
        if len(cells) <= room:
            yield Text(" ".join([names[0], cells, *names[1:]]))
            return
        yield Text(" ... ".join(names))
        yield from (Text(line) for line in _lines(cells, options.max_width))


def shade_of(share: float) -> int:
    """Which of five shades: none, thirds of what is between, and all.

    >>> [shade_of(share) for share in (0.0, 0.01, 0.5, 0.99, 1.0)]
    [0, 1, 2, 3, 4]
    """
    return 0 if share <= 0 else 4 if share >= 1 else max(1, math.ceil(share * 3))


def _lines(cells: Sequence[str], width: int) -> Iterator[str]:
    for start in range(0, len(cells), width):
        yield "".join(cells[start : start + width])
