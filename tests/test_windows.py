"""Windows for one's own loop: the weighted gradient is that of the concatenated window, written by hand."""

from __future__ import annotations

import itertools
import weakref
from collections import UserDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import memfit
from memfit import InexactAccumulation
from memfit.runtime.windows import Windows

CLASSES, WIDTH = 5, 3

Batch = dict[str, Tensor]


class Tagger(nn.Module):
    """Logits of each position that depend on the whole row up to there."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Parameter(torch.randn(7, WIDTH, generator=generator, dtype=torch.float64))
        self.out = nn.Parameter(torch.randn(WIDTH, CLASSES, generator=generator, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.matmul(self.embed[ids].cumsum(1).tanh(), self.out)


def token_batch(draw: Callable[[st.SearchStrategy[int]], int], rows: int, length: int) -> Batch:
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 7, (rows, length), generator=generator)
    labels = torch.randint(0, CLASSES, (rows, length), generator=generator)
    share = draw(st.sampled_from([0, 1, 3, 10]))
    labels[torch.randint(0, 10, (rows, length), generator=generator) < share] = -100
    return {"input_ids": ids, "labels": labels}


@st.composite
def token_loaders(draw: Any) -> list[Batch]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(2, 6)), min_size=1, max_size=9))
    return [token_batch(draw, rows, length) for rows, length in shapes]


def summed_and_counted(model: Tagger, batch: Batch, *, shifted: bool) -> tuple[Tensor, int]:
    """The sum of the losses of all labels that count, and how many they are: one label at a time."""
    logits = model(batch["input_ids"])
    total, number = logits.sum() * 0, 0
    for row, column in itertools.product(*map(range, batch["labels"].shape)):
        predicted_from = column - 1 if shifted else column
        label = int(batch["labels"][row, column])
        if label != -100 and predicted_from >= 0:
            total = total - logits[row, predicted_from].log_softmax(0)[label]
            number += 1
    return total, number


def mean_loss(model: Tagger, batch: Batch, *, shifted: bool) -> Tensor:
    """What people write: the mean of torch over the labels that count."""
    logits, labels = model(batch["input_ids"]), batch["labels"]
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def gradients_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@given(token_loaders(), st.integers(1, 5), st.booleans())
def test_the_weighted_gradients_of_ragged_micro_batches_are_those_of_the_whole_window(
    loader: list[Batch], steps: int, shifted: bool
) -> None:
    model = Tagger()
    name = "shifted_labels" if shifted else "labels"
    chunks = [loader[start : start + steps] for start in range(0, len(loader), steps)]
    source = iter(memfit.windows(loader, steps, name))
    for number, chunk in enumerate(chunks):
        by_hand = [summed_and_counted(model, batch, shifted=shifted) for batch in chunk]
        units = sum(counted for _, counted in by_hand)
        if units == 0:
            with pytest.raises(ValueError, match="count gave 0 for a whole window"):
                next(source)
            return
        window = next(source)
        weighted = [weight * mean_loss(model, batch, shifted=shifted) for batch, weight in window]
        expected = gradients_of(model, torch.stack([loss for loss, _ in by_hand]).sum() / units)
        assert_close(gradients_of(model, torch.stack(weighted).sum()), expected)
        assert window.count == units
        assert len(window) == len(weighted) == sum(counted > 0 for _, counted in by_hand)
        assert window.skipped == len(chunk) - len(window)
        assert window.is_last == (number == len(chunks) - 1)
        assert window.is_short == (len(chunk) < steps)
    assert next(source, None) is None


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 5), st.sampled_from(["rows", "sum"])
)
def test_the_gradient_of_a_window_of_rows_is_that_of_the_concatenated_batch(
    sizes: list[int], steps: int, name: str
) -> None:
    torch.manual_seed(sum(sizes))
    layer = nn.Linear(WIDTH, 1, dtype=torch.float64)
    loader = [torch.randn(size, WIDTH, dtype=torch.float64) for size in sizes]

    def loss_fn(rows: Tensor) -> Tensor:
        errors: Tensor = layer(rows).square()
        return errors.mean() if name == "rows" else errors.sum()

    for number, window in enumerate(memfit.windows(loader, steps, name)):
        whole = torch.cat(loader[number * steps : (number + 1) * steps])
        weighted = torch.stack([weight * loss_fn(micro_batch) for micro_batch, weight in window]).sum()
        assert_close(gradients_of(layer, weighted), gradients_of(layer, loss_fn(whole)))
        assert window.count == (len(whole) if name == "rows" else 1)


def test_the_short_last_window_is_not_scaled_down() -> None:
    loader = DataLoader(TensorDataset(torch.arange(18.0)[:, None]), batch_size=4)  # 4, 4, 4, 4, 2 rows
    *full, last = memfit.windows(loader, gradient_accumulation_steps=2)
    assert [window.weights for window in full] == [(0.5, 0.5), (0.5, 0.5)]
    assert last.weights == (1.0,)
    assert (last.is_last, last.is_short, last.count) == (True, True, 2)
    assert not any(window.is_last or window.is_short for window in full)


def test_a_function_counts_what_it_likes() -> None:
    loader = [
        {"x": torch.ones(2, 3), "lengths": torch.tensor([1, 2])},
        {"x": torch.ones(1, 3), "lengths": [5]},
    ]
    (window,) = memfit.windows(loader, 4, lambda batch: torch.as_tensor(batch["lengths"]).sum())
    assert window.weights == (3 / 8, 5 / 8)
    assert window.count == 8


def test_the_counter_sees_each_micro_batch_once() -> None:
    seen: list[int] = []

    def counter(batch: Tensor) -> float:
        seen.append(int(batch[0]))
        return 1.0

    list(memfit.windows([torch.tensor([i]) for i in range(7)], 3, counter))
    assert seen == list(range(7))


def test_a_loader_starts_anew_at_each_epoch_and_a_window_can_be_read_twice() -> None:
    windows = memfit.windows([torch.full((2,), float(i)) for i in range(3)], 2)
    first, second = list(windows), list(windows)
    assert [len(window) for window in first] == [len(window) for window in second] == [2, 1]
    assert [weight for _, weight in first[0]] == [weight for _, weight in first[0]] == [0.5, 0.5]


class Stream(IterableDataset[Tensor]):
    """A dataset without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor([float(i)]) for i in range(5))


