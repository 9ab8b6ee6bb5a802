"""The examination behind ``memfit doctor``: what the machine offers, and whether memfit keeps its word on it.

Note [Check]
 1. On each kind of device a small model with dropout is fitted at a pinned micro-batch, into a third of its
    activations less, and runs two steps. The plain loop at that micro-batch runs beside it.
 2. Losses and gradients must be those of the plain loop to the bit.
 3. What the plan promised *before* the first step is held against the allocator's account. A step mends a
    broken promise by itself, so that its own verdict, after that, would look well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from memfit.api import Step, find_plan, fit, profile, simulate
from memfit.core.machine import Finding, Level, Machine, Speeds, findings
from memfit.errors import MemfitError
from memfit.runtime.machine import machine, speeds
from memfit.runtime.preserve import same_random_streams
from memfit.units import format_bytes

CHECK: Final = "check on"  # begins the subject of what a check found
_ROWS: Final = 16
_MICRO_BATCH: Final = 8  # two equal parts: their weights are exact
_LENGTH, _WIDTH, _BLOCKS = 128, 64, 3
_STEPS: Final = 2
_PLENTY_BYTES: Final = 1 << 40

Batch = dict[str, Tensor]
_Trained = tuple[nn.Module, torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that an examination found."""

    machine: Machine
    speeds: tuple[Speeds, ...]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> list[Finding]:
        """What must be cured."""
        return [finding for finding in self.findings if finding.level is Level.PROBLEM]


def examine(*, fit: Callable[..., Step] = fit) -> Diagnosis:
    """Looks at the machine, measures its devices and checks memfit on each kind of them; some seconds.

    Args:
        fit: What is checked.
    """
    found = machine()
    places = ["cpu", *(["cuda"] if found.cards else [])]
    checks = [finding for place in places for finding in check(place, fit=fit)]
    return Diagnosis(found, tuple(speeds(place) for place in places), (*findings(found), *checks))


def check(place: str, *, fit: Callable[..., Step] = fit) -> tuple[Finding, ...]:
    """Fits a small model on a device and holds memfit to its promises. See Note [Check].

    The random streams of the caller are left as they were.
    """
    with same_random_streams():
        try:
            return tuple(_checks(torch.device(place), fit))
        except (MemfitError, RuntimeError, ValueError, TypeError) as error:
            first_line = str(error).splitlines()[0] if str(error) else ""
            text = f"a small model cannot be trained: {type(error).__name__}: {first_line}"
            return (Finding(Level.PROBLEM, f"{CHECK} {place}", text, "please report it, with this page"),)


def _checks(place: torch.device, fit: Callable[..., Step]) -> Iterator[Finding]:
    """The findings of a check."""
    subject = f"{CHECK} {place.type}"
    torch.manual_seed(0)
    model = nn.Sequential(*(_Block() for _ in range(_BLOCKS))).to(place)
    plain = copy.deepcopy(model)
    batch = {
        "x": torch.randn(_ROWS, _LENGTH, _WIDTH, device=place),
        "labels": torch.randint(0, _WIDTH, (_ROWS,), device=place),
    }
    optimizer = _optimizer(model)
    recorded = profile(model, _loss_fn, batch, optimizer=optimizer, micro_batch_size=_MICRO_BATCH)
    plain_peak = simulate(recorded, find_plan(recorded, memory=_PLENTY_BYTES)).peak
    budget_bytes = plain_peak.total_bytes - plain_peak.activations_bytes // 3
    step = fit(
        model,
        _loss_fn,
        batch,
        memory=budget_bytes,
        optimizer=optimizer,
        micro_batch_size=_MICRO_BATCH,
        profile=recorded,
    )
    promised_bytes = step.plan.predicted_peak_bytes
    differing = _differing(step, (model, optimizer), (plain, _optimizer(plain)), batch)
    yield _as_said(subject, differing, step)
    yield _as_promised(subject, promised_bytes, step)


def _differing(step: Step, fitted: _Trained, plain: _Trained, batch: Batch) -> list[str]:
    """What is not the same to the bit after some steps, beside the plain loop at the same micro-batch."""
    found: list[str] = []
    for number in range(1, _STEPS + 1):
        torch.manual_seed(number)
        loss = step(batch)
        torch.manual_seed(number)
        expected = _plain_step(plain[0], batch)
        if not torch.equal(loss, expected):
            found.append(f"the loss of step {number}")
        pairs = zip(fitted[0].named_parameters(), plain[0].parameters(), strict=True)
        for (name, parameter), wanted in pairs:
            if parameter.grad is None or wanted.grad is None or not torch.equal(parameter.grad, wanted.grad):
                found.append(f"the gradient of {name} in step {number}")
        for _, optimizer in (fitted, plain):
            optimizer.step()
            optimizer.zero_grad()
    return found


def _plain_step(model: nn.Module, batch: Batch) -> Tensor:
    """The step as everybody writes it, in equal micro-batches."""
    total = torch.zeros((), device=batch["x"].device)
    for start in range(0, _ROWS, _MICRO_BATCH):
        part = {name: tensor[start : start + _MICRO_BATCH] for name, tensor in batch.items()}
        loss = _loss_fn(model, part) * (_MICRO_BATCH / _ROWS)
        loss.backward()
        total += loss.detach()
    return total


def _as_said(subject: str, differing: list[str], step: Step) -> Finding:
    """Whether the results are those of the plain loop."""
    plan = step.plan
    if differing:
        text = f"{len(differing)} results differ from the plain loop, first {differing[0]}"
        return Finding(
            Level.PROBLEM, subject, text, "please report it, with the output of memfit doctor --json"
        )
    how = f"{plan.gradient_accumulation_steps} micro-batches, {plan.recomputes} tensors recomputed"
    text = f"losses and gradients of {_STEPS} steps are those of the plain loop to the bit ({how})"
    return Finding(Level.OK, subject, text)


def _as_promised(subject: str, promised_bytes: int, step: Step) -> Finding:
    """Whether the first plan's promise held. See Note [Check] 3."""
    verdict = step.verdict
    if verdict is None:
        return Finding(Level.PROBLEM, subject, "the allocator's account was not taken", "please report it")
    promised, measured, budget = (
        format_bytes(size) for size in (promised_bytes, verdict.measured_peak_bytes, verdict.budget_bytes)
    )
    figures = f"promised {promised}, the allocator counted {measured}, of {budget}"
    is_kept = verdict.held and verdict.attempts == 1 and verdict.measured_peak_bytes <= promised_bytes
    if is_kept and step.plan.predicted_peak_bytes == promised_bytes:
        return Finding(Level.OK, subject, f"the memory is kept to: {figures}")
    text = f"the promise was broken: {figures}"
    if step.plan.predicted_peak_bytes != promised_bytes:
        text += "; the step has planned again from what was measured"
    return Finding(Level.PROBLEM, subject, text, "please report it, with the output of memfit doctor --json")


class _Block(nn.Module):
    """A feed-forward block with dropout beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output: as x, [rows, length, width]."""
        out: Tensor = x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return out


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One with state."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over rows of the cross entropy."""
    return nn.functional.cross_entropy(model(batch["x"]).mean(dim=1), batch["labels"])
