"""PyTorch's CUDA caching allocator as arithmetic: where blocks go, without a device.

Note [Caching allocator], from c10/cuda/CUDACachingAllocator.cpp of PyTorch, for one device and one stream.
 1. A request is rounded up to 512 B. At most 1 MiB it is served by the small pool, else by the large one;
    the pools share nothing.
 2. A pool serves from its smallest free block that is large enough, of equals the one of lowest address. What
    is left of that block stays free if it is at least 512 B (small pool), or more than 1 MiB (large pool);
    otherwise it belongs to the request and counts as allocated.
 3. Where none is large enough a new segment comes from the device: 2 MiB in the small pool; in the large
    one 20 MiB for a request below 10 MiB, else the request rounded up to 2 MiB. Reserved is their sum.
 4. A freed block merges with its free neighbours of the same segment. But for 6, segments are never given
    back.
 5. Expandable segments: a pool is one range of addresses, mapped in pages of 2 MiB (small) or 20 MiB
    (large). What is left of a block stays free from 512 B on. Where no free block is large enough, pages are
    mapped after the free block that lies before the first gap, or at the end. In 2, a free block before a gap
    counts with the gap, so that the end is taken only if nothing else fits as tightly.
 6. Where a new segment would pass the limit, every segment without a live block is given back (of expandable
    ones, every page), and the request is tried once more: that is a retry. The limit is checked by the
    sizes of 3 in either mode, as PyTorch does it.

Not replayed, and off by default in PyTorch: ``max_split_size_mb``, ``roundup_power2_divisions``,
``garbage_collection_threshold``, graphs and other private pools. Where the device puts a segment is not
known: here each one lies above those before it, which decides between free blocks of equal size only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Final

from memfit.errors import MemfitError
from memfit.units import format_bytes

MIN_BLOCK_BYTES: Final = 512
_SMALL_BYTES: Final = 1 << 20  # the largest request of the small pool
_SMALL_SEGMENT_BYTES: Final = 2 << 20
_LARGE_SEGMENT_BYTES: Final = 20 << 20
_OWN_SEGMENT_BYTES: Final = 10 << 20  # a request from here on has a segment of its own size
_SEGMENT_STEP_BYTES: Final = 2 << 20
_RANGE_BYTES: Final = _LARGE_SEGMENT_BYTES << 32  # more addresses than any device has memory


class OutOfMemory(MemfitError):
    """A request does not fit the limit, not even after a retry.

    Attributes:
        size_bytes: What was asked for.
        reserved_bytes: What is reserved all the same, for what is still alive.
        limit_bytes: What may be reserved.
    """

    def __init__(self, size_bytes: int, reserved_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"{format_bytes(size_bytes)} more do not fit: {format_bytes(reserved_bytes)} of "
            f"{format_bytes(limit_bytes)} are reserved by what is alive"
        )
        self.size_bytes = size_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Three answers to how much memory is in use.

    Attributes:
        requested_bytes: What the program asked for.
        allocated_bytes: The blocks it got (``torch.cuda.memory_allocated``).
        reserved_bytes: The segments they lie in (``torch.cuda.memory_reserved``), which nobody else can use.
    """

    requested_bytes: int = 0
    allocated_bytes: int = 0
    reserved_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Block:
    """A stretch of addresses between its neighbours in a segment: live, free, or not mapped."""

    address: int
    size_bytes: int
    requested_bytes: int = 0
    is_live: bool = False
    is_mapped: bool = True
    before: _Block | None = None
    after: _Block | None = None

    @property
    def room_bytes(self) -> int:
        """Its size, and that of the gap after it."""
        gap = self.after
        return self.size_bytes + (gap.size_bytes if gap is not None and not gap.is_mapped else 0)


@dataclass(slots=True, eq=False)
class _Pool:
    """The blocks nobody uses, in order. Addresses are unique, so that blocks are never compared."""

    is_small: bool
    free: list[tuple[int, int, _Block]] = field(default_factory=list)
    gaps: list[tuple[int, _Block]] = field(default_factory=list)
    next_address: int = 0

    @property
    def page_bytes(self) -> int:
        """A page of an expandable segment."""
        return _SMALL_SEGMENT_BYTES if self.is_small else _LARGE_SEGMENT_BYTES

    def put(self, block: _Block) -> None:
        """Takes a block in."""
        if block.is_mapped:
            insort(self.free, (block.size_bytes, block.address, block))
        else:
            insort(self.gaps, (block.address, block))

    def take(self, block: _Block) -> None:
        """Lets a block go; it has the size it came with."""
        if block.is_mapped:
            del self.free[bisect_left(self.free, (block.size_bytes, block.address))]
        else:
            del self.gaps[bisect_left(self.gaps, (block.address,))]

    def add_range(self, size_bytes: int, *, is_mapped: bool) -> _Block:
        """A new segment above all others."""
        block = _Block(self.next_address, size_bytes, is_mapped=is_mapped)
        self.next_address += size_bytes
        return block


