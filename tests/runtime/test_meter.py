"""The meter against sequences whose bytes are known by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.runtime.meter import PeakMeter, device_memory, resident_bytes

MIB = 2**20


def floats(count: int) -> Tensor:
    """Returns ``4 * count`` uninitialised bytes."""
    return torch.empty(count, dtype=torch.float32)


def run_child(code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter."""
    environment = {name: value for name, value in os.environ.items() if "LOG_LEVEL" not in name}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_a_sequence_is_measured_to_the_byte() -> None:
    with PeakMeter("cpu") as meter:
        first = floats(100)
        second = floats(1_000)
        del first
        third = floats(50)
        del second
    assert meter.events == (400, 4_000, -400, 200, -4_000)
    assert meter.peak_bytes == 4_400
    assert meter.net_bytes == 200
    assert third.numel() == 50


@settings(max_examples=30)
@given(st.lists(st.one_of(st.integers(1, 5_000), st.none()), max_size=30))
def test_any_sequence_of_allocations_and_releases_is_measured_to_the_byte(steps: list[int | None]) -> None:
    live: list[Tensor] = []
    level = peak = 0
    with PeakMeter("cpu") as meter:
        for count in steps:
            if count is not None:
                live.append(floats(count))
                level += 4 * count
            elif live:
                level -= 4 * live.pop(0).numel()
            peak = max(peak, level)
    assert (meter.peak_bytes, meter.net_bytes) == (peak, level)


def test_an_empty_body_measures_nothing() -> None:
    with PeakMeter("cpu") as meter:
        pass
    assert (meter.peak_bytes, meter.net_bytes, meter.events) == (0, 0, ())


def test_views_allocate_nothing() -> None:
    base = floats(100)
    with PeakMeter("cpu") as meter:
        base.view(10, 10).t()[2:5].detach()
    assert meter.events == ()


def test_a_temporary_inside_an_operator_is_seen() -> None:
    images, kernels = torch.ones(2, 3, 32, 32), torch.ones(8, 3, 3, 3)
    with PeakMeter("cpu") as meter:
        out = nn.functional.conv2d(images, kernels)
    assert meter.net_bytes == out.untyped_storage().nbytes() == 4 * 2 * 8 * 30 * 30
    assert meter.peak_bytes > meter.net_bytes


def test_the_backward_pass_is_seen() -> None:
    weight = torch.ones(10_000, requires_grad=True)
    with PeakMeter("cpu") as meter:
        (weight * weight).sum().backward()
    assert weight.grad is not None
    assert meter.net_bytes == 40_000  # the gradient
    assert meter.peak_bytes > 80_000  # both terms of the product, before they are added up


def test_the_release_of_a_held_tensor_lowers_the_level_at_its_moment() -> None:
    held = floats(1_000)
    with PeakMeter("cpu", held=[held, held.view(10, 100)]) as meter:
        first = floats(10)
        del held
        second = floats(20)
    assert meter.events == (40, -4_000, 80)
    assert (meter.peak_bytes, meter.net_bytes) == (40, -3_880)
    del first, second


def test_a_held_tensor_that_only_the_graph_keeps_is_released_by_backward() -> None:
    weight = torch.ones(1_000, requires_grad=True)
    kept = weight * 2
    loss = (kept * kept).sum()
    with PeakMeter("cpu", held=[kept]) as meter:
        del kept
        loss.backward()
    assert meter.net_bytes == 0  # the gradient came, the activation went


def test_a_release_that_is_not_watched_makes_the_peak_too_high_and_never_too_low() -> None:
    with PeakMeter("cpu"):
        known = floats(1_000)  # the profiler keeps its size in a table for the whole process
    with PeakMeter("cpu") as meter:
        del known
        second = floats(20)
    assert meter.events == (80,)
    del second


def test_a_meter_that_is_done_writes_nothing_into_the_next_one() -> None:
    held = floats(1_000)
    with PeakMeter("cpu", held=[held]) as done:
        pass
    with PeakMeter("cpu") as meter:
        del held
    assert (done.events, meter.events) == ((), ())


def test_the_meter_is_unseen_by_a_dispatch_mode_of_the_body() -> None:
    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    held, mode = floats(1_000), Seen()  # type: ignore[no-untyped-call]
    with mode, PeakMeter("cpu", held=[held]) as meter:
        del held
        torch.ones(1)
    assert meter.events[0] == -4_000
    assert Seen.names == ["aten.ones.default"]


def test_another_thread_is_not_seen() -> None:
    kept: list[Tensor] = []
    with PeakMeter("cpu") as meter:
        thread = threading.Thread(target=lambda: kept.append(floats(100)))
        thread.start()
        thread.join()
    assert meter.events == ()  # where torch learns to see it, Rule 4 has to go


def test_a_body_that_raises_is_measured_and_its_error_passes() -> None:
    def body() -> None:
        floats(100)
        raise KeyError("mine")

    meter = PeakMeter("cpu")
    with pytest.raises(KeyError, match="mine"), meter:
        body()
    assert meter.peak_bytes == 400


