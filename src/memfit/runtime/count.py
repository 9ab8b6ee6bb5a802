"""What each micro-batch weighs in the loss of the whole batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import map_tensors, rows_of, split, tensors_of
from memfit.runtime.fake import untouched
from memfit.runtime.micro import LossFn, Weight
from memfit.runtime.preserve import Snapshot

Counter = Callable[[Any], float]

_log = logging.getLogger("memfit")

IGNORED = -100  # torch.nn.CrossEntropyLoss(ignore_index=...)
_PROBE_ROWS = 6
_TOLERANCE = 1e-5  # of the loss, in single precision


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


def weights(counter: Counter | Mapping[str, Counter], parts: list[Any]) -> list[Weight]:
    """The weight of each part, or of each term of each part; they add up to 1, or are all 1 for a sum.

    Raises:
        ValueError: A count is negative or no number, or there is nothing to count in the whole batch.
    """
    if not isinstance(counter, Mapping):
        return [*shares(counter, parts)]
    columns = {name: shares(one, parts, f" of the term {name!r}") for name, one in counter.items()}
    return [{name: column[part] for name, column in columns.items()} for part in range(len(parts))]


def shares(counter: Counter, parts: list[Any], whose: str = "") -> list[float]:
    """The share of each part in all that a counter counts."""
    if counter is one:
        return [1.0] * len(parts)
    counts = [float(counter(part)) for part in parts]
    if any(not count >= 0 or count == float("inf") for count in counts):
        raise ValueError(
            f"count{whose} gave {counts} for the micro-batches: each must be a number of at least 0"
        )
    total = sum(counts)
    if total == 0:
        raise ValueError(
            f"count{whose} gave 0 for the whole batch, so its mean loss is not defined: leave out batches "
            "without a valid label"
        )
    return [count / total for count in counts]


def counter_for(
    count: str | Counter | Mapping[str, str | Counter], model: nn.Module, loss_fn: LossFn, batch: Any
) -> Counter | Mapping[str, Counter] | None:
    """The counter a user asked for; for ``"auto"`` the one under which the parts' losses add up.

    None: none of the known ones does, so the batch must not be split.

    Raises:
        ValueError: ``count`` is none of the names.
    """
    if isinstance(count, Mapping):
        return {term: named_counter(one) for term, one in count.items()}
    return _probed(model, loss_fn, batch) if count == "auto" else named_counter(count)


def named_counter(count: str | Counter) -> Counter:
    """The counter of a name, or the one that was given.

    Raises:
        ValueError: ``count`` is none of the names.
    """
    if callable(count):
        return count
    if count in NAMED:
        return NAMED[count]
    raise ValueError(f"count is {count!r}: give 'auto', {', '.join(map(repr, NAMED))} or a function")


def guarded_rows(part: Any) -> float:
    """The rows, where no label was ever ignored: then rows and labels are the same, and else not."""
    if any((t == IGNORED).any() for _, t in tensors_of(part) if not t.is_floating_point()):
        raise InexactAccumulation(
            f"a batch holds {IGNORED}, which the example batch did not, so it is not known whether the loss "
            "is a mean over rows or over labels: give count='rows', 'labels' or 'shifted_labels'",
            owner="batch",
        )
    return rows(part)


def _probed(model: nn.Module, loss_fn: LossFn, batch: Any) -> Counter | None:
    """The one counter under which the losses of unequal parts add up; None if that is not certain.

    Note [Probe] 1. Rows from all over the batch, dropout off, no graph; labels thinned out unequally, so that
    means over labels and over rows differ. 2. Two different splits must agree, and the parts' losses differ:
    equal losses fit any weights. 3. Reduced precision cannot tell the counters apart. 4. A loss that fails
    on parts, or only without a graph, is not split.
    """
    total_rows = rows_of(batch)
    if total_rows < 3 or _precision(model) < 23:
        return None
    try:
        plain = some_rows(batch, total_rows)
        thinned = _thinned(plain)
        with torch.no_grad(), _evaluating(model), untouched(model):
            if thinned is not None:
                return _only_match(model, loss_fn, thinned, (shifted_labels, labels, rows, one))
            return _only_match(model, loss_fn, plain, (guarded_rows, one))
    except InexactAccumulation:
        return None
    except Exception as error:  # the user's own code: a real step will show it, if it is a fault
        _log.info("the loss cannot be probed (%s: %s); keeping the batch whole", type(error).__name__, error)
        return None


def _only_match(
    model: nn.Module, loss_fn: LossFn, probe: Any, counters: tuple[Counter, ...]
) -> Counter | None:
    """The counter that fits every split of a probe, if exactly one does."""
    few = rows_of(probe)
    halves, tail = (few // 2, few - few // 2), (max(1, few - 2), min(2, few - 1))
    splits = [split(probe, sizes) for sizes in (halves, tail)]
    whole = float(loss_fn(model, probe).detach())
    losses = [[float(loss_fn(model, part).detach()) for part in parts] for parts in splits]
    # A weight off by a tenth shows only if the losses of the parts differ by ten times the tolerance.
    if all(abs(one - other) <= 10 * _TOLERANCE * abs(whole) for one, other in losses):
        return None
    fitting = [
        counter
        for counter in counters
        if all(_adds_up(counter, parts, found, whole) for parts, found in zip(splits, losses, strict=True))
    ]
    return fitting[0] if len(fitting) == 1 else None


def _adds_up(counter: Counter, parts: list[Any], losses: list[float], whole: float) -> bool:
    """Whether the weighted losses of the parts give the loss of the whole."""
    try:
        found = shares(counter, parts)
    except (ValueError, InexactAccumulation, IndexError):
        return False
    summed = sum(share * loss for share, loss in zip(found, losses, strict=True))
    return 0.0 not in found and abs(summed - whole) <= _TOLERANCE * abs(whole)


def some_rows(batch: Any, total_rows: int, most: int = _PROBE_ROWS) -> Any:
    """A few rows from all over a batch; the first ones where it holds lists of an entry a row."""
    few = min(most, total_rows)
    if all(t.shape[:1] == (total_rows,) for _, t in tensors_of(batch)) and not _has_lists(batch):
        chosen = torch.linspace(0, total_rows - 1, few).long()
        return map_tensors(batch, lambda t: t[chosen.to(t.device)])
    return split(batch, (few, total_rows - few))[0] if few < total_rows else batch


def _has_lists(batch: Any) -> bool:
    """Whether a batch holds something else than tensors at its top level."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, Tensor):
        return False
    return not isinstance(values, (list, tuple)) or not all(isinstance(v, Tensor) for v in values)


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


