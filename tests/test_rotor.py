"""The dynamic program of the block-level rival, against every schedule there is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # last: it has a pages.py too
rotor: Any = importlib.import_module("rotor")
peer_ways: Any = importlib.import_module("peer_ways")

PRECISE = 10**6  # more slots than any memory here has bytes: nothing is rounded


def every_schedule(first: int, last: int) -> Iterator[tuple[Any, ...]]:
    """All ways to process a part of a chain, whose last block is kept."""
    if first == last:
        yield (first,)
        return
    for rest in every_schedule(first + 1, last):
        yield (first, *rest)
    for end in range(first, last):
        for inner, rest in product(every_schedule(first, end), every_schedule(end + 1, last)):
            yield (inner, *rest)


def walk(chain: list[Any], schedule: tuple[Any, ...], base: int, peaks: list[int]) -> float:
    """Runs a schedule on paper: notes the bytes alive at each moment, returns the seconds run again."""
    again_s, gradient = 0.0, chain[rotor.members(schedule)[-1]].output_bytes
    levels = [base]
    for item in schedule:
        blocks = [chain[i] for i in rotor.members((item,))]
        if isinstance(item, tuple):
            at = levels[-1]
            for block in blocks:
                peaks.append(at + gradient + block.bare_bytes)
                at = levels[-1] + block.output_bytes
            levels.append(at)
        else:
            peaks.append(levels[-1] + gradient + blocks[0].forward_bytes)
            levels.append(levels[-1] + blocks[0].saved_bytes)
    for item in reversed(schedule):
        after = levels.pop()
        if isinstance(item, tuple):
            again_s += sum(chain[i].forward_s for i in rotor.members(item))
            again_s += walk(chain, item, levels[-1], peaks)
        else:
            peaks.append(after + chain[item].output_bytes + chain[item].backward_bytes)
    return again_s


sizes = st.integers(1, 30)
chains = st.lists(
    st.builds(
        lambda f, o, s, p, b, r, g: rotor.Block(float(f), o, o + s, o + s + p, o + b, r, g),
        sizes, sizes, sizes, sizes, sizes, sizes, st.just(0),
    ),
    min_size=2,
    max_size=4,
)  # fmt: skip


def judged(chain: list[Any], schedule: tuple[Any, ...]) -> tuple[int, float]:
    """Peak and seconds."""
    peaks: list[int] = []
    again_s = walk(chain, schedule, 0, peaks)
    return max(peaks), again_s


@settings(deadline=None, max_examples=60)
@given(chains, st.floats(0, 1))
def test_no_schedule_within_the_memory_recomputes_less(chain: list[Any], share: float) -> None:
    every = {schedule: judged(chain, schedule) for schedule in every_schedule(0, len(chain) - 1)}
    low, high = min(peak for peak, _ in every.values()), max(peak for peak, _ in every.values())
    memory = round(low + share * (high - low))
    found = rotor.fastest(chain, memory, PRECISE)
    assert found is not None
    assert every[found][0] <= memory
    assert rotor.recomputed_s(chain, found) == every[found][1]
    assert every[found][1] == min(again_s for peak, again_s in every.values() if peak <= memory)
    assert rotor.fastest(chain, low - 1, PRECISE) is None


def test_a_range_stays_within_its_list() -> None:
    chain = [rotor.Block(1.0, 1, 9, 9, 2, 1, group) for group in (0, 0, 1, 1)]
    for memory in range(60):
        for item in rotor.fastest(chain, memory, PRECISE) or ():
            if isinstance(item, tuple):
                assert len({chain[i].group for i in rotor.members(item)}) == 1


class Tower(nn.Module):
    """Two lists of blocks, the second fed by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleList(self._block() for _ in range(3))
        self.two = nn.ModuleList(self._block() for _ in range(2))

    def _block(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, 8] -> []"""
        for block in [*self.one, *self.two]:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("schedule", [(0, 1, 2, (3,), 4), ((0, 1), 2, (3, 4)), (((0,), 1, (2,)), (3,), 4)])
def test_a_schedule_computes_the_gradients_of_the_plain_step_and_is_undone(schedule: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    tower, x, found = Tower(), torch.randn(5, 8), []
    names = [name for name, _ in tower.named_parameters()]
    for now in ((0, 1, 2, 3, 4), schedule):
        tower.zero_grad()
        torch.manual_seed(1)
        with peer_ways.scheduled(tower, ("one", "two"), now):
            tower(x).backward()
        found.append([p.grad for p in tower.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert [name for name, _ in tower.named_parameters()] == names


def test_the_measured_blocks_of_a_chain_are_the_chain() -> None:
    tower, x = Tower(), torch.randn(5, 8)
    found = peer_ways.measured_blocks(tower, ("one", "two"), lambda: tower(x))
    assert [block.group for block in found] == [0, 0, 0, 1, 1, 2]
    assert all(block.output_bytes == 5 * 8 * 4 for block in found[:-1])
    assert all(block.saved_bytes > 5 * 32 * 4 for block in found[:-1])
