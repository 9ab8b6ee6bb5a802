"""What tests of FSDP2 run on each rank; see ``tests/processes.py``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import memfit
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.runtime.sharding import settled, sharding_of

STEPS = 10
ROWS = 12
_WORDS, _WIDTH, _LENGTH = 30, 32, 24


class Block(nn.Module):
    """Attention-free, with dropout off, parameters of sizes that no number of ranks divides, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up = nn.Linear(_WIDTH, 75)
        self.down = nn.Linear(75, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Words in, words out."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, _WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(_WIDTH, _WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x).clone()  # FSDP warns of views
        return out


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def sharded(dtype: torch.dtype, **settings: Any) -> nn.Module:
    model = net(dtype)
    for block in model.blocks:
        fully_shard(block, **settings)
    return fully_shard(model, **{k: v for k, v in settings.items() if k != "reshard_after_forward"})


def batches(ranks: int = 1, rank: int = 0) -> list[dict[str, Tensor]]:
    """The rows of a rank; labels that do not count are more in the first rows, so that ranks differ."""
    made = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        words = torch.randint(0, _WORDS, (ROWS, _LENGTH), generator=made)
        labels = torch.randint(0, _WORDS, (ROWS, _LENGTH), generator=made)
        labels[: ROWS // 2, : _LENGTH // 2] = -100
        own = slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)
        found.append({"words": words[own].clone(), "labels": labels[own].clone()})
    return found


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch["words"]).flatten(0, 1), batch["labels"].flatten())


def alone(dtype: torch.dtype) -> tuple[list[float], list[Tensor]]:
    """One process with the whole batch, by a plain loop."""
    model = net(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches():
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach() for p in model.parameters()]


class Case(NamedTuple):
    """One way to be trained: a budget as a part of the way from the least to a plain step; None: no limit."""

    micro_batch_size: int
    share: float | None
    dtype: torch.dtype = torch.float32


class Trained(NamedTuple):
    """What came out: predicted and measured peaks of each of the first steps, the update included."""

    losses: list[float]
    weights: list[Tensor]
    plan: memfit.Plan
    once: bool
    predicted_bytes: list[int]
    measured_bytes: list[int]


def each_case(rank: int, ranks: int, cases: list[Case]) -> list[Trained]:
    """Trains once for each."""
    return [_trained(rank, ranks, case) for case in cases]


def _trained(rank: int, ranks: int, case: Case) -> Trained:
    model = sharded(case.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = batches(ranks, rank)

    profile = memfit.profile(
        model, loss_of, data[0], optimizer=optimizer, micro_batch_size=case.micro_batch_size
    )
    step = memfit.fit(
        model,
        loss_of,
        data[0],
        memory=_budget(profile, case.share),
        optimizer=optimizer,
        micro_batch_size=case.micro_batch_size,
        count="labels",
    )
    losses, predicted, measured = [], [], []
    for number, batch in enumerate(data):
        if number < 3:
            peaks: list[int] = []
            losses.append(_metered(model, optimizer, batch, step, peaks, is_own=number == 2))
            measured.append(max(peaks))
            predicted.append(step.plan.predicted_peak_bytes)
        else:
            losses.append(float(step(batch)))
            optimizer.step()
        optimizer.zero_grad()
    weights = [p.full_tensor().detach() for p in model.parameters()]
    once = step._accumulation.sharding.reduces_once
    return Trained(losses, weights, step.plan, once, predicted, measured)


def _budget(profile: memfit.Profile, share: float | None) -> int:
    """A part of the way from the least memory to that of a plain step; the same on all ranks."""
    if share is None:
        return 1 << 40
    try:
        memfit.find_plan(profile, memory=1)
        raise AssertionError("a plan of one byte")
    except memfit.InfeasibleBudget as refused:
        least_bytes = refused.needed_bytes
    most_bytes = memfit.find_plan(profile, memory=1 << 40).predicted_peak_bytes
    return int(least_bytes + share * (most_bytes - least_bytes))


def _metered(
    model: nn.Module, optimizer: Any, batch: Any, step: memfit.Step, peaks: list[int], *, is_own: bool
) -> float:
    """A step whose peak is told by the meter of the step itself, or by one around it, and its update's."""
    state = [t for s in optimizer.state.values() for t in s.values()]
    level_bytes = resident_bytes([*model.parameters(), *model.buffers(), *state, *batch.values()])
    if is_own:
        with settled(sharding_of(model)), PeakMeter("cpu") as meter:
            loss = float(step(batch))
        peaks.append(level_bytes + meter.peak_bytes)
    else:
        loss = float(step(batch))
        assert step.verdict is not None
        peaks.append(step.verdict.measured_peak_bytes)
    level_bytes += resident_bytes(p.grad for p in model.parameters() if p.grad is not None)
    with PeakMeter("cpu") as meter:
        optimizer.step()
    peaks.append(level_bytes + meter.peak_bytes)
    return loss
