"""Advice is read off the profile, says nothing where nothing is worth saying, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import memfit
import strategies
from jobs import job, tiny, tiny_batch, tiny_loss
from memfit.cli import main
from memfit.core.advice import advice, alone, block
from memfit.core.graph import Profile, Residents
from memfit.core.plan import Plan, find_plan
from memfit.core.timeline import base_bytes, run
from memfit.errors import InfeasibleBudget
from memfit.report.reading import read_source
from memfit.units import format_bytes, format_seconds
from memfit.workload import Workload

Captured = pytest.CaptureFixture[str]
ROWS = 12


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(3)


def heavy() -> nn.Module:
    """A model whose gradients weigh about as much as its activations."""
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(64, 8))


def heavy_batch(rows: int = ROWS) -> dict[str, Tensor]:
    """Rows of 16 positions."""
    return {"tokens": torch.randn(rows, 16, 64), "labels": torch.randint(0, 8, (rows, 16))}


def recorded(model: nn.Module, batch: Any, loss_fn: Any = tiny_loss, *, adam: bool = True) -> Profile:
    """A profile on fakes, with seconds by a roofline: the same on any machine."""
    optimizer = torch.optim.Adam(model.parameters()) if adam else None
    with torch.device("meta"):
        return memfit.profile(model.to("meta"), loss_fn, on_meta(batch), optimizer=optimizer)


def on_meta(batch: Any) -> Any:
    """A batch without data."""
    return {name: t.to("meta") for name, t in batch.items()}


@pytest.fixture(scope="module")
def profile() -> Profile:
    """The profile of the heavy model."""
    return recorded(heavy(), heavy_batch())


def pinned_plans(profile: Profile, memory: int, sizes: list[int]) -> Iterator[Plan]:
    """The best plan of each of some micro-batch sizes that has one."""
    for size in sizes:
        try:
            yield find_plan(profile, memory=memory, micro_batch_size=size)
        except InfeasibleBudget:
            continue


# ---- a smaller batch -----------------------------------------------------------------------------------


def frozen_norm() -> nn.Module:
    """Convolutions, and a layer whose parameters are used twice."""
    shared = nn.Conv2d(4, 4, 3, padding=1)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4).eval(),
        nn.ReLU(),
        shared,
        nn.ReLU(),
        shared,
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(144, 8, bias=False))


JOBS: list[tuple[str, Any, Any, Any]] = [
    ("heavy", heavy, heavy_batch, tiny_loss),
    ("tied", lambda: tiny().model, lambda rows: tiny_batch(rows, 0, 0), tiny_loss),
    (
        "images",
        frozen_norm,
        lambda rows: {"x": torch.randn(rows, 3, 8, 8), "y": torch.randint(0, 8, (rows,))},
        lambda m, b: F.cross_entropy(m(b["x"]), b["y"]),
    ),
]


@pytest.mark.parametrize(("name", "make", "batch", "loss_fn"), JOBS, ids=[name for name, *_ in JOBS])
def test_a_micro_batch_alone_is_the_step_of_a_batch_of_its_size(
    name: str, make: Any, batch: Any, loss_fn: Any
) -> None:
    whole, small = (recorded(make(), batch(rows), loss_fn, adam=False) for rows in (ROWS, 4))
    derived = alone(whole.graph(4), whole.residents.gradients_bytes)
    true = small.graph(4)
    assert derived is not None
    assert (derived.gradients_resident, true.gradients_resident) == (False, False)
    peaks = [base_bytes(small, graph) + run(graph).peak.total_bytes for graph in (derived, true)]
    assert abs(peaks[0] - peaks[1]) <= 16  # a micro-batch has a weight: a few numbers
    held = [sum(s.size_bytes for s in graph.storages if s.persists) for graph in (derived, true)]
    assert held[0] == held[1] == whole.residents.gradients_bytes
    assert alone(true, 0) is true


def test_gradients_that_are_not_found_are_not_guessed(profile: Profile) -> None:
    graph = profile.graph(4)
    assert alone(graph, profile.residents.gradients_bytes + 1) is None
    strange = replace(profile, residents=replace(profile.residents, gradients_bytes=1))
    plan = find_plan(strange, memory=1 << 30, micro_batch_size=4)
    assert not any("an effective batch of 4 rows" in line for line in advice(strange, plan))


def test_what_a_smaller_batch_saves_is_what_planning_it_says(profile: Profile) -> None:
    plan = find_plan(profile, memory=1 << 30, micro_batch_size=4)
    small = find_plan(recorded(heavy(), heavy_batch(4)), memory=1 << 30, micro_batch_size=4)
    (line,) = [line for line in advice(profile, plan) if "an effective batch" in line]
    assert small.predicted_peak_bytes < plan.predicted_peak_bytes
    peaks = [format_bytes(p.predicted_peak_bytes) for p in (small, plan)]
    assert f"of 4 rows needs no accumulation: it peaks at {peaks[0]} instead of {peaks[1]}" in line
    assert f"instead of {format_seconds(plan.predicted_step_s / ROWS)}" in line
    assert plan.rows == ROWS


@given(
    beta2=st.floats(0.5, 0.99999),
    rows=st.integers(2, 4096),
    steps=st.integers(2, 64),
)
def test_the_second_moment_keeps_its_half_life_in_rows(beta2: float, rows: int, steps: int) -> None:
    size = -(-rows // steps)
    plan = Plan(rows, size, steps, 100, 90, "", 1.0, 0.3, 0.0, 0.0)
    empty = Profile(rows, (), Residents(0, 0, 0, 0))
    lines = advice(replace(empty, graphs=(strategies.build((), rows=size),)), plan, betas=(0.9, beta2))
    (line,) = [line for line in lines if "beta2" in line]
    found = float(line.split("beta2 ")[1].split()[0])
    assert f"with {size} rows" in line
    assert "arXiv 2507.07101" in line
    decayed = found**rows  # after as many rows both forget as much
    assert decayed == pytest.approx(beta2**size, rel=2e-5 * rows)


def test_updates_of_an_epoch_are_counted_with_the_last_short_batch(profile: Profile) -> None:
    plan = find_plan(profile, memory=1 << 30, micro_batch_size=4)
    lines = advice(profile, plan, rows_per_epoch=1201)
    expected = "an epoch of 1,201 rows has 101 optimizer updates; with a batch of 4 rows it would have 301"
    assert expected in lines
    assert not any("epoch" in line or "beta2" in line for line in advice(profile, plan))


# ---- accumulation or recomputation ---------------------------------------------------------------------


@settings(max_examples=25)
@given(profile=strategies.profiles(most=5), share=st.floats(0.0, 1.2), size=st.sampled_from([None, 4, 2, 1]))
def test_the_other_way_is_the_best_plan_of_the_other_sizes(
    profile: Profile, share: float, size: int | None
) -> None:
    sizes = [graph.rows for graph in profile.graphs]
    size = size if size in sizes else None
    free = find_plan(profile, memory=1 << 40, micro_batch_size=size)
    try:
        budget_bytes = max(1, int(free.predicted_peak_bytes * share))
        plan = find_plan(profile, memory=budget_bytes, micro_batch_size=size)
    except InfeasibleBudget as refused:
        budget_bytes = refused.needed_bytes
        plan = find_plan(profile, memory=budget_bytes, micro_batch_size=size)
    accumulates = plan.gradient_accumulation_steps > 1
    lines = [line for line in advice(profile, plan) if "than" in line or "without accumulation" in line]
    if not accumulates and not plan.recomputes:
        assert lines == []
        return
    others = [rows for rows in sizes if (rows == 4) == accumulates]
    found = list(pinned_plans(profile, budget_bytes, others))
    best = min((p.predicted_step_s for p in found), default=None)
    if best is None:
        assert lines == [] or (accumulates and "takes at least" in lines[0])
    elif abs(best / plan.predicted_step_s - 1) < 0.01:
        assert lines == []
    else:
        (line,) = lines
        way = "accumulation costs" if accumulates else "recomputation costs"
        verb = "less" if best > plan.predicted_step_s else "more"
        assert line.startswith(f"{way} {verb} here than")
        assert f"would take {format_seconds(best)}" in line
        assert size is not None or verb == "less"  # the plan that was chosen freely is the fastest


def test_a_pinned_micro_batch_that_memory_does_not_ask_for_costs_more(profile: Profile) -> None:
    plan = find_plan(profile, memory=1 << 30, micro_batch_size=4)
    whole = find_plan(profile, memory=1 << 30)
    took = format_seconds(whole.predicted_step_s)
    assert advice(profile, plan)[0].startswith(
        f"accumulation costs more here than recomputation: the whole batch at once would take {took}"
    )


def test_memory_in_which_the_whole_batch_cannot_run_is_named(profile: Profile) -> None:
    with pytest.raises(InfeasibleBudget) as whole:
        find_plan(profile, memory=1, micro_batch_size=ROWS)
    with pytest.raises(InfeasibleBudget) as any_size:
        find_plan(profile, memory=1)
    assert any_size.value.needed_bytes < whole.value.needed_bytes
    plan = find_plan(profile, memory=whole.value.needed_bytes - 1)
    assert plan.gradient_accumulation_steps > 1
    needed = format_bytes(whole.value.needed_bytes)
    assert advice(profile, plan)[0] == f"without accumulation the batch of 12 rows takes at least {needed}"


def test_nothing_is_said_where_nothing_has_to_be_paid_for(profile: Profile) -> None:
    plan = find_plan(profile, memory=1 << 30)
    assert (plan.gradient_accumulation_steps, plan.recomputes) == (1, 0)
    assert advice(profile, plan, rows_per_epoch=1000, betas=(0.9, 0.999)) == ()


def test_a_batch_that_must_stay_whole_is_not_advised_to_be_split(profile: Profile) -> None:
    whole = replace(profile, graphs=profile.graphs[:1])
    with pytest.raises(InfeasibleBudget) as refused:
        find_plan(whole, memory=1)
    plan = find_plan(whole, memory=refused.value.needed_bytes)
    assert plan.recomputes > 0
    assert advice(whole, plan, rows_per_epoch=1000, betas=(0.9, 0.999)) == ()


# ---- what a workload knows, and where it is shown ------------------------------------------------------


class Endless(IterableDataset[Tensor]):
    """Data of no known length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("batches", "rows"),
    [
        ([1, 2, 3], 18),
        (DataLoader(TensorDataset(torch.zeros(20, 2)), batch_size=6), 24),
        (DataLoader(Endless(), batch_size=2), None),
        (lambda index: index, None),
    ],
    ids=["a list", "a loader", "a stream", "a function"],
)
def test_rows_of_an_epoch_are_known_where_the_batches_have_a_length(batches: Any, rows: int | None) -> None:
    made = tiny()
    work = Workload(made.model, made.optimizer, made.loss_fn, batches)
    assert work.rows_per_epoch(6) == rows


