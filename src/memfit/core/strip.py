"""A model as a strip of blocks, and how much of what each saves is kept or recomputed.

Note [Strip]
 1. A block is a call of a repeated module, as ``core/strategies.py`` finds them; what lies between two is one
    too. A model without repeated modules is cut where the outermost module changes.
 2. The share of a block is over the bytes that autograd saves in it. What is recomputed only because
    something recomputed is made from it counts no bytes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from memfit.core.graph import StepGraph
from memfit.core.plan import Plan, dropped_values
from memfit.core.strategies import repeated_blocks

KEPT, RECOMPUTED, PARTLY, NOTHING = "k", "r", "p", "."


@dataclass(frozen=True, slots=True)
class Block:
    """Some neighbouring ops of a forward, and what the modules they are in are called."""

    name: str
    ops: range


def blocks_of(graph: StepGraph) -> tuple[Block, ...]:
    """The forward as blocks, in order; every op is in one. See Note [Strip] 1."""
    repeated = next(iter(repeated_blocks(graph).values()), None)
    ranges = _by_module(graph) if repeated is None else _with_gaps(repeated, graph.forward_ops)
    return tuple(Block(_name(graph, ops), ops) for ops in ranges if len(ops))


def saved_bytes(graph: StepGraph, without: Container[int] = ()) -> tuple[int, ...]:
    """What autograd saves of the outputs of each forward op, in bytes, but for some values."""
    found = [0] * graph.forward_ops
    for value in {save.value for save in graph.saves}:
        producer = graph.values[value].producer
        if 0 <= producer < graph.forward_ops and value not in without:
            found[producer] += graph.size_bytes(value)
    return tuple(found)


def decisions(graph: StepGraph, plan: Plan) -> str:
    """One letter for each forward op.

    ``r`` it is recomputed; ``p`` too, and some of what is saved of it is kept all the same; ``k`` what is
    saved of it is kept; ``.`` neither.

    Raises:
        ValueError: The plan was made from another profile.
    """
    dropped = dropped_values(graph, plan)
    letters = []
    for op, kept_bytes in zip(graph.ops, saved_bytes(graph, dropped), strict=False):
        is_recomputed = not dropped.keys().isdisjoint(op.outputs)
        again = PARTLY if kept_bytes else RECOMPUTED
        letters.append(again if is_recomputed else KEPT if kept_bytes else NOTHING)
    return "".join(letters)


def recomputed_shares(graph: StepGraph, plan: Plan) -> tuple[float, ...]:
    """For each block, how much of the bytes saved in it is recomputed, from 0 to 1. See Note [Strip] 2.

    Raises:
        ValueError: The plan was made from another profile.
    """
    total, kept = saved_bytes(graph), saved_bytes(graph, dropped_values(graph, plan))
    found = []
    for block in blocks_of(graph):
        total_bytes, kept_bytes = (sum(sizes[op] for op in block.ops) for sizes in (total, kept))
        found.append(1 - kept_bytes / total_bytes if total_bytes else 0.0)
    return tuple(found)


def _with_gaps(blocks: Iterable[range], ops: int) -> Iterator[range]:
    """The blocks and what lies between them, before and after."""
    end = 0
    for block in blocks:
        yield range(end, block.start)
        yield block
        end = block.stop
    yield range(end, ops)


def _by_module(graph: StepGraph) -> Iterator[range]:
    """Stretches in one outermost module."""
    start = 0
    frames = (op.key.frame for op in graph.ops[: graph.forward_ops])
    for _, group in groupby(frames, key=lambda frame: _module(frame).partition(".")[0]):
        length = len(list(group))
        yield range(start, start + length)
        start += length


def _module(frame: str) -> str:
    """The module of a call."""
    return frame.partition("#")[0]


def _name(graph: StepGraph, ops: range) -> str:
    """The one module that all ops are in, or the first and the last of those they are in."""
    paths = [_module(graph.ops[op].key.frame) or "loss" for op in ops]
    common: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    is_one_module = len(common) > 1 or len(set(paths)) == 1
    return ".".join(common) if is_one_module else " … ".join(dict.fromkeys((paths[0], paths[-1])))
