"""The replayed caching allocator against a slow one, and against numbers that others saw on a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.core.allocator import CachingAllocator, Memory, OutOfMemory

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


# ---- the slow allocator: sets of addresses, and what is free follows from them ---------------------------


class Piece(NamedTuple):
    """Addresses from ``start`` up to ``end``."""

    start: int
    end: int


class SlowPool:
    """One pool. Only what is live and what is backed by memory is stored; free blocks are what lies between.

    Memory is counted in *grains* of 2 MiB, each with the number of the segment it belongs to; two free
    addresses are in one block if everything between them is free and of one segment.
    """

    def __init__(self, *, is_small: bool, expandable: bool) -> None:
        self.is_small = is_small
        self.expandable = expandable
        self.page = (2 if is_small else 20) * MIB
        self.segments: list[Piece] = []  # not expandable
        self.pages: set[int] = set()  # expandable
        self.live: list[Piece] = []
        self.end = 0

    def reserved(self) -> int:
        return sum(piece.end - piece.start for piece in self.segments) + self.page * len(self.pages)

    def backed(self) -> list[Piece]:
        """Stretches within which blocks may merge: segments, or pages in a row."""
        if not self.expandable:
            return self.segments
        firsts = sorted(page for page in self.pages if page - 1 not in self.pages)
        lasts = sorted(page for page in self.pages if page + 1 not in self.pages)
        pairs = zip(firsts, lasts, strict=True)
        return [Piece(first * self.page, (last + 1) * self.page) for first, last in pairs]

    def holes(self) -> list[Piece]:
        """Every free block, by address."""
        found = []
        for stretch in self.backed():
            inside = sorted(p for p in self.live if stretch.start <= p.start < stretch.end)
            edges = [stretch.start, *(edge for piece in inside for edge in piece), stretch.end]
            pairs = zip(edges[::2], edges[1::2], strict=True)
            found += [Piece(start, end) for start, end in pairs if start < end]
        return found

    def room(self, hole: Piece) -> float:
        """The size of a hole with the gap it can grow into."""
        if not self.expandable or hole.end % self.page or hole.end // self.page in self.pages:
            return hole.end - hole.start
        above = [page for page in self.pages if page >= hole.end // self.page]
        return min(above, default=float("inf")) * self.page - hole.start

    def tightest(self, wanted: int) -> Piece | None:
        fitting = sorted((hole.end - hole.start, hole) for hole in self.holes())
        holes = [hole for size, hole in fitting if size >= wanted]
        while self.expandable and len(holes) > 1 and self.room(holes[1]) < self.room(holes[0]):
            holes = holes[1:]
        return holes[0] if holes else None

    def grow(self, wanted: int) -> Piece:
        """Backs addresses for a request; returns the hole it can then have."""
        if not self.expandable:
            size = 2 * MIB if self.is_small else 20 * MIB if wanted < 10 * MIB else up(wanted, 2 * MIB)
            self.segments.append(Piece(self.end, self.end + size))
            self.end += size
            return self.segments[-1]
        gaps = [page for page in range(max(self.pages, default=-1) + 2) if page not in self.pages]
        for gap in gaps:
            start = gap * self.page
            if gap - 1 in gaps:
                continue  # a gap is tried from its first page only
            start = next((hole.start for hole in self.holes() if hole.end == start), start)
            if all(not start <= piece.start < start + wanted for piece in self.live):
                self.pages.update(range(gap, up(start + wanted, self.page) // self.page))
                return next(hole for hole in self.holes() if hole.start <= start < hole.end)
        raise AssertionError("there is always room at the end")

    def give_back(self) -> None:
        """What holds nothing alive goes."""
        self.segments = [s for s in self.segments if any(s.start <= p.start < s.end for p in self.live)]
        self.pages = {
            page
            for page in self.pages
            if any(p.start < (page + 1) * self.page and p.end > page * self.page for p in self.live)
        }


def up(size: int, step: int) -> int:
    return size + (-size) % step


class SlowAllocator:
    """The rules once more, looking everything up each time."""

    def __init__(self, expandable: bool, limit: int | None) -> None:
        self.expandable, self.limit = expandable, limit
        self.pools = [SlowPool(is_small=small, expandable=expandable) for small in (False, True)]
        self.asked: dict[int, tuple[int, SlowPool, Piece]] = {}
        self.count = self.retries = 0

    def allocate(self, size: int) -> int | None:
        """A handle, None if there is no memory."""
        wanted = up(size, 512)
        pool = self.pools[wanted <= MIB]
        hole = pool.tightest(wanted)
        if hole is None:
            segment = 2 * MIB if pool.is_small else 20 * MIB if wanted < 10 * MIB else up(wanted, 2 * MIB)
            if self.limit is not None and self.now().reserved_bytes + segment > self.limit:
                for one in self.pools:
                    one.give_back()
                self.retries += 1
                if self.now().reserved_bytes + segment > self.limit:
                    return None
            hole = pool.grow(wanted)
        least_left = 512 if pool.is_small or self.expandable else MIB + 1
        left = hole.end - hole.start - wanted
        piece = Piece(hole.start, hole.start + wanted) if left >= least_left else hole
        pool.live.append(piece)
        self.count += 1
        self.asked[self.count] = size, pool, piece
        return self.count

    def free(self, handle: int) -> None:
        _, pool, piece = self.asked.pop(handle)
        pool.live.remove(piece)

    def now(self) -> Memory:
        return Memory(
            sum(size for size, _, _ in self.asked.values()),
            sum(piece.end - piece.start for _, _, piece in self.asked.values()),
            sum(pool.reserved() for pool in self.pools),
        )


# ---- both side by side ----------------------------------------------------------------------------------

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(1, MIB),
    st.sampled_from([512, 513, MIB - 512, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB - 1, 10 * MIB, 20 * MIB]),
    st.integers(MIB, 10 * MIB),
    st.integers(1, 25).map(lambda count: count * MIB),
    st.integers(10 * MIB, 70 * MIB),
)
PICKS = st.integers(0, 1 << 16)
MOVES = st.lists(st.one_of(SIZES, SIZES, PICKS.map(lambda pick: -1 - pick)), max_size=60)
LIMITS = st.sampled_from([None, None, 41 * MIB, 64 * MIB, 150 * MIB])


def now(allocator: CachingAllocator) -> Memory:
    return Memory(allocator.requested_bytes, allocator.allocated_bytes, allocator.reserved_bytes)


@settings(max_examples=150)
@given(MOVES, st.booleans(), LIMITS)
def test_every_move_ends_where_the_slow_allocator_ends(
    moves: Sequence[int], expandable: bool, limit: int | None
) -> None:
    """A positive move allocates, a negative one releases one of what is live."""
    allocator = CachingAllocator(expandable_segments=expandable, limit_bytes=limit)
    slow = SlowAllocator(expandable, limit)
    live: list[tuple[int, int]] = []
    seen = [Memory()]
    for move in moves:
        if move > 0:
            theirs = slow.allocate(move)
            if theirs is None:
                with pytest.raises(OutOfMemory) as caught:
                    allocator.allocate(move)
                assert caught.value.reserved_bytes == slow.now().reserved_bytes
            else:
                live.append((allocator.allocate(move), theirs))
        elif live:
            ours, theirs = live.pop(move % len(live))
            allocator.free(ours)
            slow.free(theirs)
        assert now(allocator) == slow.now()
        assert allocator.retries == slow.retries
        seen.append(slow.now())
    highest = (max(memory.reserved_bytes for memory in seen), max(m.allocated_bytes for m in seen))
    assert (allocator.peak.reserved_bytes, allocator.peak.allocated_bytes) == highest
    assert allocator.peak.requested_bytes == max(memory.requested_bytes for memory in seen)


# ---- by hand --------------------------------------------------------------------------------------------


def reserved_after(*sizes: int, expandable: bool = False) -> int:
    """Reserved bytes once some sizes are allocated in order."""
    allocator = CachingAllocator(expandable_segments=expandable)
    for size in sizes:
        allocator.allocate(size)
    return allocator.reserved_bytes


@pytest.mark.parametrize(
    ("size", "reserved", "reserved_if_expandable"),
    [
        (0, 0, 0),
        (1, 2 * MIB, 2 * MIB),
        (MIB, 2 * MIB, 2 * MIB),
        (MIB + 1, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 20 * MIB, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 20 * MIB),  # rounded up to 512 B first
        (10 * MIB, 10 * MIB, 20 * MIB),
        (10 * MIB + 1, 12 * MIB, 20 * MIB),
        (21 * MIB, 22 * MIB, 40 * MIB),
    ],
)
def test_the_first_request_of_a_size_reserves_a_segment(
    size: int, reserved: int, reserved_if_expandable: int
) -> None:
    assert reserved_after(size) == reserved
    assert reserved_after(size, expandable=True) == reserved_if_expandable


def test_what_is_left_of_a_large_block_is_given_along_up_to_one_mib() -> None:
    """After 12 MiB are released, 11 MiB take all 12, and 11 MiB less 512 B leave the rest free."""
    for size, allocated in ((11 * MIB, 12 * MIB), (11 * MIB - 512, 11 * MIB - 512)):
        allocator = CachingAllocator()
        allocator.free(allocator.allocate(12 * MIB))
        allocator.allocate(size)
        assert now(allocator) == Memory(size, allocated, 12 * MIB)


def test_small_then_large_fragments_and_large_then_small_does_not_unless_segments_expand() -> None:
    """Ten blocks of 20 MiB leave ten segments of which none serves 200 MiB; one of 200 MiB serves all ten.

    PyTorch's own account: docs.pytorch.org/devlogs/eager/2026-06-01-cuda-caching-allocator.
    """

    def reserved(first: Sequence[int], then: Sequence[int], expandable: bool) -> int:
        allocator = CachingAllocator(expandable_segments=expandable)
        for handle in [allocator.allocate(size) for size in first]:
            allocator.free(handle)
        for size in then:
            allocator.allocate(size)
        return allocator.reserved_bytes

    ten, one = [20 * MIB] * 10, [200 * MIB]
    assert reserved(ten, one, False) == 400 * MIB
    assert reserved(one, ten, False) == 200 * MIB
    assert reserved(ten, one, True) == reserved(one, ten, True) == 200 * MIB
    halves = [MIB // 2] * 40  # on the other side of 1 MiB nothing is shared, even so
    assert reserved(one, halves, True) == 220 * MIB


def test_the_end_of_an_expandable_segment_is_kept_for_what_fits_nowhere_else() -> None:
    """15 MiB lie free at the start and 2 MiB at the end of a page: 1.5 MiB go to the start.

    So 21 MiB begin in the 2 MiB at the end, and one more page does.
    """
    allocator = CachingAllocator(expandable_segments=True)
    start = allocator.allocate(15 * MIB)
    allocator.allocate(3 * MIB)
    allocator.free(start)
    allocator.allocate(3 * MIB // 2)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate(21 * MIB)
    assert allocator.reserved_bytes == 40 * MIB


def test_pages_given_back_are_mapped_again_where_they_were() -> None:
    """Of 100 MiB, 60 in the middle are released and given back on a retry; three pages then fill the gap."""
    allocator = CachingAllocator(expandable_segments=True, limit_bytes=100 * MIB)
    allocator.allocate(20 * MIB)
    middle = allocator.allocate(60 * MIB)
    allocator.allocate(20 * MIB)
    allocator.free(middle)
    small = allocator.allocate(MIB)  # from the other pool, for which there is no page left
    assert (allocator.retries, allocator.reserved_bytes) == (1, 42 * MIB)
    allocator.free(small)
    allocator.allocate(58 * MIB)  # within the limit as PyTorch checks it, before it maps whole pages
    assert (allocator.retries, allocator.reserved_bytes) == (1, 102 * MIB)


def test_a_handle_is_good_for_one_release() -> None:
    allocator = CachingAllocator()
    for handle in (allocator.allocate(5), allocator.allocate(0)):
        allocator.free(handle)
        with pytest.raises(ValueError, match=f"nothing is allocated under handle {handle}"):
            allocator.free(handle)
    with pytest.raises(ValueError, match="-1 bytes cannot be allocated"):
        allocator.allocate(-1)


# ---- numbers that others saw on a device -----------------------------------------------------------------


def test_growing_logits_reserve_in_the_steps_that_were_logged() -> None:
    """github.com/ROCm/legacy-rocm-build/issues/6333, torch on an MI300: reserved and allocated, in GiB.

    bf16 logits of 151,936 words (what its allocated bytes divide into) for 17,000, 19,000 and 20,480 tokens,
    each released before the next: allocated 4.811, 5.377; reserved +4.812, +5.379 and, up to the logged
    maximum of 27.488 from 21.691, +5.797.
    """
    allocator = CachingAllocator()
    steps, allocated = [], []
    for tokens in (17_000, 19_000, 20_480):
        before = allocator.reserved_bytes
        handle = allocator.allocate(tokens * 151_936 * 2)
        steps.append(f"{(allocator.reserved_bytes - before) / GIB:.3f}")
        allocated.append(f"{allocator.allocated_bytes / GIB:.3f}")
        allocator.free(handle)
    assert steps == ["4.812", "5.379", "5.797"]
    assert allocated[:2] == ["4.811", "5.377"]


def test_a_batch_of_images_and_a_small_layer_reserve_what_was_reported() -> None:
    """github.com/pytorch/pytorch/issues/69526: 296 MB reserved and 294 MB allocated before the forward.

    512 float32 images of 3 x 224 x 224, after the weight and bias of ``Conv2d(3, 28, 3)``.
    """
    allocator = CachingAllocator()
    for size in (28 * 3 * 3 * 3 * 4, 28 * 4, 512 * 3 * 224 * 224 * 4):
        allocator.allocate(size)
    assert allocator.reserved_bytes == 296 * MIB
    assert allocator.allocated_bytes // MIB == 294


@pytest.mark.parametrize("expandable", [False, True])
def test_three_blocks_fill_a_cap_and_their_room_serves_one_as_large(expandable: bool) -> None:
    """PyTorch's test_max_split_expandable, in one mode: 40 MB three times under 120 MB, a fourth fails.

    Once the three are released, 120 MB in one piece must be there, by a retry where they lie in pieces.
    """
    allocator = CachingAllocator(expandable_segments=expandable, limit_bytes=120 * MIB)
    live = [allocator.allocate(40 * MIB) for _ in range(3)]
    with pytest.raises(OutOfMemory, match=r"40\.0 MiB more do not fit: 120\.0 MiB of 120\.0 MiB"):
        allocator.allocate(40 * MIB)
    assert allocator.retries == 1
    for handle in live:
        allocator.free(handle)
    allocator.allocate(120 * MIB)
    assert allocator.retries == (1 if expandable else 2)


@pytest.mark.parametrize("expandable", [False, True])
def test_a_block_that_stays_does_not_make_reserved_grow(expandable: bool) -> None:
    """github.com/pytorch/pytorch/pull/193400: without ``max_split_size_mb`` either mode stays below 500 MiB.

    Its cycles: 91 and 45.5 MiB, then 2 MiB that stay, then the first two are released; 64 MiB before.
    """
    allocator = CachingAllocator(expandable_segments=expandable)
    allocator.allocate(64 * MIB)
    for _ in range(101):
        pair = [allocator.allocate(91 * MIB), allocator.allocate(91 * MIB // 2)]
        allocator.allocate(2 * MIB)
        for handle in pair:
            allocator.free(handle)
    assert allocator.allocated_bytes == 266 * MIB
    assert allocator.peak.reserved_bytes < 500 * MIB
