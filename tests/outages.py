"""Runs out of memory on purpose: at an op, in a replay, or for real under a hard cap.

The trainings are of a few layers each and hold what an outage could spoil: BatchNorm (buffers), dropout
(random numbers), a buffer that the model replaces, an optimizer with momentum, micro-batches.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import memfit
from memfit.runtime import handles
from memfit.runtime.meter import lift_hard_cap, set_hard_cap
from memfit.runtime.rescue import is_out_of_memory

ROWS, WIDTH, CLASSES = 96, 32, 7

# As users report them; the addresses of GPUs and processes are left out.
ERRORS: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity"
    ),
    lambda: torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported at some"),
    lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
        "to allocate 134217728 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError,
]


class Running(nn.Module):
    """Adds a running mean that it replaces in every call, as code often does."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Moves the mean, then takes it away."""
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


def whole() -> nn.Module:
    """BatchNorm and dropout: the batch stays whole."""
    layers = [
        layer
        for _ in range(2)
        for layer in (nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Softplus(), nn.Dropout(0.2))
    ]
    return nn.Sequential(*layers, Running(), nn.Linear(WIDTH, CLASSES))


def in_parts() -> nn.Module:
    """No layer looks across rows: micro-batches are exact."""
    layers = [
        layer
        for _ in range(2)
        for layer in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Softplus(), nn.Dropout(0.2))
    ]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def loss_of(model: Any, batch: Any) -> Tensor:
    """Cross entropy, a mean over rows."""
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def batch_at(number: int, rows: int = ROWS) -> dict[str, Tensor]:
    """The batch of a step; drawn beside the training's own random numbers."""
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(rows, WIDTH, generator=draw)
    return {"x": x, "labels": torch.randint(0, CLASSES, (rows,), generator=draw)}


class Outage(TorchDispatchMode):
    """Raises at the op of each given number, counted from its start, in forward and backward alike.

    Args:
        at: The errors.
        op: Counts only calls of this one, such as ``"aten.tanh.default"``.
    """

    def __init__(self, at: dict[int, Exception] | None = None, op: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at = at or {}
        self.op = op
        self.ops = 0
        self.places: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts, and raises where it is time to."""
        self.ops += not self.op or str(func) == self.op
        error = self.at.pop(self.ops - 1, None)
        if error is not None:
            self.places.append(_place())
            raise error
        return func(*args, **(kwargs or {}))


class Squeeze(Outage):
    """Moves the hard cap down to what is in use at an op: the next allocation of the process fails for real.

    It is lifted as soon as one has failed, or some ops later. Only what ``malloc`` maps anew can fail: see
    :func:`map_each_tensor`.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at_op, self.is_down = at, False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts, and moves the cap where it is time to."""
        self.ops += 1
        if self.ops - 1 == self.at_op:
            self.is_down = True
            set_hard_cap(0)
        elif self.ops - 1 > self.at_op + _SQUEEZED_OPS:
            self.lift()
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            if self.is_down:
                self.lift()
                self.places.append(_place())
            raise

    def lift(self) -> None:
        """The cap is gone."""
        if self.is_down:
            self.is_down = False
            lift_hard_cap()


_SQUEEZED_OPS = 12


def map_each_tensor() -> None:
    """Lets ``malloc`` map each block of 64 KiB or more by itself, and give it back to the system at once."""
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)


_M_MMAP_THRESHOLD = -3  # of malloc.h


def squeezed(job: Job, steps: int, ops: list[int], draw: random.Random) -> tuple[Training[memfit.Step], int]:
    """A run in which the cap is moved down at a random op of each step; and how often that was an error.

    A step that even the rescue has no memory for raises, and is called again.
    """
    training, raised = job.start(), 0
    for number in range(steps):
        squeeze = Squeeze(draw.randrange(ops[number]))
        try:
            training.run(number, squeeze)
        except Exception as error:
            squeeze.lift()
            if not is_out_of_memory(error):
                raise
            raised += 1
            training.run(number)
        finally:
            squeeze.lift()
    return training, raised


def _place() -> str:
    """Where the program is in the step."""
    if torch._C._current_graph_task_id() != -1:
        return "backward"
    files = {Path(frame.filename).name for frame in traceback.extract_stack()}
    return "before the step" if "preserve.py" in files else "forward"


@contextmanager
def outage_in_replay(nth: int, error: Exception, places: list[str]) -> Iterator[None]:
    """Raises in the n-th replay of an op, which dispatch modes do not see."""
    run, left = handles.Record.run, iter(range(nth, -1, -1))

    def failing(self: handles.Record, *args: Any) -> None:
        if next(left, None) == 0:
            places.append("replay")
            raise error
        run(self, *args)

    handles.Record.run = failing  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        handles.Record.run = run  # type: ignore[method-assign]


S = TypeVar("S", bound=Callable[[Any], Tensor])


@dataclass
class Training(Generic[S]):
    """A model, its optimizer with momentum and the step that fits it; ``losses`` of the steps done."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: S
    losses: list[str] = field(default_factory=list)
    batch_at: Callable[[int], Any] = batch_at

    def run(self, number: int, within: AbstractContextManager[Any] | None = None) -> None:
        """One step within a context, and its update."""
        batch = self.batch_at(number)
        with within or nullcontext():
            loss = self.step(batch)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss).hex())

    def state(self) -> dict[str, Tensor]:
        """All that the training depends on, and would show a step doubled or lost."""
        momentum = {
            f"momentum {i}": state["momentum_buffer"]
            for i, state in enumerate(self.optimizer.state.values())
            if state.get("momentum_buffer") is not None
        }
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return own | momentum | {"random": torch.get_rng_state()}


