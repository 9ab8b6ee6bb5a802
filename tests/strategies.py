"""Random small steps, as consistent as those the recorder makes, and profiles around them.

A step is drawn as a list of :class:`Piece` (one forward op and its autograd node each); :func:`build` plays
them like a training step would and writes the log. So the same pieces give the same structure at any size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hypothesis import strategies as st

from memfit.core.costs import with_overhead
from memfit.core.graph import (
    EMPTY_GRAPH,
    LogEntry,
    LogKind,
    Op,
    OpKey,
    Profile,
    Residents,
    Save,
    StepGraph,
    Storage,
    Value,
)
from memfit.core.timeline import droppable


class Piece(NamedTuple):
    """One forward op and its autograd node. ``reads`` and the like pick among what is alive.

    ``is_dead``: the node dies in the forward. ``is_skipped``: the backward never runs it.
    """

    reads: tuple[int, ...] = ()
    sizes: tuple[int, ...] = (1,)
    writes_in_place: bool = False
    is_replayable: bool = True
    seed_bytes: int = 0
    scratch_bytes: int = 0
    seconds: float = 1.0
    temporary_bytes: int = 0
    saves_inputs: bool = False
    saves_outputs: tuple[int, ...] = ()
    frees: tuple[int, ...] = ()
    is_dead: bool = False
    is_skipped: bool = False
    backward_sizes: tuple[int, ...] = (1,)
    gradient_bytes: int = 0


@dataclass
class _Writer:
    """The lists of a graph under construction, and what the program holds."""

    rows: int
    resident: bool
    ops: list[Op] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    log: list[LogEntry] = field(default_factory=list)
    current: dict[int, int] = field(default_factory=dict)

    def storage(self, size_bytes: int, *, persists: bool = False) -> int:
        self.storages.append(Storage(size_bytes if persists else size_bytes * self.rows, persists))
        return len(self.storages) - 1

    def value(self, storage: int, output: int) -> int:
        self.values.append(Value(storage, len(self.ops), output))
        self.current[storage] = len(self.values) - 1
        return len(self.values) - 1

    def note(self, kind: LogKind, index: int) -> None:
        self.log.append(LogEntry(kind, index))

    def pack(self, value: int) -> int:
        self.saves.append(Save(value))
        self.note(LogKind.PACK, len(self.saves) - 1)
        return len(self.saves) - 1

    def free(self, storage: int) -> None:
        self.current.pop(storage, None)
        self.note(LogKind.FREE, storage)

    def forward(self, number: int, piece: Piece) -> list[int]:
        """Runs a piece's op; returns the saves of its node."""
        alive = list(self.current)
        read = list(dict.fromkeys(alive[pick % len(alive)] for pick in piece.reads if alive))
        inputs = tuple(self.current[storage] for storage in read)
        saved_values = {save.value for save in self.saves}
        in_place = bool(inputs) and piece.writes_in_place and inputs[0] not in saved_values
        kept_inputs = inputs[1:] if in_place else inputs
        node = [self.pack(value) for value in kept_inputs if piece.saves_inputs]
        overwrites = inputs[:1] if in_place else ()
        for old in overwrites:
            self.values[old] = replace(self.values[old], is_overwritten=True)
        outputs = [self.value(self.values[old].storage, 0) for old in overwrites]
        allocates = []
        for size_bytes in piece.sizes[len(overwrites) :]:
            allocates.append(self.storage(size_bytes))
            outputs.append(self.value(allocates[-1], len(outputs)))
        self.note(LogKind.OP, len(self.ops))
        key = OpKey(f"block.{number // 2}", "aten.op.default", number % 2)
        costs = (piece.seconds * (1 + self.rows) / 2, piece.temporary_bytes * self.rows, piece.seed_bytes)
        made = (inputs, tuple(outputs), overwrites, tuple(allocates))
        self.ops.append(
            Op(key, *made, *costs, piece.scratch_bytes, piece.seed_bytes > 0, piece.is_replayable)
        )
        return node + [self.pack(outputs[pick % len(outputs)]) for pick in piece.saves_outputs]

    def let_go(self, piece: Piece) -> None:
        """The program forgets some of what it holds, but not the newest: that is the loss so far."""
        for pick in piece.frees:
            alive = list(self.current)[:-1]
            if alive:
                self.free(alive[pick % len(alive)])

    def backward(self, number: int, piece: Piece, node: list[int], flowing: int) -> int:
        """Runs a piece's node; returns the gradient that flows on."""
        for turn, size_bytes in enumerate(piece.backward_sizes):
            for save in node[turn : turn + 1] if turn + 1 < len(piece.backward_sizes) else node[turn:]:
                self.note(LogKind.UNPACK, save)
            made = [self.storage(size_bytes)]
            is_last = turn + 1 == len(piece.backward_sizes)
            if is_last and piece.gradient_bytes:
                made.append(self.storage(piece.gradient_bytes, persists=not self.resident))
            self.note(LogKind.OP, len(self.ops))
            key = OpKey(f"block.{number // 2}", "aten.op_backward.default", number % 2 * 4 + turn)
            self.ops.append(Op(key, allocates=tuple(made), seconds=piece.seconds, temporary_bytes=turn))
            self.free(flowing)
            flowing = made[0]
            for gradient in made[1:]:
                if self.resident:
                    self.free(gradient)
        for save in node:
            self.note(LogKind.RELEASE, save)
        return flowing


