"""The examples that a new user copies: short, they learn, and the memory they name binds and holds."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import memfit

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str) -> tuple[Any, ...]:
    """What the main function of an example returns: the step, and what shows that it learns."""
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 60
    found: tuple[Any, ...] = runpy.run_path(str(path))["main"]()
    return found


def check(step: memfit.Step, said: str) -> None:
    """The budget holds and is less than the plain step takes; the plan and the verdict are printed."""
    plan, verdict = step.plan, step.verdict
    assert verdict is not None
    assert verdict.held
    plain = memfit.find_plan(step.profile, memory="1TiB", micro_batch_size=plan.micro_batch_size)
    assert plan.predicted_peak_bytes <= plan.budget_bytes < plain.predicted_peak_bytes
    assert str(plan) in said
    assert str(verdict) in said


def test_a_pretrained_model_is_fine_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    step, before, after = run("minilm")
    check(step, capsys.readouterr().out)
    assert after > before + 0.25


def test_a_resnet_learns_photographs_from_batches_that_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    step, losses = run("resnet")
    check(step, capsys.readouterr().out)
    assert step.plan.gradient_accumulation_steps == 1
    assert losses[-1] < losses[0] - 0.5


def test_a_contrastive_loss_is_trained_in_two_passes(capsys: pytest.CaptureFixture[str]) -> None:
    step, losses = run("contrastive")
    check(step, capsys.readouterr().out)
    assert step.plan.is_two_pass
    assert losses[-1] < losses[0] - 2
