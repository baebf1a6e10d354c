"""PyTorch's caching allocator for CUDA, replayed: what a stream of sizes reserves from the driver.

Reserved memory is what `nvidia-smi` shows and what runs out. It exceeds the live bytes because the
allocator takes memory from the driver in segments, cuts them into blocks and keeps what is freed.

Not modelled: several streams, memory pools of CUDA graphs, expandable segments after the driver
refused more, and the addresses that the driver hands out, which break ties between free blocks of
one size.

Source: c10/cuda/CUDACachingAllocator.cpp; the comments name its functions and constants.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from fitcast.memory.report import Block
from fitcast.units import KIB, MIB, round_up

MIN_BLOCK = 512  # kMinBlockSize
SMALL = MIB  # kSmallSize: requests up to here live in segments of their own
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
MIN_LARGE = 10 * MIB  # kMinLargeAlloc
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
LARGE_GRAIN = 2 * MIB  # kRoundLarge


def segment_bytes(n_bytes: int) -> int:
    """Bytes asked from the driver for a request that fits no free block: `get_allocation_size`.

    Example:
        >>> segment_bytes(512) // MIB, segment_bytes(9 * MIB) // MIB, segment_bytes(11 * MIB) // MIB
        (2, 20, 12)
    """
    if n_bytes <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if n_bytes < MIN_LARGE else round_up(n_bytes, LARGE_GRAIN)


@dataclass(slots=True, eq=False)
class Chunk:
    """A piece of a segment: in use or free, between its neighbours in the same segment."""

    address: int
    n_bytes: int
    small: bool
    free: bool = False
    before: Chunk | None = field(default=None, repr=False)
    after: Chunk | None = field(default=None, repr=False)


class CachingAllocator:
    """Hands out memory as CUDA's caching allocator does, without any.

    Args:
        limit_bytes: What the driver has; `None` for plenty.
        descending: Whether the driver's addresses fall rather than rise from segment to segment.
        expandable: One segment for small and one for large requests, each growing at its end
            (`expandable_segments:True`), rather than a new segment for what fits no hole.

    Attributes:
        allocated_bytes, reserved_bytes: Now; `peak_allocated_bytes` and `peak_reserved_bytes`: the
            most so far. As in `torch.cuda.memory_stats`.
    """

    def __init__(
        self, limit_bytes: int | None = None, descending: bool = False, expandable: bool = False
    ):
        self.limit_bytes, self.descending, self.expandable = limit_bytes, descending, expandable
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self._edge = 0  # where the next segment goes
        self._small: list[tuple[int, int, Chunk]] = []  # free: (bytes, address), smallest first
        self._large: list[tuple[int, int, Chunk]] = []
        self._last: dict[bool, Chunk] = {}  # small or not -> the end of its expandable segment

    def allocate(self, n_bytes: int) -> Chunk:
        """A chunk for `n_bytes`: its own `n_bytes` are more where a rest was not split off.

        Raises:
            MemoryError: It does not fit `limit_bytes`, even with all cached segments given back.
        """
        wanted = round_up(n_bytes, MIN_BLOCK)
        small = wanted <= SMALL
        pool = self._small if small else self._large
        found = bisect_left(pool, (wanted,))
        if self.expandable and found + 1 < len(pool) and pool[found][2] is self._last[small]:
            found += 1  # the chunk that can grow is taken last: get_free_block
        if found < len(pool):
            chunk = pool.pop(found)[2]
        else:
            chunk = (self._expand if self.expandable else self._new_segment)(wanted, small, pool)
        chunk.free = False
        rest = chunk.n_bytes - wanted
        if rest >= MIN_BLOCK if small or self.expandable else rest > SMALL:  # should_split
            self._split(chunk, wanted, rest, pool)
        self.allocated_bytes += chunk.n_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return chunk

    def _split(self, chunk: Chunk, wanted: int, rest: int, pool: list) -> None:
        other = Chunk(chunk.address + wanted, rest, chunk.small, True, chunk, chunk.after)
        if chunk.after is not None:
            chunk.after.before = other
        chunk.n_bytes, chunk.after = wanted, other
        if self._last.get(chunk.small) is chunk:
            self._last[chunk.small] = other
        insort(pool, (rest, other.address, other))

    def free(self, chunk: Chunk) -> None:
        """Give a chunk back to the pool, merged with free neighbours: `free_block`."""
        self.allocated_bytes -= chunk.n_bytes
        pool = self._small if chunk.small else self._large
        after, before = chunk.after, chunk.before
        if after is not None and after.free:
            self._take_out(pool, after)
            self._absorb(chunk, after)
        if before is not None and before.free:
            self._take_out(pool, before)
            self._absorb(before, chunk)
            chunk = before
        chunk.free = True
        insort(pool, (chunk.n_bytes, chunk.address, chunk))

    def _take_out(self, pool: list, chunk: Chunk) -> None:
        del pool[bisect_left(pool, (chunk.n_bytes, chunk.address))]

    def _absorb(self, chunk: Chunk, after: Chunk) -> None:
        chunk.n_bytes += after.n_bytes
        chunk.after = after.after
        if after.after is not None:
            after.after.before = chunk
        if self._last.get(after.small) is after:
            self._last[after.small] = chunk

    def _new_segment(self, wanted: int, small: bool, _: list) -> Chunk:
        n_bytes = segment_bytes(wanted)
        self._reserve(n_bytes)
        self._edge += n_bytes + 64 * KIB
        return Chunk(-self._edge if self.descending else self._edge - n_bytes, n_bytes, small)

    def _expand(self, wanted: int, small: bool, pool: list) -> Chunk:
        """Map pages behind the last chunk, itself used when it is free: `map_block`."""
        last, page = self._last.get(small), SMALL_SEGMENT if small else LARGE_SEGMENT
        grows = last is not None and last.free
        n_bytes = round_up(wanted - (last.n_bytes if grows else 0), page)
        self._reserve(n_bytes)
        if grows:
            self._take_out(pool, last)
            last.n_bytes += n_bytes
            return last
        # small chunks lie far above all large ones
        address = (small << 60) if last is None else last.address + last.n_bytes
        chunk = self._last[small] = Chunk(address, n_bytes, small, before=last)
        if last is not None:
            last.after = chunk
        return chunk

    def _reserve(self, n_bytes: int) -> None:
        if self.limit_bytes is not None and self.reserved_bytes + n_bytes > self.limit_bytes:
            self.empty_cache()  # release_cached_blocks, then one more try
            if self.reserved_bytes + n_bytes > self.limit_bytes:
                raise MemoryError(f"{n_bytes} bytes do not fit {self.limit_bytes}")
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def empty_cache(self) -> None:
        """Give segments without a live chunk back to the driver: `torch.cuda.empty_cache()`."""
        if self.expandable:
            return  # its free pages could go; not modelled
        for pool in (self._small, self._large):
            before = sum(n_bytes for n_bytes, _, _ in pool)
            pool[:] = [free for free in pool if free[2].before or free[2].after]
            self.reserved_bytes -= before - sum(n_bytes for n_bytes, _, _ in pool)


class Playback:
    """Plays a ledger's events through an allocator.

    Attributes:
        chunks: Block -> where it lies, of those alive.
        sizes: Block -> the bytes it was given last.
        phase_peaks: Phase -> the most allocated bytes at an allocation in it.
    """

    def __init__(self, blocks: list[Block], **options):
        self.blocks, self.allocator = blocks, CachingAllocator(**options)
        self.chunks: dict[int, Chunk] = {}
        self.sizes: dict[int, int] = {}
        self.phase_peaks: dict[str, int] = {}

    def play(self, events: list[tuple[int, int, str]]) -> int:
        """The most allocated bytes on the way.

        Raises:
            MemoryError: The allocator's limit is reached.
        """
        allocator, chunks, sizes, peaks = self.allocator, self.chunks, self.sizes, self.phase_peaks
        allocator.peak_allocated_bytes = allocator.allocated_bytes
        for sign, block, phase in events:
            if sign < 0:
                allocator.free(chunks.pop(block))
                continue
            chunks[block] = chunk = allocator.allocate(self.blocks[block].n_bytes)
            sizes[block] = chunk.n_bytes
            if allocator.allocated_bytes > peaks.get(phase, 0):
                peaks[phase] = allocator.allocated_bytes
        return allocator.peak_allocated_bytes
