"""What others do by hand, to compare with: no recomputation, and blocks under ``torch.utils.checkpoint``.

Note [Strategies]
 1. A *block* is a call of a numbered module (``model.layers.3``) that does the same as another one, or stands
    in the same list. Numbers nest (``stages.1.layers.0``); each depth at which modules repeat is a choice.
 2. Of every k blocks the first is checkpointed. The last would take as long and more memory: the backward
    begins with what the blocks at the end have kept.
 3. All are run by ``core/regions.py`` and priced by the rule of a plan: seconds of what runs again, and
    Python where no kernel hides it. A plan pays ``Op.overhead_s`` for each op it replays, the others a
    part of that for each op and as much as some ops for each region. By how much the others' Python is
    cheaper or dearer is measured beside memfit's own (``benchmarks/overhead.py``: 22 us a replayed op, 11 us
    one under a checkpoint, 33 us one of a selective region; 95 and 162 us a region).
 4. Early stop is on, as is torch's default. A block of which torch would refuse an argument stays as it is.
 5. Selective checkpointing saves what matmuls, convolutions and attention make. torchtitan runs every second
    matmul again all the same; that is a strategy of its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memfit.core.candidate import Candidate
from memfit.core.frontier import undominated
from memfit.core.graph import Profile, StepGraph
from memfit.core.links import Choices
from memfit.core.regions import Region, can_be_region, run_regions
from memfit.core.sums import out_of_place
from memfit.core.timeline import floors

_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_scaled_mm"})
_SAVED = _MATMULS | {"convolution", "_convolution"}
_ATTENTION = ("_scaled_dot_product_", "_flash_attention_forward", "_efficient_attention_forward")
_HARDLY_FASTER = 0.98
_DEPTHS = 3  # of numbers in the path of a module


class Python(NamedTuple):
    """Python of checkpointing, where replaying an op with memfit costs 1. See Note [Strategies] 3."""

    of_an_op: float
    of_a_region: float
    is_of_all_ops: bool  # in the mode of selective checkpointing each op pays, twice, cached or not


CHECKPOINT = Python(11 / 22, 95 / 22, is_of_all_ops=False)
SELECTIVE = Python(33 / 22, 162 / 22, is_of_all_ops=True)


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to run the step that needs no planner, and what it is predicted to cost; compare ``Plan``.

    Attributes:
        family: "plain", "every block", "every k-th block", or, with every block under selective
            checkpointing, "matmuls saved" and "half the matmuls".
        name: The same, with the number: "every 2nd block".
        blocks: The list of modules that the blocks are, such as "model.layers"; empty for "plain".
        micro_batch_size: Rows of the largest micro-batch.
        gradient_accumulation_steps: Number of micro-batches.
        predicted_peak_bytes: Highest allocated bytes of the whole step.
        predicted_step_s: Seconds of the step, update and recomputation included.
        forward_s: Seconds of the forwards of one step.
        recompute_s: Seconds of recomputation in one step.
    """

    family: str
    name: str
    blocks: str
    micro_batch_size: int
    gradient_accumulation_steps: int
    predicted_peak_bytes: int
    predicted_step_s: float
    forward_s: float
    recompute_s: float


def strategies(profile: Profile, *, micro_batch_size: int | None = None) -> list[Strategy]:
    """What recomputing by hand costs: for each kind of strategy, its undominated points, least memory first.

    Plain comes first; it is alone where the model has no repeated blocks. Pure, like ``find_plan``.

    Args:
        micro_batch_size: Pins the micro-batch; otherwise each point has its own.

    Raises:
        ValueError: The profile has no such micro-batch.
    """
    graphs = profile.graphs if micro_batch_size is None else (profile.graph(micro_batch_size),)
    choices = Choices(profile.alignment_bytes)
    floor = floors(profile)
    families: dict[str, list[Strategy]] = {}
    for graph in graphs:
        least = floor[graph.held_bytes > 0]
        candidate = Candidate(profile, graph, choices, least)
        in_a_mode = Candidate(profile, out_of_place(graph), choices, least)
        for strategy in _of_size(candidate, in_a_mode):
            families.setdefault(strategy.family, []).append(strategy)
    return [strategy for family in families.values() for strategy in undominated(family)]


