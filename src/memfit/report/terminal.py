"""What the command line shows: plans, progress and results, drawn with rich.

Data goes to stdout, progress to stderr. Decides nothing and imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from memfit.core.hidden import KNOB, told
from memfit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.core.allocator import Memory
    from memfit.core.plan import Plan
    from memfit.core.strategies import Strategy
    from memfit.train import RunResult, StepReport

_BARS = "▁▂▃▄▅▆▇█"
_LINE_EVERY_S = 5.0  # without a terminal: one line of progress at most this often


def sparkline(values: Sequence[float]) -> str:
    """Returns a line of blocks as high as ``values``, from the smallest to the largest of them."""
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in values)


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Returns a table of names and what they are."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    return table


def plan_facts(plan: Plan) -> list[tuple[str, str]]:
    """Returns what a reader wants to know of a plan, as names and texts."""
    twice = [("passes", "two: all outputs first, then every forward once more for its gradient")]
    return [
        ("memory", f"{format_bytes(plan.budget_bytes)}"),
        ("predicted peak", f"{format_bytes(plan.predicted_peak_bytes)} ({_share(plan)} of the memory)"),
        (
            "micro-batch",
            f"{plan.micro_batch_size} rows x {plan.gradient_accumulation_steps} accumulation steps",
        ),
        *(twice if plan.is_two_pass else []),
        ("recomputed", _recomputed(plan)),
        *([("compiled", told(plan.hidden)), ("", KNOB)] if plan.hidden.modules else []),
        ("predicted step", format_seconds(plan.predicted_step_s)),
        ("certified gap", f"at most {plan.optimality_gap:.2%} of a step from the best plan of this kind"),
    ]


def plan_table(plan: Plan, title: str, *cuda: Memory) -> Table:
    """Returns a plan as a table; ``cuda`` is what its allocator takes, then with expandable segments."""
    rows = plan_facts(plan)
    if cuda:
        usual, expandable = cuda
        at = [name for name, _ in rows].index("predicted peak") + 1
        requested, allocated, reserved, if_expandable = map(
            format_bytes,
            (usual.requested_bytes, usual.allocated_bytes, usual.reserved_bytes, expandable.reserved_bytes),
        )
        rows[at:at] = [
            ("allocator", f"{allocated} allocated ({requested} requested, {reserved} reserved)"),
            ("", f"{if_expandable} reserved with expandable_segments:True"),
        ]
    return facts(title, rows)


def frontier_table(plans: Sequence[Plan], title: str) -> Table:
    """Returns the plans of a frontier as a table; "recomputed" is a share of the step, a bar its seconds."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("memory", "micro-batches", "recomputed", "step", "slower"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    fastest_s, slowest_s = (pick(plan.predicted_step_s for plan in plans) for pick in (min, max))
    for plan in plans:
        table.add_row(
            *_point(plan),
            f"{plan.predicted_step_s / fastest_s:.2f} x",
            "█" * max(1, round(10 * plan.predicted_step_s / slowest_s)),
        )
    return table


