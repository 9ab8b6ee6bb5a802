"""The independent judge of memory: what the allocator says, next to what a plan promised.

Nothing here knows a plan, a model or a simulation.

What the meter sees on a CPU (measured with torch 2.13):

Rule 1. Every allocation of the CPU allocator by the thread that entered the meter, to the byte, in order,
        temporaries inside kernels and the backward pass included (autograd runs a CPU graph on the
        thread that called ``backward``).
Rule 2. A release is reported only for memory that was allocated under the profiler. Worse, an address that it
        knows from an earlier session may be reported with the size it had then. So a release counts
        only for what was allocated inside, and for the tensors named as ``held``, which are watched
        by weak references whose callbacks write a mark into the same trace.
Rule 3. So each error is on the safe side: a release that is not seen makes the peak too high, never too low.
Rule 4. Not seen: allocations of other threads (data loaders, the user's own), and memory that does not come
        from torch's allocator (NumPy, MKL's own buffers, the interpreter).
Rule 5. What gloo copies for a collective is now and then released by a thread of its own, unseen. So it
        counts until the next event outside of the collective, which has waited for it.

On CUDA the allocator's own statistics are read; they cover the whole device and every thread.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _RecordFunctionFast
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memfit.runtime.machine import cpu_memory

# Torch's profiler is one for all threads, and does not survive two of them. Whoever uses it waits for it.
PROFILER: Final = threading.Lock()
_RELEASED: Final = "memfit.meter.released:"
_COLLECTIVE: Final = ("c10d::", "gloo:")


class PeakMeter:
    """Measures the peak of the bytes allocated within its body, above the level at entry.

        with PeakMeter("cpu") as meter:
            loss_fn(model, batch).backward()
        meter.peak_bytes

    Enter it before the forward pass: activations of an earlier one are released unseen (Rule 2).
    On CUDA it waits for the device and resets its peak statistics.

    Args:
        device: A ``cpu`` or ``cuda`` device.
        held: Tensors that are alive at entry and may be released inside, such as gradients or an old batch.
            Needed on a CPU only. They are not kept alive.

    Raises:
        RuntimeError: A torch profiler is already running, or the body ran one: there can be only one. A
            meter of another thread is waited for.
        ValueError: A device without a meter.
    """

    __slots__ = (
        "_alloc_retries",
        "_device",
        "_entry_bytes",
        "_events",
        "_held",
        "_net_bytes",
        "_peak_bytes",
        "_profiler",
    )

    def __init__(self, device: torch.device | str, *, held: Iterable[Tensor] = ()) -> None:
        self._device = torch.device(device)
        if self._device.type not in ("cpu", "cuda"):
            raise ValueError(f"no meter for {self._device}: memory is measured on cpu and cuda devices")
        storages = _storages(held) if self._device.type == "cpu" else {}
        self._held = [
            weakref.ref(storage, _mark_release(storage.nbytes()))
            for storage in storages.values()
            if storage.device.type == "cpu"
        ]
        self._profiler: Any = None
        self._entry_bytes = 0
        self._alloc_retries = 0
        self._events: tuple[int, ...] = ()
        self._peak_bytes: int | None = None
        self._net_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The highest number of bytes allocated at once inside, above the level at entry; at least 0."""
        return _measured(self._peak_bytes)

    @property
    def net_bytes(self) -> int:
        """The bytes allocated at exit minus those at entry; negative if more was released."""
        return _measured(self._net_bytes)

    @property
    def events(self) -> tuple[int, ...]:
        """The bytes of each allocation (positive) and release (negative) in order; empty on CUDA."""
        _measured(self._peak_bytes)
        return self._events

    @property
    def alloc_retries(self) -> int:
        """How often CUDA's allocator had to give its cache back to serve a request; 0 on a CPU."""
        _measured(self._peak_bytes)
        return self._alloc_retries

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._entry_bytes = torch.cuda.memory_allocated(self._device)
            self._alloc_retries = -_alloc_retries(self._device)
            return self
        if _profiler_enabled():
            raise RuntimeError(
                "a torch profiler or another PeakMeter is already running, and there can be only one: "
                "measure memory outside of it"
            )
        PROFILER.acquire()
        try:
            profiler = torch.autograd.profiler.profile(profile_memory=True)
            with quiet_kineto():
                profiler.__enter__()
        except BaseException:
            PROFILER.release()
            raise
        self._profiler = profiler
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._peak_bytes = max(0, torch.cuda.max_memory_allocated(self._device) - self._entry_bytes)
            self._net_bytes = torch.cuda.memory_allocated(self._device) - self._entry_bytes
            self._alloc_retries += _alloc_retries(self._device)
            return
        self._held.clear()
        profiler, self._profiler = self._profiler, None
        is_whole = _profiler_enabled()
        try:
            if is_whole:
                profiler.__exit__(kind, error, trace)
        finally:
            PROFILER.release()
        if is_whole:
            self._read(profiler.kineto_results.experimental_event_tree())
        elif error is None:
            raise RuntimeError(
                "the body of a PeakMeter ran a torch profiler, which ended the measurement: "
                "profile and measure memory in separate runs"
            )

    def _read(self, event_tree: list[Any]) -> None:
        """Adds up the allocator's events. See Rule 2."""
        events = tuple(_signed_bytes(sorted(_in_order(event_tree), key=lambda event: event.start_time_ns)))
        level_bytes = peak_bytes = 0
        for size_bytes in events:
            level_bytes += size_bytes
            peak_bytes = max(peak_bytes, level_bytes)
        self._events, self._peak_bytes, self._net_bytes = events, peak_bytes, level_bytes


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the distinct storages behind ``tensors``: ties and views count once."""
    return sum(resident_sizes(tensors))


def resident_sizes(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Returns the bytes of each distinct storage behind ``tensors``, in order."""
    return tuple(storage.nbytes() for storage in _storages(tensors).values())


