"""Long, doubled and broken trainings: nothing may pile up, mix or stay behind."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memfit
from outages import WIDTH, Job, Training, batch_at, differing, loss_of

# ---- many steps -----------------------------------------------------------------------------------------


class _MallInfo(ctypes.Structure):
    """``struct mallinfo2`` of the C library."""

    _fields_ = [
        *((f"_{number}", ctypes.c_size_t) for number in range(4)),
        ("hblkhd", ctypes.c_size_t),
        *((f"_{number}", ctypes.c_size_t) for number in (5, 6)),
        ("uordblks", ctypes.c_size_t),
        *((f"_{number}", ctypes.c_size_t) for number in (8, 9)),
    ]


@dataclass(frozen=True)
class Level:
    """What a process holds: bytes that ``malloc`` has given out, bytes in memory, and Python's objects."""

    step: int
    live_bytes: int
    resident_bytes: int
    objects: int

    @staticmethod
    def now(step: int) -> Level:
        """After a collection."""
        gc.collect()
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _MallInfo
        told = library.mallinfo2()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held_bytes = int(told.uordblks) + int(told.hblkhd)
        return Level(step, held_bytes, pages * os.sysconf("SC_PAGE_SIZE"), len(gc.get_objects()))


def levels(job: Job, steps: int, every: int, memory: int) -> list[Level]:
    """What is held after every so many steps of a training; batches of three lengths."""
    training, found = job.start(memory), list[Level]()
    batches = [batch_at(number) for number in range(3)]
    batches[1] = {name: tensor[:-5] for name, tensor in batches[1].items()}
    for number in range(1, steps + 1):
        training.step(batches[number % 3])
        training.optimizer.step()
        training.optimizer.zero_grad()
        if number % every == 0:
            found.append(Level.now(number))
    return found


def least_peak(profile: memfit.Profile, micro_batch_size: int) -> int:
    """The smallest budget: most is recomputed."""
    try:
        return memfit.find_plan(profile, memory=1, micro_batch_size=micro_batch_size).predicted_peak_bytes
    except memfit.InfeasibleBudget as refused:
        return refused.needed_bytes


# ---- two threads ----------------------------------------------------------------------------------------


def _net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 7)
    )


def _fitted(width: int) -> Training[memfit.Step]:
    """A training that draws no random numbers, under the least memory possible."""
    generator = torch.Generator().manual_seed(width)
    model = _net(width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    profile = memfit.profile(model, loss_of, batch_at(0), optimizer=optimizer, micro_batch_size=48)
    memory = least_peak(profile, 48)
    step = memfit.fit(
        model, loss_of, batch_at(0), memory=memory, optimizer=optimizer, micro_batch_size=48, profile=profile
    )
    return Training(model, optimizer, step)


def in_threads(pairs: int, steps: int) -> list[str]:
    """Pairs of models trained in two threads, each against itself alone; what differs, and every error."""
    wrong = list[str]()

    def run(training: Training[memfit.Step], errors: list[str]) -> None:
        try:
            for number in range(steps):
                training.run(number)
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")

    for pair in range(pairs):
        widths = (24 + 8 * (pair % 3), 64 + 8 * (pair % 2))
        both = [_fitted(width) for width in widths]
        threads = [threading.Thread(target=run, args=(training, wrong)) for training in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for width, training in zip(widths, both, strict=True):
            alone = _fitted(width)
            run(alone, wrong)
            if training.losses != alone.losses:
                wrong.append(f"pair {pair}, width {width}: the losses are not those of the one alone")
            if differing(_weights(training), _weights(alone)):
                wrong.append(f"pair {pair}, width {width}: the weights are not those of the one alone")
    return wrong


def _weights(training: Training[Any]) -> dict[str, Tensor]:
    return dict(training.model.state_dict())


# ---- errors of the user's own ---------------------------------------------------------------------------


class Mine(Exception):
    """An error that memfit cannot know."""


PLACES = ("loss", "forward hook", "backward hook", "gradient hook", "after a gradient", "batch")


def _strike(model: Any, place: str, draw: random.Random) -> Callable[[], None]:
    """Lets a hook raise in one of its next calls; returns what takes it away."""
    left = [draw.randrange(3)]

    def fail(*given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise draw.choice((Mine, KeyboardInterrupt, ZeroDivisionError, RuntimeError))("of the user's own")

    layer: Any = draw.choice([module for module in model.modules() if isinstance(module, nn.Linear)])
    remove: Callable[[], None] = _hook(layer, place, fail, left)
    return remove


def _hook(layer: Any, place: str, fail: Callable[..., None], left: list[int]) -> Any:
    """Registers a hook; returns what removes it."""
    if place == "forward hook":
        return layer.register_forward_hook(fail).remove
    if place == "backward hook":
        return layer.register_full_backward_hook(fail).remove
    left[0] = 0  # the others are called once a step
    if place == "gradient hook":
        return layer.weight.register_hook(fail).remove
    return layer.weight.register_post_accumulate_grad_hook(fail).remove


def _gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def _same_gradients(ours: list[Tensor | None], others: list[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(ours, others, strict=True)
    )


def broken(job: Job, seed: int, steps: int, expected: Training[Any], seen: Counter[str]) -> list[str]:
    """A training in which each step fails once in the user's own code, and is then done as if it had not.

    ``seen`` counts where errors were raised.
    """
    draw, wrong = random.Random(seed), list[str]()
    failing = [False]

    def loss(model: Any, batch: Any) -> Tensor:
        told = loss_of(model, batch)
        if failing[0] and draw.random() < 0.7:
            raise Mine("of the user's own")
        return told

    training = job.start(loss_fn=loss)
    for number in range(steps):
        before, gradients = training.state(), _gradients(training.model)
        place = draw.choice(PLACES)
        raised = _fails(training, place, number, draw, failing)
        seen[place] += raised
        wrong += [
            f"step {number}, {place}: {name} changed" for name in differing(training.state(), before)
        ] * raised
        if raised and not _same_gradients(gradients, _gradients(training.model)):
            wrong.append(f"step {number}, {place}: gradients changed")
        if not raised:  # the hook was not reached, or the loss did not raise: the step is done
            training.model.zero_grad()
            _rewind(training, before)
        training.run(number)
    if training.losses != expected.losses or differing(training.state(), expected.state()):
        wrong.append("the losses or the end differ from the undisturbed training")
    return wrong


def _fails(
    training: Training[Any], place: str, number: int, draw: random.Random, failing: list[bool]
) -> bool:
    """Runs a step that is to fail at some place; whether it did."""
    batch = batch_at(number)
    remove: Callable[[], None] = lambda: None  # noqa: E731
    if place == "loss":
        failing[0] = True
    elif place == "batch":
        batch = {**batch, "labels": batch["labels"][:-1]}  # rows do not agree
    else:
        remove = _strike(training.model, place, draw)
    try:
        training.step(batch)
    except (Mine, KeyboardInterrupt, ZeroDivisionError, RuntimeError, ValueError, memfit.MemfitError):
        return True
    finally:
        failing[0] = False
        remove()
    return False


def _rewind(training: Training[Any], before: dict[str, Tensor]) -> None:
    """Puts buffers and random numbers back by hand."""
    torch.set_rng_state(before["random"])
    with torch.no_grad():
        for name, buffer in training.model.named_buffers():
            buffer.copy_(before[name])
