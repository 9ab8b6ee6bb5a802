"""What other tools are given: it opens there, and says what the timeline says."""

from __future__ import annotations

import csv
import io
import json
import pickle
import pickletools
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.cuda import _memory_viz

import memfit
from memfit.cli import main
from memfit.core.graph import Profile
from memfit.core.plan import Plan, find_plan, simulate
from memfit.core.unrolled import unrolled
from memfit.report.contents import CATEGORIES, Contents, contents, sizes_of
from memfit.report.export import KINDS, MOST_MICRO_BATCHES, exported, write_exports
from memfit.report.reading import BadReport, Source
from memfit.report.snapshot import PROTOCOL
from memfit.report.table import COLUMNS, SCHEMA_VERSION
from memfit.report.trace import trace
from test_shape_of_the_code import imported_by

Captured = pytest.CaptureFixture[str]
# What the viewer's own reader knows (`unpickle` in torch/utils/viz/MemoryViz.js of PyTorch).
READ_BY_THE_VIEWER = {
    *("APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE"),
    *("DICT", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1", "LONG_BINGET"),
    *("LONG_BINPUT", "MARK", "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS"),
    *("SHORT_BINUNICODE", "STOP", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(batch).square().mean()
    return out


@pytest.fixture(scope="module")
def profile() -> Profile:
    """A small stack of blocks in which activations outweigh the rest."""
    layers = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Sigmoid())
    optimizer = torch.optim.AdamW(model.parameters())
    return memfit.profile(model, loss_fn, torch.randn(256, 8), optimizer=optimizer)


def made(profile: Profile, rows: int) -> Contents:
    """A report of the plan of least memory with so many rows a micro-batch."""
    found = memfit.frontier(profile, micro_batch_size=rows, plans=3)
    plan = min(found, key=lambda plan: plan.predicted_peak_bytes)
    return contents(Source("a plan", "memfit report", plan, profile, micro_batch_size=rows), plans=2)


@pytest.fixture(scope="module")
def reports(profile: Profile) -> dict[int, Contents]:
    """The whole batch at once, in some parts, and in more than are told one by one."""
    return {rows: made(profile, rows) for rows in (256, 43, 22)}


@pytest.fixture(params=[256, 43, 22])
def content(request: pytest.FixtureRequest, reports: dict[int, Contents]) -> Contents:
    """Each of them."""
    return reports[request.param]


def plan_of(content: Contents) -> Plan:
    assert content.planned is not None
    return content.planned.choices[content.planned.chosen].plan


def plain_of(content: Contents) -> Plan:
    assert content.planned is not None
    return content.planned.plain.plan


def parsed(content: Contents, kind: str) -> Any:
    return json.loads(exported(content, kind))


# ---- the memory snapshot ------------------------------------------------------------------------------


class OnlyPlain(pickle.Unpickler):
    """Refuses whatever is not a plain value."""

    def find_class(self, module: str, name: str) -> Any:
        raise AssertionError(f"the file names {module}.{name}")


def opened(content: Contents) -> dict[str, Any]:
    found: dict[str, Any] = OnlyPlain(io.BytesIO(exported(content, "snapshot"))).load()
    return found


def test_the_plans_of_the_tests_recompute_and_split(reports: dict[int, Contents]) -> None:
    """Else the tests below would say little."""
    assert plan_of(reports[256]).recomputes
    assert 1 < plan_of(reports[43]).gradient_accumulation_steps <= MOST_MICRO_BATCHES
    assert plan_of(reports[22]).gradient_accumulation_steps > MOST_MICRO_BATCHES


def test_a_snapshot_holds_nothing_that_the_viewer_cannot_read(content: Contents) -> None:
    codes = [(code.name, argument) for code, argument, _ in pickletools.genops(exported(content, "snapshot"))]
    assert codes[0] == ("PROTO", PROTOCOL)
    assert PROTOCOL <= 4
    assert {name for name, _ in codes} <= READ_BY_THE_VIEWER
    opened(content)


def viewed_peak_bytes(events: list[dict[str, Any]]) -> int:
    """The highest point of the viewer's curve: a block is there until its free is completed."""
    live: dict[int, int] = {}
    highest = 0
    for before, event in pairwise([{}, *events]):
        if event["action"] == "alloc":
            assert event["addr"] not in live
            live[event["addr"]] = event["size"]
        elif event["action"] == "free_completed":
            # The viewer takes both for one event only where they follow each other.
            assert (before["action"], before["addr"]) == ("free_requested", event["addr"])
            assert live.pop(event["addr"]) == event["size"]
        highest = max(highest, sum(live.values()))
    return highest


def test_the_peak_that_the_viewer_shows_is_the_predicted_one(content: Contents) -> None:
    (events,) = opened(content)["device_traces"]
    assert viewed_peak_bytes(events) == plan_of(content).predicted_peak_bytes


def test_no_two_blocks_of_a_snapshot_overlap_and_all_lie_in_its_segment(content: Contents) -> None:
    found = opened(content)
    (segment,), (events,) = found["segments"], found["device_traces"]
    live: dict[int, int] = {}
    for event in events:
        if event["action"] == "alloc":
            start, end = event["addr"], event["addr"] + event["size"]
            assert all(end <= other or start >= other + size for other, size in live.items())
            assert segment["address"] <= start < end <= segment["address"] + segment["total_size"]
            live[start] = event["size"]
        elif event["action"] == "free_completed":
            del live[event["addr"]]
    at_end = {b["address"]: b["size"] for b in segment["blocks"] if b["state"] == "active_allocated"}
    assert at_end == live
    assert [b["address"] for b in segment["blocks"]] == [
        segment["address"] + sum(b["size"] for b in segment["blocks"][:at])
        for at in range(len(segment["blocks"]))
    ]


def test_pytorch_reads_a_snapshot(content: Contents) -> None:
    found = opened(content)
    for page in (_memory_viz.trace_plot(found), _memory_viz.segment_plot(found)):
        assert page.lstrip().startswith("<!DOCTYPE html>")
    assert "total_allocated" in _memory_viz.segsum(found)
    assert f"{len(found['device_traces'][0])} entries" in _memory_viz.trace(found)
    flames = _memory_viz.memory(found, format_flamegraph=str).splitlines()
    parameters = [line for line in flames if "parameters" in line]
    assert content.planned is not None
    sizes = content.planned.profile.residents.parameters_bytes
    assert sum(int(line.rsplit(" ", 1)[1]) for line in parameters) == sizes


def test_a_snapshot_names_module_op_phase_and_what_memory_is_for(content: Contents) -> None:
    (events,) = opened(content)["device_traces"]
    allocations = [event for event in events if event["action"] == "alloc"]
    stacks = [[(frame["filename"], frame["name"]) for frame in event["frames"]] for event in allocations]
    linear = [("2.0", "aten.addmm.default"), ("2", "forward"), ("micro-batch 1", "forward")]
    assert linear in stacks
    kinds = {"parameter", "gradient", "optimizer_state", "input", "activation", "temporary"}
    again = {"recomputed_activation"} if plan_of(content).recomputes else set()
    assert {event["category"] for event in allocations} == kinds | again
    # A version of the viewer fails on categories without it.
    assert "unknown" in {event.get("category") for event in events}


# ---- the trace ----------------------------------------------------------------------------------------


def test_slices_of_a_trace_nest_and_take_as_long_as_the_step(content: Contents) -> None:
    found = parsed(content, "trace")
    for process, plan in ((1, plain_of(content)), (2, plan_of(content))):
        slices = [e for e in found["traceEvents"] if e["ph"] == "X" and e["pid"] == process]
        spans = [(round(e["ts"] * 1000), round((e["ts"] + e["dur"]) * 1000)) for e in slices]
        assert all(start <= end for start, end in spans)
        assert min(start for start, _ in spans) == 0
        assert max(end for _, end in spans) == pytest.approx(plan.predicted_step_s * 1e9, rel=1e-6, abs=2)
        around: list[tuple[int, int]] = []
        for start, end in spans:  # the outer before the inner, as Perfetto wants it
            while around and around[-1][1] <= start and (around[-1][1] < end or around[-1][0] < start):
                around.pop()
            assert not around or (around[-1][0] <= start and end <= around[-1][1])
            around.append((start, end))


def test_ops_of_a_trace_fill_their_parts_without_a_gap(content: Contents) -> None:
    found = parsed(content, "trace")
    assert content.planned is not None
    step = unrolled(content.planned.profile, plan_of(content), most_micro_batches=MOST_MICRO_BATCHES)
    slices = [e for e in found["traceEvents"] if e["ph"] == "X" and e["pid"] == 2]
    ops = [e for e in slices if "args" in e]
    assert [e["args"]["live bytes"] for e in ops] == [tick.event.total_bytes for tick in step.ticks]
    assert [(e["name"], e["cat"]) for e in ops] == [(tick.key.op, tick.event.phase) for tick in step.ticks]
    together = [e["name"] for e in slices if e["name"].startswith("micro-batches")]
    told = [part.name for part in step.parts if not part.ticks]
    assert together == [f"{name}, each like the one before" for name in told]
    modules = {e["name"] for e in slices}
    assert {"forward", "backward", "optimizer step", "micro-batch 1", "2", "2.0", "loss"} <= modules
    assert ("recompute" in modules) == bool(plan_of(content).recomputes)


def test_the_counters_of_a_trace_stack_to_the_total_and_reach_the_peak(content: Contents) -> None:
    found = parsed(content, "trace")["traceEvents"]
    for process, plan in ((1, plain_of(content)), (2, plan_of(content))):
        counters = [e for e in found if e["ph"] == "C" and e["pid"] == process]
        stacked = {e["ts"]: e["args"] for e in counters if e["name"] == "live bytes"}
        total = {e["ts"]: e["args"]["bytes"] for e in counters if e["name"] == "total"}
        assert all(tuple(args) == CATEGORIES for args in stacked.values())
        assert {ts: sum(args.values()) for ts, args in stacked.items()} == total
        assert list(total) == sorted(total)
        assert max(total.values()) == plan.predicted_peak_bytes


def test_of_moments_at_one_time_the_counters_show_the_highest(profile: Profile) -> None:
    plan = find_plan(profile, memory="1GiB", micro_batch_size=256)
    graphs = (
        replace(g, ops=tuple(replace(op, seconds=0.0, overhead_s=0.0) for op in g.ops))
        for g in profile.graphs
    )
    step = unrolled(replace(profile, graphs=tuple(graphs)), replace(plan, predicted_step_s=0.0))
    found = trace([("plain", plan, step)], {})["traceEvents"]
    total = [e["args"]["bytes"] for e in found if e["ph"] == "C" and e["name"] == "total"]
    assert max(total) == plan.predicted_peak_bytes


def test_a_trace_has_a_process_for_each_of_both_steps(content: Contents) -> None:
    found = parsed(content, "trace")
    names = [e["args"]["name"] for e in found["traceEvents"] if e["name"] == "process_name"]
    assert [name.split(":")[0] for name in names] == ["plain", "planned"]
    assert found["otherData"]["versions"]["memfit"] == memfit.__version__


# ---- the tables ---------------------------------------------------------------------------------------


def test_the_rows_of_the_table_are_the_timeline(reports: dict[int, Contents], profile: Profile) -> None:
    content = reports[256]
    head, *rows = list(csv.reader(io.StringIO(exported(content, "csv").decode())))
    assert tuple(head) == COLUMNS
    assert {row[0] for row in rows} == {str(SCHEMA_VERSION)}
    for state, each in (("plain", plain_of(content)), ("planned", plan_of(content))):
        told = [dict(zip(head, row, strict=True)) for row in rows if row[1] == state]
        events = [simulate(profile, each, first_step=first).events for first in (False, True)]
        sizes = [tuple(int(row[name]) for name in head if name.endswith("_bytes"))[:-1] for row in told]
        assert sizes in [[sizes_of(event) for event in some] for some in events]
        assert [int(row["index"]) for row in told] == list(range(len(told)))
        assert max(int(row["total_bytes"]) for row in told) == each.predicted_peak_bytes
        assert all(int(row["total_bytes"]) == sum(size) for row, size in zip(told, sizes, strict=True))
        ends = [float(row["start_s"]) + float(row["seconds"]) for row in told]
        assert ends[:-1] == pytest.approx([float(row["start_s"]) for row in told[1:]])
        assert ends[-1] == pytest.approx(each.predicted_step_s)


def test_the_json_says_the_same_as_the_table_and_what_made_it(content: Contents) -> None:
    found = parsed(content, "data")
    assert (found["format"], found["schema_version"]) == ("memfit-timeline", SCHEMA_VERSION)
    assert found["versions"]["memfit"] == memfit.__version__
    rows = list(csv.DictReader(io.StringIO(exported(content, "csv").decode())))
    for state, plan in (("plain", plain_of(content)), ("planned", plan_of(content))):
        told = found["states"][state]
        mine = [row for row in rows if row["state"] == state]
        for name, column in told["timeline"].items():
            assert [str(value) for value in column] == [row[name] for row in mine]
        assert told["plan"]["predicted_peak_bytes"] == plan.predicted_peak_bytes
        assert sum(part["seconds"] for part in told["parts"]) == pytest.approx(plan.predicted_step_s)
        assert sum(part["moments"] for part in told["parts"]) == len(mine)


# ---- files and the command ----------------------------------------------------------------------------


def test_the_command_writes_each_kind_and_says_where(
    profile: Profile, tmp_path: Path, capsys: Captured
) -> None:
    plan = find_plan(profile, memory="1GiB")
    (tmp_path / "plan.json").write_text(plan.to_json())
    (tmp_path / "profile.json").write_text(profile.to_json())
    targets = {kind: tmp_path / f"step.{kind}" for kind in KINDS}
    options = [word for kind, path in targets.items() for word in (f"--{kind}", str(path))]
    assert main(["report", str(tmp_path / "plan.json"), *options, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert {kind: written[kind] for kind in KINDS} == {kind: str(path) for kind, path in targets.items()}
    pickle.loads(targets["snapshot"].read_bytes())
    assert json.loads(targets["trace"].read_text())["traceEvents"]
    assert json.loads(targets["data"].read_text())["states"]
    assert targets["csv"].read_text().startswith("schema_version,")
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_that_cannot_be_written_is_named_with_the_cure(
    reports: dict[int, Contents], tmp_path: Path
) -> None:
    content = reports[256]
    with pytest.raises(BadReport, match=r"nowhere/a\.csv cannot be written .*Give a file in a folder"):
        write_exports(content, {"csv": tmp_path / "nowhere" / "a.csv"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadReport, match=r"folder cannot be written"):
        write_exports(content, {"csv": tmp_path / "folder"})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_two_kinds_do_not_go_to_one_file(reports: dict[int, Contents], tmp_path: Path) -> None:
    content = reports[256]
    with pytest.raises(BadReport, match="Give each its own file"):
        write_exports(content, {"csv": tmp_path / "a", "data": tmp_path / "a"})
    assert not list(tmp_path.iterdir())


def test_a_plain_run_has_nothing_to_export(tmp_path: Path) -> None:
    for kind in KINDS:
        with pytest.raises(BadReport, match="give a run with a plan"):
            write_exports(contents(Source("a run", "memfit train")), {kind: tmp_path / "a"})
    assert not list(tmp_path.iterdir())


def test_names_from_outside_stay_text_and_a_number_that_is_none_is_left_out(
    reports: dict[int, Contents],
) -> None:
    evil = '"\n,</script>\u2028'
    result = {"measured_peak_bytes": float("nan"), "held": True}
    content = replace(reports[256], source=Source(evil, evil, result=result))
    assert parsed(content, "data")["title"] == parsed(content, "trace")["otherData"]["title"] == evil
    assert parsed(content, "data")["measured"] == {"held": True}


def test_the_page_on_exports_runs(
    reports: dict[int, Contents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("step.pickle", "step.trace.json", "step.csv", "step.json")
    write_exports(reports[256], {kind: Path(name) for kind, name in zip(KINDS, names, strict=True)})
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    assert all(name in page for name in (*names, *COLUMNS[:10], COLUMNS[-1]))
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, {})
    assert str(plan_of(reports[256]).predicted_peak_bytes) in capsys.readouterr().out
    assert (tmp_path / "step.html").exists()


def test_an_export_needs_no_torch() -> None:
    assert "torch" not in imported_by("import memfit.report.export")
