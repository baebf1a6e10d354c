"""PyTorch's caching allocator for CUDA, replayed: what a stream of sizes reserves from the driver.

Reserved memory is what `nvidia-smi` shows and what runs out. It exceeds the live bytes because the
allocator takes memory from the driver in segments, cuts them into blocks and keeps what is freed.

Each stream has free blocks of its own, which no other one is given.

Not modelled: waiting for a stream's work (`record_stream`), memory pools of CUDA graphs, expandable
segments after the driver refused more, and the addresses that the driver hands out, which break
ties between free blocks of one size.

Source: c10/cuda/CUDACachingAllocator.cpp; the comments name its functions and constants.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any

from fitcast.memory.report import Block
from fitcast.units import KIB, MIB, round_up

MIN_BLOCK = 512  # kMinBlockSize
SMALL = MIB  # kSmallSize: requests up to here live in segments of their own
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
MIN_LARGE = 10 * MIB  # kMinLargeAlloc
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer
LARGE_GRAIN = 2 * MIB  # kRoundLarge

Event = tuple[int, int, str]  # +1 allocated or -1 freed, block, phase


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
    stream: int = 0
    free: bool = False
    before: Chunk | None = field(default=None, repr=False)
    after: Chunk | None = field(default=None, repr=False)

    @property
    def is_whole_segment(self) -> bool:
        """Whether its segment holds nothing else."""
        return self.before is None and self.after is None


class FreeChunks:
    """A stream's free chunks of small segments, or those of large ones: `BlockPool`.

    Attributes:
        small: Whether of small segments.
        stream: Whose they are.
        end: The last chunk, free or not, of the segment that can grow; `None` without such a one.
    """

    def __init__(self, small: bool, stream: int = 0):
        self.small, self.stream = small, stream
        self.end: Chunk | None = None
        self._by_size: list[tuple[int, int, Chunk]] = []  # (bytes, address, chunk), ascending

    def take(self, wanted: int) -> Chunk | None:
        """The smallest that holds `wanted` bytes, no longer free: `get_free_block`."""
        free = self._by_size
        best = bisect_left(free, (wanted,))
        if best == len(free):
            return None
        if free[best][2] is self.end and best + 1 < len(free):
            best += 1  # the one that can grow is the last choice
        return free.pop(best)[2]

    def add(self, chunk: Chunk) -> None:
        """From now on this chunk is free."""
        chunk.free = True
        insort(self._by_size, (chunk.n_bytes, chunk.address, chunk))

    def remove(self, chunk: Chunk) -> None:
        """This chunk is used, or part of another one."""
        del self._by_size[bisect_left(self._by_size, (chunk.n_bytes, chunk.address))]

    def remove_whole_segments(self) -> int:
        """Forget chunks without neighbours; how many bytes these were."""
        whole = sum(n_bytes for n_bytes, _, chunk in self._by_size if chunk.is_whole_segment)
        self._by_size = [free for free in self._by_size if not free[2].is_whole_segment]
        return whole

    def layout(self) -> list[tuple[int, int]]:
        """(bytes, address) of each, smallest first."""
        return [(n_bytes, address) for n_bytes, address, _ in self._by_size]


class CachingAllocator:
    """Hands out memory as CUDA's caching allocator does, without any.

    Args:
        limit_bytes: What the driver has; `None` for plenty.
        descending: Whether the driver's addresses fall rather than rise from segment to segment.
        expandable: One segment for small and one for large requests, each growing at its end
            (`expandable_segments:True`), rather than a new segment for what fits no hole.

    Attributes:
        allocated_bytes, reserved_bytes: Now; `peak_allocated_bytes` and `peak_reserved_bytes`: the
            most so far. `retries`: how often the cache was given back to find room. As in
            `torch.cuda.memory_stats`.
    """

    def __init__(
        self, limit_bytes: int | None = None, descending: bool = False, expandable: bool = False
    ):
        self.limit_bytes, self.descending, self.expandable = limit_bytes, descending, expandable
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self._edge = 0  # where the next segment goes
        self._pools: dict[tuple[int, bool], FreeChunks] = {}

    def allocate(self, n_bytes: int, stream: int = 0) -> Chunk:
        """A chunk for `n_bytes`: its own `n_bytes` are more where a rest was not split off.

        Args:
            n_bytes: Asked for.
            stream: Whose free chunks may be taken.

        Raises:
            MemoryError: It does not fit `limit_bytes`, even with all cached segments given back.
        """
        wanted = round_up(n_bytes, MIN_BLOCK)
        pool = self._pool(stream, wanted <= SMALL)
        chunk = pool.take(wanted)
        if chunk is None and self.expandable:
            chunk = self._grow(pool, wanted)
        elif chunk is None:
            chunk = self._new_segment(pool, wanted)
        chunk.free = False
        if self._is_worth_splitting(chunk.n_bytes - wanted, pool):
            self._split(chunk, wanted, pool)
        self.allocated_bytes += chunk.n_bytes
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return chunk

    def free(self, chunk: Chunk) -> None:
        """Give a chunk back to its pool, merged with free neighbours: `free_block`."""
        self.allocated_bytes -= chunk.n_bytes
        pool = self._pool(chunk.stream, chunk.small)
        after, before = chunk.after, chunk.before
        if after is not None and after.free:
            pool.remove(after)
            self._absorb(chunk, after, pool)
        if before is not None and before.free:
            pool.remove(before)
            self._absorb(before, chunk, pool)
            chunk = before
        pool.add(chunk)

    def empty_cache(self) -> None:
        """Give segments without a live chunk back to the driver: `torch.cuda.empty_cache()`."""
        if self.expandable:
            return  # its free pages could go; not modelled
        for pool in self._pools.values():
            self.reserved_bytes -= pool.remove_whole_segments()

    def layout(self) -> list[tuple[int, int]]:
        """(bytes, address) of every free chunk: alike twice, the same requests get the same."""
        return [free for pool in self._pools.values() for free in pool.layout()]

    def _pool(self, stream: int, small: bool) -> FreeChunks:
        """A stream's free chunks, small or large ones; `BlockComparator` sorts by stream first."""
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = FreeChunks(small, stream)
        return pool

    def _is_worth_splitting(self, rest: int, pool: FreeChunks) -> bool:
        """`should_split`: what is left of a large segment must be of use to large requests."""
        return rest >= MIN_BLOCK if pool.small or self.expandable else rest > SMALL

    def _split(self, chunk: Chunk, wanted: int, pool: FreeChunks) -> None:
        """Keep `wanted` bytes of a chunk; the rest becomes a free chunk behind it."""
        rest = Chunk(chunk.address + wanted, chunk.n_bytes - wanted, chunk.small, chunk.stream)
        rest.before, rest.after = chunk, chunk.after
        if chunk.after is not None:
            chunk.after.before = rest
        chunk.n_bytes, chunk.after = wanted, rest
        if pool.end is chunk:
            pool.end = rest
        pool.add(rest)

    def _absorb(self, chunk: Chunk, after: Chunk, pool: FreeChunks) -> None:
        """Make one chunk of two neighbours: `try_merge_blocks`."""
        chunk.n_bytes += after.n_bytes
        chunk.after = after.after
        if after.after is not None:
            after.after.before = chunk
        if pool.end is after:
            pool.end = chunk

    def _new_segment(self, pool: FreeChunks, wanted: int) -> Chunk:
        """A segment of its own from the driver: `alloc_block`."""
        n_bytes = segment_bytes(wanted)
        self._reserve(n_bytes)
        self._edge += n_bytes + 64 * KIB
        address = -self._edge if self.descending else self._edge - n_bytes
        return Chunk(address, n_bytes, pool.small, pool.stream)

    def _grow(self, pool: FreeChunks, wanted: int) -> Chunk:
        """Map pages behind the last chunk, which is part of the new one when free: `map_block`."""
        end, page = pool.end, SMALL_SEGMENT if pool.small else LARGE_SEGMENT
        there = end.n_bytes if end is not None and end.free else 0
        n_bytes = round_up(wanted - there, page)
        self._reserve(n_bytes)
        if end is not None and end.free:
            pool.remove(end)
            end.n_bytes += n_bytes
            return end
        # small chunks lie far above all large ones, and each stream's above another's
        start = (pool.small << 60) + (pool.stream << 50)
        address = start if end is None else end.address + end.n_bytes
        pool.end = Chunk(address, n_bytes, pool.small, pool.stream, before=end)
        if end is not None:
            end.after = pool.end
        return pool.end

    def _reserve(self, n_bytes: int) -> None:
        """Take bytes from the driver; if it has too few, give the cache back and ask once more."""
        if not self._has(n_bytes):
            self.empty_cache()  # release_cached_blocks
            self.retries += 1  # num_alloc_retries
        if not self._has(n_bytes):
            raise MemoryError(f"{n_bytes} bytes do not fit {self.limit_bytes}")
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _has(self, n_bytes: int) -> bool:
        return self.limit_bytes is None or self.reserved_bytes + n_bytes <= self.limit_bytes


class Playback:
    """Plays a ledger's events through an allocator.

    Args:
        blocks: What the events are about.
        options: Of the `CachingAllocator`.

    Attributes:
        chunks: Block -> where it lies, of those alive.
        sizes: Block -> the bytes it was given last.
        phase_peaks: Phase -> the most allocated bytes at an allocation in it.
    """

    def __init__(self, blocks: list[Block], **options: Any):
        self.blocks, self.allocator = blocks, CachingAllocator(**options)
        self.chunks: dict[int, Chunk] = {}
        self.sizes: dict[int, int] = {}
        self.phase_peaks: dict[str, int] = {}

    def play(self, events: list[Event]) -> int:
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
            asked = self.blocks[block]
            chunks[block] = chunk = allocator.allocate(asked.n_bytes, asked.stream)
            sizes[block] = chunk.n_bytes
            if allocator.allocated_bytes > peaks.get(phase, 0):
                peaks[phase] = allocator.allocated_bytes
        return allocator.peak_allocated_bytes
