"""What a plan will reserve on CUDA: the blocks of whole steps, in order, through the caching allocator.

Note [Blocks of a step]
 1. ``core/timeline.py`` says which blocks come and go in a micro-batch; nothing is decided here. An op's
    outputs come before its temporaries, which are one block, and go with the op.
 2. A run begins with parameters and batch. Each step is its micro-batches, of which two show all there
    is to see; then the update; then the gradients go, as ``zero_grad()`` lets them. The optimizer's state
    comes with the first update, into what the activations left, so that the second step finds another
    memory than the first.
 3. Gradients that the recorded micro-batch found there come at the start of each step.
 4. Steps are repeated until one after the first reserves nothing new.
 5. In two passes the loss of all outputs comes first; then their gradients are there, as one block.
 6. Left out: what measuring and verifying a plan leave in the cache, and other streams.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import NamedTuple

from memfit.core.allocator import CachingAllocator, Memory
from memfit.core.graph import Level, Profile, StepGraph
from memfit.core.plan import Plan, dropped_values
from memfit.core.timeline import BlockKind, Walk, old_state_bytes, play

_MOST_STEPS = 5


class Move(NamedTuple):
    """A block comes (positive size) or goes (negative)."""

    block: Hashable
    size_bytes: int


class Recorder(Walk):
    """A walk that writes down every block that comes and goes."""

    def __init__(self, graph: StepGraph, levels: Mapping[int, Level], alignment_bytes: int) -> None:
        super().__init__(graph, levels, alignment_bytes)
        self.moves: list[Move] = []
        # The blocks of each replayed value, newest last: a replay may make what is there already.
        self._blocks: defaultdict[int, list[Hashable]] = defaultdict(list)

    def _moved(self, kind: BlockKind, item: int, size_bytes: int) -> None:
        block: Hashable = kind, item
        if kind is BlockKind.REPLAYED:
            # Sizes of nothing have no sign; they are no blocks either.
            if size_bytes > 0:
                block = kind, item, len(self.moves)
                self._blocks[item].append(block)
            elif size_bytes < 0:
                block = self._blocks[item].pop()
        if size_bytes:
            self.moves.append(Move(block, size_bytes))

    def _note(self, op: int, is_replay: bool, temporary_bytes: int) -> None:
        super()._note(op, is_replay, temporary_bytes)
        self._moved(BlockKind.TEMPORARY, op, temporary_bytes)
        self._moved(BlockKind.TEMPORARY, op, -temporary_bytes)

    def _took_over(self, old: int, new: int) -> None:
        if self._blocks[old]:
            self._blocks[new].append(self._blocks[old].pop())


def moves(graph: StepGraph, dropped: Mapping[int, Level], *, alignment_bytes: int = 1) -> list[Move]:
    """Every block that comes and goes in one micro-batch, in order; what persists does not go.

    The sum of the sizes up to a moment is what :func:`memfit.core.timeline.run` says of that moment.
    """
    walk = Recorder(graph, dropped, alignment_bytes)
    play(walk)
    return walk.moves


def predict_cuda_memory(profile: Profile, plan: Plan, *, expandable_segments: bool = False) -> Memory:
    """The peaks that CUDA's caching allocator will show when a plan is run. See Note [Blocks of a step].

    Args:
        expandable_segments: Whether ``PYTORCH_ALLOC_CONF=expandable_segments:True`` will be set.

    Raises:
        ValueError: The plan is not of this profile.
    """
    graph = profile.graph(plan.micro_batch_size)
    run = _TrainingRun(profile, graph, CachingAllocator(expandable_segments=expandable_segments))
    micro_batch = moves(graph, dropped_values(graph, plan))
    twice = plan.gradient_accumulation_steps > 1 and graph.gradients_resident
    for step in range(_MOST_STEPS):
        before_bytes = run.allocator.reserved_bytes
        run.step([micro_batch] * (2 if twice else 1))
        if step and run.allocator.reserved_bytes == before_bytes:  # the first has no state yet
            break
    return run.allocator.peak


class _TrainingRun:
    """Steps in a row on one allocator."""

    def __init__(self, profile: Profile, graph: StepGraph, allocator: CachingAllocator) -> None:
        residents = profile.residents
        self.allocator = allocator
        self._gradients = list(_blocks(*residents.resident_gradients))
        self._rounded = list(_blocks(residents.gradients_bytes, residents.gradient_sizes))
        self._updates = [moves(update, {}) for update in (profile.first_update, profile.update)]
        self._gradients_resident = graph.gradients_resident
        self._held_bytes = graph.held_bytes
        self._between = moves(profile.loss_of_all, {}) if graph.held_bytes else []
        for size_bytes in (
            profile.unexplained_bytes,
            *_blocks(residents.parameters_bytes, residents.parameter_sizes),
            *_blocks(residents.batch_bytes, residents.batch_sizes),
            old_state_bytes(profile),
        ):
            allocator.allocate(size_bytes)

    def step(self, micro_batches: Iterable[list[Move]]) -> None:
        """Every micro-batch, the update, and the end of the gradients."""
        allocate, free = self.allocator.allocate, self.allocator.free
        self._play(self._between)
        held = [allocate(self._held_bytes)] if self._held_bytes else []
        gradients = [allocate(size) for size in self._gradients] if self._gradients_resident else []
        for micro_batch in micro_batches:
            gradients.extend(self._play(micro_batch))
        for handle in held:
            free(handle)
        if self._gradients_resident and self._rounded != self._gradients:
            gradients = list(self._round(gradients))
        self._play(self._updates[0])  # what it leaves is the optimizer's state, which stays
        del self._updates[:-1]
        for handle in gradients:
            free(handle)

    def _round(self, sums: Iterable[int]) -> Iterator[int]:
        """The gradients in the type that the optimizer finds: each is made before its sum goes."""
        for size_bytes, handle in zip_longest(self._rounded, sums):
            if size_bytes is not None:
                yield self.allocator.allocate(size_bytes)
            if handle is not None:
                self.allocator.free(handle)

    def _play(self, micro_batch: Iterable[Move]) -> list[int]:
        """Plays the moves of a micro-batch; returns what is left."""
        live: dict[Hashable, int] = {}
        for block, size_bytes in micro_batch:
            if size_bytes > 0:
                live[block] = self.allocator.allocate(size_bytes)
            else:
                self.allocator.free(live.pop(block))
        return list(live.values())


def _blocks(total_bytes: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The blocks that are known, or one for all."""
    return sizes or (total_bytes,)
