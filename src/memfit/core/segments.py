"""Cuts a step graph into the segments of a chain, each a small step graph of its own.

Note [Segments]
 1. A *cut* lies between two forward ops where one value, the *entry* of the next segment, crosses. Candidates
    are where the numbered module changes (``layers.3`` to ``layers.4``, or the next call of a shared one).
 2. A value that crosses three cuts or more (a mask, rotary tables, a long skip) is *shared*: never dropped.
    Where no earlier segment saves it, the only one that reads it counts it as its own: replays may need it.
 3. A save belongs to the segment in which it was packed; one packed between two segments to the later, unless
    it is of a value that the op before made and nothing reads after (the mean of a LayerNorm). The
    backward of a segment begins where the first of its saves is unpacked. If the backwards of two
    segments mix, the cut between them goes.
 4. A segment's graph begins with an op that makes its entry, and its backward with one that makes the
    gradients on their way. So what a choice inside it keeps, and its own peak, are a simulation of that
    graph alone; what the rest of the step adds is read off a run that drops nothing: its most in either
    phase, and how much less that is at each op.
 5. Its forward ends with an op that does nothing. There the program still holds what it lets go of only after
    the whole forward (a key-value cache, collected hidden states): dropping that saves nothing until then.
 6. Segments that do the same differ only in names: one *class*, worked out once.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from memfit.core.graph import LogEntry, LogKind, Op, OpKey, Save, StepGraph, Storage, Value
from memfit.core.timeline import Run, droppable, run

_SHARED_CUTS = 3  # a value crossing this many is no entry
_FEW_OPS = 4  # a segment of fewer joins its neighbour
_LARGE_OPS = 160  # a segment of more is cut again, at deeper modules
_FEWEST = 3  # segments worth planning as a chain


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of the forward with its backward.

    Attributes:
        graph: Its step graph; value 0 is the entry, even if nothing crosses (then of no bytes).
        values: The value of the whole graph behind each of its values; -1 for an entry that is not there.
        forward_extra_bytes, backward_extra_bytes: The most the rest of the step holds meanwhile, beyond what
            earlier segments keep.
        relief_bytes: How much less that is at each op of the graph.
        class_key: Equal for segments that do the same.
        shape_key: Equal for segments whose forwards do the same, at any size.
    """

    graph: StepGraph
    values: tuple[int, ...]
    forward_extra_bytes: int
    backward_extra_bytes: int
    relief_bytes: tuple[int, ...]
    class_key: str
    shape_key: str

    @property
    def entry_bytes(self) -> int:
        """Bytes of the value that crosses into it."""
        return self.graph.size_bytes(0)

    @property
    def held_entry_bytes(self) -> int:
        """Bytes of that value if the program holds it as long as the forward runs."""
        entry, leave = self.graph.values[0].storage, LogEntry(LogKind.OP, self.graph.forward_ops - 1)
        let_go = self.graph.log[: self.graph.log.index(leave)].count(LogEntry(LogKind.FREE, entry))
        return 0 if let_go else self.entry_bytes


def read_segments(graph: StepGraph, *, alignment_bytes: int) -> tuple[Segment, ...]:
    """The chain a graph is; empty where it is none, or too short to be worth it.

    Cost: linear in the log.
    """
    if not graph.saves or any(kind == LogKind.UNPACK for kind, _ in _forward_log(graph)):
        return ()
    cuts: list[int] = []
    found = _cuts(graph)
    while cuts != found:  # without one cut a value may cross too few to be shared, and forbid another
        cuts = found
        found = _narrow(_spans(graph), _unmixed(graph, cuts))
    if len(cuts) + 1 < _FEWEST:
        return ()
    return _with_extras(graph, _Cutter(graph, cuts).segments(), alignment_bytes)


def _forward_log(graph: StepGraph) -> list[LogEntry]:
    """The log up to the first op of the backward."""
    end = next(
        (i for i, (kind, item) in enumerate(graph.log) if kind == LogKind.OP and item >= graph.forward_ops),
        len(graph.log),
    )
    return list(graph.log[:end])


# ---- where to cut --------------------------------------------------------------------------------


def _block(frame: str, depth: int) -> str:
    """The numbered module a frame lies in: its path up to the number at ``depth``, and which call."""
    path, _, call = frame.partition("#")
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbered:
        return ""
    return ".".join(parts[: numbered[min(depth, len(numbered) - 1)] + 1]) + "#" + call


