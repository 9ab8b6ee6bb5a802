"""A few rows of a batch whose parts are as unequal as they may be: equal ones fit wrong weights too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import map_tensors, rows_of, tensors_of
from memfit.runtime.count import IGNORED, labels_of, some_rows


def samples_of(batch: Any) -> list[tuple[Any, bool]]:
    """Probes of a batch and whether labels and masks were thinned out in them, the more telling first."""
    plain = some_rows(batch, rows_of(batch))
    thinned = _thinned(plain)
    return [(plain, False)] if thinned is None else [(thinned, True), (plain, False)]


def _thinned(probe: Any) -> Any | None:
    """The same rows, some labels ignored and some ends masked; None where nothing is known to be ignorable.

    On a CUDA device a value of -100 is put in only beside others like it: where the loss does not know it, it
    is an index out of range, which the device does not survive. On a CPU it is an error, or another value.
    """
    found = _label_leaf(probe)
    changes: list[tuple[Tensor, Tensor]] = []
    if found is not None and (found.device.type == "cpu" or bool((found == IGNORED).any())):
        changes.append((found, _thin_labels(found)))
    for path, leaf in tensors_of(probe):
        if "mask" in path.rsplit("[", 1)[-1].lower() and leaf.dim() == 2 and bool((leaf == 1).all()):
            changes.append((leaf, _thin_mask(leaf)))
    if all(torch.equal(before, after) for before, after in changes):
        return None
    return map_tensors(probe, lambda t: next((after for before, after in changes if before is t), t))


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
