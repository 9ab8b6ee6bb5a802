"""What a terminal shows: pictures are to scale, plain text says all that colours say, nothing is cut off."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from memfit.core.frontier import frontier
from memfit.core.graph import OpKey, Profile, Residents
from memfit.core.outline import Outline, outline
from memfit.core.plan import Plan, Planner, find_plan
from memfit.core.strategies import strategies
from memfit.core.strip import Block
from memfit.core.timeline import Event
from memfit.core.tried import tried
from memfit.errors import InfeasibleBudget
from memfit.report.categories import CATEGORIES, EITHER, LETTERS, sizes_of
from memfit.report.terminal import (
    BlockStrip,
    LiveBytes,
    PeakBar,
    TerminalWatcher,
    facts,
    plan_pictures,
    plan_table,
    plan_verdict,
    strategy_table,
    tried_table,
)
from memfit.report.terminal.look import stacked
from memfit.report.terminal.sparks import columns_of, heights
from memfit.report.terminal.watcher import Progress
from memfit.train import StepReport
from strategies import Piece, build, chains, flat_update, profiles

FEW = settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
MIB = 2**20
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|9[0-7])[;m]")


def drawn(*what: RenderableType, width: int = 80, colours: bool = False, **more: str) -> str:
    """What a console writes: as if to a file, or to a terminal with colours and these variables."""
    file = io.StringIO()
    terminal = {"TERM": "xterm-256color", "COLORTERM": "truecolor"} | more
    console = Console(
        file=file,
        width=width,
        force_terminal=colours,
        _environ=terminal if colours else {},
        highlight=False,
    )
    for each in what:
        console.print(each)
    return file.getvalue()


def in_ascii(*what: RenderableType) -> bytes:
    """What a console writes to a file that knows ASCII only; an error if anything else is written."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    for each in what:
        console.print(each)
    console.file.flush()
    return raw.getvalue()


