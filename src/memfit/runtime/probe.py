"""What one op costs: seconds, and bytes it allocates inside itself.

On a CPU both are read off the profiler, whose memory events are the allocator's own account; on CUDA
off events and ``torch.cuda`` statistics. A fake run has no clock: there a roofline estimates seconds
(the slower of arithmetic and memory traffic, plus a launch), and temporaries are not seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

from memfit.core.devices import Roofline
from memfit.runtime.meter import PROFILER, PeakMeter, quiet_kineto
from memfit.runtime.opinfo import map_tensors, strides_of, tensors_in


class OpCost(NamedTuple):
    """Seconds of an op, the highest bytes alive inside it above those at its start, and those at its end.

    None: unseen.
    """

    seconds: float
    peak_bytes: int | None
    net_bytes: int | None = None


class Probe(Protocol):
    """Runs ops one by one and afterwards says what each cost, in the order they ran."""

    def __enter__(self) -> Probe: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one op."""

    def begin(self) -> None:
        """What runs from here to :meth:`end` counts as one op."""

    def end(self) -> None:
        """The end of it."""

    def costs(self) -> list[OpCost]:
        """One entry a call; valid after exit."""


class RooflineProbe:
    """For fake tensors: seconds from operations and bytes."""

    def __init__(self, device: Roofline) -> None:
        self._device = device
        self._costs: list[OpCost] = []

    def __enter__(self) -> RooflineProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one op on fakes and estimates it."""
        out = func(*args, **kwargs)
        moved = sum(t.numel() * t.element_size() for tree in (args, out) for t in tensors_in(tree))
        formula = flop_registry.get(func.overloadpacket)
        flops = float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0
        is_float32 = next((t.dtype == torch.float32 for t in tensors_in(out)), False)
        self._costs.append(OpCost(self._device.seconds(flops, moved, is_float32=is_float32), None))
        return out

    def begin(self) -> None:
        """Nothing that hides its ops runs on fakes."""

    def end(self) -> None:
        """It costs nothing."""
        self._costs.append(OpCost(0.0, None))

    def costs(self) -> list[OpCost]:
        """The estimates so far."""
        return self._costs


class MaterialProbe(RooflineProbe):
    """For fake tensors too, but some ops are also run really, one at a time and alone, at their true sizes.

    Args:
        place: The device to run them on.
        wanted: Names of the ops (``str(func)``) of which the inner peak is to be measured; None: all.
        free_bytes: An op whose arguments take more is not run.
        most_s: Nor is any once this much time has gone by.
    """

    def __init__(
        self,
        device: Roofline,
        place: torch.device,
        wanted: frozenset[str] | None,
        free_bytes: float,
        most_s: float,
    ) -> None:
        super().__init__(device)
        self._place = place
        self._wanted = wanted
        self._free_bytes = free_bytes
        self._until_s = time.perf_counter() + most_s
        self._known: dict[object, int | None] = {}

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Estimates an op; measures what it allocates, its results included, if that is wanted."""
        out = super().call(func, args, kwargs)
        if self._wanted is None or str(func) in self._wanted:
            looks = repr((func, map_tensors((args, list(kwargs.items())), _look)))
            if looks not in self._known:
                self._known[looks] = self._peak_bytes(func, args, kwargs, out)
            self._costs[-1] = self._costs[-1]._replace(peak_bytes=self._known[looks])
        return out

    def _peak_bytes(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> int | None:
        """The inner peak of one op on numbers of no meaning; None where it cannot be had."""
        try:
            there = [*args, *kwargs.values(), *(out if isinstance(out, (list, tuple)) else [out])]
            sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(there)}
            if sum(sizes.values()) > self._free_bytes or time.perf_counter() > self._until_s:
                return None
            with _disable_current_modes(), torch.no_grad():
                arguments = [map_tensors(a, self._material) for a in args]
                keywords = {name: map_tensors(value, self._material) for name, value in kwargs.items()}
                with PeakMeter(self._place) as meter:
                    func(*arguments, **keywords)
            return meter.peak_bytes
        except Exception:  # not with these numbers or layouts, or a profiler of the user's is running
            return None

    def _material(self, fake: Tensor) -> Tensor:
        """A real tensor that looks like a fake one."""
        items = 1 + sum((n - 1) * step for n, step in zip(fake.shape, fake.stride(), strict=True))
        flat = torch.zeros(items if fake.numel() else 0, dtype=fake.dtype, device=self._place)
        if fake.is_floating_point():
            flat.uniform_()
        return flat.as_strided(fake.shape, fake.stride())