def _cuts(graph: StepGraph) -> list[int]:
    """The forward ops that begin a segment, but for the first."""
    spans = _spans(graph)
    chosen = _narrow(spans, _changes(graph, 0, 0, graph.forward_ops))
    for depth in (1, 2):
        bounds = [0, *chosen, graph.forward_ops]
        for low, high in pairwise(bounds):
            if high - low > _LARGE_OPS:
                deeper = _changes(graph, depth, low, high)
                chosen = sorted({*chosen, *_narrow(spans, sorted({*chosen, *deeper}))})
    return _without_small(chosen, graph.forward_ops)


def _changes(graph: StepGraph, depth: int, low: int, high: int) -> list[int]:
    """The ops at which the numbered module changes."""
    blocks = [_block(op.key.frame, depth) for op in graph.ops[low:high]]
    return [low + i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1]]


def _spans(graph: StepGraph) -> dict[int, tuple[int, int]]:
    """The op that makes each value and the last forward op that reads it."""
    spans: dict[int, tuple[int, int]] = {}
    for index, op in enumerate(graph.ops[: graph.forward_ops]):
        for value in op.inputs:
            if graph.values[value].producer >= 0:
                spans[value] = (graph.values[value].producer, index)
    return spans


def _narrow(spans: dict[int, tuple[int, int]], cuts: list[int]) -> list[int]:
    """The cuts that at most one value crosses, shared ones aside."""
    crossing = [0] * len(cuts)
    for made, read in spans.values():
        low, high = bisect.bisect_right(cuts, made), bisect.bisect_right(cuts, read)
        if high - low < _SHARED_CUTS:
            for i in range(low, high):
                crossing[i] += 1
    return [cut for cut, count in zip(cuts, crossing, strict=True) if count <= 1]


def _without_small(cuts: list[int], forward_ops: int) -> list[int]:
    """Cuts that leave a few ops at least on either side."""
    found: list[int] = []
    for cut in cuts:
        if cut - (found[-1] if found else 0) >= _FEW_OPS and forward_ops - cut >= _FEW_OPS:
            found.append(cut)
    return found


def _unmixed(graph: StepGraph, cuts: list[int]) -> list[int]:
    """The cuts on whose two sides the backwards do not mix. See Note [Segments] 3."""
    while cuts:
        first, last = _backward_ranges(graph, cuts)
        mixed = {
            cut
            for index, cut in enumerate(cuts)
            if index + 1 not in first or index not in first or last[index + 1] > first[index]
        }
        if not mixed:
            return cuts
        cuts = [cut for cut in cuts if cut not in mixed]
    return cuts


