"""A run while it goes on: live lines in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from memfit.report.categories import EITHER
from memfit.report.terminal.look import Look, fitting, look_of
from memfit.report.terminal.tables import plan_table
from memfit.report.terminal.verdicts import plan_verdict
from memfit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.core.plan import Plan
    from memfit.train import StepReport

_LINE_EVERY_S = 5.0  # without a terminal: one line of progress at most this often
_BAR_CELLS = 24
_DONE, _PREDICTED, _MEASURED = EITHER[1], EITHER[2], EITHER[0]


class TerminalWatcher:
    """Shows a run while it goes on; nothing at all on a quiet console."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._plan: Plan | None = None
        self._started_s = 0.0
        self._done = 0
        self._first = 0
        self._printed_s = float("-inf")

    def __enter__(self) -> TerminalWatcher:
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def said(self, text: str) -> None:
        """Prints a line about what is being done."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def planned(self, plan: Plan) -> None:
        """Prints the plan, in one line if it corrects an earlier one."""
        if self._plan is None:
            self._console.print(plan_table(plan, "Plan"))
        else:
            self.said(f"planned again from what was measured: {plan_verdict(plan, 'the step')}")
        self._plan = plan

    def stepped(self, report: StepReport) -> None:
        """Shows one step done."""
        if self._console.quiet:
            return
        now_s = time.monotonic()
        if self._done == 0:
            self._started_s, self._first = now_s, report.step
        self._done += 1
        lines = Progress(report, self._plan, self._left(report, now_s))
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(lines)
        elif now_s - self._printed_s >= _LINE_EVERY_S or report.step == report.steps:
            self._printed_s = now_s
            self._console.print(Text(" ".join([*lines.words(), *lines.memory_words()])), soft_wrap=True)

    def _left(self, report: StepReport, now_s: float) -> str:
        """How long the rest will take, once that can be told."""
        if self._done < 2:
            return ""
        per_step_s = (now_s - self._started_s) / (report.step - self._first)
        return f"{format_seconds(per_step_s * (report.steps - report.step))} left"


class Progress:
    """One step done, in two lines: how far the run is, and the memory against the budget.

    What there is no room for is left out, the least important first.
    """

    def __init__(self, report: StepReport, plan: Plan | None, left: str = "") -> None:
        self._report = report
        self._plan = plan
        self._left = left

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws both lines."""
        look, width = look_of(console, options), options.max_width
        report = self._report
        done = _bar(look, [(report.step / report.steps, _DONE, "#")])
        yield _line(done, self.words(), width)
        memory = self.memory_words()
        if memory:
            yield _line(self._memory_bar(look), memory, width)

    def words(self) -> list[str]:
        """How far the run is, the most important first."""
        report = self._report
        words = [f"step {report.step}/{report.steps}", f"loss {report.loss:.4f}"]
        words += [self._left] if self._left else []
        return [*words, f"{report.amount / report.seconds:,.0f} {report.unit}/s"]

    def memory_words(self) -> list[str]:
        """The peak, predicted and as far as it is measured, and the budget."""
        measured = self._report.measured_peak_bytes
        told = [] if measured is None else [f"measured {format_bytes(measured)}"]
        if self._plan is None:
            return [f"peak {told[0]}"] if told else []
        peak, budget = self._plan.predicted_peak_bytes, self._plan.budget_bytes
        return [f"peak {format_bytes(peak)} of {format_bytes(budget)}", *told]

    def _memory_bar(self, look: Look) -> Text:
        """What was measured, what is predicted beyond it, and what stays free."""
        measured = self._report.measured_peak_bytes or 0
        if self._plan is None:
            return Text()
        budget = self._plan.budget_bytes
        beyond = max(0, self._plan.predicted_peak_bytes - measured)
        return _bar(look, [(measured / budget, _MEASURED, "#"), (beyond / budget, _PREDICTED, "=")])


def _bar(look: Look, parts: Sequence[tuple[float, str, str]]) -> Text:
    """A bar of shares, each with its colour, and a letter for where there are no colours."""
    bar, total = Text(), 0.0
    for share, colour, letter in parts:
        total = min(1.0, total + share)
        cells = round(total * _BAR_CELLS) - len(bar)
        is_solid = look.has_colours and look.has_blocks
        bar.append(("█" if is_solid else letter) * cells, style=colour if look.has_colours else "")
    return bar.append(("·" if look.has_blocks else ".") * (_BAR_CELLS - len(bar)), style="dim")


def _line(bar: Text, words: Sequence[str], width: int) -> Text:
    """A bar and words in one line: as many words as fit, and the bar where it has room beside them."""
    kept = fitting(words, width)
    text = "  ".join(kept)
    has_room = bar and cell_len(text) + bar.cell_len + 2 <= width
    return Text.assemble(bar, "  ", text) if has_room else Text(text)