def strategy_table(strategies: Sequence[Strategy], plans: Sequence[Plan]) -> Table:
    """Returns what recomputing by hand costs, and the step of the fastest of ``plans`` in the same memory."""
    table = Table(title="by hand", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for name in ("memory", "micro-batches", "recomputed", "step", "memfit"):
        table.add_column(name, justify="right", no_wrap=True)
    for strategy in strategies:
        within = [p for p in plans if p.predicted_peak_bytes <= strategy.predicted_peak_bytes]
        there_s = min((plan.predicted_step_s for plan in within), default=None)
        table.add_row(
            strategy.name,
            *_point(strategy),
            "-" if there_s is None else f"{there_s / strategy.predicted_step_s:.2f} x",
        )
    return table


def strategy_notes(strategies: Sequence[Strategy]) -> str:
    """Returns what the table of strategies is about, in a line or two."""
    blocks = list(dict.fromkeys(strategy.blocks for strategy in strategies if strategy.blocks))
    if not blocks:
        return "The model has no repeated blocks, so there is nothing to checkpoint by hand."
    return (
        f"By hand: torch.utils.checkpoint around blocks ({'; or '.join(blocks)}). "
        "memfit: the step of the best plan above in that memory, over this one. Both are charged for "
        "their Python, as benchmarks/overhead.py measures it."
    )


def _point(point: Plan | Strategy) -> tuple[str, str, str, str]:
    """Returns memory, micro-batches, recomputed and seconds of a way to run the step."""
    return (
        format_bytes(point.predicted_peak_bytes),
        f"{point.gradient_accumulation_steps} x {point.micro_batch_size} rows",
        f"{point.recompute_s / point.predicted_step_s:.1%}" if point.recompute_s else "nothing",
        format_seconds(point.predicted_step_s),
    )


def plan_verdict(plan: Plan, title: str) -> str:
    """Returns the plan in one line."""
    fits = f"{title} fits into {format_bytes(plan.budget_bytes)}"
    how = f"{plan.gradient_accumulation_steps} micro-batches of at most {plan.micro_batch_size} rows"
    if plan.gradient_accumulation_steps == 1:
        how = "the whole batch at once"
    if plan.recomputes == 0:
        return f"{fits}: {how}, nothing recomputed."
    return f"{fits}: {how}, {plan.recompute_s / plan.predicted_step_s:.1%} of a step spent recomputing."


def frontier_verdict(plans: Sequence[Plan], title: str) -> str:
    """Returns a frontier in one line: its two ends."""
    least, fastest = plans[0], plans[-1]
    slower = least.predicted_step_s / fastest.predicted_step_s if fastest.predicted_step_s else 1.0
    return (
        f"{title} runs in {format_bytes(least.predicted_peak_bytes)} and more: the fastest step takes "
        f"{format_bytes(fastest.predicted_peak_bytes)}, one in the least memory {slower:.2f} times as long."
    )


def result_verdict(result: RunResult, title: str) -> str:
    """Returns a run in one line: its steps, its losses, and whether the promise held."""
    steps = f"{result.steps_done} step{'s' if result.steps_done != 1 else ''}"
    done = f"{title}, {steps}, loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
    measured = result.measured_peak_bytes
    peak = "peak not measured" if measured is None else f"measured peak {format_bytes(measured)}"
    if result.plan is None:
        return f"{done}: {peak}, without a plan."
    budget = format_bytes(result.plan.budget_bytes)
    if result.held is None:
        return f"{done}: {peak}, of {budget}."
    return f"{done}: {peak}, {'within' if result.held else 'NOT AS PROMISED within'} {budget}."


def recomputed_share(recompute_s: float, forward_s: float) -> str:
    """Returns how much of the forward pass is computed again, by seconds."""
    return f"{recompute_s / forward_s:.1%} of the forward pass" if recompute_s > 0 else "nothing"


def result_table(result: RunResult) -> Table:
    """Returns the summary of a run."""
    rows = [
        ("steps", f"{result.steps_done}"),
        ("loss", f"{result.first_loss:.4f} -> {result.last_loss:.4f}"),
    ]
    if result.plan is not None:
        rows += plan_facts(result.plan)
    if result.measured_peak_bytes is not None:
        rows.append(
            ("measured peak", f"{format_bytes(result.measured_peak_bytes)} by the allocator{_held(result)}")
        )
    if result.median_step_s is not None:
        rows.append(("median step", format_seconds(result.median_step_s)))
    rows.append(("saved in", str(result.out)))
    return facts("Stopped early" if result.interrupted else "Done", rows)


def _held(result: RunResult) -> str:
    """Returns the verdict on the promise, in words."""
    if result.held is None:
        return ""
    return ": the promise held" if result.held else ": THE PROMISE DID NOT HOLD"


def _recomputed(plan: Plan) -> str:
    """Returns what a plan computes again, by seconds and by number."""
    share = recomputed_share(plan.recompute_s, plan.forward_s)
    return share if plan.recomputes == 0 else f"{share}, {plan.recomputes:,} tensors"


def _share(plan: Plan) -> str:
    return f"{plan.predicted_peak_bytes / plan.budget_bytes:.1%}"


class TerminalWatcher:
    """Shows a run while it goes on: one live line in a terminal, a line now and then elsewhere."""

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
        now_s = time.monotonic()
        if self._done == 0:
            self._started_s, self._first = now_s, report.step
        self._done += 1
        if self._console.is_terminal:
            self._draw(report)
        elif now_s - self._printed_s >= _LINE_EVERY_S or report.step == report.steps:
            self._printed_s = now_s
            self._console.print(Text(" ".join(self._words(report))), soft_wrap=True)

    def _draw(self, report: StepReport) -> None:
        """Redraws the live line."""
        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=report.steps, completed=report.step, width=20)
        line.add_row(bar, *self._words(report))
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(line)

    def _words(self, report: StepReport) -> list[str]:
        """Returns the parts of a line of progress."""
        words = [
            f"step {report.step}/{report.steps}",
            f"loss {report.loss:.4f}",
            f"{report.amount / report.seconds:,.0f} {report.unit}/s",
        ]
        if self._plan is not None:
            peak, budget = self._plan.predicted_peak_bytes, self._plan.budget_bytes
            words.append(f"peak {format_bytes(peak)} of {format_bytes(budget)}")
        if self._done > 1:
            per_step_s = (time.monotonic() - self._started_s) / (report.step - self._first)
            words.append(f"{format_seconds(per_step_s * (report.steps - report.step))} left")
        return words
