"""A few rows of a batch whose parts are as unequal as they may be: equal ones fit wrong weights too."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import map_tensors, rows_of, tensors_of
from memfit.runtime.count import IGNORED, labels_of, some_rows

Changes = list[tuple[Tensor, Tensor]]


class Sample(NamedTuple):
    """A few rows, and whether some of their labels were ignored on purpose."""

    batch: Any
    has_thin_labels: bool


def samples_of(batch: Any, most_rows: int) -> list[Sample]:
    """Probes of a batch, the more telling first, as they are last. A loss may not run on some.

    On a CUDA device a value of -100 is put in only beside others like it: where the loss does not know it, it
    is an index out of range, which the device does not survive. On a CPU it is an error, or another value.
    """
    plain = some_rows(batch, rows_of(batch), most_rows)
    found = _label_leaf(plain)
    labels: Changes = []
    if found is not None and (found.device.type == "cpu" or bool((found == IGNORED).any())):
        labels = [(found, _thin_labels(found))]
    masks = [
        (leaf, _thin_mask(leaf))
        for path, leaf in tensors_of(plain)
        if "mask" in path.rsplit("[", 1)[-1].lower() and leaf.dim() == 2 and bool((leaf == 1).all())
    ]
    labels, masks = ([(a, b) for a, b in c if not torch.equal(a, b)] for c in (labels, masks))
    found_samples = [Sample(_changed(plain, [*labels, *masks]), bool(labels))] if labels and masks else []
    found_samples += [Sample(_changed(plain, masks), False)] if masks else []
    found_samples += [Sample(_changed(plain, labels), True)] if labels else []
    return [*found_samples, Sample(plain, False)]


def _changed(batch: Any, changes: Changes) -> Any:
    """A batch with some leaves exchanged."""
    return map_tensors(batch, lambda t: next((after for before, after in changes if before is t), t))


def _label_leaf(probe: Any) -> Tensor | None:
    """The leaf called labels, or the only one of whole numbers."""
    whole = [t for _, t in tensors_of(probe) if t.dtype in (torch.int64, torch.int32) and t.dim() in (1, 2)]
    try:
        found = labels_of(probe)
    except InexactAccumulation:
        return whole[0] if len(whole) == 1 else None
    return found if any(found is t for t in whole) else None


def _thin_labels(found: Tensor) -> Tensor:
    """Two labels a row are left of the first half: then counting the first one or not halves its weight."""
    thin = found.clone()
    if found.dim() == 1:
        thin[1] = IGNORED
        return thin
    for row in range(len(thin) // 2):
        thin[row, (thin[row] != IGNORED).nonzero()[2:, 0]] = IGNORED
    return thin


def _thin_mask(mask: Tensor) -> Tensor:
    """The first half of the rows end earlier, each of them elsewhere."""
    thin = mask.clone()
    for row in range(len(thin) // 2):
        thin[row, max(1, mask.shape[1] // 2 - row) :] = 0
    return thin