def _look(tensor: Tensor) -> object:
    """What decides what an op allocates for a tensor."""
    return tuple(tensor.shape), strides_of(tensor), tensor.dtype


class CpuProbe:
    """Wall time of each op, and its inner peak from the profiler's allocation events."""

    _RANGE = "memfit.op"

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._profiler: Any = torch.autograd.profiler.profile(profile_memory=True)
        self._sums: list[tuple[int, int]] = []
        self._open: Any = None
        self._start_s = 0.0

    def __enter__(self) -> CpuProbe:
        PROFILER.acquire()
        try:
            with quiet_kineto():
                self._profiler.__enter__()
        except BaseException:
            PROFILER.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        profiler, self._profiler = self._profiler, None  # its trace is large, and read once
        try:
            profiler.__exit__(kind, error, trace)
        finally:
            PROFILER.release()
        if error is None:
            self._sums = self._read_sums(profiler.kineto_results.experimental_event_tree())

    def begin(self) -> None:
        """Opens a named range of the profile."""
        self._open = torch._C._profiler._RecordFunctionFast(f"{self._RANGE}.{len(self._seconds)}")
        self._open.__enter__()
        self._start_s = time.perf_counter()

    def end(self) -> None:
        """Closes it."""
        self._seconds.append(time.perf_counter() - self._start_s)
        self._open.__exit__(None, None, None)

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one op inside a named range of the profile."""
        with torch._C._profiler._RecordFunctionFast(f"{self._RANGE}.{len(self._seconds)}"):
            start_s = time.perf_counter()
            out = func(*args, **kwargs)
            self._seconds.append(time.perf_counter() - start_s)
        return out

    def costs(self) -> list[OpCost]:
        """Seconds and inner sums of each call."""
        return [OpCost(s, *sums) for s, sums in zip(self._seconds, self._sums, strict=True)]

    def _read_sums(self, events: list[Any]) -> list[tuple[int, int]]:
        """The highest and the last running sum of allocations within each named range."""
        sums = [(0, 0)] * len(self._seconds)
        pending = list(events)
        while pending:
            event = pending.pop()
            if event.name.startswith(self._RANGE):
                sums[int(event.name.rsplit(".", 1)[1])] = _running_sum(event)
            else:
                pending.extend(event.children)
        return sums


class CudaProbe:
    """Device time of each op from events, and its inner peak from the allocator's statistics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sums: list[tuple[int, int]] = []
        self._before_bytes = 0

    def __enter__(self) -> CudaProbe:
        torch.cuda.synchronize(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.cuda.synchronize(self._device)

    def begin(self) -> None:
        """Records an event, and begins a new peak."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._before_bytes = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        start.record()
        self._marks.append((start, end))

    def end(self) -> None:
        """Records another one, and reads the peak."""
        self._marks[-1][1].record()
        peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._before_bytes
        self._sums.append((peak_bytes, torch.cuda.memory_allocated(self._device) - self._before_bytes))

    def call(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one op between two events."""
        self.begin()
        out = func(*args, **kwargs)
        self.end()
        return out

    def costs(self) -> list[OpCost]:
        """Seconds and inner sums of each call."""
        return [
            OpCost(start.elapsed_time(end) / 1e3, *sums)
            for (start, end), sums in zip(self._marks, self._sums, strict=True)
        ]


def probe_for(device: torch.device) -> Callable[[], Probe]:
    """The probe for real runs on a device."""
    return CpuProbe if device.type == "cpu" else lambda: CudaProbe(device)


def _running_sum(event: Any) -> tuple[int, int]:
    """The highest and the last running sum of the allocation events under a profiler event."""
    found: list[tuple[int, int]] = []
    pending = [event]
    while pending:
        node = pending.pop()
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            found.append((node.start_time_ns, node.extra_fields.alloc_size))
        pending.extend(node.children)
    highest = running = 0
    for _, size in sorted(found, key=lambda pair: pair[0]):
        running += size
        highest = max(highest, running)
    return highest, running
