"""A machine as plain facts, and what is known to go wrong on such a one. Reads nothing itself.

Note [Traps]
 1. Each says what was found, with its number, what it does to a training step, and the cure.
 2. A *problem* breaks memfit or its promise. A *note* costs speed, or is a fault of a torch of this version
    that memfit does not step on by itself.
Sources: docs/versions.md for the versions that were run; docs/compile.md for the compiler's memory budget
(pytorch#197838, #190758); docs/many_processes.md for restarts with gloo; the documentation of torch's CUDA
allocator for its settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from memfit.units import format_bytes

OLDEST_TORCH = "2.10"
OLDEST_PYTHON = "3.11"
# docs/versions.md; of the frameworks the pinned ones, with which the tests of the integrations run.
TRIED: dict[str, tuple[str, ...]] = {
    "torch": ("2.10.0", "2.13.0", "2.15.0"),
    "transformers": ("5.0.0", "5.23.0"),
    "accelerate": ("1.15.0",),
    "lightning": ("2.6.6",),
    "peft": ("0.21.2",),
}
_OLDEST = {"transformers": "5.0", "accelerate": "1.1", "lightning": "2.5", "peft": "0.18"}


class Level(Enum):
    """How bad a finding is. See Note [Traps] 2."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what it is about, what was found, and the cure of what is wrong."""

    level: Level
    subject: str
    text: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """A CUDA device: its name, and the bytes that are free and there at all."""

    name: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process finds on its machine.

    Attributes:
        cores: CPUs this process may use, a quota of its control group counted in.
        threads: Threads that torch computes with.
        free_bytes, total_bytes: Memory of the machine, or what its control group leaves of it.
        installed_bytes: Memory of the machine, whatever the control group says.
        process_limit_bytes: The most that this process may map (``ulimit -d``, ``-v``); None: no limit.
        cuda: The version of CUDA that torch was built for; None: for none.
        allocator: The settings of CUDA's allocator as the environment has them.
        is_caching: Whether CUDA's allocator keeps what is released.
        packages: Optional ones by name; None: not installed.
    """

    system: str
    python: str
    torch: str
    cpu: str
    cores: int
    threads: int
    free_bytes: int
    total_bytes: int
    installed_bytes: int
    process_limit_bytes: int | None = None
    cuda: str | None = None
    cards: tuple[Card, ...] = ()
    allocator: str = ""
    is_caching: bool = True
    packages: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Speeds:
    """What was measured on a device, the best of a few runs each; None: not there.

    Attributes:
        copy_bytes_per_s: Read and written, together.
        to_device_bytes_per_s, from_device_bytes_per_s: Between the device and pinned memory of the host.
    """

    device: str
    copy_bytes_per_s: float
    float32_flops_per_s: float
    bfloat16_flops_per_s: float
    to_device_bytes_per_s: float | None = None
    from_device_bytes_per_s: float | None = None


def findings(machine: Machine) -> tuple[Finding, ...]:
    """Returns what is to be said of a machine, in order: versions first, then memory, threads and CUDA."""
    found = (_versions, _packages, _memory, _threads, _cuda, _compiler, _restarts)
    return tuple(finding for look in found for finding in look(machine))


def _versions(machine: Machine) -> Iterator[Finding]:
    """Of Python, torch and the system."""
    if _number(machine.python) < _number(OLDEST_PYTHON):
        cure = f"make an environment with Python {OLDEST_PYTHON} or newer"
        yield Finding(Level.PROBLEM, "Python", f"{machine.python} is not supported", cure)
    if _number(machine.torch) < _number(OLDEST_TORCH):
        text = f"{machine.torch} is older than {OLDEST_TORCH}, where Tensor.grad_dtype begins: steps fail"
        yield Finding(Level.PROBLEM, "torch", text, f"pip install 'torch>={OLDEST_TORCH}'")
    else:
        yield _tried("torch", machine.torch)
    if machine.system != "Linux":
        text = f"on {machine.system} the memory of the CPU is not known, and there is no --hard-cap"
        yield Finding(Level.NOTE, "system", text, "state the memory in bytes, not as a share")


def _packages(machine: Machine) -> Iterator[Finding]:
    """Of the frameworks that memfit has a door to; one that is not installed is not missed."""
    for name, version in machine.packages:
        if version is None:
            yield Finding(Level.OK, name, f"not installed (pip install memfit[{name}] brings it)")
        elif name in _OLDEST and _number(version) < _number(_OLDEST[name]):
            text = f"{version} is older than {_OLDEST[name]}, the oldest that memfit.integrations can use"
            yield Finding(Level.PROBLEM, name, text, f"pip install '{name}>={_OLDEST[name]}'")
        else:
            yield _tried(name, version)


def _tried(name: str, version: str) -> Finding:
    """Whether memfit was run with a version."""
    tried = TRIED.get(name, ())
    if any(_number(version) == _number(one) for one in tried):
        return Finding(Level.OK, name, f"{version}, which memfit was tried with")
    text = f"{version}; memfit was tried with {', '.join(tried)}"
    return Finding(Level.NOTE, name, text, "read the checks below: they ran with yours")


def _memory(machine: Machine) -> Iterator[Finding]:
    """Of what holds less memory than one would think."""
    if machine.total_bytes < machine.installed_bytes:
        text = (
            f"the control group (container, job) allows {format_bytes(machine.total_bytes)} of the "
            f"{format_bytes(machine.installed_bytes)} installed"
        )
        yield Finding(Level.NOTE, "memory", text, "a share such as --memory 80% is of what it allows")
    limit_bytes = machine.process_limit_bytes
    if limit_bytes is not None and limit_bytes < machine.total_bytes:
        text = f"this process may map at most {format_bytes(limit_bytes)} (ulimit -d or -v)"
        yield Finding(Level.NOTE, "memory", text, "raise the limit, or state a --memory well below it")


def _threads(machine: Machine) -> Iterator[Finding]:
    """Of more threads than CPUs: they wait for each other at every op."""
    if machine.threads > machine.cores:
        text = f"torch computes with {machine.threads} threads on {machine.cores} usable CPUs, which is slow"
        yield Finding(Level.NOTE, "threads", text, f"set OMP_NUM_THREADS={machine.cores}")


def _cuda(machine: Machine) -> Iterator[Finding]:
    """Of torch's CUDA and its allocator."""
    if machine.cuda is not None and not machine.cards:
        text = f"torch is built for CUDA {machine.cuda}, and finds no device"
        yield Finding(
            Level.NOTE, "CUDA", text, "look at nvidia-smi and CUDA_VISIBLE_DEVICES; a CPU works, too"
        )
    if machine.cards and "cudaMallocAsync" in machine.allocator:
        text = f"{machine.allocator}: what memfit predicts as reserved is by the rules of the other allocator"
        yield Finding(
            Level.NOTE, "CUDA allocator", text, "leave backend: out; allocated bytes hold either way"
        )
    if machine.cards and not machine.is_caching:
        text = (
            "PYTORCH_NO_CUDA_MEMORY_CACHING is set: torch then counts no bytes, and no peak can be measured"
        )
        yield Finding(Level.PROBLEM, "CUDA allocator", text, "unset it")
    if machine.cards and "expandable_segments:True" not in machine.allocator:
        text = "segments are not expandable, so that memory may be reserved in pieces that fit nothing"
        cure = "set PYTORCH_ALLOC_CONF=expandable_segments:True where a plan fills most of the card"
        yield Finding(Level.NOTE, "CUDA allocator", text, cure)


def _compiler(machine: Machine) -> Iterator[Finding]:
    """Of the compiler's own knob for memory."""
    text = (
        f"the activation_memory_budget of torch.compile in torch {machine.torch}: a smaller budget can raise "
        "the peak (pytorch#197838), and with dropout gradients were silently wrong below 1 (pytorch#190758)"
    )
    yield Finding(Level.NOTE, "known trap", text, "leave it at 1; memfit never sets it")


def _restarts(machine: Machine) -> Iterator[Finding]:
    """Of processes that torchrun starts again."""
    text = f"gloo in torch {machine.torch} may hang where it connects after torchrun has restarted processes"
    yield Finding(Level.NOTE, "known trap", text, "end torchrun and start it again, with --resume")


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of "2.13.0+cpu"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