class CachingAllocator:
    """Replays allocations and releases by the rules of Note [Caching allocator].

    Args:
        expandable_segments: Whether ``expandable_segments:True`` is set.
        limit_bytes: What may be reserved, as ``torch.cuda.set_per_process_memory_fraction`` sets it.

    Attributes:
        retries: ``num_alloc_retries`` of ``torch.cuda.memory_stats``.

    Cost: a search in a sorted list for each allocation and release.
    """

    def __init__(self, *, expandable_segments: bool = False, limit_bytes: int | None = None) -> None:
        self._expandable = expandable_segments
        self._limit_bytes = limit_bytes
        self._pools = {is_small: _Pool(is_small) for is_small in (True, False)}
        self._live: dict[int, _Block | None] = {}
        self._next_handle = 0
        self._now = [0, 0, 0]
        self._peak = [0, 0, 0]
        self.retries = 0

    @property
    def requested_bytes(self) -> int:
        """Bytes the program asked for and has not released."""
        return self._now[0]

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the live blocks."""
        return self._now[1]

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all segments."""
        return self._now[2]

    @property
    def peak(self) -> Memory:
        """The highest value that each of the three has had."""
        return Memory(*self._peak)

    def allocate(self, size_bytes: int) -> int:
        """Serves a request; returns the handle to release it with. Nothing is asked of a pool for 0 bytes.

        Raises:
            OutOfMemory: It does not fit the limit.
            ValueError: A negative size.
        """
        if size_bytes < 0:
            raise ValueError(f"{size_bytes} bytes cannot be allocated")
        block = self._serve(size_bytes) if size_bytes else None
        self._next_handle += 1
        self._live[self._next_handle] = block
        return self._next_handle

    def free(self, handle: int) -> None:
        """Releases what a handle stands for.

        Raises:
            ValueError: It was released before, or never given out.
        """
        if handle not in self._live:
            raise ValueError(f"nothing is allocated under handle {handle}")
        block = self._live.pop(handle)
        if block is None:
            return
        self._count(-block.requested_bytes, -block.size_bytes, 0)
        block.is_live = False
        # A block's place says its pool: both neighbours, and all of a segment, are of the same one.
        pool = self._pools[_rounded(block.requested_bytes) <= _SMALL_BYTES]
        self._merge(pool, block)
        pool.put(block)

    # ---- serving ------------------------------------------------------------------------------------

    def _serve(self, size_bytes: int) -> _Block:
        """A live block for a request of at least one byte."""
        wanted_bytes = _rounded(size_bytes)
        pool = self._pools[wanted_bytes <= _SMALL_BYTES]
        block = self._best_fit(pool, wanted_bytes) or self._new_or_retry(pool, wanted_bytes)
        left_bytes = block.size_bytes - wanted_bytes
        tiny = pool.is_small or self._expandable
        if left_bytes >= MIN_BLOCK_BYTES if tiny else left_bytes > _SMALL_BYTES:
            pool.put(_split(block, wanted_bytes))
        block.is_live = True
        block.requested_bytes = size_bytes
        self._count(size_bytes, block.size_bytes, 0)
        return block

    def _best_fit(self, pool: _Pool, wanted_bytes: int) -> _Block | None:
        """Takes the tightest free block out of its pool; None if none is large enough."""
        at = bisect_left(pool.free, (wanted_bytes,))
        if at == len(pool.free):
            return None
        if self._expandable:
            while at + 1 < len(pool.free) and pool.free[at + 1][2].room_bytes < pool.free[at][2].room_bytes:
                at += 1
        return pool.free.pop(at)[2]

    def _new_or_retry(self, pool: _Pool, wanted_bytes: int) -> _Block:
        """A block of new memory, if need be once what nobody uses was given back."""
        block = self._new(pool, wanted_bytes)
        if block is None:
            self._give_back()
            self.retries += 1
            block = self._new(pool, wanted_bytes)
        if block is None:
            assert self._limit_bytes is not None
            raise OutOfMemory(wanted_bytes, self.reserved_bytes, self._limit_bytes)
        return block

    def _new(self, pool: _Pool, wanted_bytes: int) -> _Block | None:
        """A free block of new memory, in no pool yet; None beyond the limit."""
        segment_bytes = _segment_bytes(wanted_bytes)
        if self._limit_bytes is not None and self.reserved_bytes + segment_bytes > self._limit_bytes:
            return None
        if self._expandable:
            return self._expanded(pool, wanted_bytes)
        self._count(0, 0, segment_bytes)
        return pool.add_range(segment_bytes, is_mapped=True)

    # ---- expandable segments ------------------------------------------------------------------------

    def _expanded(self, pool: _Pool, wanted_bytes: int) -> _Block:
        """A free block large enough, made by mapping pages where the lowest addresses are left."""
        block = self._place_to_grow(pool, wanted_bytes)
        if not block.is_mapped:
            self._map(pool, block, wanted_bytes)
        while block.size_bytes < wanted_bytes:
            gap = block.after
            assert gap is not None
            self._map(pool, gap, wanted_bytes - block.size_bytes)
            block = gap  # which took the block before it in
        pool.take(block)
        return block

    def _place_to_grow(self, pool: _Pool, wanted_bytes: int) -> _Block:
        """The lowest gap, or the free block before it, from which enough addresses are unused in a row."""
        if not pool.gaps:
            pool.put(pool.add_range(_RANGE_BYTES, is_mapped=False))
        for _, gap in pool.gaps:
            before = gap.before
            start = before if before is not None and not before.is_live else gap
            if _unused_from(start, wanted_bytes) >= wanted_bytes:
                return start
        raise AssertionError("the last gap has no end")

    def _map(self, pool: _Pool, gap: _Block, size_bytes: int) -> None:
        """Makes a free block of the start of a gap: as many pages as some bytes take."""
        mapped_bytes = _ceil(min(size_bytes, gap.size_bytes), pool.page_bytes)
        pool.take(gap)
        if mapped_bytes < gap.size_bytes:
            pool.put(_split(gap, mapped_bytes))
        gap.is_mapped = True
        self._count(0, 0, mapped_bytes)
        self._merge(pool, gap)
        pool.put(gap)

    # ---- giving back --------------------------------------------------------------------------------

    def _give_back(self) -> None:
        """Gives every segment back that holds nothing alive; of expandable ones every such page."""
        for pool in self._pools.values():
            for _, _, block in list(pool.free):
                if self._expandable:
                    self._unmap(pool, block)
                elif block.before is None and block.after is None:
                    pool.take(block)
                    self._count(0, 0, -block.size_bytes)

    def _unmap(self, pool: _Pool, block: _Block) -> None:
        """Makes a gap of the whole pages within a free block; what is left on either side stays free."""
        start = _ceil(block.address, pool.page_bytes)
        end = (block.address + block.size_bytes) // pool.page_bytes * pool.page_bytes
        if start >= end:
            return
        pool.take(block)
        gap = block
        if start > block.address:
            gap = _split(block, start - block.address)
            pool.put(block)
        if end < gap.address + gap.size_bytes:
            pool.put(_split(gap, end - start))
        gap.is_mapped = False
        self._count(0, 0, start - end)
        self._merge(pool, gap)
        pool.put(gap)

    # ---- blocks -------------------------------------------------------------------------------------

    def _merge(self, pool: _Pool, block: _Block) -> None:
        """A block that is in no pool takes in the neighbours that are like it."""
        for neighbour in (block.before, block.after):
            if neighbour is None or neighbour.is_live or neighbour.is_mapped != block.is_mapped:
                continue
            pool.take(neighbour)
            if neighbour is block.before:
                block.address = neighbour.address
                block.before = neighbour.before
                if block.before is not None:
                    block.before.after = block
                block.size_bytes += neighbour.size_bytes
            else:
                _absorb_next(block)

    def _count(self, requested_bytes: int, allocated_bytes: int, reserved_bytes: int) -> None:
        """Adds to what is in use, and to the peaks."""
        now, peak = self._now, self._peak
        for which, size_bytes in enumerate((requested_bytes, allocated_bytes, reserved_bytes)):
            now[which] += size_bytes
            peak[which] = max(peak[which], now[which])


