"""From a step graph to the links of a chain, and from a way through the chain back to the values to drop.

Note [Links]
 1. Choices are worked out once a class of segments, and tried again where only sizes and seconds differ: in
    the graphs of other micro-batch sizes.
 2. A segment that is run again drops also what lies on the way to the next entry and nothing saves; what its
    choice keeps is made for good when it is run for the segment that ``Way.made_for`` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from memfit.core.chain import Link, Way
from memfit.core.choices import Choice, read_choices, tried_choices
from memfit.core.graph import Level, StepGraph
from memfit.core.segments import Segment, read_segments


@dataclass(slots=True)
class Choices:
    """The choices of each class of segments, for one profile's alignment. See Note [Links] 1."""

    alignment_bytes: int
    by_class: dict[str, tuple[Choice, ...]] = field(default_factory=dict)
    by_shape: dict[str, tuple[Choice, ...]] = field(default_factory=dict)
    by_passing: dict[tuple[str, frozenset[int]], Choice] = field(default_factory=dict)

    def of(self, segment: Segment) -> tuple[Choice, ...]:
        """The choices of a segment."""
        if segment.class_key not in self.by_class:
            known = self.by_shape.get(segment.shape_key)
            if known is None:
                found = read_choices(segment, self.alignment_bytes)
            else:
                tried = [choice.dropped for choice in known]
                found = tried_choices(segment, tried, self.alignment_bytes)
            self.by_class[segment.class_key] = found
            self.by_shape.setdefault(segment.shape_key, found)
        return self.by_class[segment.class_key]

    def passed(self, segment: Segment, dropped: frozenset[int]) -> Choice:
        """What a segment leaves behind if all of this is dropped."""
        key = segment.class_key, dropped
        if key not in self.by_passing:
            (found,) = tried_choices(segment, [dropped], self.alignment_bytes)
            self.by_passing[key] = found
        return self.by_passing[key]


def read_links(graph: StepGraph, choices: Choices) -> tuple[Link, ...]:
    """The chain of a graph; empty where it is none."""
    segments = read_segments(graph, alignment_bytes=choices.alignment_bytes)
    links = []
    for index, segment in enumerate(segments):
        known = choices.of(segment)
        everything = min(known, key=lambda c: (c.kept_bytes, c.peak_bytes, c.seconds))
        following = segments[index + 1] if index + 1 < len(segments) else None
        path = path_to(segment, following)
        passed = choices.passed(segment, everything.dropped | path)
        links.append(
            Link(
                segment=segment,
                choices=known,
                path=path,
                again_s=tuple(again_s(segment, path, everything.dropped, choice) for choice in known),
                pass_s=again_s(segment, path, everything.dropped, everything),
                everything=everything,
                stuck_bytes=max(0, passed.kept_bytes - segment.entry_bytes),
                held_bytes=passed.held_bytes,
                forward_peak_bytes=passed.forward_peak_bytes,
                last=passed,
            )
        )
    return tuple(links)


def path_to(segment: Segment, following: Segment | None) -> frozenset[int]:
    """The values of a segment's graph that the entry of the next is made from, and that entry."""
    graph = segment.graph
    if following is None or following.values[0] not in segment.values:
        return frozenset()
    found: set[int] = set()
    stack = [segment.values.index(following.values[0])]
    while stack:
        value = stack.pop()
        producer = graph.ops[graph.values[value].producer]
        if value not in found and producer.is_replayable:
            found.add(value)
            stack.extend(producer.inputs)
    return frozenset(found)


def again_s(segment: Segment, path: frozenset[int], most: frozenset[int], choice: Choice) -> float:
    """Seconds to run a segment again up to the next entry, keeping what a choice keeps."""
    graph = segment.graph
    stack, ops = [*path, *(most - choice.dropped)], set[int]()
    while stack:
        producer = graph.values[stack.pop()].producer
        if producer not in ops:
            ops.add(producer)
            stack.extend(v for v in graph.ops[producer].inputs if v in most or v in path)
    return sum(graph.ops[op].replay_s for op in sorted(ops))


def levels_of(links: Sequence[Link], ways: Sequence[Way]) -> dict[int, Level]:
    """The values of the whole graph to drop, with levels, in order."""
    found: dict[int, Level] = {}
    for index, (link, way) in enumerate(zip(links, ways, strict=True)):
        segment = link.segment
        dropped = dict.fromkeys(way.choice.dropped, Level(index, index))
        if way.made_for >= 0:
            saved = {save.value for save in segment.graph.saves}
            kept = (link.everything.dropped | (link.path & saved)) - way.choice.dropped
            path = link.path - kept - way.choice.dropped
            dropped |= dict.fromkeys(path, Level(index, index))
            dropped |= dict.fromkeys(kept, Level(index, way.made_for))
        for value, level in dropped.items():
            if segment.values[value] >= 0:
                found.setdefault(segment.values[value], level)
    for index, (link, way) in enumerate(zip(links, ways, strict=True)):
        entry = link.segment.values[0]
        if way.entry_for >= 0:
            found[entry] = Level(index, way.entry_for)
        else:
            found.pop(entry, None)
    if all(way.made_for < 0 for way in ways):
        return dict.fromkeys(sorted(found), Level())
    return dict(sorted(found.items()))
