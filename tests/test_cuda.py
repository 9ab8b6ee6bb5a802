"""What only a CUDA device can show; skipped by name without one. ``make check-cuda`` runs them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import memfit
from memfit.core.allocator import CachingAllocator, Memory
from memfit.runtime.meter import PeakMeter

pytestmark = pytest.mark.cuda


def mlp() -> nn.Module:
    """Dropout on the device, so that the CUDA generator matters."""
    layers = [m for _ in range(6) for m in (nn.Linear(512, 512), nn.GELU(), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.Linear(512, 10)).cuda().train()


def conv() -> nn.Module:
    """BatchNorm through cudnn, and in-place ReLU."""
    layers = [
        m for _ in range(4) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 256, 10)).cuda().train()


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy over rows."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def autocast_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The same under autocast."""
    with torch.autocast("cuda", torch.bfloat16):
        return loss_fn(model, batch)


def run(model: nn.Module, step: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Loss, gradients, buffers and the generator's state after a step from a fixed start."""
    model.zero_grad(set_to_none=True)
    torch.cuda.manual_seed(3)
    loss = step()
    tensors = [loss, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]
    return [t.detach().clone() for t in tensors], torch.cuda.get_rng_state()


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("loss", [loss_fn, autocast_loss])
def test_a_planned_step_equals_the_plain_one_on_cuda(
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor], share: float
) -> None:
    model = mlp()
    batch = (torch.randn(2048, 512, device="cuda"), torch.randint(0, 10, (2048,), device="cuda"))
    profile = memfit.profile(model, loss, batch, micro_batch_size=2048)
    plain = memfit.find_plan(profile, memory=1 << 40).predicted_peak_bytes
    fixed = profile.residents.total_bytes
    budget_bytes = fixed + profile.unexplained_bytes + int((plain - fixed) * share)

    def plainly() -> Tensor:
        value = loss(model, batch)
        value.backward()
        return value

    expected, state = run(model, plainly)
    step = memfit.fit(model, loss, batch, memory=budget_bytes, micro_batch_size=2048, count="rows")
    found, state_after = run(model, lambda: step(batch))
    assert torch.equal(state, state_after)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert step.verdict is not None
    assert step.verdict.held


def test_batch_norm_statistics_are_updated_once_on_cuda() -> None:
    model = conv()
    batch = (torch.randn(64, 8, 16, 16, device="cuda"), torch.randint(0, 10, (64,), device="cuda"))
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        loss_fn(model, batch).backward()
        expected = [b.clone() for b in model.buffers()]
        model.load_state_dict(start)
        profile = memfit.profile(model, loss_fn, batch, micro_batch_size=64)
        plain = memfit.find_plan(profile, memory=1 << 40).predicted_peak_bytes
        step = memfit.fit(model, loss_fn, batch, memory=int(plain * 0.7), count="rows")
        step(batch)
    assert all(torch.equal(a, b) for a, b in zip(expected, model.buffers(), strict=True))


def test_memory_may_be_a_share_of_the_device_or_what_is_free() -> None:
    model = mlp()
    batch = (torch.randn(64, 512, device="cuda"), torch.randint(0, 10, (64,), device="cuda"))
    total = torch.cuda.get_device_properties(0).total_memory
    assert memfit.fit(model, loss_fn, batch, memory="50%", count="rows").plan.budget_bytes <= total // 2 + 1
    assert 0 < memfit.fit(model, loss_fn, batch, count="rows").plan.budget_bytes <= total


# ---- the caching allocator -------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.fixture
def clean() -> Iterator[None]:
    """Nothing cached before, no cap and the default settings afterwards."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield
    torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def in_use() -> Memory:
    """What the allocator says now."""
    stats = torch.cuda.memory_stats()
    names = ("requested_bytes", "allocated_bytes", "reserved_bytes")
    return Memory(*(stats[f"{name}.all.current"] for name in names))


def cap(extra_bytes: int) -> None:
    """Lets the allocator reserve so much more than now."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra_bytes) / total)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("expandable", [False, True])
def test_the_replayed_allocator_does_what_the_allocator_does(expandable: bool) -> None:
    """Tensors come and go on a stream of their own, which shares no block with what was there before."""
    torch.cuda.memory._set_allocator_settings(f"expandable_segments:{expandable}")
    chance = random.Random(5)
    replayed = CachingAllocator(expandable_segments=expandable)
    start = in_use()
    live: list[tuple[Tensor, int]] = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(400):
            if live and chance.random() < 0.45:
                tensor, handle = live.pop(chance.randrange(len(live)))
                del tensor
                replayed.free(handle)
            else:
                size_bytes = int(2 ** chance.uniform(0, 26))
                tensor = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
                live.append((tensor, replayed.allocate(size_bytes)))
                del tensor
            now = in_use()
            assert now.requested_bytes - start.requested_bytes == replayed.requested_bytes
            assert now.allocated_bytes - start.allocated_bytes == replayed.allocated_bytes
            assert now.reserved_bytes - start.reserved_bytes == replayed.reserved_bytes


@pytest.mark.usefixtures("clean")
def test_the_meter_counts_how_often_the_allocator_made_room() -> None:
    """40 MiB are cached when 60 are asked for under a cap of 80."""
    cap(80 * MIB)
    with torch.cuda.stream(torch.cuda.Stream()):
        with PeakMeter("cuda") as meter:
            torch.empty(40 * MIB, dtype=torch.uint8, device="cuda")
        assert meter.alloc_retries == 0
        with PeakMeter("cuda") as meter:
            torch.empty(60 * MIB, dtype=torch.uint8, device="cuda")
        assert meter.alloc_retries == 1


@pytest.mark.usefixtures("clean")
def test_a_step_for_which_the_allocator_made_room_did_not_hold() -> None:
    """The cache is full of a large block of another stream when the verified step begins."""
    model = mlp()
    batch = (torch.randn(2048, 512, device="cuda"), torch.randint(0, 10, (2048,), device="cuda"))
    step = memfit.fit(model, loss_fn, batch, memory="2GiB", count="rows")
    torch.cuda.empty_cache()
    with torch.cuda.stream(torch.cuda.Stream()):  # blocks are not shared between streams
        torch.empty(600 * MIB, dtype=torch.uint8, device="cuda")
    cap(10 * MIB)
    step(batch)
    assert step.verdict is not None
    assert step.verdict.alloc_retries > 0
    assert step.verdict.is_within_budget
    assert not step.verdict.held