def test_streams_without_a_length_work_and_have_none() -> None:
    windows = memfit.windows(DataLoader(Stream(), batch_size=1), 2)
    assert [(len(window), window.is_last) for window in windows] == [(2, False), (2, False), (1, True)]
    with pytest.raises(TypeError, match="has no len"):
        len(windows)
    assert [len(window) for window in memfit.windows(iter(Stream()), 3)] == [3, 2]


@given(st.integers(1, 40), st.integers(1, 12))
def test_the_length_is_the_number_of_windows(micro_batches: int, steps: int) -> None:
    windows = memfit.windows([torch.ones(1)] * micro_batches, steps)
    assert len(windows) == len(list(windows))


def test_no_more_is_fetched_than_a_window_and_one() -> None:
    fetched = 0

    def endless() -> Iterator[Tensor]:
        nonlocal fetched
        while True:
            fetched += 1
            yield torch.ones(1)

    source = iter(memfit.windows(endless(), 3))
    next(source)
    assert fetched == 4
    next(source)
    assert fetched == 7


def test_a_window_that_the_loop_let_go_is_not_kept_by_the_iterator() -> None:
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def loader() -> Iterator[Tensor]:
        for _ in range(6):
            alive.append(sum(ref() is not None for ref in kept))
            tensor = torch.ones(1)
            kept.append(weakref.ref(tensor))
            yield tensor
            del tensor

    for window in memfit.windows(loader(), 2):
        del window
    assert max(alive) == 2


@dataclass
class Example:
    """A batch as a dataclass."""

    x: Tensor
    labels: Tensor


def test_batches_of_any_nesting_count() -> None:
    label = torch.tensor([1, -100])
    loader: list[Any] = [
        {"x": torch.ones(2), "labels": label}, Example(torch.ones(2), label), UserDict(labels=label),
        defaultdict(list, {"deep": [{"labels": label}]}),
    ]  # fmt: skip
    (window,) = memfit.windows(loader, 4, "labels")
    assert window.weights == (0.25,) * 4


