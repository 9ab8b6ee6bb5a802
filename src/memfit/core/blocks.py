"""Every block of memory that comes and goes in a whole step, with what it is for and whose it is.

Note [Blocks of a whole step]
 1. ``core/unrolled.py`` says which parts a step has, ``core/timeline.py`` which blocks come and go in each.
    Nothing is decided here: the live blocks of a category sum to what the timeline says at each moment.
 2. Before the step there are parameters, batch, the optimizer's state, and what a measured run showed above
    the prediction.
 3. What a micro-batch leaves are gradients. Where the timeline has another amount of them while the next part
    runs (sums in another type, say), they make room for blocks of that amount.
 4. At the end the gradients go, as ``zero_grad()`` lets them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from memfit.core.graph import OpKey, Profile, in_blocks
from memfit.core.reserved import Recorder
from memfit.core.timeline import BlockKind, old_state_bytes, play
from memfit.core.unrolled import LOSS_OF_ALL, UPDATE, Part, Unrolled

PARAMETER: Final = "parameter"
GRADIENT: Final = "gradient"
OPTIMIZER_STATE: Final = "optimizer_state"
BATCH: Final = "input"
ACTIVATION: Final = "activation"
RECOMPUTED: Final = "recomputed_activation"
TEMPORARY: Final = "temporary"
BEFORE: Final = "before the step"
_END: Final = "end of the step"


class Place(NamedTuple):
    """Where in the step something happens: the part, the phase of it, and the call site."""

    part: str
    phase: str
    key: OpKey


class BlockMove(NamedTuple):
    """A block comes (positive size) or goes (negative): which one, what it is for, and who does it."""

    block: int
    size_bytes: int
    category: str
    place: Place


class _Told(NamedTuple):
    """A block that comes or goes in one part, by its name there."""

    block: Hashable
    size_bytes: int
    category: str
    place: Place


class _Teller(Recorder):
    """A walk through one part that also writes down what each block is for, and which op runs."""

    def __init__(self, part: Part, alignment_bytes: int) -> None:
        super().__init__(part.graph, part.dropped, alignment_bytes)
        self._part = part.name
        self._persisting = OPTIMIZER_STATE if part.name == UPDATE else GRADIENT
        self._place = Place(part.name, part.name, OpKey("", part.name, 0))
        self.told: list[_Told] = []

    def run_op(self, index: int) -> None:
        phase = "forward" if index < self.graph.forward_ops else "backward"
        self._place = Place(self._part, self._part if self._is_whole else phase, self.graph.ops[index].key)
        super().run_op(index)

    def _replay(self, index: int) -> None:
        self._place = Place(self._part, "recompute", self.graph.ops[index].key)
        super()._replay(index)

    @property
    def _is_whole(self) -> bool:
        """Whether the part has no phases."""
        return self._part in (LOSS_OF_ALL, UPDATE)

    def _moved(self, kind: BlockKind, item: int, size_bytes: int) -> None:
        before = len(self.moves)
        super()._moved(kind, item, size_bytes)
        for move in self.moves[before:]:
            self.told.append(_Told(move.block, move.size_bytes, self._category(kind, item), self._place))

    def _category(self, kind: BlockKind, item: int) -> str:
        """What a block is for, as the walk counts it."""
        if kind is not BlockKind.STORAGE:
            own = {BlockKind.REPLAYED: RECOMPUTED, BlockKind.SEED: ACTIVATION}
            return own.get(kind, TEMPORARY)
        if self.is_activation[item]:
            return ACTIVATION
        return self._persisting if self.graph.storages[item].persists else TEMPORARY


def block_moves(profile: Profile, step: Unrolled) -> list[BlockMove]:
    """Every block that comes and goes in a step, in order. Pure. See Note [Blocks of a whole step].

    Args:
        profile: What ``step`` was unrolled from.

    Returns:
        The highest sum of the sizes up to any of them is ``predicted_peak_bytes`` of the plan.

    Cost: linear in the log and the replayed ops of every part that is told.
    """
    return list(_Step(profile, step).moves())


@dataclass(slots=True)
class _Live:
    """Blocks of one kind that outlive a part."""

    moves: list[BlockMove] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return sum(move.size_bytes for move in self.moves)


class _Step:
    """The blocks of one step, numbered."""

    def __init__(self, profile: Profile, step: Unrolled) -> None:
        self._profile = profile
        self._step = step
        self._blocks = 0
        self._gradients = _Live()
        self._held = _Live()
        self._tellers: dict[int, list[_Told]] = {}

    def moves(self) -> Iterator[BlockMove]:
        """Before, each part, and the end."""
        yield from self._before()
        for part in self._step.parts:
            if part.ticks:
                yield from self._settle(part)
                yield from self._play(part)
        end = Place(_END, _END, OpKey("", "optimizer.zero_grad", 0))
        yield from self._let_go(self._gradients, end)
        yield from self._let_go(self._held, end)

    def _before(self) -> Iterator[BlockMove]:
        """What is there all the time."""
        profile, residents = self._profile, self._profile.residents
        state_bytes = old_state_bytes(profile) if self._step.is_first_step else residents.optimizer_bytes
        for category, total_bytes, sizes, name in (
            (PARAMETER, residents.parameters_bytes, residents.parameter_sizes, "parameters"),
            (OPTIMIZER_STATE, state_bytes, (), "optimizer state"),
            (BATCH, residents.batch_bytes, residents.batch_sizes, "batch"),
            (TEMPORARY, profile.unexplained_bytes, (), "measured above the prediction"),
        ):
            yield from self._come(total_bytes, sizes, category, Place(BEFORE, BEFORE, OpKey("", name, 0)))

    def _settle(self, part: Part) -> Iterator[BlockMove]:
        """Makes the gradients those which the timeline has while a part runs."""
        residents, graph = self._profile.residents, part.graph
        place = Place(part.name, part.name, OpKey("", "gradients", 0))
        total_bytes, sizes = 0, tuple[int, ...]()
        if part.name == UPDATE:
            total_bytes, sizes = residents.gradients_bytes, residents.gradient_sizes
        elif part.name != LOSS_OF_ALL and graph.gradients_resident:
            total_bytes, sizes = residents.resident_gradients
        held_bytes = graph.held_bytes if part.name != UPDATE else 0
        for live, wanted_bytes, blocks in (
            (self._gradients, total_bytes, sizes),
            (self._held, held_bytes, ()),
        ):
            if live.total_bytes != wanted_bytes:
                yield from self._let_go(live, place)
                live.moves = list(self._come(wanted_bytes, blocks, GRADIENT, place))
                yield from live.moves

    def _play(self, part: Part) -> Iterator[BlockMove]:
        """What comes and goes in a part; what a micro-batch leaves are gradients."""
        live: dict[Hashable, BlockMove] = {}
        for told in self._told(part):
            place = told.place._replace(part=part.name)
            if told.size_bytes > 0:
                live[told.block] = self._new(told.size_bytes, told.category, place)
                yield live[told.block]
            else:
                gone = live.pop(told.block)
                yield BlockMove(gone.block, told.size_bytes, gone.category, place)
        stays = {LOSS_OF_ALL: "", UPDATE: OPTIMIZER_STATE}.get(part.name, GRADIENT)
        if stays == GRADIENT:
            self._gradients.moves += [move for move in live.values() if move.category == GRADIENT]
        left = _Live([move for move in live.values() if move.category != stays])
        yield from self._let_go(left, Place(part.name, part.name, OpKey("", "end", 0)))

    def _told(self, part: Part) -> list[_Told]:
        """What a part does; alike parts are walked through once."""
        if id(part.graph) not in self._tellers:
            teller = _Teller(part, self._profile.alignment_bytes)
            play(teller)
            self._tellers[id(part.graph)] = teller.told
        return self._tellers[id(part.graph)]

    def _new(self, size_bytes: int, category: str, place: Place) -> BlockMove:
        """One more block."""
        self._blocks += 1
        return BlockMove(self._blocks, size_bytes, category, place)

    def _come(
        self, total_bytes: int, sizes: Iterable[int], category: str, place: Place
    ) -> Iterator[BlockMove]:
        """Blocks of so many bytes: the known ones if they sum to it, else one."""
        align = self._profile.alignment_bytes
        rounded = [in_blocks((size_bytes,), align) for size_bytes in sizes]
        blocks = rounded if sum(rounded) == total_bytes else [total_bytes]
        for nth, size_bytes in enumerate(size_bytes for size_bytes in blocks if size_bytes):
            yield self._new(size_bytes, category, place._replace(key=place.key._replace(nth=nth)))

    def _let_go(self, live: _Live, place: Place) -> Iterator[BlockMove]:
        """All of them go."""
        for move in live.moves:
            yield BlockMove(move.block, -move.size_bytes, move.category, place)
        live.moves = []