def build(pieces: tuple[Piece, ...], *, rows: int = 1, resident: bool = True) -> StepGraph:
    """Plays a step of some rows. ``resident``: whether gradients existed before it."""
    writer = _Writer(rows, resident)
    nodes: list[list[int]] = []
    for number, piece in enumerate(pieces):
        nodes.append(writer.forward(number, piece))
        if piece.is_dead:
            for save in nodes[-1]:
                writer.note(LogKind.RELEASE, save)
        writer.let_go(piece)
    forward_ops, left = len(writer.ops), list(writer.current)
    flowing = writer.storage(1)
    writer.note(LogKind.OP, forward_ops)
    writer.ops.append(Op(OpKey("", "aten.ones_like.default", 0), allocates=(flowing,), seconds=0.0))
    for number in reversed(range(len(pieces))):
        if not pieces[number].is_dead and not pieces[number].is_skipped:
            flowing = writer.backward(number, pieces[number], nodes[number], flowing)
    writer.free(flowing)
    for piece, node in zip(pieces, nodes, strict=True):
        for save in node if piece.is_skipped and not piece.is_dead else ():
            writer.note(LogKind.RELEASE, save)
    for storage in left:
        writer.free(storage)
    lists = (writer.ops, writer.storages, writer.values, writer.saves, writer.log)
    return StepGraph(rows, forward_ops, resident, *(tuple(found) for found in lists))  # type: ignore[arg-type]


PICKS = st.integers(0, 7)
SECONDS = st.integers(0, 16).map(lambda eighths: eighths / 8)