def test_an_object_that_may_hide_tensors_is_left_to_the_users_own_counter() -> None:
    class Graph:
        nodes = torch.ones(3, 2)

    (window,) = memfit.windows([Graph(), Graph()], 4, lambda graph: len(graph.nodes))
    assert window.weights == (0.5, 0.5)
    with pytest.raises(ValueError, match=r"micro-batch 0 of the loader: .*Graph.* holds no tensor"):
        list(memfit.windows([Graph()], 4))


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([ONE], 0), ValueError, "gradient_accumulation_steps is 0"),
        (([ONE], -2), ValueError, "gradient_accumulation_steps is -2"),
        (([ONE], 2.0), TypeError, "gradient_accumulation_steps is 2.0"),
        (([ONE], True), TypeError, "gradient_accumulation_steps is True"),
        (([ONE], None), TypeError, "gradient_accumulation_steps is None"),
        (([ONE], 4, "tokens"), ValueError, "count is 'tokens': give 'rows', 'labels'"),
        (([ONE], 4, "auto"), ValueError, "count is 'auto'"),
        ((5,), TypeError, "loader is a int"),
        ((torch.ones(4, 2),), TypeError, "loader is a Tensor"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        memfit.windows(*arguments)


@pytest.mark.parametrize(
    ("loader", "count", "error", "words"),
    [
        ([], "rows", ValueError, "yielded no micro-batch"),
        ([ONE, torch.ones(0, 3)], "rows", ValueError, r"micro-batch 1 .* is empty: batch has 0 rows"),
        ([{"x": torch.ones(0, 3)}], lambda _: 1, ValueError, r"micro-batch 0 .* batch\['x'\] has 0 rows"),
        ([ONE, "text"], "rows", TypeError, "micro-batch 1 .* is a str without any tensor"),
        ([{"a": [1, 2]}], lambda _: 1, TypeError, "micro-batch 0 .* is a dict without any tensor"),
        ([{"x": torch.ones(2), "y": torch.ones(3)}], "rows", InexactAccumulation, "micro-batch 0 .* rows"),
        ([{"x": ONE}], "labels", InexactAccumulation, "micro-batch 0 .* 0 leaves called labels"),
        ([{"labels": ONE}], "shifted_labels", InexactAccumulation, "micro-batch 0 .* cannot be shifted"),
        ([ONE], lambda _: float("nan"), ValueError, "count gave nan for micro-batch 0"),
        ([ONE, ONE], lambda _: -1, ValueError, "count gave -1 for micro-batch 0"),
        ([ONE], lambda _: float("inf"), ValueError, "count gave inf for micro-batch 0"),
        ([ONE], lambda _: None, TypeError, "count gave a NoneType for micro-batch 0"),
        ([ONE], lambda _: torch.ones(2), TypeError, "count gave a Tensor for micro-batch 0"),
        ([ONE] * 3, lambda _: 0, ValueError, r"count gave 0 for a whole window \(micro-batches 0 to 2"),
        ([ONE] * 3, lambda _: 1e308, ValueError, "count gave inf for a whole window"),
    ],
)
def test_bad_micro_batches_are_refused_by_name(
    loader: Any, count: Any, error: type[Exception], words: str
) -> None:
    windows: Windows[Any] = memfit.windows(loader, 4, count)
    with pytest.raises(error, match=words):
        list(windows)


def test_a_generator_that_was_used_up_is_refused() -> None:
    windows = memfit.windows(iter([ONE]), 4)
    list(windows)
    with pytest.raises(ValueError, match="used up before"):
        list(windows)


def test_a_loader_that_writes_over_what_it_gave_out_is_refused() -> None:
    memory = torch.zeros(2)

    def reusing() -> Iterator[Tensor]:
        for number in range(4):
            yield memory.fill_(number)

    with pytest.raises(RuntimeError, match="batch of micro-batch 0 was overwritten"):
        list(memfit.windows(reusing(), 2))


def test_an_error_of_the_users_counter_is_left_as_it_is() -> None:
    with pytest.raises(KeyError, match="lengths"):
        list(memfit.windows([{"x": ONE}], 4, lambda batch: batch["lengths"]))