def notable(found: Iterable[Strategy]) -> list[Strategy]:
    """The strategies to show, least memory first: those no other beats, and the fastest of each family.

    But not what plain beats, nor what is hardly faster than the one before it in its family.
    """
    families: dict[str, list[Strategy]] = {}
    for strategy in found:
        families.setdefault(strategy.family, []).append(strategy)
    plain = families.get("plain", [])
    useful = [
        [s for s in undominated([*members, *plain]) if s.family == family]
        for family, members in families.items()
    ]
    fastest = [members[-1] for members in useful if members]
    best = undominated(strategy for members in useful for strategy in members)
    rows: list[Strategy] = []
    last_s: dict[str, float] = {}
    for strategy in sorted(
        {*best, *fastest}, key=lambda s: (s.predicted_peak_bytes, s.predicted_step_s, s.name)
    ):
        limit_s = _HARDLY_FASTER * last_s.get(strategy.family, math.inf)
        if strategy in fastest or strategy.predicted_step_s <= limit_s:
            rows.append(strategy)
            last_s[strategy.family] = strategy.predicted_step_s
    return rows


def _of_size(candidate: Candidate, in_a_mode: Candidate) -> Iterator[Strategy]:
    """Every strategy at one micro-batch size; selective checkpointing runs a dispatch mode."""
    graph = candidate.graph
    yield _strategy(candidate, "plain", "plain", "", [])
    for name, blocks in repeated_blocks(graph).items():
        every = [Region(ops) for ops in blocks]
        yield _strategy(candidate, "every block", "every block", name, every)
        for k in _intervals(len(blocks)):
            yield _strategy(candidate, "every k-th block", f"every {_ordinal(k)} block", name, every[::k])
        for family, half in (("matmuls saved", False), ("half the matmuls", True)):
            regions = [Region(ops, saved_by_policy(in_a_mode.graph, ops, half=half)) for ops in blocks]
            yield _strategy(in_a_mode, family, family, name, regions, SELECTIVE)


def _strategy(
    candidate: Candidate,
    family: str,
    name: str,
    blocks: str,
    regions: Sequence[Region],
    python: Python = CHECKPOINT,
) -> Strategy:
    """Simulates and prices one."""
    profile, graph = candidate.profile, candidate.graph
    simulated = run_regions(graph, regions, alignment_bytes=profile.alignment_bytes)
    recompute_s = sum(graph.ops[op].seconds for op in simulated.replayed_ops)
    recompute_s += python_s(graph, regions, simulated.replayed_ops, python)
    peak_bytes = candidate.base_bytes + simulated.peak.total_bytes
    return Strategy(
        family=family,
        name=name,
        blocks=blocks,
        micro_batch_size=graph.rows,
        gradient_accumulation_steps=candidate.steps,
        predicted_peak_bytes=max(peak_bytes, candidate.floor.total_bytes),
        predicted_step_s=candidate.step_s(recompute_s),
        forward_s=candidate.largest * graph.forward_s,
        recompute_s=candidate.largest * recompute_s,
    )


def python_s(graph: StepGraph, regions: Sequence[Region], replayed: Sequence[int], python: Python) -> float:
    """Seconds of Python that checkpointing costs in one micro-batch. See Note [Strategies] 3.

    Args:
        replayed: The ops that run again.
    """
    found_s = 0.0
    if not python.is_of_all_ops:
        found_s = python.of_an_op * sum(graph.ops[op].overhead_s for op in replayed)
    for region in regions:
        region_s = sum(graph.ops[op].overhead_s for op in region.ops)
        found_s += python.of_a_region * region_s / len(region.ops)
        if python.is_of_all_ops:
            found_s += python.of_an_op * region_s
    return found_s