def test_there_can_be_only_one_profiler() -> None:
    with PeakMeter("cpu") as outer:
        kept = floats(100)
        with pytest.raises(RuntimeError, match="already running"), PeakMeter("cpu"):
            pass
    assert outer.peak_bytes == 4 * kept.numel()


def test_a_profiler_inside_the_body_is_an_error_and_not_a_wrong_number() -> None:
    def body() -> None:
        with torch.autograd.profiler.profile():
            floats(100)

    with pytest.raises(RuntimeError, match="the body of a PeakMeter ran a torch profiler"), PeakMeter("cpu"):
        body()
    with PeakMeter("cpu") as meter:  # and nothing is left running
        floats(100)
    assert meter.peak_bytes == 400


def test_reading_before_the_end_is_an_error() -> None:
    with PeakMeter("cpu") as meter:
        for name in ("peak_bytes", "net_bytes", "events"):
            with pytest.raises(RuntimeError, match="nothing is measured yet"):
                getattr(meter, name)


def test_a_device_without_a_meter_is_refused() -> None:
    with pytest.raises(ValueError, match="no meter for meta"):
        PeakMeter("meta")
    with pytest.raises(ValueError, match="the memory of meta is not known: state it"):
        device_memory("meta")


def test_the_meter_writes_nothing_and_leaves_the_environment_alone() -> None:
    child = run_child(
        """
        import os, torch
        from memfit.runtime.meter import PeakMeter
        before = dict(os.environ)
        for _ in range(2):
            with PeakMeter("cpu") as meter:
                torch.empty(100)
            assert meter.peak_bytes == 400
        assert dict(os.environ) == before
        """
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_resident_bytes_count_each_storage_once() -> None:
    base, other = floats(100), floats(10)
    assert resident_bytes([base, base[3:5], base.detach(), other]) == 440
    assert resident_bytes(floats(10) for _ in range(5)) == 200  # an address is not taken for the same storage
    assert resident_bytes([]) == 0


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta state")
def test_resident_bytes_of_other_layouts_are_those_of_their_parts() -> None:
    ends, at, values = torch.tensor([0, 1, 2]), torch.tensor([0, 1]), floats(2)
    parts_bytes = 3 * 8 + 2 * 8 + 2 * 4
    assert resident_bytes([torch.eye(4).to_sparse()]) == 2 * 4 * 8 + 4 * 4
    assert (
        resident_bytes([torch.sparse_csr_tensor(ends, at, values, (2, 2), check_invariants=True)])
        == parts_bytes
    )
    assert (
        resident_bytes([torch.sparse_csc_tensor(ends, at, values, (2, 2), check_invariants=True)])
        == parts_bytes
    )
    assert resident_bytes([floats(7).to("meta")]) == 28


def test_resident_bytes_look_into_wrapper_subclasses() -> None:
    values, offsets = floats(6), torch.tensor([0, 2, 6])
    ragged = torch.nested.nested_tensor_from_jagged(values, offsets)
    assert resident_bytes([ragged, values]) == 6 * 4 + 3 * 8


def test_the_memory_of_the_machine_is_known() -> None:
    free_bytes, total_bytes = device_memory("cpu")
    assert 0 < free_bytes <= total_bytes
    assert total_bytes % 1024 == 0


CAPPED = """
    import torch
    from memfit.runtime.meter import set_hard_cap
    torch.ones(1000).sum()
    set_hard_cap({cap_bytes})
    kept = torch.ones({first_bytes}, dtype=torch.uint8)
    try:
        torch.ones({second_bytes}, dtype=torch.uint8)
    except RuntimeError as error:
        print(error)
"""


def test_a_capped_process_runs_out_of_memory_for_real() -> None:
    child = run_child(CAPPED.format(cap_bytes=192 * MIB, first_bytes=128 * MIB, second_bytes=128 * MIB))
    assert child.returncode == 0, child.stderr
    assert "DefaultCPUAllocator: can't allocate memory: you tried to allocate 134217728 bytes" in child.stdout


def test_a_capped_process_may_use_what_it_was_given() -> None:
    child = run_child(CAPPED.format(cap_bytes=320 * MIB, first_bytes=128 * MIB, second_bytes=128 * MIB))
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_a_cap_below_what_is_in_use_is_refused() -> None:
    from memfit.runtime.meter import set_hard_cap

    with pytest.raises(ValueError, match="a cap of -1 bytes beyond what is in use"):
        set_hard_cap(-1)


@pytest.mark.cuda
def test_on_cuda_the_allocator_is_asked() -> None:
    with PeakMeter("cuda") as meter:
        first = torch.empty(MIB, dtype=torch.uint8, device="cuda")
        second = torch.empty(100, dtype=torch.uint8, device="cuda")
        del first
    assert meter.peak_bytes == MIB + 512  # allocated bytes are rounded up to 512
    assert meter.net_bytes == 512
    assert meter.events == ()
    del second


def test_a_cpu_has_no_allocation_retries() -> None:
    with PeakMeter("cpu") as meter:
        torch.empty(100)
    assert meter.alloc_retries == 0