def six_layers() -> Profile:
    """Six alike layers, at four rows and at two: sizes and seconds are given, so nothing varies."""
    half, one, two = MIB // 8, MIB // 4, MIB // 2
    layer = (
        Piece((0,), (half,), saves_inputs=True, seconds=0.010, gradient_bytes=MIB),
        Piece((1,), (two,), saves_inputs=True, saves_outputs=(0,), seconds=0.020),
        Piece((2,), (one,), saves_inputs=True, seconds=0.030),
        Piece((0, 3), (one,), seconds=0.005, frees=(0, 0, 0, 0)),
    )
    graphs = []
    for rows in (4, 2):
        start = Piece(sizes=(one,), is_replayable=False, is_skipped=True, seconds=0.001)
        graph = build((start, *layer * 6), rows=rows, resident=rows < 4)
        ops = [
            replace(op, key=OpKey(f"layers.{(i - 1) // 4}" if i else "embed", f"aten.op{i % 4}.default", i))
            for i, op in enumerate(graph.ops[: graph.forward_ops])
        ]
        graphs.append(replace(graph, ops=(*ops, *graph.ops[graph.forward_ops :])))
    return Profile(4, tuple(graphs), Residents(6 * MIB, 6 * MIB, 12 * MIB, MIB // 8))


SIX = six_layers()
TIGHT = find_plan(SIX, memory=33 * MIB)


def shown(profile: Profile, plan: Plan) -> list[RenderableType]:
    """All that `memfit plan` shows, but the advice."""
    planner = Planner(profile)
    found = planner.best(plan.budget_bytes)
    return [
        plan_table(found, "six layers"),
        *plan_pictures(profile, found),
        "",
        tried_table(tried(planner, found)),
        plan_verdict(found, "six layers"),
    ]


SNAPSHOT = """
six layers
memory          33.0 MiB
predicted peak  32.6 MiB (98.9% of the memory)
micro-batch     4 rows x 1 accumulation steps
recomputed      23.0% of the forward pass, 5 tensors
predicted step  1.59 s
certified gap   at most 1.37% of a step from the best plan of this kind

peak in the forward, at layers.5: aten.op0.default #24
PPPPPPPPPPPPPOOOOOOOOOOOOOOOOOOOOOOOOOOKKKKKKKKKKKKKKKKKKKKKKKKKKKKKKK·│
P parameters 6.0 MiB   O optimizer state 12.0 MiB   B batch 128.0 KiB
K activations kept 14.5 MiB   384.0 KiB free of 33.0 MiB

live bytes, plain: peak 41.1 MiB, 1.37 s
                ▁▁▁▁▁▁▂▂▃▃▃▃▃▃▄▄▅▅▅▅▅▅▆▆▇▇▇▇▇▇█▇▇▇▆▆▆▄▄▄▃▃▃▂▂▂▁
▃▅▅▅▅▅▅▆▅▇▇▇▇▇▇██████████████████████████████████████████████████▇
██████████████████████████████████████████████████████████████████
live bytes, memfit: peak 32.6 MiB, 1.59 s
                      ▁▁  ▁▁▁▁▂▂▁▁▂▂▂▂▂▁▂▂▂▂▂▂▃▂▂▂▁▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂
▃▅▅▅▅▅▅▆▅▇▇▇▇▇▇█████████████████████████████████████████████████████████████
████████████████████████████████████████████████████████████████████████████

recomputed in each of 7 blocks (· none, ░ up to a third, ▒ up to two thirds,
▓ more, █ all)
embed ··▒▒▒▓· layers.5

candidates
   micro-batches      peak       step  recomputed  why not
>  1 x 4 rows     32.6 MiB     1.59 s       14.1%  chosen
   2 x 2 rows            -  >= 1.95 s           -  slower at best
six layers fits into 33.0 MiB: the whole batch at once, 14.1% of a step
spent recomputing.
"""


def test_a_stored_plan_is_shown_as_it_always_was() -> None:
    lines = [line.rstrip() for line in drawn(*shown(SIX, TIGHT), width=76).splitlines()]
    assert lines == SNAPSHOT.strip("\n").splitlines()


# ---- the peak ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=7), st.integers(0, 60), st.integers(1, 90))
def test_a_bar_is_to_scale_wherever_it_is_cut(sizes: list[int], free: int, cells: int) -> None:
    scale = sum(sizes) + free
    found = stacked(sizes, scale, cells)
    assert len(found) == len(sizes)
    assert min(found) >= 0
    for end in range(1, len(sizes) + 1):
        assert abs(sum(found[:end]) - sum(sizes[:end]) * cells / max(scale, 1)) <= 0.5


sizes_in_bytes = st.lists(st.integers(0, 40 * MIB), min_size=7, max_size=7).filter(any)


@given(sizes_in_bytes, st.integers(1, 400 * MIB), st.integers(30, 120))
def test_the_plain_bar_counts_the_letters_of_the_legend(sizes: list[int], budget: int, width: int) -> None:
    event = Event("backward", "here", *sizes)
    title, bar, *legend = drawn(PeakBar(event, budget), width=width).splitlines()
    assert "here" in title
    assert len(bar) <= width
    counted = Counter(bar)
    for letter, name, size in zip(LETTERS, CATEGORIES, sizes_of(event), strict=True):
        assert (f"{letter} {name} " in " ".join(legend)) == (size > 0)
        assert counted[letter] == 0 or size > 0
    assert "│" in bar
    assert ("TOO MUCH" in " ".join(legend)) == (sum(sizes) > budget)
    if sum(sizes) > budget:
        assert not bar.endswith("│") or sum(sizes) * 0.98 < budget
    else:
        assert bar.endswith("│")


def test_colours_are_those_of_the_other_pictures_and_are_never_alone() -> None:
    event = Event("backward", "here", *range(MIB, 8 * MIB, MIB))
    coloured = drawn(PeakBar(event, 40 * MIB), colours=True)
    for colour in EITHER:
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert f"38;2;{red};{green};{blue}m" in coloured
    assert not COLOUR.search(drawn(PeakBar(event, 40 * MIB), colours=True, NO_COLOR="1"))
    plain = drawn(PeakBar(event, 40 * MIB))
    assert "\x1b" not in plain
    uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", drawn(PeakBar(event, 40 * MIB), colours=True, NO_COLOR="1"))
    assert uncoloured == plain
    assert all(f"{letter} {name}" in plain for letter, name in zip(LETTERS, CATEGORIES, strict=True))


# ---- live bytes --------------------------------------------------------------------------------------------


def by_looking(picture: Outline, end_s: float, cells: int) -> list[int]:
    """The highest bytes of each stretch, found by asking every point about every stretch."""
    ends = [*(point.start_s for point in picture.points[1:]), picture.end_s]
    found = []
    for cell in range(cells):
        start_s, stop_s = end_s * cell / cells, end_s * (cell + 1) / cells
        inside = [
            point.event.total_bytes
            for point, until_s in zip(picture.points, ends, strict=True)
            if point.start_s < stop_s * (1 - 1e-9) and until_s > start_s * (1 + 1e-9)
        ]
        found.append(max(inside, default=0))
    return found


@FEW
@given(chains(), st.integers(1, 60), st.sampled_from([1.0, 1.5, 4.0]))
def test_each_cell_is_as_high_as_the_highest_moment_in_it(
    profile: Profile, cells: int, longer: float
) -> None:
    picture = outline(profile, find_plan(profile, memory=1 << 50))
    if not picture.end_s:
        return
    end_s = picture.end_s * longer
    found = heights(picture, end_s, cells)
    assert max(found) == picture.peak.event.total_bytes
    for one, two in zip(found, by_looking(picture, end_s, cells), strict=False):
        assert one >= two  # at an edge between two cells a moment may be drawn in both
    assert len(found) == max(1, round(cells / longer + 0.499))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 4))
