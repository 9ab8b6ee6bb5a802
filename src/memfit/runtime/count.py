"""What each micro-batch weighs in the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.micro import Weight

Counter = Callable[[Any], float]

COUPLED = "coupled"
IGNORED = -100  # torch.nn.CrossEntropyLoss(ignore_index=...)


def rows(part: Any) -> float:
    """The rows of a micro-batch: for losses that are a mean over rows."""
    return float(rows_of(part))


def labels(part: Any) -> float:
    """The labels of a micro-batch that are not -100: for losses that are a mean over labels."""
    return float((labels_of(part) != IGNORED).sum())


def shifted_labels(part: Any) -> float:
    """The same without the first of each row, which a causal language model has nothing to predict from."""
    found = labels_of(part)
    if found.dim() < 2:
        raise InexactAccumulation("labels without a sequence cannot be shifted", owner="batch")
    return float((found[..., 1:] != IGNORED).sum())


def one(part: Any) -> float:
    """Always 1: for losses that are a sum."""
    return 1.0


NAMED: Final[Mapping[str, Counter]] = {
    "rows": rows,
    "labels": labels,
    "shifted_labels": shifted_labels,
    "sum": one,
}
_CHOICES: Final = ("auto", COUPLED)


class Alike(NamedTuple):
    """The counter in use, and another one that counted like it so far."""

    name: str
    counter: Counter
    other_name: str
    other: Counter

    def refusal(self) -> InexactAccumulation:
        """The error of a batch in which they differ."""
        return InexactAccumulation(
            f"it is not known whether the loss is a mean over {self.name} or over {self.other_name}: "
            "they counted alike in the example batch, and do not in this one. Say which with count=, "
            "or fit with a batch in which they differ",
            owner="batch",
        )


class Weigher:
    """A counter that must see all parts of a batch at once.

    Attributes:
        known: What it counts by; None as long as that is not known.
    """

    known: Counter | Mapping[str, Counter] | None = None

    @property
    def alike(self) -> Sequence[Alike]:
        """Others that have counted alike."""
        return ()

    def __call__(self, part: Any) -> float:
        """Not known for one part alone."""
        raise TypeError(f"{type(self).__name__} weighs all parts of a batch at once: call weights()")

    def weights(self, parts: Sequence[Any]) -> list[Weight]:
        """The weight of each part, as :func:`weights` has them."""
        raise NotImplementedError


def weights(counter: Counter | Mapping[str, Counter], parts: Sequence[Any]) -> list[Weight]:
    """The weight of each part, or of each term of each part; they add up to 1, or are all 1 for a sum.

    Raises:
        ValueError: A count is negative or no number, or there is nothing to count in the whole batch.
    """
    if isinstance(counter, Weigher):
        return counter.weights(parts)
    if not isinstance(counter, Mapping):
        return [*shares(counter, parts)]
    columns = {name: shares(one, parts, name) for name, one in counter.items()}
    return [{name: column[part] for name, column in columns.items()} for part in range(len(parts))]


def shares(counter: Counter, parts: Sequence[Any], whose: str = "") -> list[float]:
    """The share of each part in all that a counter counts; ``whose`` term it is, if there are several."""
    if counter is one:
        return [1.0] * len(parts)
    counts = counts_of(counter, parts, whose)
    total = sum(counts)
    if total == 0:
        raise nothing_to_count(whose)
    return [count / total for count in counts]


def counts_of(counter: Counter, parts: Sequence[Any], whose: str = "") -> list[float]:
    """What a counter counts in each part.

    Raises:
        ValueError: Something negative, or no number.
    """
    counts = [float(counter(part)) for part in parts]
    if any(not count >= 0 or count == float("inf") for count in counts):
        raise ValueError(
            f"{_count(whose)} gave {counts} for the micro-batches: each must be a number of at least 0"
        )
    return counts


def nothing_to_count(whose: str = "") -> ValueError:
    """The error of a batch of which a mean is not defined."""
    return ValueError(
        f"{_count(whose)} gave 0 for the whole batch, so its mean loss is not defined: leave out batches "
        "without a valid label"
    )


def _count(whose: str) -> str:
    """The argument, with the name of the term."""
    return f"count of the term {whose!r}" if whose else "count"


def counter_named(
    count: str | Counter | Mapping[str, str | Counter],
) -> Counter | Mapping[str, Counter] | None:
    """The counter that a user asked for, or one for each term of the loss; None for what asks for none.

    Raises:
        ValueError: ``count`` is none of the names, or a mapping without any term.
        TypeError: It, or what it has for a term, is no name and no function.
    """
    if isinstance(count, Mapping):
        if not count:
            raise ValueError("count is a mapping without any term: give {'name of a term': 'rows', ...}")
        return {term: _named(one, f"count of the term {term!r}", NAMED) for term, one in count.items()}
    if isinstance(count, str) and count in _CHOICES:
        return None
    return _named(count, "count", (*_CHOICES, *NAMED))


def _named(count: str | Counter, what: str, names: Iterable[str]) -> Counter:
    """The counter of a name, or the one that was given.

    Raises:
        ValueError: ``count`` is none of the names.
        TypeError: It is no name and no function.
    """
    if callable(count):
        return count
    cure = f"give {', '.join(map(repr, names))} or a function"
    if not isinstance(count, str):
        raise TypeError(f"{what} is {count!r}, a {type(count).__name__}: {cure}")
    if count not in NAMED:
        raise ValueError(f"{what} is {count!r}: {cure}")
    return NAMED[count]


def labels_of(part: Any) -> Tensor:
    """The labels of a batch: the leaf called so."""
    found = [
        t for path, t in tensors_of(part) if path.rstrip("']\"").endswith(("labels", "label", "targets"))
    ]
    if len(found) != 1:
        raise InexactAccumulation(
            f"the batch has {len(found)} leaves called labels, label or targets, so its labels cannot be "
            "counted: give count= a function micro_batch -> number of labels",
            owner="batch",
        )
    return found[0]
