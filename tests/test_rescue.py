"""A step that runs out of memory is run again from its start, and nobody can tell from the numbers."""

from __future__ import annotations

import copy
import dataclasses
import errno
import gc
import logging
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from memfit.core.frontier import fallbacks
from memfit.runtime.preserve import Snapshot
from memfit.runtime.rescue import is_out_of_memory, let_go_of_frames
from models import assert_same, outcome_of, square_loss
from outages import ERRORS, WIDTH, Job, Outage, batch_at, capped, differing, disturbed, undisturbed

STEPS = 5


@pytest.fixture(scope="module")
def jobs() -> dict[str, Job]:
    return {name: Job.named(name) for name in ("whole", "in parts")}


@pytest.fixture(scope="module")
def whole_job(jobs: dict[str, Job]) -> Job:
    return jobs["whole"]


@pytest.fixture(scope="module")
def lower_plans(whole_job: Job) -> list[memfit.Plan]:
    return list(fallbacks(whole_job.profile, whole_job.start().step.plan))


# ---- which errors ------------------------------------------------------------------------------------

OUT_OF_MEMORY: list[Exception] = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.88 GiB. GPU 0 has a total capacity of"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 432.00 MiB."),
    torch.OutOfMemoryError("anything"),
    RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.42 GB, other allocations: 1.1 GB, max allowed"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("cuda runtime error (2) : out of memory at /pytorch/aten/src/THC/THCTensorRandom.cu:25"),
    RuntimeError("HIP error: out of memory\nHIP kernel errors might be asynchronously reported"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED_DEVICE_MEMORY"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    torch.distributed.DistBackendError(
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:275, unhandled cuda error, NCCL version "
        "2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'"
    ),
    RuntimeError("Last error:\nCuda failure 'out of memory'"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 132426121216 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        "[enforce fail at ..\\c10\\core\\impl\\alloc_cpu.cpp:72] data. DefaultCPUAllocator: not enough "
        "memory: you tried to allocate 29491200 bytes."
    ),
    RuntimeError("std::bad_alloc"),
    MemoryError("std::bad_alloc"),
    MemoryError(),
    RuntimeError("could not create a memory object"),
    RuntimeError("unable to mmap 4096 bytes from file </torch_7_1>: Cannot allocate memory (12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]

OTHER: list[Exception] = [
    RuntimeError("the replay buffer is out of memory cells"),
    RuntimeError("out of memory"),
    RuntimeError("not enough memory slots for 12 keys"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a"),
    RuntimeError("could not create a memory descriptor from blob"),
    RuntimeError("NCCL error: unhandled cuda error"),
    ValueError("CUDA out of memory"),
    KeyError("MemoryError"),
    OSError(errno.ENOSPC, "No space left on device"),
]


def text_of(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:60]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=text_of)
def test_every_form_of_the_error_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=text_of)
def test_an_error_that_only_speaks_of_memory_is_not_taken_for_one(error: Exception) -> None:
    assert not is_out_of_memory(error)


def raised(body: Callable[[], None]) -> Exception:
    with pytest.raises((ValueError, KeyError)) as caught:
        body()
    return caught.value


def test_an_error_counts_if_it_was_raised_from_or_during_one() -> None:
    def from_one() -> None:
        raise ValueError("the layer failed") from MemoryError()

    def during_one() -> None:
        try:
            raise ERRORS[1]()
        except RuntimeError:
            raise KeyError("the layer failed")  # noqa: B904

    def in_place_of_one() -> None:
        try:
            raise MemoryError
        except MemoryError:
            raise KeyError("not this") from None

    assert is_out_of_memory(raised(from_one))
    assert is_out_of_memory(raised(during_one))
    assert not is_out_of_memory(raised(in_place_of_one))


def test_a_ring_of_causes_is_walked_once() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert not is_out_of_memory(one)