def _thinned(probe: Any) -> Any | None:
    """The same rows, some labels of the first row ignored; None where no label is known to be ignorable.

    A value of -100 is put in only beside others like it: where the loss does not know it, it is an index out
    of range, which a CUDA device does not survive.
    """
    ignoring = [t for _, t in tensors_of(probe) if not t.is_floating_point() and (t == IGNORED).any()]
    try:
        found = labels_of(probe)
    except InexactAccumulation:
        if ignoring:
            raise
        return None
    if any(t is not found for t in ignoring):
        raise InexactAccumulation("-100 stands in a leaf that is not the labels", owner="batch")
    if found.is_floating_point() or (found.device.type != "cpu" and not ignoring):
        return None
    thin = found.clone()
    if found.dim() == 2 and found.shape[1] >= 4:
        # Two labels a row are left of the first half: then counting the first one or not halves its weight.
        for row in range(len(thin) // 2):
            thin[row, (thin[row] != IGNORED).nonzero()[2:, 0]] = IGNORED
    elif found.dim() == 1 and len(thin) >= 4:
        thin[1] = IGNORED
    elif not ignoring:
        return None
    return map_tensors(probe, lambda t: thin if t is found else t)


def _precision(model: nn.Module) -> int:
    """Mantissa bits of the least precise floating parameter."""
    bits = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return 7 if autocast else min(bits.get(p.dtype, 7) for p in model.parameters())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off; buffers, random streams and every module's mode as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    snapshot = Snapshot(model)
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        snapshot.restore()