def test_columns_are_as_high_as_their_values(values: list[int], rows: int) -> None:
    lines = columns_of(values, 1000, rows)
    assert len(lines) == rows
    for at, value in enumerate(values):
        eighths = [" ▁▂▃▄▅▆▇█".index(line[at]) for line in lines]
        assert sum(eighths) == round(value / 1000 * rows * 8)
        assert eighths == sorted(eighths)  # the lower one is full before the next begins


def test_plain_and_planned_are_on_one_scale() -> None:
    plain = find_plan(SIX, memory=1 << 50, micro_batch_size=4)
    steps = [("plain", outline(SIX, plain)), ("memfit", outline(SIX, TIGHT))]
    top, *_ = (line for line in drawn(LiveBytes(tuple(steps))).splitlines() if "█" in line)
    alone = drawn(LiveBytes((steps[1],)))
    assert TIGHT.predicted_peak_bytes < plain.predicted_peak_bytes
    assert "█" in top
    assert (
        alone.splitlines()[1:] != drawn(LiveBytes(tuple(steps))).splitlines()[-len(alone.splitlines()) + 1 :]
    )


# ---- blocks ------------------------------------------------------------------------------------------------


def test_each_block_is_one_cell_as_dark_as_its_share() -> None:
    blocks = tuple(Block(f"layers.{i}", range(i, i + 1)) for i in range(6))
    strip = BlockStrip(blocks, (0.0, 0.2, 0.5, 0.9, 1.0, 0.0))
    *_, line = drawn(strip).splitlines()
    assert line == "layers.0 ·░▒▓█· layers.5"
    many = BlockStrip(blocks * 20, (0.0, 1.0) * 60)
    assert "".join(drawn(many, width=50).splitlines()[-3:]) == "·█" * 60
    assert all(len(line) <= 50 for line in drawn(many, width=50).splitlines())


# ---- candidates --------------------------------------------------------------------------------------------


def check_tried(planner: Planner, profile: Profile, budget: int) -> list[str]:
    """Compares each size that was tried with planning it alone; returns why each was not taken."""
    plan = planner.best(budget)
    found = tried(planner, plan)
    assert [size.micro_batch_size for size in found] == sorted({g.rows for g in profile.graphs}, reverse=True)
    (chosen,) = (size for size in found if size.is_chosen)
    assert (chosen.micro_batch_size, chosen.predicted_peak_bytes, chosen.predicted_step_s) == (
        plan.micro_batch_size,
        plan.predicted_peak_bytes,
        plan.predicted_step_s,
    )
    for size in found:
        if size.is_chosen:
            continue
        try:
            alone = find_plan(profile, memory=budget, micro_batch_size=size.micro_batch_size)
        except InfeasibleBudget:
            assert size.predicted_peak_bytes is None
            continue
        assert alone.predicted_step_s >= plan.predicted_step_s
        if size.is_bound:
            assert size.predicted_step_s is not None
            assert plan.predicted_step_s <= size.predicted_step_s <= alone.predicted_step_s + 1e-6
        elif size.predicted_step_s is not None:
            assert (size.predicted_step_s, size.predicted_peak_bytes) == (
                alone.predicted_step_s,
                alone.predicted_peak_bytes,
            )
    again = {
        size.micro_batch_size: ", recomputing" for size in found if size.recompute_s and not size.is_bound
    }
    return [
        size.why_not and size.why_not.partition(" alone takes ")[0] + again.get(size.micro_batch_size, "")
        for size in found
    ]