def test_betas_are_those_of_an_optimizer_of_the_family() -> None:
    made = tiny()
    assert made.betas == (0.9, 0.999)
    assert Workload(made.model, torch.optim.SGD(made.model.parameters()), tiny_loss, []).betas is None


def listed() -> Workload:
    """A workload whose epoch is known; the command line finds it by its name."""
    return job(batch=[tiny_batch(6, 0, index) for index in range(10)])  # type: ignore[arg-type]


HERE = "test_advice:listed"
ACCUMULATES = ["plan", HERE, "--memory", "1GiB", "--micro-batch-size", "2"]


def test_the_plan_command_gives_a_block_of_advice_before_its_verdict(capsys: Captured) -> None:
    assert main(ACCUMULATES) == 0
    shown = capsys.readouterr().out
    _, found, rest = shown.partition("\nadvice:\n")
    advised, _, verdict = rest.partition("\n\n")
    assert found
    assert " fits into " in verdict
    assert "an epoch of 60 rows has 10 optimizer updates" in advised
    assert "beta2 0.999667 keeps the half-life of 0.999 in rows" in advised
    assert all(line.startswith("  ") for line in advised.splitlines())


def test_the_plan_as_json_lists_the_advice_and_is_still_a_plan(capsys: Captured) -> None:
    assert main([*ACCUMULATES, "--json"]) == 0
    text = capsys.readouterr().out
    lines = json.loads(text)["advice"]
    assert len(lines) >= 3
    plan = Plan.from_json(text)
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (2, 3)
    assert main(ACCUMULATES) == 0
    assert block(lines) in capsys.readouterr().out


