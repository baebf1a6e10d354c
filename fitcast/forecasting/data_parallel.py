"""What `DistributedDataParallel` adds to each process: buckets with a second copy of each gradient.

Wrapping a model sends its weights to all processes, in the model's own order, through flat tensors
of some 250 MiB or of what the last one of them brings, which go again, and makes one bucket a dtype
for all gradients. From the second step on the buckets have 25 MiB, the first 1 MiB, in the order in
which the gradients were whole. Which tensors share a bucket is PyTorch's own answer.

As `torch.distributed` has it by default: `find_unused_parameters` and `gradient_as_bucket_view`
off. The scales of 4-bit weights are no parameters and are not sent. Not modelled: NCCL's own
buffers, which the caching allocator never sees.

Sources: torch/nn/parallel/distributed.py; torch/distributed/utils.py, `_sync_module_states`;
torch/csrc/distributed/c10d/reducer.cpp, `initialize_buckets` and `rebuild_buckets`, and comm.cpp,
`broadcast_coalesced`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist

from fitcast.memory.report import Block, Event
from fitcast.memory.stream import Stream
from fitcast.units import MIB

FLAT = 250 * MIB  # broadcast_bucket_size
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB  # kDefaultFirstBucketBytes, kDefaultBucketBytesCap
NO_LIMIT = 2**63 - 1
IN_FLIGHT = 2  # flat tensors that are on their way at a time
EMBEDDINGS_PART = "embedding_dense_backward"
PHASE = "wrap"  # of what happens before the first step


def wrapped(stream: Stream) -> Stream:
    """The stream of one of several processes, from that of one alone.

    Args:
        stream: Loading and first step, with the marks "adapters" and "ready".
    """
    weights = _in_the_models_order(stream, _alive_at(stream, stream.marks["adapters"]))
    gradients = _gradients(stream)
    blocks = list(stream.blocks)

    def allocate(group: list[int], category: str, phase: str) -> Event:
        blocks.append(_joined([stream.blocks[block] for block in group], category, phase))
        return (1, len(blocks) - 1, phase)

    flats = [
        allocate(group, "temporaries", PHASE)
        for group in _grouped(stream, weights, [FLAT])
        if len(group) > 1  # one alone is sent as it is
    ]
    sent: list[Event] = []
    for number, flat in enumerate(flats):
        if number >= IN_FLIGHT:
            sent.append(_freed(flats[number - IN_FLIGHT]))
        sent.append(flat)
    sent += [_freed(flat) for flat in flats[-IN_FLIGHT:]]
    first = [
        allocate(group, "gradients", PHASE) for group in _grouped(stream, gradients, [NO_LIMIT])
    ]
    rebuilt = [
        allocate(group, "gradients", "forward")
        for group in _grouped(stream, gradients, [FIRST_BUCKET, BUCKET])
    ]
    before_second_step = [(-1, block, "forward") for _, block, _ in first] + rebuilt
    return _with_events(stream, blocks, sent + first, before_second_step)


def _alive_at(stream: Stream, position: int) -> list[int]:
    """Blocks that are alive after so many events, in the order in which they came."""
    alive: dict[int, None] = {}
    for sign, block, _ in stream.events[:position]:
        if sign > 0:
            alive[block] = None
        else:
            del alive[block]
    return list(alive)


def _in_the_models_order(stream: Stream, alive: list[int]) -> list[int]:
    """Parameters and buffers as the model names them: what is before its layers, these, the rest.

    A stream that was deepened has several layers' blocks in one place. One without a model has no
    places; its blocks stay as they came.
    """
    places = {n: place for n in alive if (place := stream.blocks[n].parameter) is not None}
    layers = {n: stream.layers.unit(stream.blocks[n].module) for n in places}
    first = min((places[n] for n, layer in layers.items() if layer is not None), default=0)

    def key(block: int) -> tuple[bool, float, int]:
        layer = layers[block]
        after = math.inf if layer is None else layer
        return places[block] >= first, after, places[block]

    return sorted(places, key=key) or alive


def _gradients(stream: Stream) -> list[int]:
    """The step's gradients in the order in which they were whole.

    One is whole where it is made, but that of a head tied to the embedding only once the
    embedding's part, which comes last, is added.
    """
    whole: dict[int, None] = {}
    for sign, block, _ in stream.events[stream.marks["ready"] :]:
        made = stream.blocks[block]
        if sign > 0 and made.category == "gradients":
            whole[block] = None
        elif sign < 0 and made.operation.startswith(EMBEDDINGS_PART) and block not in whole:
            tied = next((n for n in whole if stream.blocks[n].n_bytes == made.n_bytes), None)
            if tied is not None:
                whole[tied] = whole.pop(tied)  # to the end
    return list(whole)


def _grouped(stream: Stream, blocks: list[int], limits: list[int]) -> list[list[int]]:
    """Blocks that share a flat tensor: of one dtype, and closed at the limit.

    Args:
        stream: Holds the blocks.
        blocks: Their numbers, in order.
        limits: Bytes at which the first group is closed, the second, ...; the last one repeats.
    """
    tensors = []
    for block in blocks:
        n_bytes, dtype = stream.blocks[block].n_bytes, stream.blocks[block].dtype
        tensors.append(torch.empty(n_bytes // dtype.itemsize, dtype=dtype, device="meta"))
    if not tensors:
        return []
    assign: Any = dist.__dict__["_compute_bucket_assignment_by_size"]  # as the Reducer calls it
    groups, _ = assign(tensors, limits)
    return [[blocks[i] for i in group] for group in groups]


def _joined(parts: list[Block], category: str, phase: str) -> Block:
    n_bytes, dtype = sum(part.n_bytes for part in parts), parts[0].dtype
    shape = (n_bytes // dtype.itemsize,)
    return Block(n_bytes, category, "DistributedDataParallel", "", phase, shape, dtype)


def _freed(allocation: Event) -> Event:
    _, block, phase = allocation
    return (-1, block, phase)


def _with_events(
    stream: Stream, blocks: list[Block], wrapping: list[Event], before_second_step: list[Event]
) -> Stream:
    """The stream with events between adapters and first step, and after that step."""
    place, more = stream.marks["adapters"], len(wrapping)
    names = list(stream.marks)  # as the moments came
    after = names[names.index("adapters") + 1 :]
    events = [*stream.events[:place], *wrapping, *stream.events[place:], *before_second_step]
    return dataclasses.replace(
        stream,
        blocks=blocks,
        events=events,
        marks={name: n + more * (name in after) for name, n in stream.marks.items()},
        work=[
            work._replace(n_events=work.n_events + more) if work.n_events > place else work
            for work in stream.work
        ],
    )
