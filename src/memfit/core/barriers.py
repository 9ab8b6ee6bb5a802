"""Values that must be kept, because what would make them again is not there when they are wanted.

Note [Barriers]
 1. A *stretch* is a part of the forward whose parameters are in memory only while it runs, forward or
    backward: a module under ``fully_shard`` that reshards after its forward. It is named by the stretches
    that it lies in, outermost first; the empty name is the rest of the step, always there.
 2. In the backward a stretch is there from the first gradient of its outputs to the last one of its inputs.
    What asks for a replay is a save of the same stretch, or of one within it: then it is there. A save of any
    other stretch, or of none, comes too early.
 3. So a value that is read or saved outside of the stretch that made it is a barrier: it is kept.
    The rule holds for each reader, so it holds for any chain of replays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memfit.core.graph import StepGraph

Stretch = tuple[str, ...]


def is_there(made_in: Stretch, wanted_in: Stretch) -> bool:
    """Whether a value of one stretch can be made again for another. See Note [Barriers] 2."""
    return wanted_in[: len(made_in)] == made_in


def barriers(
    graph: StepGraph, op_stretches: Sequence[Stretch], save_stretches: Sequence[Stretch]
) -> set[int]:
    """The values that must be kept.

    Args:
        op_stretches: Where each op ran; those of the backward are not looked at.
        save_stretches: Where each save was packed.
    """
    wanted = [(value, op_stretches[i]) for i, op in enumerate(graph.ops) for value in op.inputs]
    wanted += [(save.value, stretch) for save, stretch in zip(graph.saves, save_stretches, strict=True)]
    made_in = {index: op_stretches[graph.values[index].producer] for index in graph.produced()}
    return {v for v, stretch in wanted if v in made_in and not is_there(made_in[v], stretch)}


def with_barriers(
    graph: StepGraph, op_stretches: Sequence[Stretch], save_stretches: Sequence[Stretch]
) -> StepGraph:
    """The graph in which no op is replayed that makes a value which must be kept."""
    kept = barriers(graph, op_stretches, save_stretches)
    ops = (op if kept.isdisjoint(op.outputs) else replace(op, is_replayable=False) for op in graph.ops)
    return replace(graph, ops=tuple(ops))
