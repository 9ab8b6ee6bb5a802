"""What ``torch.utils.checkpoint`` costs: the one simulation, with regions that run again as a whole.

Note [Regions]
 1. A *region* is one call under ``torch.utils.checkpoint`` (not reentrant): a run of forward ops. Nothing
    that is saved in it is held. What it reads from outside is held from its start on, and a generator state
    if it draws random numbers.
 2. When the first of its saves is unpacked, its stretch of the log runs again on storages of its own, up to
    its last save (early stop): ops, saves and frees alike. Then the program of the region ends, and what it
    saved is held until released. With the last release the region is done, and lets go of what it held.
 3. Selective checkpointing holds the outputs of its *cached* ops from the forward on. Run again, the region
    takes them instead of running the op; those beyond the early stop are held until the region is done.
 4. A save packed between two regions belongs to the one with its frame. The graph tells no frame, but the op
    of the backward that follows an unpack has that of what was unpacked. Where it does not tell, what the op
    before has made is taken for its save, and anything else for one of the op after.
 5. Three things are left out, all to the good of the regions: a generator state where nothing random runs
    (5 kB on a CPU), arguments that no op reads, and saves of parameters, which the graph does not have and
    which may put off the early stop (only where the last op saves nothing but frozen weights).

Source: ``torch/utils/checkpoint.py`` (``_checkpoint_hook``, ``_recomputation_hook``,
``_CachingTorchDispatchMode``), as of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from memfit.core.graph import LogEntry, LogKind, StepGraph
from memfit.core.timeline import Run, Walk, play


class Region(NamedTuple):
    """Forward ops under one ``torch.utils.checkpoint``, and which of them are cached."""

    ops: range
    cached: frozenset[int] = frozenset()


def run_regions(graph: StepGraph, regions: Sequence[Region], *, alignment_bytes: int = 1) -> Run:
    """Simulates one micro-batch with some of its ops under ``torch.utils.checkpoint``.

    Args:
        regions: In the order of the forward; none shares an op with another.

    Cost: linear in the log and the replayed ops.
    """
    return play(_RegionWalk(graph, regions, alignment_bytes))


def can_be_region(graph: StepGraph, ops: range) -> bool:
    """Whether torch allows a region: it refuses one of which an argument is written to later."""
    return not any(graph.values[value].is_overwritten for value in _arguments(graph, ops))


def _arguments(graph: StepGraph, ops: range) -> set[int]:
    """The values a region reads from outside."""
    read = {value for op in ops for value in graph.ops[op].inputs}
    return {value for value in read if graph.values[value].producer not in ops}


def _save_homes(graph: StepGraph, regions: Sequence[Region]) -> list[int]:
    """The region of each save, -1 where it is in none. See Note [Regions] 4."""
    region_of = {op: number for number, region in enumerate(regions) for op in region.ops}
    frames = _save_frames(graph)
    homes = [-1] * len(graph.saves)
    before, waiting = -1, list[int]()
    for kind, item in graph.log:
        if kind == LogKind.PACK:
            waiting.append(item)
        elif kind == LogKind.OP:
            for save in waiting:
                is_earlier = before >= 0 and _is_of_earlier(graph, save, frames.get(save), before, item)
                homes[save] = region_of.get(before if is_earlier else item, -1)
            before, waiting = item, []
    return homes


def _is_of_earlier(graph: StepGraph, save: int, frame: str | None, before: int, after: int) -> bool:
    """Whether a save packed between two ops is of the former; by its frame if that tells."""
    earlier, later = graph.ops[before].key.frame, graph.ops[after].key.frame
    if earlier != later and frame in (earlier, later):
        return frame == earlier
    return graph.values[graph.saves[save].value].producer == before


def _save_frames(graph: StepGraph) -> dict[int, str]:
    """The frame in which each save was packed, as far as the backward tells."""
    frames: dict[int, str] = {}
    unpacked: list[int] = []
    for kind, item in graph.log:
        if kind == LogKind.UNPACK:
            unpacked.append(item)
        elif kind == LogKind.OP:
            frames.update(dict.fromkeys(unpacked, graph.ops[item].key.frame))
            unpacked = []
    return frames


class _State:
    """What one region needs and holds in the course of a run."""

    def __init__(self, graph: StepGraph, region: Region) -> None:
        self.region = region
        self.stretch: list[LogEntry] = []
        self.unreleased = 0
        self.is_open = self.is_made = False
        self.held = [graph.values[value].storage for value in sorted(_arguments(graph, region.ops))]
        self.seed_bytes = max(graph.ops[op].seed_bytes for op in region.ops)
        self.cached: dict[int, list[int]] = {}


class _RegionWalk(Walk):
    """The reference counting of Note [Regions]: saves of a region are not held but made again with it."""

    def __init__(self, graph: StepGraph, regions: Sequence[Region], alignment_bytes: int) -> None:
        super().__init__(graph, {}, alignment_bytes)
        self.homes = _save_homes(graph, regions)
        self.states = [_State(graph, region) for region in regions]
        self.state_of = {op: state for state in self.states for op in state.region.ops}
        self.copies: dict[int, int] = {}
        self.released: set[int] = set()
        self._read_stretches()

    def _read_stretches(self) -> None:
        """The log of each region, from its first entry to its last save."""
        made_in = {
            storage: state for op, state in self.state_of.items() for storage in self.graph.ops[op].allocates
        }
        for entry in self.graph.log:
            kind, item = entry
            if kind == LogKind.OP and item in self.state_of:
                self.state_of[item].stretch.append(entry)
            elif kind == LogKind.PACK and self.homes[item] >= 0:
                self.states[self.homes[item]].stretch.append(entry)
                self.states[self.homes[item]].unreleased += 1
            elif kind == LogKind.FREE and item in made_in:
                made_in[item].stretch.append(entry)
        for state in self.states:
            while state.stretch and state.stretch[-1].kind != LogKind.PACK:
                state.stretch.pop()

    # ---- the forward --------------------------------------------------------------------------------

    def run_op(self, index: int) -> None:
        """An op of the program runs; the first of a region takes hold of its arguments."""
        state = self.state_of.get(index)
        if state is not None and state.unreleased and index == state.region.ops.start:
            state.is_open = True
            self._hold(state.held)
            self.activations += state.seed_bytes
        super().run_op(index)
        if state is not None and state.is_open and index in state.region.cached:
            state.cached[index] = [self.graph.values[v].storage for v in self.graph.ops[index].outputs]
            self._hold(state.cached[index])

    def _hold(self, storages: Iterable[int]) -> None:
        """One holder more for each."""
        for storage in storages:
            self.holders[storage] += 1

    def pack(self, save: int) -> None:
        """A save of a region holds nothing."""
        if self.homes[save] < 0:
            super().pack(save)

    # ---- the backward -------------------------------------------------------------------------------

    def unpack(self, save: int) -> None:
        """The first save of a region that is needed makes all of them again."""
        if self.homes[save] >= 0:
            state = self.states[self.homes[save]]
            if not state.is_made:
                state.is_made = True
                self._run_again(state)

    def release(self, save: int) -> None:
        """The backward is done with a save, and with the last one of a region also with the region."""
        if self.homes[save] < 0:
            super().release(save)
            return
        self.released.add(save)
        if save in self.copies:
            self._release(self.copies[save])
        state = self.states[self.homes[save]]
        state.unreleased -= 1
        if state.is_open and not state.unreleased:
            state.is_open = False
            self.activations -= state.seed_bytes
            for storages in (state.held, *state.cached.values()):
                for storage in storages:
                    self._release(storage)

    def _run_again(self, state: _State) -> None:
        """Replays the stretch of a region. ``named`` is what its program holds: each storage and its copy."""
        named: dict[int, int] = {}
        for kind, item in state.stretch:
            if kind == LogKind.OP and item in state.cached:
                named.update((storage, storage) for storage in state.cached.pop(item))
            elif kind == LogKind.OP:
                named.update((storage, self._copy(storage)) for storage in self.graph.ops[item].allocates)
                self.replayed_ops.append(item)
                # The stream of random numbers is put aside while the region draws its own once more.
                self._note(item, True, self.graph.ops[item].temporary_bytes + state.seed_bytes)
            elif kind == LogKind.PACK and item not in self.released:
                storage = self.graph.values[self.graph.saves[item].value].storage
                self.copies[item] = named.get(storage, storage)
                self._hold([self.copies[item]])
            elif kind == LogKind.FREE and item in named:
                self._release(named.pop(item))
        for storage in named.values():
            self._release(storage)

    def _copy(self, storage: int) -> int:
        """A new storage as large as another, held once."""
        self.sizes.append(self.sizes[storage])
        self.holders.append(1)
        self.named.append(False)
        self._count(len(self.sizes) - 1, 1)
        return len(self.sizes) - 1

    def _count(self, storage: int, sign: int) -> None:
        """Adds or removes a storage from its category; copies are replayed bytes."""
        if storage < len(self.graph.storages):
            super()._count(storage, sign)
        else:
            self.replayed += sign * self.sizes[storage]