def _rounded(size_bytes: int) -> int:
    """What a request takes at least."""
    return max(MIN_BLOCK_BYTES, _ceil(size_bytes, MIN_BLOCK_BYTES))


def _segment_bytes(wanted_bytes: int) -> int:
    """The size of a new segment for a rounded request."""
    if wanted_bytes <= _SMALL_BYTES:
        return _SMALL_SEGMENT_BYTES
    if wanted_bytes < _OWN_SEGMENT_BYTES:
        return _LARGE_SEGMENT_BYTES
    return _ceil(wanted_bytes, _SEGMENT_STEP_BYTES)


def _ceil(size_bytes: int, step_bytes: int) -> int:
    """The next multiple of a step."""
    return -(-size_bytes // step_bytes) * step_bytes


def _split(block: _Block, size_bytes: int) -> _Block:
    """Cuts a block after some bytes; returns the rest, which is as free or mapped as the block."""
    rest = _Block(
        block.address + size_bytes,
        block.size_bytes - size_bytes,
        is_mapped=block.is_mapped,
        before=block,
        after=block.after,
    )
    if rest.after is not None:
        rest.after.before = rest
    block.after, block.size_bytes = rest, size_bytes
    return rest


def _unused_from(block: _Block | None, enough_bytes: int) -> int:
    """The unused addresses in a row from a block on, counted until they are enough."""
    unused_bytes = 0
    while block is not None and not block.is_live and unused_bytes < enough_bytes:
        unused_bytes += block.size_bytes
        block = block.after
    return unused_bytes


def _absorb_next(block: _Block) -> None:
    """A block takes in the one after it, which is in no pool."""
    gone = block.after
    assert gone is not None
    block.size_bytes += gone.size_bytes
    block.after = gone.after
    if block.after is not None:
        block.after.before = block
