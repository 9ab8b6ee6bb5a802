"""Splitting nested batches along their rows."""

from __future__ import annotations

import enum
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from memfit.errors import InexactAccumulation
from memfit.runtime.batch import map_tensors, rows_of, split, tensors_of

ROWS = 4


class Pair(NamedTuple):
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    inputs: Tensor
    scale: float = 2.0


@dataclass
class Counted:
    """A dataclass whose construction does more than store."""

    inputs: Tensor
    built: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.built += 1
        self.inputs = self.inputs + 1


class Kind(enum.Enum):
    TRAIN = 1


class ReadOnly(Mapping[str, Tensor]):
    """A mapping that cannot be constructed from a dict alone."""

    def __init__(self, store: dict[str, Tensor], name: str) -> None:
        self.store, self.name = store, name

    def __getitem__(self, key: str) -> Tensor:
        return self.store[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


def rows(*shape: int) -> Tensor:
    """Returns a tensor of which every element is different."""
    return torch.arange(float(torch.Size((ROWS, *shape)).numel())).view(ROWS, *shape)


NESTINGS = {
    "tensor": rows(2),
    "dict": {"a": rows(2), "b": rows()},
    "ordered": OrderedDict(b=rows(2), a=rows()),
    "default": defaultdict(rows, {"a": rows(2)}),
    "list": [rows(2), rows(3)],
    "tuple": (rows(2), {"a": [rows()]}),
    "named tuple": Pair(rows(2), rows()),
    "frozen dataclass": Frozen(rows(2)),
    "dataclass": Counted(rows(2)),
    "user dict": UserDict({"a": rows(2)}),
    "mapping proxy": MappingProxyType({"a": rows(2)}),
    "batch encoding": BatchEncoding({"input_ids": rows(3), "attention_mask": rows(3)}),
    "model output": BaseModelOutput(last_hidden_state=rows(2, 3)),
    "constants": {
        "a": rows(2),
        "b": 0.5,
        "c": "text",
        "d": None,
        "e": True,
        "f": Kind.TRAIN,
        "g": (None, None),
    },
    "torch constants": [rows(2), torch.float32, torch.device("cpu"), torch.Size((7, 7)), []],
}


@pytest.mark.parametrize("batch", NESTINGS.values(), ids=NESTINGS.keys())
def test_parts_have_the_type_of_the_whole_and_their_tensors_are_its_views(batch: Any) -> None:
    whole = list(tensors_of(batch))
    parts = split(batch, [3, 1])
    assert rows_of(batch) == ROWS
    assert [rows_of(part) for part in parts] == [3, 1]
    for part in parts:
        assert type(part) is type(batch)
        assert [path for path, _ in tensors_of(part)] == [path for path, _ in whole]
    for (_, tensor), (_, first), (_, second) in zip(whole, *map(tensors_of, parts), strict=True):
        assert torch.equal(torch.cat([first, second]), tensor)
        assert first.untyped_storage()._cdata == second.untyped_storage()._cdata
        assert first.untyped_storage()._cdata == tensor.untyped_storage()._cdata


@pytest.mark.parametrize("batch", NESTINGS.values(), ids=NESTINGS.keys())
def test_splitting_leaves_the_batch_of_the_caller_as_it_was(batch: Any) -> None:
    before = [(path, id(tensor), tensor.shape) for path, tensor in tensors_of(batch)]
    split(batch, [1, 1, 2])
    map_tensors(batch, torch.zeros_like)
    assert [(path, id(tensor), tensor.shape) for path, tensor in tensors_of(batch)] == before


@pytest.mark.parametrize("batch", NESTINGS.values(), ids=NESTINGS.keys())
def test_mapping_tensors_changes_them_and_nothing_else(batch: Any) -> None:
    mapped = map_tensors(batch, lambda tensor: tensor + 1)
    assert type(mapped) is type(batch)
    for (path, old), (mapped_path, new) in zip(tensors_of(batch), tensors_of(mapped), strict=True):
        assert path == mapped_path
        assert torch.equal(new, old + 1)


def test_constants_reach_every_part() -> None:
    batch = NESTINGS["constants"]
    assert isinstance(batch, dict)
    for part in split(batch, [2, 2]):
        assert {key: part[key] for key in "bcdefg"} == {key: batch[key] for key in "bcdefg"}


def test_a_list_as_long_as_the_batch_is_split_by_entries() -> None:
    batch = {"x": rows(), "text": ["a", "b", "c", "d"], "ids": (1, 2, 3, 4), "ragged": [[1], [2, 3], [], [4]]}
    first, second = split(batch, [3, 1])
    assert (first["text"], first["ids"], first["ragged"]) == (["a", "b", "c"], (1, 2, 3), [[1], [2, 3], []])
    assert (second["text"], second["ids"], second["ragged"]) == (["d"], (4,), [[4]])


def test_entries_of_rows_are_not_split_again_where_they_are_as_long_as_the_batch() -> None:
    batch = [rows(), [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]]
    assert split(batch, [1, 3])[0][1] == [[1, 2, 3, 4]]


def test_a_batch_encoding_keeps_its_attributes() -> None:
    batch = BatchEncoding({"input_ids": rows(3)}, n_sequences=1)
    part = split(batch, [2, 2])[1]
    assert part.n_sequences == 1
    assert torch.equal(part.input_ids, rows(3)[2:])


def test_a_model_output_is_split_in_its_attributes_too() -> None:
    part = split(NESTINGS["model output"], [2, 2])[0]
    assert part.last_hidden_state.shape == part["last_hidden_state"].shape == (2, 2, 3)


def test_a_dataclass_is_not_initialised_again() -> None:
    part = split(Counted(rows()), [2, 2])[0]
    assert part.built == 1
    assert torch.equal(part.inputs, rows()[:2] + 1)


def test_a_default_factory_survives() -> None:
    assert split(NESTINGS["default"], [2, 2])[0]["missing"].shape == (ROWS,)


def test_gradients_reach_the_whole_through_its_parts() -> None:
    whole = rows(2).requires_grad_()
    sum(part["x"].sum() * (i + 1) for i, part in enumerate(split({"x": whole}, [3, 1]))).backward()
    assert whole.grad is not None
    assert whole.grad[:, 0].tolist() == [1, 1, 1, 2]


def test_what_holds_no_tensor_is_mapped_to_itself() -> None:
    constants, custom = {"a": [1, 2]}, SimpleNamespace(x=1)
    mapped = map_tensors([constants, custom, rows()], torch.zeros_like)
    assert mapped[0] is constants
    assert mapped[1] is custom


@pytest.mark.parametrize(
    "batch", [SimpleNamespace(x=1), {"a": rows(), "b": torch.ones(9)}, torch.tensor(1.0), None]
)
def test_one_part_is_the_batch_itself_whatever_it_is(batch: object) -> None:
    assert split(batch, [ROWS])[0] is batch
    assert len(split(batch, [ROWS])) == 1


REFUSALS: dict[str, tuple[object, str, str]] = {
    "another number of rows": (
        {"pixel_values": [torch.ones(7, 2)], "labels": rows(), "ids": rows()},
        "batch['pixel_values'][0]",
        "batch['pixel_values'][0] has 7 rows where batch['labels'] has 4, so the batch cannot be split by "
        "rows: give it 4 rows, or close over it in loss_fn if it belongs to every row",
    ),
    "the first is taken as right where two disagree": (
        Pair(rows(), torch.ones(1, 4)),
        "batch.labels",
        "batch.labels has 1 rows where batch.inputs has 4",
    ),
    "no dimension": (
        {"x": rows(), "weight": torch.tensor(0.5)},
        "batch['weight']",
        "batch['weight'] has no rows (it is a 0-dim tensor): "
        "pass it as a Python number or close over it in loss_fn",
    ),
    "custom object": (
        [rows(), {"meta": SimpleNamespace(x=1)}],
        "batch[1]['meta']",
        "batch[1]['meta'] is of type SimpleNamespace, which may hold anything: pass its tensors in a dict, "
        "list, tuple or dataclass, or close over it in loss_fn",
    ),
    "custom objects by row": (
        [rows(), [object()] * ROWS],
        "batch[1][0]",
        "batch[1][0] is of type object, which may",
    ),
    "list of another length": (
        {"x": rows(), "size": (224, 224)},
        "batch['size']",
        "batch['size'] is a tuple of 2 plain values where the batch has 4 rows: give it one entry per row",
    ),
    "sparse": ([rows(), rows(2).to_sparse()], "batch[1]", "batch[1] is a sparse_coo tensor"),
    "nested": (
        [rows(), torch.nested.nested_tensor([torch.ones(n) for n in range(ROWS)], layout=torch.jagged)],
        "batch[1]",
        "batch[1] is a nested tensor, of which no rows can be viewed: pass a dense, padded tensor and a mask",
    ),
    "packed": (
        {"x": pack_sequence([torch.ones(3), torch.ones(1)])},
        "batch['x']",
        "batch['x'] is a PackedSequence, which mixes rows and time steps: pass the padded tensor",
    ),
    "mapping that cannot be built": (ReadOnly({"a": rows()}, "n"), "batch", "batch cannot be split: "),
    "a class": ([rows(), Frozen], "batch[1]", "batch[1] is of type type, which may hold anything"),
}


@pytest.mark.parametrize(("batch", "owner", "words"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_be_split_without_guessing_is_refused_by_name(
    batch: object, owner: str, words: str
) -> None:
    with pytest.raises(InexactAccumulation) as caught:
        split(batch, [2, 2])
    assert caught.value.owner == owner
    assert words in str(caught.value)


@pytest.mark.parametrize("batch", [{}, [], {"a": 1}, None, {"loss": torch.tensor(1.0)}])
def test_a_batch_without_rows_to_count_is_misuse(batch: object) -> None:
    with pytest.raises(
        ValueError, match="holds no tensor with rows, so there is nothing to split: pass the ten"
    ):
        rows_of(batch)


def test_a_batch_of_zero_rows_is_misuse() -> None:
    with pytest.raises(ValueError, match=r"batch\['x'\] has 0 rows: leave empty batches out"):
        rows_of({"x": torch.empty(0, 3)})


@pytest.mark.parametrize("sizes", [[], [0, 4], [5, -1]])
def test_parts_without_rows_are_misuse(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="each part needs at least 1 row"):
        split(rows(), sizes)


def test_sizes_that_do_not_add_up_are_misuse() -> None:
    with pytest.raises(ValueError, match=r"the sizes \[2, 3\] add up to 5 rows, and the batch has 4"):
        split(rows(), [2, 3])


def batches(n_rows: int) -> st.SearchStrategy[Any]:
    """Draws nestings of tensors with ``n_rows`` rows, at least one, and constants."""
    tensor = st.lists(st.integers(0, 3), max_size=2).map(lambda shape: torch.rand(n_rows, *shape))
    leaf = tensor | st.none() | st.integers() | st.text(max_size=3)
    named = st.dictionaries(st.text(max_size=3), leaf, max_size=3)
    tree = st.recursive(
        leaf, lambda inner: named | st.tuples(tensor, inner) | inner.map(Frozen), max_leaves=6
    )
    return st.tuples(tensor, tree)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
        lambda n: st.tuples(st.just(n), batches(sum(n)))
    )
)
def test_the_parts_of_any_batch_put_together_are_the_batch(drawn: tuple[list[int], Any]) -> None:
    sizes, batch = drawn
    parts = split(batch, sizes)
    assert [rows_of(part) for part in parts] == sizes
    columns = zip(*(tensors_of(part) for part in parts), strict=True)
    for (path, whole), column in zip(tensors_of(batch), columns, strict=True):
        assert {part_path for part_path, _ in column} == {path}
        assert torch.equal(torch.cat([piece for _, piece in column]), whole)