@FEW
@given(profiles(6, tidy=True), st.floats(0, 1))
def test_what_was_tried_is_what_planning_each_size_alone_gives(profile: Profile, part: float) -> None:
    planner = Planner(profile)
    low, high = (planner.lowest().predicted_peak_bytes, planner.best(1 << 50).predicted_peak_bytes)
    check_tried(planner, profile, int(low + part * max(0, high - low)))


def test_there_is_an_answer_for_each_way_of_not_being_taken() -> None:
    """In one profile the update is the peak of small parts, in one small parts cost little."""
    seen = Counter[str]()
    whole, half = SIX.graphs
    quick = replace(half, ops=tuple(replace(op, seconds=op.seconds * 0.75) for op in half.ops))
    for profile in (SIX, replace(SIX, update=flat_update(14 * MIB)), replace(SIX, graphs=(whole, quick))):
        planner = Planner(profile)
        low, high = planner.lowest().predicted_peak_bytes, planner.best(1 << 50).predicted_peak_bytes
        for part in range(11):
            seen.update(check_tried(planner, profile, low + (high - low) * part // 10))
    assert set(seen) == {"", "slower", "slower at best", "slower, recomputing", "nothing found fits"}


# ---- widths, encodings -------------------------------------------------------------------------------------


def letters(text: str) -> Counter[str]:
    """How often each character occurs, but for spaces."""
    return Counter(re.sub(r"\s", "", text))


def test_a_narrow_window_breaks_lines_and_loses_nothing() -> None:
    planner = Planner(SIX)
    sizes, plans, others = tried(planner, planner.best(33 * MIB)), frontier(SIX, plans=3), strategies(SIX)
    tables: tuple[Callable[[], RenderableType], ...] = (
        lambda: tried_table(sizes),
        lambda: strategy_table(others, plans),
        lambda: facts("a run", [("saved in", "/a/long/path/" + "x" * 50), ("steps", "3")]),
        lambda: plan_table(TIGHT, "six layers"),
    )
    for make, width in product(tables, (30, 40, 60, 76)):
        narrow = drawn(make(), width=width)
        assert letters(narrow) == letters(drawn(make(), width=200))
        assert max(len(line) for line in narrow.splitlines()) <= width


def test_a_stream_that_knows_ascii_only_gets_ascii() -> None:
    report = StepReport(3, 9, 1.5, 0.1, 100, "rows", 30 * MIB)
    assert in_ascii(*shown(SIX, TIGHT), Progress(report, TIGHT, "1 s left"))


# ---- while it runs -----------------------------------------------------------------------------------------


@given(st.integers(20, 120), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 40 * MIB)))
def test_progress_keeps_to_its_two_lines(width: int, step: int, measured: int | None) -> None:
    report = StepReport(step, 9, 1.5, 0.1, 123_456, "tokens", measured)
    first, second = drawn(Progress(report, TIGHT, "12.3 s left"), width=width).splitlines()
    assert max(len(first), len(second)) <= width
    assert f"step {step}/9" in first
    assert width < 26 or "of 33.0 MiB" in second
    assert width < 80 or first.count("#") == round(24 * step / 9)


def test_a_quiet_watcher_says_nothing() -> None:
    file = io.StringIO()
    with TerminalWatcher(Console(file=file, quiet=True, force_terminal=True)) as watcher:
        watcher.said("building")
        watcher.planned(TIGHT)
        watcher.stepped(StepReport(1, 1, 1.0, 0.1, 1, "rows"))
    assert file.getvalue() == ""


def test_without_a_terminal_progress_is_lines_with_what_was_measured() -> None:
    file = io.StringIO()
    with TerminalWatcher(Console(file=file, width=100)) as watcher:
        watcher.planned(TIGHT)
        for step in (1, 2, 3):
            watcher.stepped(StepReport(step, 3, 1.0, 0.1, 1, "rows", 20 * MIB))
    assert "\x1b" not in file.getvalue()
    assert file.getvalue().splitlines()[-1].startswith("step 3/3 loss 1.0000")
    assert file.getvalue().splitlines()[-1].endswith("of 33.0 MiB measured 20.0 MiB")
