"""A profile that the first steps have corrected is stored, used again, and refused where it does not hold."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memfit
from memfit.core.basis import what_changed
from memfit.core.costs import at_speed
from memfit.runtime.basis import basis_of
from memfit.runtime.job import Job
from memfit.train import TrainOptions, train
from strategies import profiles

ROWS = 8


def net(width: int = 16, dropout: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 1))


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def cubes(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).pow(3).mean()
    return loss


def batch(rows: int = ROWS) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 4)


def adamw(model: nn.Module, **flags: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **flags)


def stored() -> tuple[memfit.Profile, memfit.Plan]:
    """What an earlier run left behind, by way of JSON."""
    model = net()
    step = memfit.fit(model, squares, batch(), memory="1GiB", optimizer=adamw(model))
    for _ in range(3):
        step(batch())
    return memfit.Profile.from_json(step.profile.to_json()), memfit.Plan.from_json(step.plan.to_json())


def test_a_stored_profile_is_used_again_and_gives_the_same_plan() -> None:
    profile, plan = stored()
    model = net()
    with warnings.catch_warnings(action="error"):
        step = memfit.fit(
            model, squares, batch(), memory="1GiB", optimizer=adamw(model, lr=0.5), profile=profile
        )
    assert step.profile is profile
    assert step.plan.recompute == plan.recompute
    assert step.plan.predicted_step_s == pytest.approx(plan.predicted_step_s)


def test_the_third_step_is_timed_and_its_seconds_are_in_profile_and_plan() -> None:
    model = net()
    step = memfit.fit(model, squares, batch(), memory="1GiB", optimizer=adamw(model))
    for _ in range(2):
        step(batch())
    before = step.plan
    start_s = time.perf_counter()
    step(batch())
    elapsed_s = time.perf_counter() - start_s
    update_s = step.profile.update_s
    assert before.predicted_step_s != step.plan.predicted_step_s <= elapsed_s + update_s
    again = memfit.find_plan(step.profile, memory="1GiB")
    assert again.predicted_step_s == pytest.approx(step.plan.predicted_step_s)
    timed = step.plan
    step(batch())
    assert step.plan is timed


@given(profiles(6), st.sampled_from([0.5, 2.0, 8.0]), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_another_speed_changes_no_decision(profile: memfit.Profile, factor: float, percent: int) -> None:
    budget = find(profile, 1).predicted_peak_bytes * (100 + percent) // 100
    plan, quicker = find(profile, budget), find(at_speed(profile, factor), budget)
    assert (plan.recompute, plan.micro_batch_size) == (quicker.recompute, quicker.micro_batch_size)
    assert plan.at_speed(factor, profile.update_s).predicted_step_s == pytest.approx(quicker.predicted_step_s)


def find(profile: memfit.Profile, budget: int) -> memfit.Plan:
    """The plan of a budget, or of the least memory that works."""
    try:
        return memfit.find_plan(profile, memory=budget)
    except memfit.InfeasibleBudget as refused:
        return memfit.find_plan(profile, memory=refused.needed_bytes)


@pytest.mark.parametrize(
    ("changed", "model", "loss", "rows", "flags", "size"),
    [
        ("the model was Sequential of 97 parameters", net(20), squares, ROWS, {}, None),
        ("the model was Sequential of 97 parameters", net(dropout=0.2), squares, ROWS, {}, None),
        ("the loss was squares", net(), cubes, ROWS, {}, None),
        (
            r"the batch was float32 \(8, 4\) and is float32 \(6, 4\)",
            net(),
            squares,
            6,
            {},
            None,
        ),
        ("the optimizer was AdamW", net(), squares, ROWS, {"amsgrad": True}, None),
    ],
)
def test_a_profile_of_something_else_is_not_used_and_the_warning_says_what_changed(
    changed: str, model: nn.Module, loss: Any, rows: int, flags: dict[str, Any], size: int | None
) -> None:
    profile, _ = stored()
    with pytest.warns(UserWarning, match=f"the stored profile is not used: {changed}.*profiling again"):
        step = memfit.fit(
            model,
            loss,
            batch(rows),
            memory="1GiB",
            optimizer=adamw(model, **flags),
            micro_batch_size=size,
            profile=profile,
        )
    assert step.profile is not profile
    step(batch(rows))


def test_a_stored_profile_does_not_loosen_a_pinned_micro_batch() -> None:
    profile, _ = stored()
    model = net()

    def fitted(size: int, stored: memfit.Profile) -> memfit.Step:
        return memfit.fit(
            model,
            squares,
            batch(),
            memory="1GiB",
            optimizer=adamw(model),
            micro_batch_size=size,
            profile=stored,
        )

    four = fitted(4, profile)
    assert four.plan.micro_batch_size == 4
    assert [graph.rows for graph in four.profile.graphs] == [4]
    with pytest.warns(UserWarning, match=r"it holds micro-batches of \[4\] rows, and 2 are asked for"):
        assert fitted(2, four.profile).plan.micro_batch_size == 2


def told(loss: Any = squares, model: nn.Module | None = None) -> dict[str, str]:
    model = model or net()
    return dict(basis_of(Job(model, loss, batch(), None)))


class Scaled(nn.Sequential):
    """A module with a plain attribute that its forward reads."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return self.scale * x


