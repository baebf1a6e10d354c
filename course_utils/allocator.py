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

from .memory_report import Block
from .units import KIB, MIB, round_up

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


class CachingAllocator:
    """Hands out blocks as CUDA's caching allocator does, without any memory.

    Args:
        limit_bytes: What the driver has; `None` for plenty.
        descending: Whether the driver's addresses fall rather than rise from segment to segment.
        expandable: One segment for small and one for large blocks, each growing at its end
            (`expandable_segments:True`), rather than a new segment for what fits no hole.

    Attributes:
        allocated_bytes, reserved_bytes: Now; `peak_allocated_bytes` and `peak_reserved_bytes`: the
            most so far. As in `torch.cuda.memory_stats`.
    """

    def __init__(self, limit_bytes: int | None = None, descending: bool = False,
                 expandable: bool = False):
        self.limit_bytes, self.descending, self.expandable = limit_bytes, descending, expandable
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self._edge = 0  # where the next segment goes
        self._size: dict[int, int] = {}  # address of each block -> bytes
        self._after: dict[int, int] = {}  # neighbours within one segment
        self._before: dict[int, int] = {}
        self._free: set[int] = set()
        self._small: list[tuple[int, int]] = []  # free blocks, smallest first: (bytes, address)
        self._large: list[tuple[int, int]] = []
        self._is_small: dict[int, bool] = {}
        self._last: dict[bool, int] = {}  # small or not -> last block of its expandable segment

    def allocate(self, n_bytes: int) -> int:
        """The address of a block for `n_bytes`; its real size is `size_of`.

        Raises:
            MemoryError: It does not fit `limit_bytes`, even with all cached segments given back.
        """
        wanted = round_up(n_bytes, MIN_BLOCK)
        small = wanted <= SMALL
        pool = self._small if small else self._large
        found = bisect_left(pool, (wanted, -(1 << 62)))
        if self.expandable and pool[found + 1:] and pool[found][1] == self._last[small]:
            found += 1  # the block that can grow is taken last: get_free_block
        if found < len(pool):
            address = pool.pop(found)[1]
        elif self.expandable:
            address = self._expand(wanted, small, pool)
        else:
            address = self._new_segment(wanted, small)
        self._free.discard(address)
        rest = self._size[address] - wanted
        if rest >= MIN_BLOCK if small or self.expandable else rest > SMALL:  # should_split
            self._split(address, wanted, rest, small, pool)
        self.allocated_bytes += self._size[address]
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return address

    def size_of(self, address: int) -> int:
        """Bytes of the block: a remainder too small to be split off is part of it."""
        return self._size[address]

    def _split(self, address: int, wanted: int, rest: int, small: bool, pool: list) -> None:
        other, after = address + wanted, self._after.get(address)
        self._size[address], self._size[other] = wanted, rest
        self._is_small[other] = small
        self._after[address], self._before[other] = other, address
        if after is not None:
            self._after[other], self._before[after] = after, other
        if self._last.get(small) == address:
            self._last[small] = other
        self._free.add(other)
        insort(pool, (rest, other))

    def free(self, address: int) -> None:
        """Give a block back to the pool, merged with free neighbours: `free_block`."""
        self.allocated_bytes -= self._size[address]
        pool = self._small if self._is_small[address] else self._large
        after, before = self._after.get(address), self._before.get(address)
        if after in self._free:
            self._take_out(pool, after)
            self._absorb(address, after)
        if before in self._free:
            self._take_out(pool, before)
            self._absorb(before, address)
            address = before
        self._free.add(address)
        insort(pool, (self._size[address], address))

    def _take_out(self, pool: list, address: int) -> None:
        del pool[bisect_left(pool, (self._size[address], address))]
        self._free.discard(address)

    def _absorb(self, address: int, after: int) -> None:
        self._size[address] += self._size.pop(after)
        if self._last.get(small := self._is_small.pop(after)) == after:
            self._last[small] = address
        del self._before[after]
        beyond = self._after.pop(after, None)
        if beyond is None:
            self._after.pop(address, None)
        else:
            self._after[address], self._before[beyond] = beyond, address

    def _new_segment(self, wanted: int, small: bool) -> int:
        n_bytes = segment_bytes(wanted)
        self._reserve(n_bytes)
        self._edge += n_bytes + 64 * KIB
        address = -self._edge if self.descending else self._edge - n_bytes
        self._size[address], self._is_small[address] = n_bytes, small
        return address

    def _expand(self, wanted: int, small: bool, pool: list) -> int:
        """Map pages behind the last block, itself used when it is free: `map_block`."""
        last, page = self._last.get(small), SMALL_SEGMENT if small else LARGE_SEGMENT
        grows = last in self._free
        n_bytes = round_up(wanted - (self._size[last] if grows else 0), page)
        self._reserve(n_bytes)
        if grows:
            self._take_out(pool, last)
            self._size[last] += n_bytes
            return last
        # small blocks lie far above all large ones
        address = (small << 60) if last is None else last + self._size[last]
        self._size[address], self._is_small[address] = n_bytes, small
        if last is not None:
            self._after[last], self._before[address] = address, last
        self._last[small] = address
        return address

    def _reserve(self, n_bytes: int) -> None:
        if self.limit_bytes is not None and self.reserved_bytes + n_bytes > self.limit_bytes:
            self.empty_cache()  # release_cached_blocks, then one more try
            if self.reserved_bytes + n_bytes > self.limit_bytes:
                raise MemoryError(f"{n_bytes} bytes do not fit {self.limit_bytes}")
        self.reserved_bytes += n_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def empty_cache(self) -> None:
        """Give segments without a live block back to the driver: `torch.cuda.empty_cache()`."""
        if self.expandable:
            return  # its free pages could go; not modelled
        for pool in (self._small, self._large):
            for n_bytes, address in list(pool):
                if address not in self._after and address not in self._before:
                    pool.remove((n_bytes, address))
                    self._free.discard(address)
                    del self._size[address], self._is_small[address]
                    self.reserved_bytes -= n_bytes


class Playback:
    """Plays a ledger's events through an allocator.

    Attributes:
        address: Block -> where it lies, of those alive.
        sizes: Block -> the bytes it was given last.
        phase_peaks: Phase -> the most allocated bytes at an allocation in it.
    """

    def __init__(self, blocks: list[Block], **options):
        self.blocks, self.allocator = blocks, CachingAllocator(**options)
        self.address: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.phase_peaks: dict[str, int] = {}

    def play(self, events: list[tuple[int, int, str]]) -> int:
        """The most allocated bytes on the way.

        Raises:
            MemoryError: The allocator's limit is reached.
        """
        allocator, blocks, address = self.allocator, self.blocks, self.address
        peaks, sizes = self.phase_peaks, self.sizes
        allocator.peak_allocated_bytes = allocator.allocated_bytes
        for sign, block, phase in events:
            if sign > 0:
                address[block] = at = allocator.allocate(blocks[block].n_bytes)
                sizes[block] = allocator.size_of(at)
                peaks[phase] = max(peaks.get(phase, 0), allocator.allocated_bytes)
            else:
                allocator.free(address.pop(block))
        return allocator.peak_allocated_bytes
