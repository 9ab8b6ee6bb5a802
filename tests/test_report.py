"""The report page: what it says is what the plans say, it asks for nothing, and nothing from outside runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.cli import main
from memfit.core.frontier import frontier, undominated
from memfit.core.graph import OpKey, Profile, StepGraph
from memfit.core.outline import Point, outline, thinned
from memfit.core.plan import Plan, find_plan, simulate
from memfit.core.strategies import strategies
from memfit.core.strip import blocks_of, decisions, recomputed_shares
from memfit.core.timeline import Event
from memfit.report.contents import PLANS, contents, sizes_of
from memfit.report.page import page
from memfit.report.reading import Source, read_source
from test_shape_of_the_code import imported_by

Captured = pytest.CaptureFixture[str]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
BIG = ["train", "memfit.workloads.text:workload", "--batch-size", "4", "--steps", "2"]
BIG += ["--memory", "88MiB", "--micro-batch-size", "4"]


class Parsed(HTMLParser):
    """The tags of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._is_in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._is_in_script = tag == "script"
        if self._is_in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_in_script = False

    def handle_data(self, data: str) -> None:
        if self._is_in_script:
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        """What the script of the page reads."""
        found: dict[str, Any] = json.loads(self.scripts[0])["data"]
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the 12-layer byte GPT that has to recompute, and its page."""
    out = tmp_path_factory.mktemp("report") / "run"
    assert main([*BIG, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def parsed(run: Path) -> Parsed:
    return Parsed((run / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def profile(run: Path) -> Profile:
    return Profile.from_json((run / "profile.json").read_text())


@pytest.fixture(scope="module")
def plans(run: Path, profile: Profile) -> dict[tuple[int, float], Plan]:
    """The frontier at the peaks of the ways by hand and the plan of the run, by peak and seconds."""
    own = Plan.from_json((run / "plan.json").read_text())
    by_hand = [strategy.predicted_peak_bytes for strategy in undominated(strategies(profile))]
    both = [*frontier(profile, plans=PLANS, budgets_bytes=by_hand), own]
    return {(plan.predicted_peak_bytes, plan.predicted_step_s): plan for plan in both}


def sizes(choice: dict[str, Any]) -> list[tuple[int, ...]]:
    """The bytes of each point, category by category."""
    return list(zip(*(accumulate(column) for column in choice["sizes"]), strict=True))


def test_the_plans_of_the_page_are_the_frontier_and_its_own(
    run: Path, parsed: Parsed, plans: dict[tuple[int, float], Plan]
) -> None:
    own = Plan.from_json((run / "plan.json").read_text())
    shown = [(choice["peak"], choice["seconds"]) for choice in parsed.data["choices"]]
    assert shown == sorted(shown)
    assert set(shown) == set(plans)
    assert shown[parsed.data["chosen"]] == (own.predicted_peak_bytes, own.predicted_step_s)


def test_each_peak_of_the_page_is_the_simulated_one_to_the_byte(
    parsed: Parsed, profile: Profile, plans: dict[tuple[int, float], Plan]
) -> None:
    found = parsed.data
    plain = find_plan(profile, memory=1 << 60)
    for choice in (found["plain"], *found["choices"]):
        plan = plans.get((choice["peak"], choice["seconds"]), plain)
        told = [simulate(profile, plan, first_step=first).peak for first in (False, True)]
        most = max(told, key=lambda event: event.total_bytes)
        top = max(sizes(choice), key=sum)
        assert top == sizes_of(most)
        assert sum(top) == choice["peak"] == plan.predicted_peak_bytes
        assert found["texts"][choice["at"][sizes(choice).index(top)]] == most.owner


def test_each_point_is_a_moment_of_the_simulation(run: Path, profile: Profile) -> None:
    plan = Plan.from_json((run / "plan.json").read_text())
    drawn = outline(profile, plan)
    moments = {e for first in (False, True) for e in simulate(profile, plan, first_step=first).events}
    edge = next((p.end_s for p in drawn.phases if p.name == "backward"), 0.0)  # gradients grow in the first
    later = [p for p in drawn.points if p.start_s >= edge or plan.gradient_accumulation_steps == 1]
    assert later
    assert {point.event for point in later} <= moments


def test_the_picture_takes_as_long_as_the_step(parsed: Parsed) -> None:
    for choice in parsed.data["choices"]:
        assert choice["end_ns"] == pytest.approx(choice["seconds"] * 1e9, rel=1e-6)
        assert sum(name == "forward" for name, _, _ in choice["phases"]) == choice["steps"]
        starts = list(accumulate(choice["at_ns"]))
        assert all(a < b for a, b in pairwise(starts))


def event(size_bytes: int) -> Event:
    return Event("forward", "", 0, 0, 0, 0, size_bytes, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 99)), min_size=1), st.integers(1, 40))
def test_the_highest_moment_of_every_stretch_survives(moments: list[tuple[int, int]], stretches: int) -> None:
    points = [Point(float(at), event(size)) for at, size in sorted(moments, key=lambda moment: moment[0])]
    end_s = points[-1].start_s + 1.0
    kept = thinned(points, end_s, stretches)
    assert len(kept) <= 2 * stretches
    assert set(kept) <= set(points)

    def highest(some: list[Point]) -> list[tuple[int, int]]:
        groups = groupby(some, key=lambda p: min(int(p.start_s / (end_s / stretches)), stretches - 1))
        return [(number, max(p.event.total_bytes for p in group)) for number, group in groups]

    assert highest(kept) == highest(points)


def test_the_strip_says_what_the_plan_says(profile: Profile, plans: dict[tuple[int, float], Plan]) -> None:
    plan = plans[min(plans)]
    graph = profile.graph(plan.micro_batch_size)
    letters, blocks = decisions(graph, plan), blocks_of(graph)
    assert [op for block in blocks for op in block.ops] == list(range(graph.forward_ops))
    assert sum(block.name.startswith("blocks.") for block in blocks) == 12
    wanted = set(plan.recompute)
    saved = {save.value for save in graph.saves if graph.values[save.value].producer >= 0}
    again = {value for value in saved if graph.value_key(value) in wanted}
    shares = recomputed_shares(graph, plan)
    for block, share in zip(blocks, shares, strict=True):
        total, part = (
            sum(graph.size_bytes(v) for v in some if graph.values[v].producer in block.ops)
            for some in (saved, again)
        )
        assert share == pytest.approx(part / total if total else 0.0)
    assert max(shares) > 0
    for op, letter in zip(graph.ops, letters, strict=False):
        kinds = {graph.value_key(v) in wanted for v in op.outputs if v in saved}
        remade = any(graph.value_key(v) in wanted for v in op.outputs)
        assert (
            letter
            == {(True, True): "p", (True, False): "r", (False, True): "k", (False, False): "."}[
                remade, False in kinds
            ]
        )


def test_the_page_is_small_and_asks_for_nothing(run: Path, parsed: Parsed) -> None:
    assert (run / "report.html").stat().st_size < 2_000_000
    assert not any(
        {"src", "href", "action", "data", "poster"} & set(attributes) for _, attributes in parsed.tags
    )
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"link", "iframe", "object", "img", "base", "form"})
    (style,) = re.findall(r"<style>(.*?)</style>", (run / "report.html").read_text(), flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_lets_only_the_own_scripts_run(parsed: Parsed) -> None:
    (policy,) = [a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    digests = [hashlib.sha256(script.encode()).digest() for script in parsed.scripts[1:]]
    assert rules["script-src"].split() == [f"'sha256-{base64.b64encode(d).decode()}'" for d in digests]
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}


def evil(graph: StepGraph) -> StepGraph:
    """The same graph, its modules named by an attacker."""
    ops = [replace(op, key=OpKey(f"{EVIL}.{op.key.frame}", op.key.op, op.key.nth)) for op in graph.ops]
    return replace(graph, ops=tuple(ops))


def test_names_from_outside_stay_text(profile: Profile) -> None:
    largest = profile.graph(profile.rows)
    profile = replace(profile, graphs=(evil(largest),), source=EVIL)
    plan = find_plan(profile, memory=1 << 50)
    result = {"advice": [EVIL], "measured_peak_bytes": 1, "held": True}
    text = page(contents(Source(EVIL, f"memfit {EVIL}", plan, profile, (), {EVIL: EVIL}, result), plans=2))
    shown = Parsed(text)
    assert len(shown.scripts) == 3
    assert "img" not in {tag for tag, _ in shown.tags}
    assert any(EVIL in entry for entry in shown.data["texts"])
    assert EVIL not in text


def test_a_loss_that_is_no_number_leaves_a_gap(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    with open(tmp_path / "run" / "losses.jsonl", "a") as file:
        file.write('{"step": 3, "loss": NaN, "seconds": 1.0}\n{"step": 4, "lo')
    assert [entry.step for entry in read_source(tmp_path / "run").losses] == [1, 2, 3]
    source = replace(read_source(tmp_path / "run"), plan=None, profile=None)
    assert Parsed(page(contents(source))).data["losses"][-1] == [3, None, 1.0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.json", None, "holds no run"),
        ("run.json", "{", "is damaged"),
        ("run.json", "[]", "is damaged"),
        ("run.json", '{"format": "other"}', "is not what memfit writes"),
        ("plan.json", "{}", "is damaged"),
        ("plan.json", "[1", "is damaged"),
        ("profile.json", None, "it is missing"),
        ("profile.json", '{"format": 3}', "is damaged"),
        ("losses.jsonl", "what?\n", "is damaged"),
    ],
)
def test_a_damaged_run_is_refused_with_the_cure(
    run: Path, tmp_path: Path, capsys: Captured, name: str, content: str | None, said: str
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    assert main(["report", str(copy), "--out", str(tmp_path / "page.html")]) == 5
    told = capsys.readouterr().err
    assert said in told
    assert "Put the file back" in told or "Give the --out" in told
    assert not (tmp_path / "page.html").exists()


def test_a_plan_needs_its_own_profile(run: Path, tmp_path: Path, capsys: Captured) -> None:
    plan = tmp_path / "a plan.json"
    shutil.copy(run / "plan.json", plan)
    assert main(["report", str(plan)]) == 5
    assert "--profile" in capsys.readouterr().err
    other = json.loads((run / "plan.json").read_text()) | {
        "recompute": [["nowhere", "aten.mm", 0, 0]],
        "levels": [],
    }
    (tmp_path / "other.json").write_text(json.dumps(other))
    for stranger in ("other.json", "nothing.json"):
        assert main(["report", str(tmp_path / stranger), "--profile", str(run / "profile.json")]) == 5
    assert "was not made from" in capsys.readouterr().err


def test_a_plan_with_its_profile_has_a_page_and_pictures(run: Path, tmp_path: Path, capsys: Captured) -> None:
    plan, png, svg = tmp_path / "plan.json", tmp_path / "a.png", tmp_path / "a.svg"
    shutil.copy(run / "plan.json", plan)
    options = ["--profile", str(run / "profile.json"), "--png", str(png), "--svg", str(svg), "--json"]
    assert main(["report", str(plan), *options]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written.pop("schema"), written.pop("schema_version")) == ("memfit/report", 1)
    assert written == {"page": str(tmp_path / "plan.html"), "png": str(png), "svg": str(svg)}
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().startswith("<svg")
    assert "Nothing was measured" in Parsed((tmp_path / "plan.html").read_text()).text


def test_a_plain_run_has_a_page_without_plans(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "jobs:tiny", "--plain", "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert "report.html" in capsys.readouterr().err
    shown = Parsed((tmp_path / "run" / "report.html").read_text())
    assert "A plain run" in shown.text
    assert len(shown.data["losses"]) == 2
    assert "choices" not in shown.data
    assert main(["report", str(tmp_path / "run"), "--png", str(tmp_path / "a.png")]) == 5
    assert "no timeline to draw" in capsys.readouterr().err


def test_the_command_and_the_versions_that_made_it_are_shown(run: Path, parsed: Parsed) -> None:
    stored = json.loads((run / "run.json").read_text())
    assert (
        "memfit train memfit.workloads.text:workload --memory 88MiB --steps 2 --batch-size 4" in parsed.text
    )
    assert stored["versions"]["torch"] in parsed.text
    assert "It held: " in parsed.text
    assert "accumulation is" in parsed.text or "Not asked yet" in parsed.text


def test_a_report_needs_no_torch_and_help_needs_no_altair(run: Path) -> None:
    made = imported_by(f"from memfit.cli import main; assert main(['report', {str(run)!r}]) == 0")
    assert "altair" in made
    assert "torch" not in made
    asked = imported_by("from memfit.cli import main; assert main(['report', '--help']) == 0")
    assert asked.isdisjoint({"altair", "vl_convert", "torch"})