def test_what_a_loss_closes_over_and_what_a_module_holds_are_part_of_the_basis() -> None:
    def around(function: Any, power: int = 1) -> Any:
        return lambda model, b: function(model, b) ** power

    assert told(around(squares))["loss"] == told(around(squares))["loss"]
    assert told(around(squares))["loss"] != told(around(cubes))["loss"]
    assert told(around(squares))["loss"] != told(around(squares, 2))["loss"]
    assert told(functools.partial(squares))["loss"] != told(functools.partial(cubes))["loss"]
    one, two = Scaled(*net()), Scaled(*net())
    assert told(model=one)["model"] == told(model=two)["model"] != told()["model"]
    two.scale = 2.0
    assert told(model=one)["model"] != told(model=two)["model"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = told()["settings"]
    assert inside != told()["settings"]


def test_what_an_optimizer_steps_is_part_of_the_basis_and_a_rate_is_not() -> None:
    model = net()

    def optimizer(parameters: Any, lr: float = 0.1, momentum: float = 0.9) -> str:
        made = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
        return dict(basis_of(Job(model, squares, batch(), made)))["optimizer"]

    everything = optimizer(model.parameters())
    assert optimizer(model[3].parameters()) != everything
    assert optimizer(model.parameters(), lr=0.2, momentum=0.8) == everything
    assert optimizer(model.parameters(), momentum=0.0) != everything


@pytest.mark.parametrize(
    "damage",
    [
        {"residents": [[]]}, {"rows": None}, {"fixed_s": "x"}, {"alignment_bytes": None}, {"graphs": []},
        {"alignment_bytes": 0}, {"update": {}}, {"basis": 3}, {"rows": -1},
    ],
)  # fmt: skip
def test_a_damaged_profile_is_refused(damage: dict[str, Any]) -> None:
    data = json.loads(stored()[0].to_json())
    with pytest.raises(ValueError, match="not a memfit profile"):
        memfit.Profile.from_json(json.dumps(data | damage))


def test_a_profile_whose_log_names_what_is_not_there_is_refused() -> None:
    data = json.loads(stored()[0].to_json())
    data["graphs"][0]["ops"] = data["graphs"][0]["ops"][:-1]
    with pytest.raises(ValueError, match="the log names what is not there"):
        memfit.Profile.from_json(json.dumps(data))


def test_another_version_is_named() -> None:
    before = (("torch", "2.12.0"), ("device", "cpu"))
    assert what_changed(before, before) is None
    assert (
        what_changed(before, (("torch", "2.13.0"), ("device", "cpu"))) == "the torch was 2.12.0 and is 2.13.0"
    )
    assert what_changed((), before) == "nothing is known of the torch it was made for"


def test_the_basis_is_the_same_in_every_process() -> None:
    code = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from test_stored_profile import *\n"
        "m = net(); print(basis_of(Job(m, squares, batch(), adamw(m))))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    model = net()
    assert told == {f"{basis_of(Job(model, squares, batch(), adamw(model)))}\n"}


def test_a_resumed_run_plans_from_the_profile_it_stored(tmp_path: Path) -> None:
    class Watch:
        def said(self, text: str) -> None: ...
        def planned(self, plan: memfit.Plan) -> None: ...
        def stepped(self, report: Any) -> None: ...

    out = tmp_path / "run"
    target = "memfit.workloads.images:workload"
    options = TrainOptions(target, "1GiB", 4, out, batch_size=4)
    train(options, Watch())
    text = (out / "profile.json").read_text()
    marked = replace(memfit.Profile.from_json(text), source="a stored profile")
    (out / "profile.json").write_text(marked.to_json())
    train(TrainOptions(target, "1GiB", 6, out, batch_size=4, resume=True), Watch())
    assert json.loads((out / "profile.json").read_text())["source"] == "a stored profile"
    (out / "profile.json").write_text("{")
    train(TrainOptions(target, "1GiB", 8, out, batch_size=4, resume=True), Watch())
    assert json.loads((out / "profile.json").read_text())["source"] != "a stored profile"