def rarely(strategy: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """Zero, but for some of the time."""
    return st.one_of(st.just(0), st.just(0), strategy)


@st.composite
def pieces(draw: st.DrawFn, most: int, *, tidy: bool = False) -> tuple[Piece, ...]:
    """The ops of a random step. ``tidy``: all nodes save something, and the backward runs all of them."""
    sizes = st.lists(st.integers(int(tidy), 40), min_size=1, max_size=3).map(tuple)
    one = st.builds(
        Piece,
        reads=st.lists(PICKS, min_size=1, max_size=3).map(tuple),
        sizes=st.one_of(sizes.map(lambda many: many[:1]), sizes),
        writes_in_place=st.sampled_from([False, False, True]),
        is_replayable=st.sampled_from([True, True, True, False]),
        seed_bytes=rarely(st.just(7)),
        scratch_bytes=rarely(st.just(3)),
        seconds=SECONDS,
        temporary_bytes=rarely(st.integers(1, 30)),
        saves_inputs=st.booleans(),
        saves_outputs=st.lists(PICKS, min_size=int(tidy), max_size=2).map(tuple),
        frees=st.lists(PICKS, min_size=int(tidy), max_size=3).map(tuple),
        is_dead=st.just(False) if tidy else st.sampled_from([False] * 7 + [True]),
        is_skipped=st.just(False) if tidy else st.sampled_from([False] * 9 + [True]),
        backward_sizes=st.lists(st.integers(0, 40 >> tidy), min_size=1, max_size=2).map(tuple),
        gradient_bytes=rarely(st.integers(1, 20)),
    )
    return tuple(draw(st.lists(one, min_size=most - 1 if tidy else 2, max_size=most)))


@st.composite
def graphs(draw: st.DrawFn, most: int = 8, rows: int = 1) -> StepGraph:
    """A random step."""
    return build(draw(pieces(most)), rows=rows, resident=draw(st.booleans()))


@st.composite
def choices(draw: st.DrawFn, graph: StepGraph) -> frozenset[int]:
    """A random valid set of values to replay: with each, the overwritten ones that its replay reads."""
    possible = sorted(droppable(graph))
    found = set(draw(st.lists(st.sampled_from(possible), unique=True))) if possible else set()
    waiting = list(found)
    while waiting:
        producer = graph.values[waiting.pop()].producer
        new = {v for v in graph.ops[producer].inputs if graph.values[v].is_overwritten} - found
        found |= new
        waiting.extend(new)
    return frozenset(found)


@st.composite
def graphs_and_choices(draw: st.DrawFn, most: int = 8) -> tuple[StepGraph, frozenset[int]]:
    """A random step and a random valid set of its values."""
    graph = draw(graphs(most))
    return graph, draw(choices(graph))


def flat_update(temporary_bytes: int, *, state_bytes: int = 0, seconds: float = 0.0) -> StepGraph:
    """An ``optimizer.step()`` of one op that makes its state and holds temporaries meanwhile."""
    op = Op(OpKey("", "step", 0), allocates=(0,), temporary_bytes=temporary_bytes, seconds=seconds)
    state = Storage(state_bytes, persists=True)
    return replace(EMPTY_GRAPH, ops=(op,), storages=(state,), log=(LogEntry(LogKind.OP, 0),))


@st.composite
def profiles(draw: st.DrawFn, most: int = 8, sizes: int = 3, *, tidy: bool = False) -> Profile:
    """A random step at one to three micro-batch sizes: all rows at once, then halves, then quarters."""
    drawn = draw(pieces(most, tidy=tidy))
    count = draw(st.integers(1, sizes))
    steps = [build(drawn, rows=4 >> halvings, resident=halvings > 0) for halvings in range(count)]
    overhead_s, hides = draw(st.sampled_from([0.0, 0.125, 2.0])), draw(st.booleans())
    steps = [with_overhead(step, overhead_s, is_asynchronous=hides) for step in steps]
    some = st.integers(0, 50)
    state_bytes = draw(some)
    update = flat_update(draw(some), seconds=draw(SECONDS))
    return Profile(
        rows=4,
        graphs=tuple(steps),
        residents=Residents(draw(some), sum(p.gradient_bytes for p in drawn), state_bytes, draw(some)),
        first_update=flat_update(draw(some), state_bytes=draw(st.integers(0, state_bytes))),
        update=draw(st.sampled_from([update, EMPTY_GRAPH])),
        alignment_bytes=draw(st.sampled_from([1, 1, 8])),
        unexplained_bytes=draw(rarely(st.integers(1, 9))),
    )


BLOCK_OPS = 4


@st.composite
def chains(draw: st.DrawFn, blocks: int = 5, kinds: int = 2) -> Profile:
    """A step of several residual blocks in a row, some alike: normalise, widen, narrow, add."""
    small, time_s = st.integers(1, 12), st.integers(1, 16).map(lambda eighths: eighths / 8)
    width = draw(small)
    made = []
    for _ in range(draw(st.integers(1, kinds))):
        seconds = [draw(time_s) for _ in range(BLOCK_OPS)]
        wide, narrow = draw(small) * 2, draw(small)
        seed = draw(rarely(st.just(3)))
        gradient = draw(rarely(st.integers(1, 5)))
        made.append(
            (
                Piece((0,), (narrow,), saves_inputs=True, seconds=seconds[0], gradient_bytes=gradient),
                Piece(
                    (1,), (wide,), saves_inputs=True, saves_outputs=(0,), seconds=seconds[1], seed_bytes=seed
                ),
                Piece((2,), (width,), saves_inputs=draw(st.booleans()), seconds=seconds[2]),
                Piece((0, 3), (width,), seconds=seconds[3], frees=(0, 0, 0, 0)),
            )
        )
    order = draw(st.lists(st.integers(0, len(made) - 1), min_size=3, max_size=blocks))
    pieces = tuple(piece for kind in order for piece in made[kind])
    start = Piece(sizes=(width,), is_replayable=False, is_skipped=True)
    graph = build((start, *pieces), resident=draw(st.booleans()))
    ops = [
        replace(op, key=OpKey(f"block.{max(0, index - 1) // BLOCK_OPS}", op.key.op, index))
        for index, op in enumerate(graph.ops[: graph.forward_ops])
    ]
    graph = replace(graph, ops=(*ops, *graph.ops[graph.forward_ops :]))
    overhead_s = draw(st.sampled_from([0.0, 0.125]))
    graph = with_overhead(graph, overhead_s, is_asynchronous=draw(st.booleans()))
    return Profile(1, (graph,), Residents(0, 0, 0, 0))
