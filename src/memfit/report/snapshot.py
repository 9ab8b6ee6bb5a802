"""A planned step as the memory snapshot that PyTorch's viewer opens (https://pytorch.org/memory_viz).

Note [Memory snapshot]
 1. The format is that of ``torch.cuda.memory._snapshot()``: one device, one segment, and every allocation and
    release of the step in order. Plain dicts, lists, texts and integers, pickled with protocol 4: the viewer
    reads no later one, and a file that holds nothing else can be opened without trust.
 2. Sizes are those of the timeline, so that the peak which the viewer shows is the predicted one. Addresses
    are made up: each block lies at the lowest place where it fits. So the segment's size says little; what
    CUDA's allocator will reserve is said by ``memfit plan``.
 3. A frame has no line of a source file: its file is the module path, its line the how many-th such op it is
    in that call (from 0), its name the op. Around it lie the outer modules, the phase and the part of the
    step.
 4. Where an event has a category the viewer colours by it, and a version of it then fails unless one event is
    of category "unknown": the mark at the end is.
"""

from __future__ import annotations

import pickle
from bisect import bisect, insort
from collections.abc import Iterator
from typing import Any, Final

from memfit.core.blocks import BlockMove, Place, block_moves
from memfit.core.graph import Profile
from memfit.core.plan import Plan
from memfit.core.unrolled import unrolled
from memfit.report.places import modules_of

PROTOCOL: Final = 4
_START: Final = 1 << 32  # no block lies at address 0, which means "none" elsewhere
_ROOM_BYTES: Final = 1 << 52  # every address is an integer that a browser has exactly

Frame = dict[str, Any]


def snapshot(profile: Profile, plan: Plan, *, most_micro_batches: int) -> dict[str, Any]:
    """The step of a plan as a snapshot. Pure. See Note [Memory snapshot].

    Args:
        most_micro_batches: How many are told; the others are like the last of these.

    Raises:
        ValueError: The plan was made from another profile.
    """
    step = unrolled(profile, plan, most_micro_batches=most_micro_batches)
    writer = _Writer()
    for move in block_moves(profile, step):
        writer.add(move)
    mark = {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "frames": [], "category": "unknown"}
    return {"segments": [writer.segment()], "device_traces": [[*writer.events, mark]]}


def pickled(content: dict[str, Any]) -> bytes:
    """The file that a viewer opens."""
    return pickle.dumps(content, protocol=PROTOCOL)


class _Writer:
    """Places blocks and writes down what happens to them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._addresses = _Addresses()
        self._live: dict[int, dict[str, Any]] = {}
        self._frames: dict[Place, list[Frame]] = {}

    def add(self, move: BlockMove) -> None:
        """A block comes or goes; one that goes is waited for by nobody, so both events of that follow."""
        frames = self._frames_of(move.place)
        if move.size_bytes > 0:
            address = self._addresses.take(move.size_bytes)
            event = {"addr": address, "size": move.size_bytes, "stream": 0, "frames": frames}
            self._live[move.block] = event
            self.events.append({"action": "alloc", **event, "category": move.category})
            return
        gone = self._live.pop(move.block)
        self._addresses.give(gone["addr"], gone["size"])
        for action in ("free_requested", "free_completed"):
            self.events.append({"action": action, **gone, "frames": frames})

    def segment(self) -> dict[str, Any]:
        """The one segment, as it is at the end."""
        blocks: list[dict[str, Any]] = []
        address = _START
        for event in sorted(self._live.values(), key=lambda event: int(event["addr"])):
            if event["addr"] > address:
                blocks.append(_free(address, event["addr"] - address))
            size_bytes = event["size"]
            sizes = {"address": event["addr"], "size": size_bytes, "requested_size": size_bytes}
            blocks.append({**sizes, "state": "active_allocated", "frames": event["frames"]})
            address = event["addr"] + size_bytes
        if self._addresses.top > address:
            blocks.append(_free(address, self._addresses.top - address))
        live_bytes = sum(event["size"] for event in self._live.values())
        sizes = dict.fromkeys(("allocated_size", "active_size", "requested_size"), live_bytes)
        place = {"device": 0, "address": _START, "total_size": self._addresses.top - _START, **sizes}
        kind = {"stream": 0, "segment_type": "large", "segment_pool_id": (0, 0), "is_expandable": False}
        return {**place, **kind, "frames": [], "blocks": blocks}

    def _frames_of(self, place: Place) -> list[Frame]:
        """Innermost first; one list for each place, which the file holds once. See Note 3."""
        if place not in self._frames:
            self._frames[place] = list(_stack(place))
        return self._frames[place]


class _Addresses:
    """The lowest place where a block fits."""

    def __init__(self) -> None:
        self.top = _START
        self._holes = [(_START, _ROOM_BYTES)]

    def take(self, size_bytes: int) -> int:
        """An address with so many free bytes after it."""
        at = next(at for at, (_, room_bytes) in enumerate(self._holes) if room_bytes >= size_bytes)
        address, room_bytes = self._holes[at]
        self._holes[at : at + 1] = (
            [(address + size_bytes, room_bytes - size_bytes)] if room_bytes > size_bytes else []
        )
        self.top = max(self.top, address + size_bytes)
        return address

    def give(self, address: int, size_bytes: int) -> None:
        """Makes a hole, together with those beside it."""
        at = bisect(self._holes, (address,))
        if at < len(self._holes) and self._holes[at][0] == address + size_bytes:
            size_bytes += self._holes.pop(at)[1]
        if at and sum(self._holes[at - 1]) == address:
            address, before_bytes = self._holes.pop(at - 1)
            size_bytes += before_bytes
        insort(self._holes, (address, size_bytes))


def _stack(place: Place) -> Iterator[Frame]:
    """The op, the modules around it, and the phase; what is not in the model has no modules."""
    key = place.key
    if place.phase == place.part:
        yield _frame(place.part, key.nth, key.op)
        return
    *outer, module = modules_of(key)
    yield _frame(module, key.nth, key.op)
    yield from (_frame(name, 0, "forward") for name in reversed(outer))
    yield _frame(place.part, 0, place.phase)


def _frame(filename: str, line: int, name: str) -> Frame:
    """One line of a stack."""
    return {"filename": filename, "line": line, "name": name}


def _free(address: int, size_bytes: int) -> dict[str, Any]:
    """A hole of a segment."""
    return {
        "address": address,
        "size": size_bytes,
        "requested_size": 0,
        "state": "inactive",
        "frames": [],
    }
