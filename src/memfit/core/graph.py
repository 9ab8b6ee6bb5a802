"""What one training step does, as a pure value: operations, values, saves and their order.

Note [The step graph]
 1. A *storage* is a block of memory; views share it. A *value* is one version of one storage: an
    in-place write makes a new value of the same storage. Views are not operations here.
 2. An *op* is one call below autograd. ``ops[:forward_ops]`` is the forward, the rest the backward.
    It allocates storages, reads values, makes values, and overwrites values of the same storage.
 3. A *save* is one tensor that autograd keeps for the backward: packed in the forward, unpacked
    when its node runs, released when the node is done.
 4. ``log`` is the order of everything that moves memory. ``FREE`` is the moment at which a storage
    would die if autograd had saved nothing: the recorder never keeps a saved tensor alive, so the
    life that a plan decides about and the life that the program decides about are separate.
 5. External values (parameters, buffers, the batch, constants) are alive throughout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum
from typing import Any, NamedTuple

from memfit.core.audit import Audit
from memfit.core.basis import Basis
from memfit.core.soundness import check_profile
from memfit.core.stored import decode, is_intact, of_format, read, sealed

FORMAT = 3
COMPILED = "torch.compile of "  # begins the name of an op that stands for a region it hides
COMMUNICATION = "communication"  # the frame of what other processes have a part in: no op of the model
_MOST_OPS_MORE = 2  # that a node of the backward runs after one has made a gradient


class OpKey(NamedTuple):
    """The call site of an op: which module call, which op, the how many-th of it in that call."""

    frame: str
    op: str
    nth: int

    def __str__(self) -> str:
        """Readable form, for people only."""
        return f"{self.frame or 'loss'}: {self.op}" + (f" #{self.nth}" if self.nth else "")


class LogKind(IntEnum):
    """What a log entry says happened to the op, save or storage it names."""

    OP = 0
    PACK = 1
    UNPACK = 2
    RELEASE = 3
    FREE = 4


class LogEntry(NamedTuple):
    """One moment of the step: ``item`` is the number of an op, a save or a storage, as ``kind`` says."""

    kind: int
    item: int


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of memory. ``persists`` means it outlives the step (a gradient)."""

    size_bytes: int
    persists: bool = False


@dataclass(frozen=True, slots=True)
class Value:
    """One version of a storage. ``producer`` is an op index, -1 for an external value."""

    storage: int
    producer: int
    output: int
    is_overwritten: bool = False


@dataclass(frozen=True, slots=True)
class Op:
    """One call below autograd.

    ``overhead_s`` is what a replay of it costs beside its own ``seconds``: Python, where no kernel hides it.
    ``temporary_bytes`` are allocated inside the operator on top of its outputs. ``seed_bytes`` is
    the size of the generator state a replay of a random op needs, ``scratch_bytes`` of what a replay
    copies so as not to write to it (running statistics). ``inputs`` include what the op overwrites;
    ``overwrites`` are the old versions of the storages written in place. For ``is_sum_in_place`` see
    ``core/sums.py``.
    """

    key: OpKey
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    overwrites: tuple[int, ...] = ()
    allocates: tuple[int, ...] = ()
    seconds: float = 0.0
    temporary_bytes: int = 0
    seed_bytes: int = 0
    scratch_bytes: int = 0
    is_random: bool = False
    is_replayable: bool = False
    overhead_s: float = 0.0
    is_sum_in_place: bool = False

    @property
    def replay_s(self) -> float:
        """Seconds of running it once more."""
        return self.seconds + self.overhead_s


@dataclass(frozen=True, slots=True)
class Save:
    """A tensor autograd keeps: the value it lives in."""

    value: int


