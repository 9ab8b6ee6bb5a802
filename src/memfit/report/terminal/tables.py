"""Tables: a plan, what was tried for it, a frontier, what is done by hand, a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from memfit.core.hidden import KNOB, told
from memfit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.core.allocator import Memory
    from memfit.core.plan import Plan
    from memfit.core.strategies import Strategy
    from memfit.core.tried import Tried
    from memfit.train import RunResult


_BAR_CELLS = 10
_LEAST_CELLS = 10  # of a column that may break its lines


def facts(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    """Returns a table of names and what they are."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
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


def columns(title: str, names: Sequence[str], numbers: Sequence[str], more: Sequence[str] = ()) -> Table:
    """Returns an empty table with columns of names, of numbers (to the right), and of more names.

    What is too wide goes on in the next line: nothing is cut off.
    """
    table = _Columns(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for head in names:
        table.add_column(head, no_wrap=True, overflow="fold")
    for head in numbers:
        table.add_column(head, no_wrap=True, overflow="fold", justify="right")
    for head in more:
        table.add_column(head, overflow="fold")
    return table


class _Columns(Table):
    """A table that would rather break its lines than cut them off, where the window is narrow."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it."""
        whole = [column for column in self.columns if column.no_wrap]
        rest = len(self.columns) - len(whole)
        least = sum(_widest(column) for column in whole) + rest * _LEAST_CELLS
        if least + 2 * len(self.columns) > options.max_width:
            self.padding = (0, 1, 0, 0)
        if least + len(self.columns) > options.max_width:
            for column in whole:
                column.no_wrap = False
                column.header = str(column.header).replace("-", "- ")  # where a line may break
        yield from super().__rich_console__(console, options)


def _widest(column: Column) -> int:
    """The cells of the longest entry of a column of texts."""
    return max(cell_len(str(entry)) for entry in (column.header, *column.cells))


class Bar:
    """A share as a bar, never empty."""

    def __init__(self, share: float) -> None:
        self._share = share

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it; with ASCII where there is nothing else."""
        cells = max(1, round(self._share * min(_BAR_CELLS, options.max_width)))
        yield Text(("#" if options.ascii_only else "█") * cells)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """It has room in a few cells."""
        return Measurement(1, _BAR_CELLS)


def tried_table(sizes: Sequence[Tried]) -> Table:
    """Returns the micro-batch sizes that were weighed, the chosen one marked; ">=" is a bound."""
    table = columns("candidates", ("", "micro-batches"), ("peak", "step", "recomputed"), ("why not",))
    for size in sizes:
        least = ">= " if size.is_bound else ""
        again_s, step_s = size.recompute_s, size.predicted_step_s
        share = "-" if not again_s or not step_s else f"{least}{again_s / step_s:.1%}"
        table.add_row(
            ">" if size.is_chosen else "",
            f"{size.gradient_accumulation_steps} x {size.micro_batch_size} rows",
            "-" if size.predicted_peak_bytes is None else format_bytes(size.predicted_peak_bytes),
            "-" if step_s is None else f"{least}{format_seconds(step_s)}",
            "nothing" if again_s == 0 and not size.is_bound else share,
            "chosen" if size.is_chosen else size.why_not,
            style="bold" if size.is_chosen else "",
        )
    return table


def frontier_table(plans: Sequence[Plan], title: str) -> Table:
    """Returns the plans of a frontier as a table; "recomputed" is a share of the step, a bar its seconds."""
    table = columns(title, (), ("memory", "micro-batches", "recomputed", "step", "slower"), ("",))
    fastest_s, slowest_s = (pick(plan.predicted_step_s for plan in plans) for pick in (min, max))
    for plan in plans:
        table.add_row(
            *_point(plan),
            f"{plan.predicted_step_s / fastest_s:.2f} x",
            Bar(plan.predicted_step_s / slowest_s),
        )
    return table


def strategy_table(strategies: Sequence[Strategy], plans: Sequence[Plan]) -> Table:
    """Returns what recomputing by hand costs, and the step of the fastest of ``plans`` in the same memory."""
    table = columns("by hand", ("strategy",), ("memory", "micro-batches", "recomputed", "step", "memfit"))
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
    if result.plan is not None:
        rows += _over(result.plan, result.measured_peak_bytes, result.median_step_s)
    rows.append(("saved in", str(result.out)))
    return facts("Stopped early" if result.interrupted else "Done", rows)


def _over(plan: Plan, measured_bytes: int | None, measured_s: float | None) -> list[tuple[str, str]]:
    """Returns predicted over measured, of what was measured."""
    told = [f"{plan.predicted_peak_bytes / measured_bytes:.4f} of the peak"] if measured_bytes else []
    told += [f"{plan.predicted_step_s / measured_s:.2f} of the step"] if measured_s else []
    return [("predicted/measured", ", ".join(told))] if told else []


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
