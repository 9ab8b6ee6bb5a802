"""Reads what this machine offers: memory, CPUs, devices, versions, and how fast it copies and multiplies.

Note [Control groups]
 1. A container or a job has less than its machine where a control group says so. Version 2 has one tree below
    ``/sys/fs/cgroup``, version 1 one a kind of resource; ``/proc/self/cgroup`` says where a process is.
 2. Every group above counts, too. Within a container the path is the host's, which is not there: then it is
    the root of the mount.
 3. Page cache that nobody uses is taken back before a process is killed, so it counts as free.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, NamedTuple

import torch

from memfit.core.machine import Card, Machine, Speeds

_PACKAGES: Final = ("transformers", "accelerate", "lightning", "peft")
_MOUNT: Final = Path("/sys/fs/cgroup")
_OWN_GROUPS: Final = Path("/proc/self/cgroup")
_UNLIMITED_BYTES: Final = 1 << 60  # version 1 says "no limit" with a number about as large as can be
_MEASURED_S: Final = 0.2
_COPIED_BYTES: Final = {"cpu": 64 << 20, "cuda": 1 << 30}
_MATRIX: Final = {"cpu": 512, "cuda": 8192}  # rows and columns


class Group(NamedTuple):
    """What a control group allows: bytes, of which some are in use, and CPUs; None: no limit."""

    limit_bytes: int | None = None
    used_bytes: int = 0
    cpus: float | None = None


def machine() -> Machine:
    """Returns the facts of this machine. Takes no memory on any device.

    Raises:
        OSError: ``/proc`` cannot be read on a Linux machine.
    """
    free_bytes, total_bytes = cpu_memory()
    return Machine(
        system=platform.system(),
        python=platform.python_version(),
        torch=str(torch.__version__),
        cpu=f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        cores=_cores(),
        threads=torch.get_num_threads(),
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        installed_bytes=_installed()[1],
        process_limit_bytes=_process_limit_bytes(),
        cuda=torch.version.cuda,
        cards=tuple(_card(index) for index in range(torch.cuda.device_count())),
        allocator=os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")),
        is_caching=os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING", "0") in ("", "0"),
        packages=tuple((name, _version(name)) for name in _PACKAGES),
    )


def cpu_memory() -> tuple[int, int]:
    """The ``(free, total)`` bytes of memory that this process may use, as Linux and its control group say.

    Raises:
        OSError: Not a Linux machine.
    """
    free_bytes, total_bytes = _installed()
    group = control_group()
    if group.limit_bytes is not None and group.limit_bytes < total_bytes:
        return min(free_bytes, max(0, group.limit_bytes - group.used_bytes)), group.limit_bytes
    return free_bytes, total_bytes


def control_group(groups: Path = _OWN_GROUPS, mount: Path = _MOUNT) -> Group:
    """What the control groups of this process allow, the tightest of each. See Note [Control groups]."""
    limits: list[tuple[int, int]] = []
    cpus: list[float] = []
    for folder in _folders(groups, mount):
        limit_bytes = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit_bytes is not None and limit_bytes < _UNLIMITED_BYTES:
            used_bytes = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            limits.append((limit_bytes, max(0, used_bytes - _unused_cache_bytes(folder))))
        cpus += _quota(folder)
    fewest = min(cpus, default=None)
    if not limits:
        return Group(cpus=fewest)
    limit_bytes, used_bytes = min(limits, key=lambda found: found[0] - found[1])
    return Group(limit_bytes, used_bytes, fewest)


def _folders(groups: Path, mount: Path) -> Iterator[Path]:
    """The folders of the groups of this process and of all above them."""
    try:
        lines = groups.read_text("ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        roots = [mount / kind for kind in kinds.split(",") if kind in ("memory", "cpu")] if kinds else [mount]
        for root in roots:
            inner = [part for part in Path(path).parts if part not in ("/", "..")]
            yield from (root.joinpath(*inner[:depth]) for depth in range(len(inner), -1, -1))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none ("max")."""
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _unused_cache_bytes(folder: Path) -> int:
    """Page cache that would be taken back first."""
    try:
        lines = (folder / "memory.stat").read_text("ascii").splitlines()
    except OSError:
        return 0
    counts = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    return counts.get("total_inactive_file", counts.get("inactive_file", 0))


def _quota(folder: Path) -> list[float]:
    """How many CPUs a group may use at once, if it says so."""
    try:
        quota, period = (folder / "cpu.max").read_text("ascii").split()
        return [] if quota == "max" else [int(quota) / int(period)]
    except (OSError, ValueError):
        pass
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return [quota_us / period_us] if quota_us and period_us and quota_us > 0 else []


def _installed() -> tuple[int, int]:
    """The free and all bytes of the machine's memory; free is what Linux gives without swapping."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        counts = {
            name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)
        }
    return counts["MemAvailable"], counts["MemTotal"]


def _cores() -> int:
    """CPUs that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = control_group().cpus
    return cores if quota is None else max(1, min(cores, round(quota)))


def _process_limit_bytes() -> int | None:
    """The tightest of the limits of this process on what it may map."""
    if sys.platform == "win32":
        return None
    import resource

    soft = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS)]
    return min((limit for limit in soft if limit != resource.RLIM_INFINITY), default=None)


def _card(index: int) -> Card:
    """A CUDA device."""
    return Card(torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index))


def _version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# ---- speeds --------------------------------------------------------------------------------------


def speeds(device: str) -> Speeds:
    """Measures a device: ``"cpu"``, or ``"cuda"`` with a number. Takes about a second.

    Memory that it takes: twice the bytes copied (64 MiB on a CPU, 1 GiB on CUDA) or three matrices.
    """
    place = torch.device(device)
    source = torch.ones(_COPIED_BYTES[place.type] // 4, device=place)
    target = torch.empty_like(source)
    copied_s = _best_s(lambda: target.copy_(source), place)  # into memory that is mapped already
    there_s, back_s = _transfer_s(source) if place.type == "cuda" else (None, None)
    size = source.nbytes
    return Speeds(
        device=device,
        copy_bytes_per_s=2 * size / copied_s,
        float32_flops_per_s=_flops_per_s(place, torch.float32),
        bfloat16_flops_per_s=_flops_per_s(place, torch.bfloat16),
        to_device_bytes_per_s=None if there_s is None else size / there_s,
        from_device_bytes_per_s=None if back_s is None else size / back_s,
    )


def _transfer_s(on_device: torch.Tensor) -> tuple[float, float]:
    """Seconds of a copy from pinned memory to a device, and back."""
    on_host = torch.empty(on_device.shape, pin_memory=True)
    there_s = _best_s(lambda: on_device.copy_(on_host, non_blocking=True), on_device.device)
    return there_s, _best_s(lambda: on_host.copy_(on_device, non_blocking=True), on_device.device)


def _flops_per_s(place: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in the product of two square matrices."""
    rows = _MATRIX[place.type]
    matrix = torch.ones(rows, rows, dtype=dtype, device=place)
    return float(2 * rows**3 / _best_s(lambda: matrix @ matrix, place))


def _best_s(run: Callable[[], object], place: torch.device) -> float:
    """The least seconds of some runs, after one that warms up."""
    found: list[float] = []
    started_s = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - started_s < _MEASURED_S:
        before_s = time.perf_counter()
        run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        found.append(time.perf_counter() - before_s)
    return min(found[1:])