@dataclass(frozen=True, slots=True)
class StepGraph:
    """Forward and backward of one micro-batch of ``rows`` rows. See Note [The step graph].

    ``gradients_resident`` says whether ``.grad`` existed at the start, as it does from the second
    micro-batch on. ``coupled`` names ops that mix rows (BatchNorm in training mode). ``held_bytes`` above 0
    says that this is a micro-batch of the second of two passes: beside it lie the gradients of all outputs.
    """

    rows: int
    forward_ops: int
    gradients_resident: bool
    ops: tuple[Op, ...]
    storages: tuple[Storage, ...]
    values: tuple[Value, ...]
    saves: tuple[Save, ...]
    log: tuple[LogEntry, ...]
    coupled: tuple[str, ...] = ()
    held_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers no step can have: the planner would compute nonsense from them."""
        for op in self.ops:
            if not math.isfinite(op.replay_s) or min(op.seconds, op.overhead_s, op.temporary_bytes) < 0:
                raise ValueError(f"op {op.key} has impossible seconds or bytes; record the step again")

    @property
    def forward_s(self) -> float:
        """Seconds of one forward."""
        return sum(op.seconds for op in self.ops[: self.forward_ops])

    @property
    def seconds(self) -> float:
        """Seconds of forward and backward without any recomputation."""
        return sum(op.seconds for op in self.ops)

    def size_bytes(self, value: int) -> int:
        """Bytes of the storage a value lives in."""
        return self.storages[self.values[value].storage].size_bytes

    def value_key(self, value: int) -> ValueKey:
        """The name of a value that survives a new trace: its op's call site and output number."""
        found = self.values[value]
        return ValueKey(*self.ops[found.producer].key, found.output)

    def produced(self) -> Iterator[int]:
        """The values made by forward ops."""
        return (index for index, value in enumerate(self.values) if value.producer >= 0)

    def to_data(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "rows": self.rows,
            "forward_ops": self.forward_ops,
            "gradients_resident": self.gradients_resident,
            "ops": [list(asdict(op).values()) for op in self.ops],
            "storages": [[s.size_bytes, s.persists] for s in self.storages],
            "values": [[v.storage, v.producer, v.output, v.is_overwritten] for v in self.values],
            "saves": [s.value for s in self.saves],
            "log": [list(entry) for entry in self.log],
            "coupled": list(self.coupled),
            "held_bytes": self.held_bytes,
        }


EMPTY_GRAPH = StepGraph(1, 0, True, (), (), (), (), ())
_SINGLE_GRAPHS = ("first_update", "update", "loss_of_all")


class ValueKey(NamedTuple):
    """The name of a value across traces: the call site of its op, and which output it is."""

    frame: str
    op: str
    nth: int
    output: int


class Level(NamedTuple):
    """When a recomputed value is made for good, and when only in passing.

    ``segment`` is the stretch of the model whose backward wants it, counted from the start of the forward.
    A replay that serves a segment after ``retained_from`` makes it only in passing: it is let go of
    as soon as that replay has used it, and made once more later.
    """

    segment: int = 0
    retained_from: int = 0