def test_a_plan_that_needs_none_has_no_advice(capsys: Captured) -> None:
    assert main(["plan", "jobs:tiny", "--memory", "1GiB"]) == 0
    assert "advice" not in capsys.readouterr().out
    assert main(["plan", "jobs:tiny", "--memory", "1GiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] == []


def test_training_says_its_advice_once_and_keeps_it_in_the_result(tmp_path: Any, capsys: Captured) -> None:
    pinned = ["--memory", "1GiB", "--micro-batch-size", "2", "--steps", "2"]
    assert main(["train", HERE, "--out", str(tmp_path / "run"), *pinned, "--json"]) == 0
    shown = capsys.readouterr()
    lines = json.loads(shown.out)["advice"]
    assert any("10 optimizer updates" in line for line in lines)
    assert shown.err.count("\nadvice:\n") == 1
    assert all(line in shown.err for line in lines if "optimizer updates" in line or "beta2" in line)
    stored = read_source(tmp_path / "run")  # its seconds are of the speed that the steps had
    assert stored.profile is not None
    assert stored.plan is not None
    assert lines == [*advice(stored.profile, stored.plan, rows_per_epoch=60, betas=listed().betas)]
    assert main(["train", HERE, "--out", str(tmp_path / "plain"), "--plain", "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] == []
