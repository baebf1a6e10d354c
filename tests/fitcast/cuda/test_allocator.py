"""The caching allocator against its own events, recorded on an H200, and against its promises."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitcast.cuda.allocator import CachingAllocator, segment_bytes
from fitcast.units import MIB

DATA = Path(__file__).parents[2] / "data"


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("number", [0, 10])
def test_same_requests_give_the_gpus_numbers(number, descending):
    trace = json.loads(gzip.decompress((DATA / f"h200_trace_{number}.json.gz").read_bytes()))
    ends = {position: name for name, position in trace["marks"].items()}
    device, chunks = CachingAllocator(descending=descending), []
    checked = 0
    for position, event in enumerate([*trace["events"], None]):
        if position in ends:
            name = ends[position]
            assert device.allocated_bytes == trace["allocated"][name]
            assert device.peak_allocated_bytes == trace["peak_allocated"][name]
            # the driver's addresses, which are not known, decide between holes of one size
            assert device.reserved_bytes == pytest.approx(trace["reserved"][name], rel=0.01)
            device.peak_allocated_bytes = device.allocated_bytes
            checked += 1
        if event is None:
            break
        if event >= 0:
            chunks.append(device.allocate(event))
        else:
            device.free(chunks[-1 - event])
    assert checked == 5


@pytest.mark.parametrize(
    ("n_bytes", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (13 * MIB, 14 * MIB),
    ],
)
def test_segments_are_pytorchs(n_bytes, segment):
    assert segment_bytes(n_bytes) == segment
    device = CachingAllocator()
    device.allocate(n_bytes)
    assert device.reserved_bytes == segment


def test_small_remainder_is_part_of_the_chunk_and_large_one_is_split():
    device = CachingAllocator()
    assert device.allocate(11 * MIB + 1).n_bytes == 12 * MIB  # under 1 MiB would be left
    other = CachingAllocator()
    assert other.allocate(9 * MIB).n_bytes == 9 * MIB
    other.allocate(8 * MIB)
    assert other.reserved_bytes == 20 * MIB  # the second one lies in the first one's segment


def test_best_fit_and_merging():
    device = CachingAllocator()
    chunks = [device.allocate(n * MIB) for n in (4, 6, 4, 6)]
    address = chunks[0].address
    device.free(chunks[0])
    device.free(chunks[1])  # 10 MiB in one piece now
    assert device.allocate(10 * MIB - 512).address == address
    assert device.reserved_bytes == 20 * MIB


def test_full_device_gives_cached_segments_back_before_it_fails():
    device = CachingAllocator(limit_bytes=40 * MIB)
    device.free(device.allocate(30 * MIB))
    kept = device.allocate(34 * MIB)
    assert device.reserved_bytes == 34 * MIB
    with pytest.raises(MemoryError, match="do not fit"):
        device.allocate(8 * MIB)
    device.free(kept)
    device.empty_cache()
    assert device.reserved_bytes == 0


@given(
    st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 5))), st.booleans(), st.booleans()
)
def test_chunks_never_overlap_and_everything_comes_back(requests, descending, expandable):
    device, live = CachingAllocator(descending=descending, expandable=expandable), []
    for n_bytes, drop in requests:
        live.append(device.allocate(n_bytes))
        assert live[-1].n_bytes >= n_bytes
        spans = sorted((chunk.address, chunk.address + chunk.n_bytes) for chunk in live)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
        assert device.allocated_bytes == sum(end - start for start, end in spans)
        assert device.allocated_bytes <= device.reserved_bytes
        if drop < len(live):
            device.free(live.pop(drop))
    for chunk in live:
        device.free(chunk)
    device.empty_cache()
    assert device.allocated_bytes == 0
    assert device.reserved_bytes == 0 or expandable  # what its pages hold goes back to no one