def test_frames_let_go_of_their_tensors_and_keep_their_lines() -> None:
    watched: list[weakref.ref[Tensor]] = []

    def inner() -> None:
        held = torch.ones(3)
        watched.append(weakref.ref(held))
        raise MemoryError

    def outer() -> None:
        held = torch.ones(3)
        watched.append(weakref.ref(held))
        try:
            inner()
        except MemoryError as error:
            raise ValueError("the layer failed") from error

    gc.disable()
    try:
        error = raised(outer)
        assert all(reference() is not None for reference in watched)
        let_go_of_frames(error)
        assert all(reference() is None for reference in watched)
        assert error.__traceback__ is not None
    finally:
        gc.enable()


# ---- a training with outages -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seed"), [("whole", 0), ("whole", 1), ("in parts", 2)])
def test_a_training_with_outages_is_the_undisturbed_one_to_the_bit(
    jobs: dict[str, Job], name: str, seed: int
) -> None:
    job = jobs[name]
    expected, ops = undisturbed(job, STEPS)
    before = expected.state()
    training, places = disturbed(job, STEPS, ops, random.Random(seed))
    assert len(training.step.rescues) == len(places) > 0
    assert training.losses == expected.losses
    assert differing(training.state(), before) == []


def test_an_outage_in_each_part_of_a_step_is_survived(whole_job: Job) -> None:
    expected, ops = undisturbed(whole_job, 4)
    before = expected.state()
    training = whole_job.start()
    training.run(0)
    for number, moment in ((1, 0), (2, ops[2] // 4), (3, ops[3] - 3)):  # the copies, forward, backward
        training.run(number, Outage({moment: MemoryError()}))
    assert training.losses == expected.losses
    assert differing(training.state(), before) == []
    peaks = [rescue.plan.predicted_peak_bytes for rescue in training.step.rescues]
    assert peaks == sorted(set(peaks), reverse=True)
    assert len(peaks) == 3


def test_a_rescue_is_told_and_later_steps_stay_on_the_lower_plan(
    whole_job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    training = whole_job.start()
    first = training.step.plan
    with caplog.at_level(logging.WARNING, logger="memfit"):
        training.run(0, Outage({20: ERRORS[0](), 60: ERRORS[1]()}))
    (rescue,) = training.step.rescues
    assert rescue.failed == first
    assert rescue.attempts == 2  # the second outage struck the first of them
    assert rescue.plan.predicted_peak_bytes < 0.9 * first.predicted_peak_bytes
    assert rescue.plan.micro_batch_size == first.micro_batch_size
    assert [record.getMessage() for record in caplog.records] == [f"{rescue}."]
    assert "CUDA out of memory. Tried to allocate 20.00 MiB" in str(rescue)
    for number in (1, 2, 3):
        training.run(number)
    assert training.step.plan.recompute == rescue.plan.recompute
    assert training.step.plan.budget_bytes == first.budget_bytes
    assert len(training.step.rescues) == 1
    training.step.profile = whole_job.profile
    assert training.step._plan_again() is None  # as where a measured peak is above the prediction
    assert training.step.plan.predicted_peak_bytes == rescue.plan.predicted_peak_bytes
    assert training.step.plan.budget_bytes == first.budget_bytes


def test_where_no_plan_is_enough_the_error_is_raised_and_nothing_is_changed(
    whole_job: Job, lower_plans: list[memfit.Plan]
) -> None:
    training = whole_job.start()
    plan, batch = training.step.plan, batch_at(0)
    before = copy.deepcopy(outcome_of(training.model, torch.zeros(())))
    outages = Outage({n: ERRORS[2]() for n in range(99)}, "aten.nll_loss_backward.default")
    with outages, pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED") as caught:
        training.step(batch)
    (note,) = caught.value.__notes__
    assert f"under {len(lower_plans)} plans" in note
    assert "as before the step" in note
    assert_same(outcome_of(training.model, torch.zeros(())), before)
    assert training.step.plan == plan
    training.run(0)
    assert training.losses == undisturbed(whole_job, 1)[0].losses


def test_where_no_plan_is_lower_the_same_one_runs_again(
    whole_job: Job, lower_plans: list[memfit.Plan]
) -> None:
    training = whole_job.start(memory=lower_plans[-1].predicted_peak_bytes)
    training.run(0, Outage({30: MemoryError()}))
    (rescue,) = training.step.rescues
    assert rescue.plan == rescue.failed
    assert "the same, as none takes less" in str(rescue)
    assert training.losses == undisturbed(whole_job, 1)[0].losses


def test_an_error_of_the_users_own_is_not_caught(whole_job: Job) -> None:
    training = whole_job.start()
    with Outage({30: RuntimeError("the replay buffer is out of memory cells")}), pytest.raises(RuntimeError):
        training.step(batch_at(0))
    assert training.step.rescues == []


class Watched(RuntimeError):
    """An error that weak references can be made of."""


def test_a_rescued_step_leaves_nothing_behind(whole_job: Job) -> None:
    training = whole_job.start()
    batch, seen = batch_at(0), list[weakref.ref[Exception]]()

    class Outages(Outage):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ops += 1
            if self.ops == 40:
                error = Watched("CUDA error: out of memory")
                seen.append(weakref.ref(error))
                raise error
            return func(*args, **(kwargs or {}))

    gc.collect()
    gc.disable()
    try:
        with Outages():
            training.step(batch)
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()


# ---- what a step may change ----------------------------------------------------------------------------


def with_gradients(job: Job, room: bool) -> tuple[Any, list[Tensor]]:
    """A training past its verified steps with gradients of another step; the budget may have no room."""
    training = job.start()
    for number in range(3):
        training.run(number)
    gradients = [torch.randn_like(p) for p in training.model.parameters()]
    for parameter, gradient in zip(training.model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    if not room:
        plan = training.step.plan
        training.step.plan = dataclasses.replace(plan, budget_bytes=plan.predicted_peak_bytes)
    return training, gradients


def test_gradients_of_an_earlier_step_are_put_back_where_the_budget_has_room(whole_job: Job) -> None:
    expected, _ = with_gradients(whole_job, room=True)
    outcome = outcome_of(expected.model, expected.step(batch_at(3)))
    training, _ = with_gradients(whole_job, room=True)
    with Outage({1: MemoryError()}, "aten.native_batch_norm_backward.default"):
        loss = training.step(batch_at(3))
    assert len(training.step.rescues) == 1
    assert_same(outcome_of(training.model, loss), outcome)


def test_without_room_a_step_is_survived_until_it_adds_to_them(whole_job: Job) -> None:
    expected, _ = with_gradients(whole_job, room=False)
    outcome = outcome_of(expected.model, expected.step(batch_at(3)))
    training, _ = with_gradients(whole_job, room=False)
    with Outage({30: MemoryError()}):
        loss = training.step(batch_at(3))
    assert_same(outcome_of(training.model, loss), outcome)


def test_without_room_gradients_that_were_added_to_are_an_error_that_says_so(whole_job: Job) -> None:
    training, gradients = with_gradients(whole_job, room=False)
    outage = Outage({1: MemoryError()}, "aten.native_batch_norm_backward.default")
    with outage, pytest.raises(MemoryError) as caught:
        training.step(batch_at(3))
    found = [p.grad for p in training.model.parameters()]
    assert any(not torch.equal(one, other) for one, other in zip(found, gradients, strict=True))
    (note,) = caught.value.__notes__
    assert "the gradient of the parameter '" in note
    assert "drop the gradients" in note


@pytest.mark.parametrize("op", ["tanh", "tanh_backward"], ids=["before it is written", "afterwards"])
def test_a_large_buffer_is_copied_if_steps_write_to_it(op: str) -> None:
    model = Remembering()
    step = memfit.fit(model, square_loss, torch.randn(8, WIDTH), memory="1GiB", micro_batch_size=8)
    for _ in range(3):
        step(torch.randn(8, WIDTH))
        model.zero_grad()
    assert step._written == {"memory"}
    lasting = Snapshot(model, room_bytes=0, written=step._written).lasting_sizes
    assert sorted(lasting) == sorted((model.memory.nbytes, model.count.nbytes))
    batch, twin = torch.randn(8, WIDTH), copy.deepcopy(model)
    outcome = outcome_of(twin, plain_step(twin, batch))
    with Outage({0: MemoryError()}, f"aten.{op}.default"):
        loss = step(batch)
    assert len(step.rescues) == 1
    assert_same(outcome_of(model, loss), outcome)


class Remembering(nn.Module):
    """A queue of old rows, as large as those that a contrastive loss keeps, beside a constant as large."""

    memory: Tensor
    table: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("memory", torch.zeros(1024, WIDTH))
        self.register_buffer("table", torch.ones(1024, WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Writes its rows into the queue."""
        h: Tensor = self.layer(x).tanh()
        self.memory[: len(h)].copy_(0.5 * self.memory[: len(h)] + h.detach())
        self.count += 1
        return h + self.memory.mean() * self.table[0]


def plain_step(model: nn.Module, batch: Tensor) -> Tensor:
    loss = square_loss(model, batch)
    loss.backward()
    return loss


def writes_its_batch(model: Any, batch: Tensor) -> Tensor:
    return square_loss(model, batch.mul_(2))


@pytest.mark.parametrize("what", ["the batch", "the parameter '2.bias'"])
def test_what_cannot_be_put_back_is_an_error_that_names_it(what: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus(), nn.Linear(WIDTH, WIDTH))
    loss_fn = writes_its_batch if what == "the batch" else square_loss
    step = memfit.fit(model, loss_fn, torch.randn(8, WIDTH), memory="1GiB", micro_batch_size=8)
    for _ in range(3):
        step(torch.randn(8, WIDTH))
    if loss_fn is square_loss:  # an update in the backward: it must not be done twice
        bias = model[2].bias
        assert isinstance(bias, nn.Parameter)
        optimizer = torch.optim.SGD([bias])
        bias.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    outage = Outage({0: MemoryError()}, "aten.softplus_backward.default")
    with outage, pytest.raises(MemoryError) as caught:
        step(torch.randn(8, WIDTH))
    (note,) = caught.value.__notes__
    assert f"again: {what} had been changed" in note


def test_gradients_of_the_batch_are_put_back_too() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus(), nn.Linear(WIDTH, WIDTH))
    batch = torch.randn(8, WIDTH, requires_grad=True)
    step = memfit.fit(model, square_loss, batch, memory="1GiB", micro_batch_size=8)
    batch.grad = None
    plain_step(copy.deepcopy(model), batch)
    expected, batch.grad = batch.grad, None
    assert expected is not None
    with Outage({18: MemoryError()}):
        step(batch)
    assert len(step.rescues) == 1
    found = batch.grad
    assert found is not None
    assert torch.equal(found, expected)


# ---- for real ------------------------------------------------------------------------------------------


def test_a_hard_cap_lowered_while_training_is_survived() -> None:
    found = capped((1, 0.8))
    assert found["rescues"]
    assert found["end"] == found["plain"]


# ---- the plans to turn to --------------------------------------------------------------------------------


def test_each_fallback_peaks_lower_and_the_micro_batch_shrinks_last() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softplus(), nn.Linear(WIDTH, WIDTH), nn.Softplus())
    profile = memfit.profile(model, square_loss, torch.randn(4, 64, WIDTH))
    plan = memfit.find_plan(profile, memory="1GiB", micro_batch_size=4)
    found = list(fallbacks(profile, plan))
    peaks = [one.predicted_peak_bytes for one in found]
    sizes = [one.micro_batch_size for one in found]
    assert [plan.predicted_peak_bytes, *peaks] == sorted({plan.predicted_peak_bytes, *peaks}, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4
    assert sizes[-1] == 1
    assert all(memfit.simulate(profile, one).peak_bytes == one.predicted_peak_bytes for one in found)
    with pytest.raises(memfit.InfeasibleBudget) as refused:
        memfit.find_plan(profile, memory=1)
    assert peaks[-1] == refused.value.needed_bytes