@dataclass(frozen=True)
class Job:
    """What is trained, and at which micro-batch size; planned from a profile made once."""

    name: str
    build: Callable[[], nn.Module]
    micro_batch_size: int
    profile: memfit.Profile
    batch_at: Callable[[int], dict[str, Tensor]] = batch_at

    @staticmethod
    def named(name: str, rows: int = ROWS) -> Job:
        """Profiles a job."""
        build, size = {"whole": (whole, rows), "in parts": (in_parts, rows // 2)}[name]
        model, optimizer = _fresh(build)
        drawn = partial(batch_at, rows=rows)
        profile = memfit.profile(model, loss_of, drawn(0), optimizer=optimizer, micro_batch_size=size)
        return Job(name, build, size, profile, drawn)

    def start(
        self, memory: int | str = "1GiB", loss_fn: Callable[[Any, Any], Tensor] = loss_of
    ) -> Training[memfit.Step]:
        """The training at its first step."""
        model, optimizer = _fresh(self.build)
        step = memfit.fit(
            model,
            loss_fn,
            self.batch_at(0),
            memory=memory,
            optimizer=optimizer,
            micro_batch_size=self.micro_batch_size,
            profile=self.profile,
        )
        torch.manual_seed(3)
        return Training(model, optimizer, step, batch_at=self.batch_at)


def _fresh(build: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = build()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def undisturbed(job: Job, steps: int) -> tuple[Training[memfit.Step], list[int]]:
    """A run without any outage, and the number of ops of each step."""
    training, ops = job.start(), []
    for number in range(steps):
        counted = Outage()
        training.run(number, counted)
        ops.append(counted.ops)
    return training, ops


def disturbed(
    job: Job, steps: int, ops: list[int], draw: random.Random
) -> tuple[Training[memfit.Step], list[str]]:
    """A run with an outage at a random moment of one or two steps, or in one of their replays; and where."""
    training, places = job.start(), list[str]()
    struck = draw.sample(range(steps), draw.randint(1, 2))
    for number in range(steps):
        error, plan = draw.choice(ERRORS)(), training.step.plan
        if number not in struck:
            training.run(number)
        elif plan.recompute and draw.random() < 0.5:
            replayed = len({key[:3] for key in plan.recompute})
            training.run(number, outage_in_replay(draw.randrange(replayed), error, places))
        else:
            outage = Outage({draw.randrange(ops[number]): error})
            training.run(number, outage)
            places += outage.places
    return training, places


def differing(state: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of what is not the same to the bit."""
    assert state.keys() == other.keys()
    return [name for name, tensor in state.items() if not torch.equal(tensor, other[name])]


# ---- for real: a child process under a hard cap ---------------------------------------------------------

LARGE_ROWS, LARGE_WIDTH = 32768, 64  # 8 MiB an activation
CAPPED_STEPS = 4
# Before which step the cap is lowered, and to which share of what the plan takes above the residents. The
# planner's own memory counts under a cap, so it cannot be much lower.
CAPS: list[tuple[int, float]] = [(0, 0.8), (1, 0.7), (2, 0.9), (3, 0.7)]


def large() -> nn.Module:
    """Activations that a hard cap sees beside the interpreter; BatchNorm and dropout."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [
            nn.Linear(LARGE_WIDTH, LARGE_WIDTH),
            nn.BatchNorm1d(LARGE_WIDTH),
            nn.Tanh(),
            nn.Dropout(0.1),
        ]
    return nn.Sequential(*layers, nn.Linear(LARGE_WIDTH, CLASSES))


def large_batch(number: int) -> dict[str, Tensor]:
    """The batch of a step."""
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(LARGE_ROWS, LARGE_WIDTH, generator=draw)
    return {"x": x, "labels": torch.randint(0, CLASSES, (LARGE_ROWS,), generator=draw)}


def capped(cap: tuple[int, float]) -> dict[str, Any]:
    """What a training in a child process came to: its losses and a digest of its end, those of the plain one
    that ran before it without memfit, and its rescues.

    The child's allocator gives every large block back to the system, so that the cap is on what is in use.
    """
    code = f"import outages; outages.train_capped({cap!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(memfit.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def train_capped(cap: tuple[int, float]) -> None:
    """Trains and prints; the cap binds this process until it ends."""
    model, optimizer = _fresh(large)
    torch.manual_seed(3)
    plainly = Training(model, optimizer, partial(_plain_step, model), batch_at=large_batch)
    plain = _end(plainly, range(CAPPED_STEPS))
    model, optimizer = _fresh(large)
    batch, rows = large_batch(0), LARGE_ROWS
    few = 64 * 2**20  # more would be measured more exactly, and the budget is not what matters here
    profile = memfit.profile(
        model, loss_of, batch, optimizer=optimizer, micro_batch_size=rows, limit_bytes=few
    )
    step = memfit.fit(
        model, loss_of, batch, memory="2GiB", optimizer=optimizer, micro_batch_size=rows, profile=profile
    )
    torch.manual_seed(3)
    training = Training(model, optimizer, step, batch_at=large_batch)
    before, share = cap
    _end(training, range(before))
    gc.collect()
    set_hard_cap(int(share * (step.plan.predicted_peak_bytes - step.profile.residents.total_bytes)))
    end = _end(training, range(before, CAPPED_STEPS))
    print(json.dumps({"plain": plain, "end": end, "rescues": [rescue.attempts for rescue in step.rescues]}))


def _plain_step(model: nn.Module, batch: Any) -> Tensor:
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach()


def _end(training: Training[Any], numbers: Iterable[int]) -> list[Any]:
    """Runs some steps; the losses so far and a digest of the state."""
    for number in numbers:
        training.run(number)
    digest = hashlib.sha256()
    for name, tensor in sorted(training.state().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return [training.losses, digest.hexdigest()]
