"""A few rows of a batch whose parts are as unequal as they may be: equal ones fit wrong weights too.

Note [Samples]
 1. A loss may be a mean over rows, over labels that are not -100, over a mask, over what is not 0... In most
    batches several of these count alike. So some labels are ignored, masks end early, and a few numbers
    become 0 or what the loss may ignore (255, a padding), each in another row and number, where the counts
    would be equal otherwise.
 2. A loss may not run on some of that, so there are several samples, the most telling first, the rows as they
    are last.
 3. On a CUDA device a value of -100 is put in only beside others like it: where the loss does not know it, it
    is an index out of range, which the device does not survive. On a CPU it is an error, or another value. A
    0 is an index everywhere.
 4. Where rows are long and the model large, the sequences may be cut: which rows or tokens share a mean shows
    in a few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import map_tensors, rows_of, split, tensors_of
from memfit.runtime.count import IGNORED, labels_of

_INTEGERS = (torch.int64, torch.int32)


class Sample(NamedTuple):
    """A few rows, and what was done to them: labels ignored on purpose, sequences cut to some tokens."""

    batch: Any
    has_thin_labels: bool
    cut_tokens: tuple[int, int] | None = None


def samples_of(
    batch: Any, most_rows: int, most_tokens: int | None = None, ignored: tuple[int, ...] = ()
) -> list[Sample]:
    """Probes of a batch, the more telling first, as they are last. See Note [Samples].

    ``ignored`` are numbers besides -100 and 0 that the loss may ignore.
    """
    plain = some_rows(batch, rows_of(batch), most_rows)
    found = [] if most_tokens is None else _variants(plain, most_tokens, ignored)
    return [*found, *_variants(plain, None, ignored)]


def some_rows(batch: Any, total_rows: int, most: int) -> Any:
    """A few rows from all over a batch; the first ones where it holds lists of an entry a row."""
    few = min(most, total_rows)
    if all(t.shape[:1] == (total_rows,) for _, t in tensors_of(batch)) and not has_lists(batch):
        chosen = torch.linspace(0, total_rows - 1, few).long()
        return map_tensors(batch, lambda t: t[chosen.to(t.device)])
    return split(batch, (few, total_rows - few))[0] if few < total_rows else batch


def has_lists(batch: Any) -> bool:
    """Whether a batch holds something else than tensors at its top level."""
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, Tensor):
        return False
    return not isinstance(values, (list, tuple)) or not all(isinstance(v, Tensor) for v in values)


def _variants(plain: Any, most_tokens: int | None, ignored: tuple[int, ...]) -> list[Sample]:
    """The samples of some rows, cut or not."""
    cut = None if most_tokens is None else _cut(plain, most_tokens)
    if most_tokens is not None and cut is None:
        return []
    rows, tokens = (plain, None) if cut is None else cut
    found: list[Sample] = []
    zeroed = _with_zeros(rows)
    for base in (_with_values(rows if zeroed is None else zeroed, ignored), zeroed, rows):
        if base is None:
            continue
        masked, labelled = _with_thin_masks(base), _with_thin_labels(base)
        both = None if masked is None else _with_thin_labels(masked)
        for probe, is_thin in ((both, True), (masked, False), (labelled, True), (base, False)):
            if probe is not None:
                found.append(Sample(probe, is_thin, tokens))
    return found


def _changed(batch: Any, changes: list[tuple[Tensor, Tensor]]) -> Any | None:
    """A batch with some leaves exchanged; None where none would be another."""
    changes = [(before, after) for before, after in changes if not torch.equal(before, after)]
    if not changes:
        return None
    return map_tensors(batch, lambda t: next((after for before, after in changes if before is t), t))


# ---- labels, masks, zeros ------------------------------------------------------------------------------


def _with_thin_labels(probe: Any) -> Any | None:
    """A probe some of whose labels are ignored."""
    found = _label_leaf(probe)
    if found is None or (found.device.type != "cpu" and not bool((found == IGNORED).any())):
        return None
    return _changed(probe, [(found, _thin_labels(found))])


def _label_leaf(probe: Any) -> Tensor | None:
    """The leaf called labels, or the only one of whole numbers."""
    whole = [t for _, t in tensors_of(probe) if t.dtype in _INTEGERS and t.dim() in (1, 2)]
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
    valid = thin[-1, thin[-1] != IGNORED]
    if len(valid) and bool((thin[:, 0] == IGNORED).all()):
        thin[-1, 0] = valid[0]  # else it would not show whether the first one counts
    return thin


def _with_thin_masks(probe: Any) -> Any | None:
    """A probe whose full masks end early."""
    masks = [leaf for path, leaf in tensors_of(probe) if _is_full_mask(path, leaf)]
    return _changed(probe, [(leaf, _thin_mask(leaf)) for leaf in masks])


def _is_full_mask(path: str, leaf: Tensor) -> bool:
    """Whether a leaf is a mask of tokens that masks none."""
    return "mask" in path.rsplit("[", 1)[-1].lower() and leaf.dim() == 2 and bool((leaf == 1).all())


def _thin_mask(mask: Tensor) -> Tensor:
    """The first half of the rows end earlier, each of them elsewhere."""
    thin = mask.clone()
    for row in range(len(thin) // 2):
        thin[row, max(1, mask.shape[1] // 2 - row) :] = 0
    return thin


def _with_zeros(probe: Any) -> Any | None:
    """A probe whose rows hold unequal numbers of zeros, in each leaf another number."""
    leaves = [(path, leaf) for path, leaf in tensors_of(probe) if leaf.dim() and leaf.numel()]
    changes = [
        (leaf, _zeroed(leaf, number))
        for number, (path, leaf) in enumerate(leaves)
        if not _is_full_mask(path, leaf) and _counts_alike(leaf)
    ]
    return _changed(probe, changes)


def _counts_alike(leaf: Tensor) -> bool:
    """Whether each row of whole numbers, or of weights that are all 1, has as many entries that are not 0."""
    if leaf.is_complex() or (leaf.is_floating_point() and not bool((leaf == 1).all())):
        return False
    counts = (leaf != 0).reshape(len(leaf), -1).sum(1)
    return bool((counts == counts[0]).all())


def _zeroed(leaf: Tensor, number: int) -> Tensor:
    """Zeros at the end of the last row; where a row is one number, one row or another is 0."""
    zeroed = leaf.detach().clone(memory_format=torch.contiguous_format)
    if leaf.dim() == 1:
        zeroed[-1 if number % 2 == 0 else 0] = 0
    else:
        last = zeroed[-1].view(-1)
        last[-min(1 + number, max(1, len(last) - 1)) :] = 0
    return zeroed.requires_grad_(leaf.requires_grad)


def _with_values(probe: Any, ignored: tuple[int, ...]) -> Any | None:
    """A probe with some numbers that may be ignored, where they are indices or an error is harmless."""
    changes = []
    for _, leaf in tensors_of(probe):
        if leaf.dtype not in _INTEGERS or not leaf.dim() or not leaf.numel() or int(leaf.max()) <= 1:
            continue
        values = [v for v in ignored if leaf.device.type == "cpu" or v <= int(leaf.max())]
        changes.append((leaf, _valued(leaf, values)))
    return _changed(probe, changes)


def _valued(leaf: Tensor, values: list[int]) -> Tensor:
    """A row in the middle holds the values, each another number of times; or rows of one number do."""
    valued = leaf.detach().clone(memory_format=torch.contiguous_format)
    if leaf.dim() == 1:
        place = valued[2:-1]
    else:
        place = valued[len(leaf) // 2].view(-1)[1:]
        values = [value for times, value in enumerate(values, 1) for _ in range(times)]
    values = values[: len(place)]
    place[: len(values)] = torch.tensor(values, dtype=leaf.dtype, device=leaf.device)
    return valued


# ---- long rows -----------------------------------------------------------------------------------------


def _cut(plain: Any, most_tokens: int) -> tuple[Any, tuple[int, int]] | None:
    """The probe with shorter sequences, and to how many of how many tokens; None where none is long.

    The length of a sequence is that of the leaves of whole numbers with rows and tokens.
    """
    leaves = [t for _, t in tensors_of(plain) if not t.is_floating_point() and t.dim() == 2]
    lengths = {t.shape[1] for t in leaves if t.shape[1] > 2 * most_tokens}
    if not lengths:
        return None
    labels = _label_leaf(plain)
    starts = dict.fromkeys(lengths, 0)
    if labels is not None and labels.dim() == 2 and labels.shape[1] in lengths:
        starts[labels.shape[1]] = _fullest_window(labels, most_tokens)

    def cut(leaf: Tensor) -> Tensor:
        for dim in range(1, leaf.dim()):
            if leaf.shape[dim] in lengths:
                leaf = leaf.narrow(dim, starts[leaf.shape[dim]], most_tokens)
        return leaf

    return map_tensors(plain, cut), (most_tokens, max(lengths))


def _fullest_window(labels: Tensor, tokens: int) -> int:
    """Where the most rows have a few labels within so many tokens."""
    before = torch.nn.functional.pad((labels != IGNORED).long().cumsum(1), (1, 0))
    within = (before[:, tokens:] - before[:, :-tokens]).clamp(max=4)
    return int(within.sum(0).argmax())
