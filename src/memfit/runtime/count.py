"""What each micro-batch weighs in the loss of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import map_tensors, rows_of, split, tensors_of
from memfit.runtime.micro import LossFn, one_number
from memfit.runtime.preserve import Snapshot

Counter = Callable[[Any], float]

IGNORED = -100  # torch.nn.CrossEntropyLoss(ignore_index=...)
_PROBE_ROWS = 3


def rows(part: Any) -> float:
    """The rows of a micro-batch: for losses that are a mean over rows."""
    return float(rows_of(part))


def labels(part: Any) -> float:
    """The labels of a micro-batch that are not -100: for losses that are a mean over labels."""
    return float((_labels_of(part) != IGNORED).sum())


def shifted_labels(part: Any) -> float:
    """The same without the first of each row, which a causal language model has nothing to predict from."""
    return float((_labels_of(part)[..., 1:] != IGNORED).sum())


def one(part: Any) -> float:
    """Always 1: for losses that are a sum."""
    return 1.0


def weights(counter: Counter, parts: list[Any]) -> list[float]:
    """The weight of each part; they add up to 1, or are all 1 for a sum.

    Raises:
        ValueError: A count is negative or no number, or there is nothing to count in the whole batch.
    """
    if counter is one:
        return [1.0] * len(parts)
    counts = [float(counter(part)) for part in parts]
    if any(not count >= 0 or count == float("inf") for count in counts):
        raise ValueError(f"count gave {counts} for the micro-batches: each must be a number of at least 0")
    total = sum(counts)
    if total == 0:
        raise ValueError(
            "count gave 0 for the whole batch, so its mean loss is not defined: leave out batches without a "
            "valid label"
        )
    return [count / total for count in counts]


def counter_for(count: str | Counter, model: nn.Module, loss_fn: LossFn, batch: Any) -> Counter | None:
    """The counter a user asked for; for ``"auto"`` the one under which the parts' losses add up.

    None: none of the known ones does, so the batch must not be split.

    Raises:
        ValueError: ``count`` is none of the names.
    """
    if callable(count):
        return count
    named: dict[str, Counter] = {"rows": rows, "labels": labels, "shifted_labels": shifted_labels, "sum": one}
    if count in named:
        return named[count]
    if count != "auto":
        raise ValueError(f"count is {count!r}: give 'auto', {', '.join(map(repr, named))} or a function")
    return _probed(model, loss_fn, batch)


def _probed(model: nn.Module, loss_fn: LossFn, batch: Any) -> Counter | None:
    """Compares the loss of a few rows with that of their unequal parts, dropout off, without a graph.

    Labels are thinned out unequally, so that a mean over labels and one over rows differ.
    """
    total_rows = rows_of(batch)
    if total_rows < 2:
        return rows
    few = min(_PROBE_ROWS, total_rows)
    try:
        probe = split(batch, (few, total_rows - few))[0] if few < total_rows else batch
        probe = _thinned(probe)
        parts = split(probe, (1, few - 1))
    except InexactAccumulation:
        return None
    with torch.no_grad(), _evaluating(model):
        whole, *losses = (float(one_number(loss_fn(model, part))) for part in [probe, *parts])
    tolerance = 1e-5 if _precision(model) >= 23 else 2e-2
    for counter in (shifted_labels, labels, rows, one):
        try:
            shares = weights(counter, parts)
        except (ValueError, InexactAccumulation, IndexError):
            continue
        summed = sum(share * loss for share, loss in zip(shares, losses, strict=True) if share)
        if abs(summed - whole) <= tolerance * max(abs(whole), 1e-12):
            return counter
    return None


def _labels_of(part: Any) -> Tensor:
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


def _thinned(probe: Any) -> Any:
    """The same rows, half of the labels of the first row ignored."""
    try:
        found = _labels_of(probe)
    except InexactAccumulation:
        return probe
    if found.is_floating_point() or found.dim() < 2 or found.shape[1] < 4:
        return probe
    thin = found.clone()
    thin[0, found.shape[1] // 2 :] = IGNORED
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
