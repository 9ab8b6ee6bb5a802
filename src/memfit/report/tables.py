"""The tables of `memfit profile`, `audit`, `compare` and `doctor`, and each one's verdict in a line.

Decides nothing and imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from memfit.core.breakdown import Breakdown
from memfit.core.machine import Finding, Level, Machine, Speeds
from memfit.report.terminal import PeakBar, facts
from memfit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.compare import Comparison, Outcome
    from memfit.core.audit import Audit
    from memfit.core.graph import Profile
    from memfit.doctor import Diagnosis

_BAR = 10  # letters of the longest bar
_SHOWN = 8  # entries of a list
_STYLES = {Level.OK: "green", Level.NOTE: "yellow", Level.PROBLEM: "bold red"}


class _Bar:
    """A bar as long as a part of the whole, in a column as wide as the whole; none where there is nothing."""

    def __init__(self, part: float, whole: float) -> None:
        self._cells = max(1, round(_BAR * part / whole)) if part > 0 < whole else 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it; with ASCII where there is nothing else."""
        yield Text(("#" if options.ascii_only else "█") * self._cells)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """As wide as the longest."""
        return Measurement(_BAR, _BAR)


def _columns(title: str, *names: str, right: Sequence[int] = ()) -> Table:
    """A plain table; ``right`` are the columns of numbers."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number in right else "left", no_wrap=True)
    return table


# ---- profile -------------------------------------------------------------------------------------


def profile_tables(found: Breakdown) -> list[RenderableType]:
    """The peak by category, the largest tensors that are kept, and the dearest ops."""
    return [PeakBar(found.peak), _kept(found), _costs(found)]


def seconds_note(profile: Profile) -> str:
    """Where the seconds of a profile come from."""
    if profile.source == "roofline":  # of no card
        return f"Seconds by {profile.source}: what a large accelerator takes at least. --real measures here."
    return f"Seconds by {profile.source}."


def profile_verdict(profile: Profile, found: Breakdown, title: str) -> str:
    """Where the memory goes, in a line or two."""
    rows = f"{found.rows} rows" if found.rows == profile.rows else f"{found.rows} of {profile.rows} rows"
    where = f"{found.peak.phase}, {found.peak.owner}" if found.peak.phase != "update" else "optimizer.step()"
    return (
        f"The plain step of {title} ({rows} at once) peaks at {format_bytes(found.peak.total_bytes)}, in "
        f"{where}."
    )


def _kept(found: Breakdown) -> Table:
    """The largest tensors that autograd keeps."""
    title = f"kept for the backward: {format_bytes(found.kept_bytes)}"
    table = _columns(title, "module", "op", "tensors", "bytes", "share", right=(2, 3, 4))
    for entry in found.kept[:_SHOWN]:
        share = f"{entry.total_bytes / found.kept_bytes:.1%}"
        table.add_row(entry.module, entry.op, f"{entry.tensors}", format_bytes(entry.total_bytes), share)
    rest = found.kept[_SHOWN:]
    if rest:
        rest_bytes = sum(entry.total_bytes for entry in rest)
        count = sum(entry.tensors for entry in rest)
        table.add_row(
            "all others", "", f"{count}", format_bytes(rest_bytes), f"{rest_bytes / found.kept_bytes:.1%}"
        )
    return table


def _costs(found: Breakdown) -> Table:
    """The ops that take longest."""
    title = f"seconds of a step: {format_seconds(found.step_s)}"
    table = _columns(title, "module", "op", "calls", "seconds", "share", right=(2, 3, 4))
    for entry in found.costs[:_SHOWN]:
        share = f"{entry.seconds / found.step_s:.1%}" if found.step_s else ""
        table.add_row(entry.module, entry.op, f"{entry.calls}", format_seconds(entry.seconds), share)
    return table


# ---- audit ---------------------------------------------------------------------------------------


def audit_table(audit: Audit, title: str) -> Table:
    """What an audit found."""
    rows = [("class", audit.kind.value), ("decided by", audit.owner)]
    if audit.terms:
        rows += [(f"term {name}", f"{term.kind.value}, {_weights(term)}") for name, term in audit.terms]
    elif audit.is_exact:
        rows.append(("weights", _weights(audit)))
    if audit.worst_error == audit.worst_error:  # not "not a number"
        rows.append(("worst relative error", f"{audit.worst_error:.1e} of the gradient, in float64"))
    for name, entries in (("cure", audit.cures), ("undecided", audit.undecided), ("note", audit.notes)):
        rows += [(name if number == 0 else "", entry) for number, entry in enumerate(entries)]
    return facts(title, rows)


def audit_verdict(audit: Audit, title: str, two_passes: Audit | None = None) -> str:
    """An audit in one line."""
    if audit.is_exact:
        return f"Gradient accumulation is exact for {title}."
    if two_passes is not None and two_passes.is_exact:
        return f"Gradient accumulation is exact for {title} in two passes: its loss is taken on all outputs."
    return f"Gradient accumulation is NOT exact for {title}: {audit.reason}."


def _weights(audit: Audit) -> str:
    """What micro-batches are weighted by."""
    return "each counts 1" if audit.counter == "sum" else f"by {audit.counter}"


# ---- compare -------------------------------------------------------------------------------------


def compare_table(found: Comparison, title: str) -> Table:
    """Time and peak of each way, with bars."""
    memory_bytes = next((o.memory_bytes for o in found.outcomes if o.memory_bytes), None)
    stated = "" if memory_bytes is None else f"of {format_bytes(memory_bytes)}"
    table = _columns(title, "", "a step", "", "peak", "", stated, "loss", right=(1, 3, 5))
    slowest_s = max((o.median_step_s or 0.0 for o in found.outcomes), default=0.0)
    highest_bytes = max((o.measured_peak_bytes or 0 for o in found.outcomes), default=0)
    for outcome in found.outcomes:
        if outcome.median_step_s is None or outcome.measured_peak_bytes is None:
            table.add_row(outcome.way.value, Text(outcome.end.value, style="bold red"))
            continue
        share = outcome.measured_peak_bytes / memory_bytes if memory_bytes else 0.0
        table.add_row(
            outcome.way.value,
            format_seconds(outcome.median_step_s),
            _Bar(outcome.median_step_s, slowest_s),
            format_bytes(outcome.measured_peak_bytes),
            _Bar(outcome.measured_peak_bytes, highest_bytes),
            Text(f"{share:.0%}", style="bold red") if share > 1 else f"{share:.0%}",
            _loss(found, outcome),
        )
    return table


def compare_notes(found: Comparison) -> list[str]:
    """What must be said besides: what is checkpointed, why a way did not end well, what dropout does."""
    notes = ["Every block: torch.utils.checkpoint around each repeated block, the batch whole."]
    notes += [
        f"{outcome.way.value}: {outcome.end.value}: {outcome.detail}"
        for outcome in found.outcomes
        if outcome.median_step_s is None
    ]
    if any(outcome.draws and found.loss_difference(outcome) for outcome in found.outcomes):
        notes.append("Micro-batches draw dropout masks of their own, so that losses differ by chance.")
    return notes


def compare_verdict(found: Comparison, title: str) -> str:
    """The comparison in one line."""
    plain, _, fitted = found.outcomes
    if fitted.median_step_s is None or fitted.memory_bytes is None or fitted.measured_peak_bytes is None:
        return f"memfit did not run {title}: {fitted.end.value}."
    held = "within" if fitted.is_within else "ABOVE"
    told = (
        f"memfit runs a step of {title} in {format_seconds(fitted.median_step_s)}, {held} the "
        f"{format_bytes(fitted.memory_bytes)} stated"
    )
    if plain.median_step_s is None:
        return f"{told}; the plain step: {plain.end.value}."
    if plain.is_within:
        return f"{told}; the plain step fits, too, and takes {format_seconds(plain.median_step_s)}."
    ratio = fitted.median_step_s / plain.median_step_s
    return f"{told}: {ratio:.2f} x the seconds of the plain step, which does not fit."


def _loss(found: Comparison, outcome: Outcome) -> str:
    """How the losses of a way compare."""
    difference = found.loss_difference(outcome)
    if difference is None:
        return "reference"
    return "same to the bit" if difference == 0 else f"within {difference:.0e}"


# ---- doctor --------------------------------------------------------------------------------------


def doctor_tables(found: Diagnosis) -> list[RenderableType]:
    """The machine, its speeds, and what is to be said of it."""
    speeds = [_speeds(each) for each in found.speeds]
    return [facts("this machine", _facts(found.machine)), *speeds, _findings(found.findings)]


def doctor_verdict(found: Diagnosis) -> str:
    """The examination in one line."""
    count = len(found.problems)
    notes = sum(finding.level is Level.NOTE for finding in found.findings)
    told = f"{notes} note{'s' if notes != 1 else ''}"
    if count:
        return f"memfit will NOT work well here: {count} problem{'s' if count != 1 else ''}, {told}."
    return f"memfit works here: no problem, {told}."


def _facts(machine: Machine) -> list[tuple[str, str]]:
    """The facts of a machine."""
    free, total = format_bytes(machine.free_bytes), format_bytes(machine.total_bytes)
    built = "no CUDA" if machine.cuda is None else f"CUDA {machine.cuda}"
    cards = [
        (
            f"cuda:{number}",
            f"{card.name}, {format_bytes(card.free_bytes)} free of {format_bytes(card.total_bytes)}",
        )
        for number, card in enumerate(machine.cards)
    ]
    settings = [("CUDA allocator", machine.allocator)] if machine.allocator else []
    return [
        ("system", f"{machine.system}, Python {machine.python}"),
        ("torch", f"{machine.torch}, built for {built}"),
        ("cpu", f"{machine.cpu}; {machine.threads} threads on {machine.cores} usable CPUs"),
        ("memory", f"{free} free of {total}; --memory 80% on a CPU is of the {total}"),
        *(cards or [("cuda", "no device")]),
        *settings,
    ]


def _speeds(speeds: Speeds) -> Table:
    """What was measured on a device."""
    rows = [
        ("memory copy", f"{speeds.copy_bytes_per_s / 1e9:,.1f} GB/s, read and written"),
        ("matmul float32", f"{speeds.float32_flops_per_s / 1e9:,.0f} GFLOP/s"),
        ("matmul bfloat16", f"{speeds.bfloat16_flops_per_s / 1e9:,.0f} GFLOP/s"),
    ]
    for name, rate in (
        ("from the host", speeds.to_device_bytes_per_s),
        ("to the host", speeds.from_device_bytes_per_s),
    ):
        if rate is not None:
            rows.append((name, f"{rate / 1e9:,.1f} GB/s, pinned memory"))
    return facts(f"measured on {speeds.device}", rows)


def _findings(findings: Sequence[Finding]) -> Table:
    """What is to be said, one line each, and the cure below it."""
    table = Table(title="looked at", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        cure = f"\n-> {finding.cure}" if finding.cure else ""
        level = Text(finding.level.value, style=_STYLES[finding.level])
        table.add_row(level, finding.subject, f"{finding.text}{cure}")
    return table