@dataclass(frozen=True, slots=True)
class Residents:
    """Bytes that live through the whole step, by category.

    ``summed_bytes`` is what gradients take while micro-batches are added up, where that is not as much as
    afterwards: sums in float32 for parameters in reduced precision, pooled statistics of BatchNorm.
    The sizes say which blocks they lie in, as far as that is known: they matter to what is reserved only.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    parameter_sizes: tuple[int, ...] = ()
    gradient_sizes: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    summed_bytes: int | None = None
    summed_sizes: tuple[int, ...] = ()

    @property
    def resident_gradients(self) -> tuple[int, tuple[int, ...]]:
        """Bytes and blocks of the gradients that are there while a second micro-batch runs."""
        if self.summed_bytes is None:
            return self.gradients_bytes, self.gradient_sizes
        return self.summed_bytes, self.summed_sizes

    @property
    def totals(self) -> tuple[int, int, int, int]:
        """Bytes of each category."""
        return self.parameters_bytes, self.gradients_bytes, self.optimizer_bytes, self.batch_bytes

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return sum(self.totals)


def without_gradients(graph: StepGraph) -> StepGraph:
    """The same where each gradient goes as soon as it is there: into memory that is held for all of them.

    It goes when the node of the backward that made it has ended, at the latest two ops later.
    """
    storage_of = [value.storage for value in graph.values]
    last: dict[int, int] = {}
    for at, (kind, item) in enumerate(graph.log):
        if kind == LogKind.OP:
            op = graph.ops[item]
            touched = {*op.allocates, *(storage_of[value] for value in (*op.inputs, *op.outputs))}
            last |= {storage: at for storage in touched if graph.storages[storage].persists}
    freed: dict[int, list[LogEntry]] = {}
    for storage, at in last.items():
        freed.setdefault(_end_of_node(graph.log, at), []).append(LogEntry(LogKind.FREE, storage))
    log = tuple(e for at, entry in enumerate(graph.log) for e in (entry, *freed.get(at, ())))
    storages = tuple(replace(storage, persists=False) for storage in graph.storages)
    return replace(graph, storages=storages, log=log)


def _end_of_node(log: tuple[LogEntry, ...], at: int) -> int:
    """Where the node ends that runs an op: it releases its saves then, if it has some."""
    ops = 0
    for later in range(at + 1, len(log)):
        ops += log[later].kind == LogKind.OP
        if log[later].kind == LogKind.RELEASE or ops == _MOST_OPS_MORE:
            return later
    return len(log) - 1


def in_blocks(sizes: Iterable[int], block_bytes: int) -> int:
    """Bytes of some blocks as an allocator rounds them."""
    return sum(-(-size_bytes // block_bytes) * block_bytes for size_bytes in sizes)


@dataclass(frozen=True, slots=True)
class Profile:
    """What one step of a model does, at every micro-batch size worth considering.

    Attributes:
        rows: Rows of the effective batch.
        graphs: One graph a candidate micro-batch size, largest first.
        residents: Bytes alive throughout; gradients as after the first micro-batch.
        first_update: The ``optimizer.step()`` in which the optimizer's state is born: what it persists.
        update: Every later one.
        fixed_s: Seconds of a micro-batch that do not grow with its rows.
        alignment_bytes: The allocator rounds every block up to this.
        unexplained_bytes: What a measured run showed above the prediction; added to every peak.
        source: How it was recorded ("fake", "real") and where the seconds come from.
        basis: What it depends on: model, batch, versions and so on, each as a short text.
        loss_of_all: Between two passes: the outputs of all micro-batches are joined, then the loss alone goes
            forward and backward.
        audit: Whether micro-batches add up, where that was asked; it holds as long as the profile does.
    """

    rows: int
    graphs: tuple[StepGraph, ...]
    residents: Residents
    first_update: StepGraph = EMPTY_GRAPH
    update: StepGraph = EMPTY_GRAPH
    fixed_s: float = 0.0
    alignment_bytes: int = 1
    unexplained_bytes: int = 0
    source: str = ""
    basis: Basis = ()
    loss_of_all: StepGraph = EMPTY_GRAPH
    audit: Audit | None = None

    @property
    def update_s(self) -> float:
        """Seconds of ``optimizer.step()``."""
        return self.update.seconds

    def graph(self, micro_batch_size: int) -> StepGraph:
        """The graph of the smallest recorded micro-batch of at least this size.

        Raises:
            ValueError: No recorded micro-batch is that large.
        """
        fitting = [graph for graph in self.graphs if graph.rows >= micro_batch_size]
        if not fitting:
            raise ValueError(
                f"the profile has no micro-batch of {micro_batch_size} rows (its largest has "
                f"{max(graph.rows for graph in self.graphs)}); profile the batch again"
            )
        return min(fitting, key=lambda graph: graph.rows)

    def to_json(self) -> str:
        """A JSON text that :meth:`from_json` reads back to an equal value."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"graphs": [graph.to_data() for graph in self.graphs], "residents": asdict(self.residents)}
        data |= {name: data[name].to_data() for name in _SINGLE_GRAPHS}
        data["audit"] = None if self.audit is None else self.audit.to_data()
        return sealed(data | {"format": FORMAT})

    @staticmethod
    def from_json(text: str) -> Profile:
        """Reads a profile. One without a seal has no ``basis``: it can be planned with, not trained with.

        Raises:
            ValueError: The text is not a profile of this version, or was changed since it was written.
        """
        noun = "a memfit profile"
        data = decode(text, noun)
        fields_of_it = of_format(data, FORMAT, noun)
        profile = read(Profile, fields_of_it, noun, check_profile)
        return profile if is_intact(data, noun) else replace(profile, basis=())