def _intervals(blocks: int) -> list[int]:
    """The least k for each number of blocks that are the first of k, but for all of them."""
    least = {-(-blocks // k): k for k in range(blocks, 1, -1)}
    return sorted(least.values())


def _ordinal(number: int) -> str:
    """2nd, 3rd, 4th, 11th, 21st."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    is_teen = 10 <= number % 100 < 20
    return f"{number}{'th' if is_teen else endings.get(number % 10, 'th')}"


def saved_by_policy(graph: StepGraph, ops: range, *, half: bool = False) -> frozenset[int]:
    """The ops of a block whose outputs selective checkpointing saves: matmuls, convolutions and attention.

    Args:
        half: Only the first, third and so on of the matmuls; all of the others.
    """
    saved: set[int] = set()
    matmuls = 0
    for index in ops:
        op = graph.ops[index]
        name = op.key.op.partition(".")[2].partition(".")[0]  # "aten.mm.default"
        matmuls += name in _MATMULS
        is_skipped = half and name in _MATMULS and matmuls % 2 == 0
        # torch refuses to take a saved output that was written to.
        is_written = any(graph.values[value].is_overwritten for value in op.outputs)
        if (name in _SAVED or name.startswith(_ATTENTION)) and not is_skipped and not is_written:
            saved.add(index)
    return frozenset(saved)


# ---- blocks --------------------------------------------------------------------------------------


def repeated_blocks(graph: StepGraph) -> dict[str, list[range]]:
    """The forward ops of each call of a repeated module, by what the modules are called; one entry a depth.

    The outermost numbered modules that repeat come first. See Note [Strategies] 1.
    """
    found: dict[str, list[range]] = {}
    for depth in range(_DEPTHS):
        blocks = _blocks_from(graph, depth)
        names = dict.fromkeys(re.sub(r"\b\d+\b", "*", _list_of(path)) or "model" for path, _ in blocks)
        ranges = [ops for _, ops in blocks if can_be_region(graph, ops)]
        if ranges and ranges not in found.values():
            found[", ".join(names)] = ranges
    return found


def _blocks_from(graph: StepGraph, depth: int) -> list[tuple[str, range]]:
    """The blocks at a depth, and deeper where modules do not repeat."""
    blocks: list[tuple[str, range]] = []
    pending = [range(graph.forward_ops)]
    for level in range(depth, _DEPTHS):
        calls = [call for ops in pending for call in _calls(graph, ops, level) if len(call[1]) > 1]
        kinds = Counter(_kind(graph, ops) for _, ops in calls)
        lists = {_list_of(path) for path, ops in calls if kinds[_kind(graph, ops)] > 1}
        blocks += [(path, ops) for path, ops in calls if _list_of(path) in lists]
        pending = [ops for path, ops in calls if _list_of(path) not in lists]
    return sorted(blocks, key=lambda block: block[1].start)


def _list_of(path: str) -> str:
    """The path of the list that a numbered module is in."""
    return path.rpartition(".")[0]


def _kind(graph: StepGraph, ops: range) -> tuple[str, ...]:
    """What a stretch of ops does."""
    return tuple(graph.ops[op].key.op for op in ops)


def _calls(graph: StepGraph, ops: range, depth: int) -> Iterator[tuple[str, range]]:
    """The calls of numbered modules, one after the other.

    A new one begins where the path changes, or where the module that began it is called again.
    """
    start, path, opening = ops.start, "", ""
    for op in ops:
        frame = graph.ops[op].key.frame
        new_path = _numbered(frame, depth)
        is_same_call = frame == opening or _module(frame) != _module(opening)
        if new_path != path or not is_same_call:
            if path:
                yield path, range(start, op)
            start, path, opening = op, new_path, frame
    if path:
        yield path, range(start, ops.stop)


def _module(frame: str) -> str:
    """The module of a call."""
    return frame.partition("#")[0]


def _numbered(frame: str, depth: int) -> str:
    """The path of a frame up to its number at ``depth``; empty if it has fewer."""
    parts = _module(frame).split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[depth] + 1]) if depth < len(numbers) else ""