def device_memory(device: torch.device | str) -> tuple[int, int]:
    """Returns the ``(free, total)`` bytes of ``device``.

    On a CPU: the machine's memory, or what the control group of a container or a job leaves of it; free is
    what Linux gives without swapping.

    Raises:
        OSError: Not a Linux machine.
        ValueError: A device of which the memory is not known.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return free_bytes, total_bytes
    if device.type == "cpu":
        return cpu_memory()
    raise ValueError(f"the memory of {device} is not known: state it, as in memory='8GiB'")


def set_hard_cap(extra_bytes: int) -> None:
    """Lets this process map at most ``extra_bytes`` of data beyond what it has now; Linux only.

    Beyond that torch raises ``RuntimeError: DefaultCPUAllocator: can't allocate memory``: a real
    out-of-memory without a GPU. Everything counts, also the stacks of new threads, the interpreter and
    the trace of a ``PeakMeter``, so warm up first and do not measure at the same time.
    It binds until :func:`lift_hard_cap`, or until the process ends.

    Raises:
        OSError: Not a Linux machine.
        ValueError: ``extra_bytes`` is negative.
    """
    import resource  # not there on Windows, where the rest of this module works

    if extra_bytes < 0:
        raise ValueError(f"a cap of {extra_bytes} bytes beyond what is in use is below what is in use")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit_bytes = _kib_field("/proc/self/status", "VmData") + extra_bytes
    if hard != resource.RLIM_INFINITY:
        limit_bytes = min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, hard))


def lift_hard_cap() -> None:
    """Takes the cap of :func:`set_hard_cap` away again, once the work it was for is done."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _alloc_retries(device: torch.device) -> int:
    """Returns the allocator's own count of its retries."""
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def _measured(value_bytes: int | None) -> int:
    if value_bytes is None:
        raise RuntimeError("nothing is measured yet: read a PeakMeter after its with block")
    return value_bytes


def _mark_release(size_bytes: int) -> Callable[[object], None]:
    """Returns a callback that writes a release into the running trace.

    It is not ``record_function``, which is an operator: a dispatch mode of the body would see it.
    """

    def mark(_: object) -> None:
        with _RecordFunctionFast(f"{_RELEASED}{size_bytes}"):
            pass

    return mark


def _in_order(events: list[Any]) -> Iterator[Any]:
    """Yields the events of a tree, each before its children; iterative, for a tree may be deep."""
    stack = events[::-1]
    while stack:
        event = stack.pop()
        yield event
        stack.extend(event.children[::-1])


def _signed_bytes(events: Iterable[Any]) -> Iterator[int]:
    """Yields the bytes of each allocation and release that counts. See Rule 2."""
    live_bytes: dict[int, int] = {}
    sent: set[int] = set()
    for event in events:
        if event.tag.name != "Allocation":
            if event.name.startswith(_RELEASED):
                yield -int(event.name.removeprefix(_RELEASED))
            continue
        block = event.extra_fields
        if block.device.type != "cpu":
            continue
        is_sent = _is_of_a_collective(event)
        for pointer in () if is_sent else sent:  # see Rule 5
            if pointer != block.ptr and (sent_bytes := live_bytes.pop(pointer, 0)):
                yield -sent_bytes
        if is_sent and block.alloc_size > 0:
            sent.add(block.ptr)
        elif not is_sent:
            sent.clear()
        # An address that is handed out again was released in between, be it unseen on another thread.
        known_bytes = live_bytes.pop(block.ptr, 0)
        if known_bytes:
            yield -known_bytes
        if block.alloc_size > 0:
            live_bytes[block.ptr] = block.alloc_size
            yield block.alloc_size


def _is_of_a_collective(event: Any) -> bool:
    """Whether an event lies within a collective of torch.distributed."""
    while event is not None:
        if event.name.startswith(_COLLECTIVE):
            return True
        event = event.parent
    return False


@contextmanager
def quiet_kineto() -> Iterator[None]:
    """Keeps the profiler from writing a line to stderr at each start and stop.

    Kineto reads its log level when it is first used, from the environment only. A level that the
    user chose stays.
    """
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "6"  # one above the level of its "USDT" lines
    try:
        yield
    finally:
        del os.environ[name]


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Returns the distinct storages by identity; they are kept, so that no address is used twice."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            found[storage._cdata] = storage
    return found


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the tensors with a storage that ``tensor`` is made of; none for a layout without."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):  # a DTensor names its mesh too
                yield from _dense_parts(part)
    elif tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())


def _kib_field(path: str, name: str) -> int:
    """Returns the bytes of a line such as ``VmData:  123 kB`` in a file of ``/proc``."""
    with open(path, encoding="ascii") as lines:
        for line in lines:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no line {name}")