def _backward_ranges(graph: StepGraph, cuts: list[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Log positions of the first and the last unpack of each segment."""
    homes = _save_homes(graph, cuts)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, (kind, item) in enumerate(graph.log):
        if kind == LogKind.UNPACK:
            first.setdefault(homes[item], position)
            last[homes[item]] = position
    return first, last


def _save_homes(graph: StepGraph, cuts: list[int]) -> list[int]:
    """The segment of each save."""
    homes = [0] * len(graph.saves)
    spans, before, segment = _spans(graph), -1, 0
    for kind, item in graph.log:
        if kind == LogKind.OP:
            before, segment = item, bisect.bisect_right(cuts, item + 1)
        elif kind == LogKind.PACK:
            value = graph.saves[item].value
            is_last = graph.values[value].producer == before and value not in spans
            homes[item] = bisect.bisect_right(cuts, before) if is_last else segment
    return homes


# ---- one segment's graph -------------------------------------------------------------------------


class _Cutter:
    """Writes the graph of each segment. See Note [Segments] 4."""

    def __init__(self, graph: StepGraph, cuts: list[int]) -> None:
        self.graph = graph
        self.bounds = [0, *cuts, graph.forward_ops]
        self.first_unpack, _ = _backward_ranges(graph, cuts)
        self.homes = _save_homes(graph, cuts)
        self.op_positions = [0] * len(graph.ops)
        self.freed_at: dict[int, int] = {}
        self.allocated_at: dict[int, int] = {}
        for position, (kind, item) in enumerate(graph.log):
            if kind == LogKind.OP:
                self.op_positions[item] = position
                for storage in graph.ops[item].allocates:
                    self.allocated_at[storage] = position
            elif kind == LogKind.FREE:
                self.freed_at[item] = position
        self.spans = _spans(graph)
        self.droppable = droppable(graph) - self._shared()
        self.readers: dict[int, set[int]] = {}
        for value, segment in self._reads():
            if graph.values[value].producer < self.bounds[segment]:
                self.readers.setdefault(value, set()).add(segment)
        self.saved_from: dict[int, int] = {}
        for save, home in zip(graph.saves, self.homes, strict=True):
            storage = graph.values[save.value].storage
            self.saved_from[storage] = min(home, self.saved_from.get(storage, home))
        self.backward_start = (
            self.op_positions[graph.forward_ops] if graph.forward_ops < len(graph.ops) else len(graph.log)
        )

    def segments(self) -> list[Segment]:
        """All segments, the first of the forward first."""
        return [self._segment(index) for index in range(len(self.bounds) - 1)]

    def _entry(self, index: int) -> int:
        """The value that crosses into a segment, -1 if none does."""
        cut = self.bounds[index]
        cuts = self.bounds[1:-1]
        for value, (made, read) in self.spans.items():
            crossed = bisect.bisect_right(cuts, read) - bisect.bisect_right(cuts, made)
            if made < cut <= read and crossed < _SHARED_CUTS:
                return value
        return -1

    def _shared(self) -> set[int]:
        """The values that cross too many cuts. See Note [Segments] 2."""
        cuts = self.bounds[1:-1]
        return {
            value
            for value, (made, read) in self.spans.items()
            if bisect.bisect_right(cuts, read) - bisect.bisect_right(cuts, made) >= _SHARED_CUTS
        }

    def _reads(self) -> Iterator[tuple[int, int]]:
        """Every value read in the forward, and the segment that does."""
        for segment, (start, end) in enumerate(pairwise(self.bounds)):
            for op in self.graph.ops[start:end]:
                for value in op.inputs:
                    yield value, segment

    def _borrowed(self, index: int) -> list[int]:
        """The shared values that only this segment reads, and no earlier one saves."""
        start, end = self.bounds[index], self.bounds[index + 1]
        values = self.graph.values
        return [
            value
            for value in dict.fromkeys(v for op in self.graph.ops[start:end] for v in op.inputs)
            if 0 <= values[value].producer < start
            and self.readers[value] == {index}
            and self.saved_from.get(values[value].storage, index) >= index
        ]

    def _stretches(self, index: int) -> tuple[range, range]:
        """Log positions of a segment's forward and backward."""
        last = len(self.bounds) - 2
        start = self.op_positions[self.bounds[index] - 1] + 1 if index else 0
        end = self.op_positions[self.bounds[index + 1]] if index < last else self.backward_start
        backward = self.first_unpack[index] if index < last else self.backward_start
        backward_end = self.first_unpack[index - 1] if index else len(self.graph.log)
        return range(start, end), range(backward, backward_end)

    def _segment(self, index: int) -> Segment:
        """The graph of one segment."""
        forward, backward = self._stretches(index)
        entry = self._entry(index) if index else -1
        writer = _Writer(self.graph, entry, self._borrowed(index), self.droppable)
        self._copy(writer, index, forward)
        outlives = forward.stop != backward.start  # what later segments read is theirs to count
        if outlives:
            self._free_until(writer, self.op_positions[self.graph.forward_ops - 1])
        writer.leave()
        if outlives:
            self._free_until(writer, self.backward_start)
        arriving = [
            item
            for kind, item in (self.graph.log[position] for position in backward)
            if kind == LogKind.FREE and self.backward_start <= self.allocated_at[item] < backward.start
        ]
        writer.arrive(arriving)
        self._copy(writer, index, backward)
        writer.release_the_rest()
        return writer.segment()

    def _free_until(self, writer: _Writer, position: int) -> None:
        """Lets go of what the program lets go of before a position in the log."""
        for storage in writer.named():
            if self.freed_at.get(storage, len(self.graph.log)) < position:
                writer.free(storage)

    def _copy(self, writer: _Writer, index: int, stretch: range) -> None:
        """Writes what a stretch of the log says of one segment."""
        for position in stretch:
            kind, item = self.graph.log[position]
            if kind == LogKind.OP:
                writer.op(item)
            elif kind == LogKind.FREE:
                writer.free(item)
            elif kind != LogKind.PACK:
                writer.log_save(LogKind(kind), item)
            elif self.homes[item] == index:
                writer.pack(item)


class _Writer:
    """A step graph under construction, with numbers of its own."""

    def __init__(
        self, graph: StepGraph, entry: int, borrowed: Sequence[int], droppable: frozenset[int]
    ) -> None:
        self.graph = graph
        self.droppable = droppable
        self.ops: list[Op] = []
        self.storage_numbers: dict[int, int] = {}
        self.storages: list[Storage] = []
        self.value_numbers: dict[int, int] = {}
        self.sources: list[int] = []
        self.save_numbers: dict[int, int] = {}
        self.saves: list[Save] = []
        self.unreleased: dict[int, None] = {}
        self.log: list[LogEntry] = []
        self.alive: dict[int, None] = {}
        self.forward_ops = 0
        if entry < 0:
            self.sources.append(-1)
            self.storages.append(Storage(0))
            allocates: tuple[int, ...] = (0,)
        else:
            allocates = (self._storage(graph.values[entry].storage),)
            self._value(entry)
        for value in borrowed:
            storage = graph.values[value].storage
            if storage not in self.storage_numbers:
                allocates += (self._storage(storage),)
            if value not in self.value_numbers:
                self._value(value)
        outputs = tuple(range(len(self.sources)))
        self._append(Op(OpKey("", "memfit.entry", 0), outputs=outputs, allocates=allocates))

    def _storage(self, storage: int) -> int:
        """The number here of a storage, allocated now."""
        self.storage_numbers[storage] = len(self.storages)
        self.storages.append(self.graph.storages[storage])
        self.alive[storage] = None
        return self.storage_numbers[storage]

    def _value(self, value: int) -> int:
        """The number here of a value, made now."""
        self.value_numbers[value] = len(self.sources)
        self.sources.append(value)
        return self.value_numbers[value]

    def _append(self, op: Op) -> None:
        self.log.append(LogEntry(LogKind.OP, len(self.ops)))
        self.ops.append(op)

    def op(self, index: int) -> None:
        """An op of the step; what it reads from elsewhere is always there."""
        op = self.graph.ops[index]
        allocates = tuple(self._storage(storage) for storage in op.allocates)
        known = [v for v in op.outputs if self.graph.values[v].storage in self.storage_numbers]
        whole = len(known) == len(op.outputs)  # a write to what lies elsewhere cannot be made again here
        self._append(
            replace(
                op,
                inputs=tuple(self.value_numbers[v] for v in op.inputs if v in self.value_numbers),
                overwrites=tuple(self.value_numbers[v] for v in op.overwrites if v in self.value_numbers),
                outputs=tuple(self._value(v) for v in known),
                allocates=allocates,
                is_replayable=op.is_replayable and whole and self.droppable.issuperset(op.outputs),
            )
        )

    def free(self, storage: int) -> None:
        """The program lets go of a storage of this segment."""
        if storage in self.alive:
            del self.alive[storage]
            self.log.append(LogEntry(LogKind.FREE, self.storage_numbers[storage]))

    def named(self) -> list[int]:
        """The storages the program still holds."""
        return list(self.alive)

    def pack(self, save: int) -> None:
        """A save of a value of this segment."""
        value = self.graph.saves[save].value
        if value in self.value_numbers:
            self.save_numbers[save] = len(self.saves)
            self.saves.append(Save(self.value_numbers[value]))
            self.unreleased[save] = None
            self.log.append(LogEntry(LogKind.PACK, self.save_numbers[save]))

    def log_save(self, kind: LogKind, save: int) -> None:
        """What happens to a save in the backward."""
        if save in self.save_numbers:
            if kind == LogKind.RELEASE:
                self.unreleased.pop(save, None)
            self.log.append(LogEntry(kind, self.save_numbers[save]))

    def leave(self) -> None:
        """The forward leaves the segment. See Note [Segments] 5."""
        self._append(Op(OpKey("", "memfit.leave", 0)))

    def arrive(self, storages: Sequence[int]) -> None:
        """The backward begins, with gradients on their way."""
        self.forward_ops = len(self.ops)
        allocates = tuple(self._storage(storage) for storage in storages)
        self._append(Op(OpKey("", "memfit.arrive", 0), allocates=allocates))

    def release_the_rest(self) -> None:
        """Saves whose release comes later, or never."""
        for save in self.unreleased:
            self.log.append(LogEntry(LogKind.RELEASE, self.save_numbers[save]))

    def segment(self) -> Segment:
        """What was written."""
        values = [Value(0, 0, 0)] if self.sources[0] < 0 else []
        for source in self.sources[len(values) :]:
            value = self.graph.values[source]
            values.append(replace(value, storage=self.storage_numbers[value.storage], producer=0))
        for index, op in enumerate(self.ops):
            for v in op.outputs:
                values[v] = replace(values[v], producer=index)
        graph = StepGraph(
            rows=self.graph.rows,
            forward_ops=self.forward_ops,
            gradients_resident=self.graph.gradients_resident,
            ops=tuple(self.ops),
            storages=tuple(self.storages),
            values=tuple(values),
            saves=tuple(self.saves),
            log=tuple(self.log),
        )
        return Segment(graph, tuple(self.sources), 0, 0, (), _class_key(graph), _shape_key(graph))


def _class_key(graph: StepGraph) -> str:
    """Everything about a segment but the names of its modules."""
    ops = [replace(op, key=OpKey("", op.key.op, 0)) for op in graph.ops]
    return _digest((ops, graph.storages, graph.values, graph.saves, graph.log, graph.forward_ops))


def _shape_key(graph: StepGraph) -> str:
    """What the forward of a segment does, whatever its sizes."""
    ops = [(op.key.op, op.inputs, op.outputs) for op in graph.ops[: graph.forward_ops]]
    return _digest((ops, [save.value for save in graph.saves]))


def _digest(facts: object) -> str:
    """A short text that is equal for equal facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


# ---- the rest of the step ------------------------------------------------------------------------


def _with_extras(graph: StepGraph, segments: list[Segment], alignment_bytes: int) -> tuple[Segment, ...]:
    """The segments with what the rest of the step holds. See Note [Segments] 4."""
    whole = run(graph, alignment_bytes=alignment_bytes)
    total_bytes = {moment.op: moment.total_bytes for moment in whole.moments}
    found: list[Segment] = []
    kept_bytes = forward_op = 0
    backward_op = len(graph.ops)
    for segment in segments:
        own = run(segment.graph, alignment_bytes=alignment_bytes)
        forwards, backwards = _own_moments(segment, own)
        backward_op -= len(backwards)
        forward = [total_bytes[forward_op + i] - own_bytes for i, own_bytes in enumerate(forwards)]
        backward = [total_bytes[backward_op + i] - own_bytes for i, own_bytes in enumerate(backwards)]
        forward_most, backward_most = max(forward, default=kept_bytes), max(backward, default=kept_bytes)
        relief = [0, *(forward_most - b for b in forward), 0, 0, *(backward_most - b for b in backward)]
        found.append(
            replace(
                segment,
                forward_extra_bytes=forward_most - kept_bytes,
                backward_extra_bytes=backward_most - kept_bytes,
                relief_bytes=tuple(relief),
                class_key=_digest((segment.class_key, relief)),
            )
        )
        forward_op += len(forwards)
        kept_bytes += kept_after_forward(segment, own)
    return tuple(found)


def _own_moments(segment: Segment, own: Run) -> tuple[list[int], list[int]]:
    """Bytes at each op of the step, without the three ops that a segment's graph adds."""
    forward_ops = segment.graph.forward_ops
    totals = [moment.total_bytes for moment in own.moments if not moment.is_replay]
    return totals[1 : forward_ops - 1], totals[forward_ops + 1 :]


def peaks_of(segment: Segment, own: Run) -> tuple[int, int]:
    """The peaks of a segment in forward and backward, to which the most of the rest of the step is added."""
    leave, arrive = segment.graph.forward_ops - 1, segment.graph.forward_ops
    forward = backward = waiting = 0
    for moment in own.moments:
        if moment.is_replay:
            waiting = max(waiting, moment.total_bytes)
        elif moment.op not in (0, leave, arrive):  # these three are no ops of the step
            own_bytes = max(waiting, moment.total_bytes) - segment.relief_bytes[moment.op]
            waiting = 0
            if moment.op < leave:
                forward = max(forward, own_bytes)
            else:
                backward = max(backward, own_bytes)
    return forward, max(backward, waiting)


def kept_after_forward(segment: Segment, own: Run) -> int:
    """What a segment still holds when the forward has left it."""
    arrive = segment.graph.forward_ops
    return next(m.activation_bytes for m in own.moments if m.op == arrive and not m.is_replay)


def held_until_then(segment: Segment, own: Run) -> int:
    """What is there beside that as long as the forward runs: what the program holds, records in vain."""
    leave = segment.graph.forward_ops - 1
    left = next(m.activation_bytes for m in own.moments if m.op == leave and not m.is_replay)
    return left - kept_after_forward(segment, own)
