"""Windows of micro-batches with exact weights, for people who keep their own training loop.

Note [Weights of a window] 1. A loss that is a mean over n_i counted units of micro-batch i is a mean over the
whole window when it is weighted by n_i / (n_1 + ... + n_k). A constant 1 / k is right only where all n_i are
equal: not for a ragged last micro-batch, for labels that are ignored, or for a last window with fewer
micro-batches than the others. 2. The denominator is known only when all of them have been fetched: so a
window is held as a whole. 3. The mean over no unit is 0 / 0, and 0 times NaN is NaN: such a micro-batch has
no share in the loss and is left out. 4. Whether a window is the last is known only by asking the loader for
one micro-batch more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from numbers import Integral
from typing import Any, Generic, TypeVar

from torch import Tensor

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import is_plain, tensors_of
from memfit.runtime.count import NAMED, one, shares

Batch = TypeVar("Batch")
Units = Callable[[Any], float | Tensor]  # how many counted units a micro-batch holds


@dataclass(frozen=True, slots=True, eq=False)
class Window(Generic[Batch]):
    """The micro-batches of one optimizer step; iterating it yields ``(micro_batch, weight)``.

    Attributes:
        micro_batches: Those that have a share in the loss, in the order of the loader.
        weights: The share of each: they add up to 1, or are all 1 where the loss is a sum.
        count: The units of the whole window, of which each weight is a fraction (1 where the loss is a sum).
        skipped: Micro-batches left out because they hold nothing that is counted, such as no valid label.
        is_last: The loader has no further micro-batch.
        is_short: The loader gave fewer micro-batches than ``gradient_accumulation_steps``.
    """

    micro_batches: tuple[Batch, ...]
    weights: tuple[float, ...]
    count: float
    skipped: int
    is_last: bool
    is_short: bool

    def __iter__(self) -> Iterator[tuple[Batch, float]]:
        return iter(zip(self.micro_batches, self.weights, strict=True))

    def __len__(self) -> int:
        return len(self.micro_batches)


class Windows(Generic[Batch]):
    """What :func:`windows` returns: each ``iter()`` of it starts the loader anew."""

    __slots__ = ("_counter", "_is_named", "_loader", "_steps")

    def __init__(self, loader: Iterable[Batch], steps: int, counter: Units, *, is_named: bool) -> None:
        self._loader = loader
        self._steps = steps
        self._counter = counter
        self._is_named = is_named

    def __len__(self) -> int:
        """The number of windows; TypeError where the loader has no length."""
        micro_batches = len(self._loader)  # type: ignore[arg-type]
        return (micro_batches + self._steps - 1) // self._steps

    def __iter__(self) -> Iterator[Window[Batch]]:
        source = self._fetched()
        ahead = next(source, None)
        if ahead is None:
            raise ValueError(
                "the loader yielded no micro-batch: it is empty, or it is a generator that was used up "
                "before (give a loader that starts anew at each iter())"
            )
        while ahead is not None:
            held = [ahead, *islice(source, self._steps - 1)]
            ahead = next(source, None)
            yield self._window(held, is_last=ahead is None)
            held.clear()  # or the old window would stay alive while the next one is fetched

    def _fetched(self) -> Iterator[_Fetched[Batch]]:
        """The micro-batches of the loader, checked and counted."""
        for number, micro_batch in enumerate(self._loader):
            _refuse_empty(number, micro_batch)
            versions = tuple((path, t, t._version) for path, t in tensors_of(micro_batch) if _versioned(t))
            yield _Fetched(number, micro_batch, self._count(number, micro_batch), versions)

    def _count(self, number: int, micro_batch: Batch) -> float:
        """What the counter says of a micro-batch, as a finite number of at least 0."""
        if not self._is_named:
            return _valid(
                number, self._counter(micro_batch)
            )  # errors of the user's own code stay as they are
        try:
            return float(self._counter(micro_batch))
        except ValueError as error:
            raise ValueError(f"micro-batch {number} of the loader: {error}") from error
        except InexactAccumulation as error:
            raise InexactAccumulation(
                f"micro-batch {number} of the loader: {error}", owner=error.owner
            ) from error

    def _window(self, held: list[_Fetched[Batch]], *, is_last: bool) -> Window[Batch]:
        """The window of these micro-batches."""
        for fetched in held:
            fetched.refuse_overwritten()
        numbers = f"micro-batches {held[0].number} to {held[-1].number}"
        counts = [fetched.count for fetched in held]
        total = 1.0 if self._counter is one else sum(counts)
        if total == 0 or not isfinite(total):
            raise ValueError(
                f"count gave {total:g} for a whole window ({numbers} of the loader), so its mean loss is not "
                "defined: leave out micro-batches without a valid label, or accumulate more of them"
            )
        found = counts if self._counter is one else shares(float, counts)
        kept = [(fetched.micro_batch, share) for fetched, share in zip(held, found, strict=True) if share > 0]
        return Window(
            micro_batches=tuple(micro_batch for micro_batch, _ in kept),
            weights=tuple(share for _, share in kept),
            count=total,
            skipped=len(held) - len(kept),
            is_last=is_last,
            is_short=len(held) < self._steps,
        )


def windows(
    loader: Iterable[Batch], gradient_accumulation_steps: int = 4, count: str | Units = "rows"
) -> Windows[Batch]:
    """Returns windows of micro-batches whose weights make gradient accumulation exact, in one's own loop.

    ::

        for window in memfit.windows(loader, gradient_accumulation_steps=4, count="shifted_labels"):
            for micro_batch, weight in window:
                (weight * loss_fn(model, micro_batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

    The weighted losses add up to the mean loss over everything that is counted in the window: for a ragged
    last micro-batch, for ignored labels, and for the last window, which may be short. That is the loss of the
    concatenated batch wherever it is such a mean and no layer looks across rows (BatchNorm in training mode
    does; ``memfit.fit`` finds it). A micro-batch without anything to count is left out, as its mean is NaN.
    On several ranks the weights are those of each rank's own window.

    The denominator needs all micro-batches of a window, so a window is fetched before it is handed out, and
    one micro-batch more to know whether it is the last; while the next one is fetched the loop still holds
    the former. So ``2 * gradient_accumulation_steps + 1`` micro-batches are in memory at most: leave them on
    the host and move each to the device inside the loop.

    Args:
        loader: Yields micro-batches. If it is no iterator itself, each ``iter()`` of the result starts it
            anew. ``len()`` works where the loader has one.
        gradient_accumulation_steps: Micro-batches in a window; the last window may have fewer.
        count: What the mean in the loss is over: ``"rows"``, ``"labels"`` (those that are not -100, in a leaf
            called labels), ``"shifted_labels"`` (causal language models), ``"sum"`` (no mean: every weight
            is 1) or a function ``micro_batch -> number``.

    Raises:
        TypeError: ``loader`` or ``gradient_accumulation_steps`` is of another type; while iterating: a
            micro-batch without any tensor, or a counter that returns no number.
        ValueError: ``gradient_accumulation_steps`` is below 1, or ``count`` none of the names; while
            iterating: an empty loader or micro-batch, a count that is negative or not finite, or 0 for a
            whole window.
        InexactAccumulation: While iterating: the rows or labels of a micro-batch are not known.
        RuntimeError: While iterating: the loader wrote into a micro-batch that it had given out.
    """
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(f"loader is a {type(loader).__name__}: give something that yields micro-batches")
    steps = gradient_accumulation_steps
    if not isinstance(steps, Integral) or isinstance(steps, bool):
        raise TypeError(f"gradient_accumulation_steps is {steps!r}: give a whole number of micro-batches")
    if steps < 1:
        raise ValueError(f"gradient_accumulation_steps is {steps}: a window has at least 1 micro-batch")
    if callable(count):
        return Windows(loader, int(steps), count, is_named=False)
    if count not in NAMED:
        raise ValueError(f"count is {count!r}: give {', '.join(map(repr, NAMED))} or a function")
    return Windows(loader, int(steps), NAMED[count], is_named=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Fetched(Generic[Batch]):
    """A micro-batch that waits for the rest of its window."""

    number: int
    micro_batch: Batch
    count: float
    versions: tuple[tuple[str, Tensor, int], ...]

    def refuse_overwritten(self) -> None:
        """Raises if the loader has written into the micro-batch since, as one that reuses its memory does."""
        for path, tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{path} of micro-batch {self.number} was overwritten after the loader had given it out, "
                    "and a window holds several: let the loader yield new tensors, and write to copies"
                )


def _refuse_empty(number: int, micro_batch: object) -> None:
    """Raises if a micro-batch holds no tensor, or none with a row."""
    if is_plain(micro_batch):
        raise TypeError(
            f"micro-batch {number} of the loader is a {type(micro_batch).__name__} without any tensor: let "
            "the loader yield tensors, or a dict, list, tuple or dataclass of them"
        )
    leaves = [(path, tensor) for path, tensor in tensors_of(micro_batch) if tensor.dim() > 0]
    if leaves and all(tensor.size(0) == 0 for _, tensor in leaves):
        raise ValueError(
            f"micro-batch {number} of the loader is empty: {leaves[0][0]} has 0 rows (leave it out)"
        )


def _valid(number: int, counted: Any) -> float:
    """A count of the user's function as a finite number of at least 0."""
    try:
        value = float(counted)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"count gave a {type(counted).__name__} for micro-batch {number} of the loader: return one number"
        ) from error
    if not value >= 0 or not isfinite(value):
        raise ValueError(
            f"count gave {value:g} for micro-batch {number} of the loader: it must be a finite number of at "
            "least 0"
        )
    return value


def _versioned(tensor: Tensor) -> bool:
    """Whether writes to a tensor are counted."""
    return not tensor.is_inference()
