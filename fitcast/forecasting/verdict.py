"""From a stream of memory events to what a card will show: peak, reserved memory, verdict, time.

The stream is replayed through CUDA's caching allocator: once with addresses that fall from segment
to segment and once with rising ones, for the bounds; under the card's limit, for the verdict. A
step is taken as its first time (the optimizer makes its state) and as any later time (the state
cuts the holes). The verdict is one of three: it fits; it is tight (it runs, because the allocator
gives cached memory back, or by less than the bounds are apart); it does not fit.

Not modelled: what other work in the same process left in the allocator, beyond the stated bounds.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from fitcast.cuda.allocator import LARGE_SEGMENT, Playback, segment_bytes
from fitcast.gpus import Gpu
from fitcast.memory.report import MemoryReport, replay
from fitcast.memory.stream import Stream, Work, later_step
from fitcast.units import show_bytes, with_article

Events = list[tuple[int, int, str]]

# Bounds of reserved memory, for what the step does not decide. Other versions' small temporaries
# take or spare a segment in forward, in backward and in the optimizer.
SLACK = 3 * LARGE_SEGMENT
# And one temporary may find the hole taken that it fitted here: it then asks for a segment of its
# own. One above this share of all memory had that from the start, and finds it again.
MISSED_HOLE_SHARE = 0.1
LATER_STEPS = 2  # that are replayed under a card's limit, unless the first leaves all as it was
FITS, TIGHT, DOES_NOT_FIT = "fits", "tight", "does not fit"


@dataclass(frozen=True, kw_only=True)
class Forecast(MemoryReport):
    """What a step will need on a GPU. Bytes, as `torch.cuda.memory_stats` will count them.

    Attributes of a `MemoryReport` describe a step after the first; blocks have the sizes that the
    allocator gives them. `phase_peaks` are over all phases, "load" included.

    Attributes:
        gpu: The GPU.
        peak_reserved_bytes: Between which bounds the allocator's memory will peak on this card.
        unlimited_reserved_bytes: The same on a card of its kind that never runs short; the two
            differ where the verdict is "tight".
        device_bytes: Those on this card with the CUDA context: what `nvidia-smi` shows.
        verdict: "fits", "tight" or "does not fit".
        retries: How often the allocator gives cached memory back in the first steps, to find room.
        fits: Whether the step runs within the GPU's memory: the verdict is not "does not fit".
        margin_bytes: What is left of the GPU's memory in the worse case; negative when cached
            memory must be given back, or when it does not fit.
        loaded_bytes: After loading the base model; `None` when nothing was loaded.
        resident_bytes: Before the first step: weights and adapters.
        operations: About how many operations the step launches.
        flops: Multiplications and additions of its matrix products.
        ideal_seconds: Its time if every operation ran at the GPU's peak rate or bandwidth.
        pinned_host_bytes: Host memory that checkpoints wait in, locked for the GPU's copies.
        notes: What was assumed and what is not modelled, a sentence each.
    """

    gpu: Gpu
    peak_reserved_bytes: tuple[int, int]
    unlimited_reserved_bytes: tuple[int, int]
    verdict: str
    retries: int
    loaded_bytes: int | None
    resident_bytes: int
    operations: int
    flops: int
    ideal_seconds: float
    pinned_host_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def peak_allocated_bytes(self) -> int:
        """Most bytes in tensors, rounded by the allocator."""
        return self.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the step runs within the GPU's memory, tightly or not."""
        return self.verdict != DOES_NOT_FIT

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Lowest and highest use of the device, context included."""
        low, high = self.peak_reserved_bytes
        return low + self.gpu.context_bytes, high + self.gpu.context_bytes

    @property
    def margin_bytes(self) -> int:
        """Bytes of the GPU left over at the upper bound of a run that never runs short."""
        return self.gpu.usable_bytes - self.unlimited_reserved_bytes[1]

    def __str__(self) -> str:
        low, high = (show_bytes(n, "GiB") for n in self.device_bytes)
        verdict = "tight on" if self.verdict == TIGHT else self.verdict
        card = f"{with_article(self.gpu.name)} ({show_bytes(self.gpu.total_bytes)})"
        return (
            f"{verdict} {card}: peak {show_bytes(self.peak_allocated_bytes)} in tensors, {low} "
            f"to {high} of the device{self._what_it_costs()}; highest in {self.peak_phase} "
            f"{self.peak_place}"
        )

    def _what_it_costs(self) -> str:
        """Why a tight run runs; of another verdict nothing."""
        if self.verdict != TIGHT:
            return ""
        if not self.retries:
            return ", so by less than the bounds are apart"
        times = "once" if self.retries == 1 else f"{self.retries} times"
        context = self.gpu.context_bytes
        low, high = (show_bytes(n + context, "GiB") for n in self.unlimited_reserved_bytes)
        return (
            f", because the allocator gives cached memory back {times} "
            f"(a card without limit: {low} to {high})"
        )


@dataclass(frozen=True)
class Moments:
    """A stream's events, cut: loading, adding adapters, the first step, any later step."""

    loading: Events
    adding: Events
    first: Events
    later: Events

    @property
    def before(self) -> Events:
        """Everything before the first step."""
        return self.loading + self.adding


def moments(stream: Stream) -> Moments:
    """Cut a stream at its marks; one without "load" is a reader's own step, and taken once."""
    loaded, ready = stream.marks.get("load", 0), stream.marks["ready"]
    step = stream.events[ready:]
    own = not loaded
    return Moments(
        loading=stream.events[:loaded],
        adding=stream.events[loaded:ready],
        first=[] if own else step,
        later=step if own else later_step(step),
    )


def report(
    stream: Stream, gpu: Gpu, *, micro_batches: int = 1, expandable: bool = False
) -> Forecast:
    """What a stream of memory events will be on a GPU.

    Args:
        stream: Loading and first step, with the marks "load" and "ready"; or a reader's own step,
            with "ready" alone.
        gpu: The card.
        micro_batches: How many the step has. The stream holds the first ones of them; the further
            ones do what its last one does. The optimizer's work is done once.
        expandable: Whether the allocator grows one segment (`expandable_segments`).
    """
    cut = moments(stream)
    falling = Playback(stream.blocks, descending=True, expandable=expandable)
    falling.play(cut.loading)
    loaded_bytes = falling.allocator.allocated_bytes if cut.loading else None
    falling.play(cut.adding)
    resident_bytes = falling.allocator.allocated_bytes
    falling.play(cut.first)
    alive = list(falling.chunks)
    peak_bytes = falling.play(cut.later)
    rising = _rising(stream, cut, gpu, expandable)
    unlimited = _reserved_bounds(
        peak_bytes,
        (falling.allocator.peak_reserved_bytes, rising.allocator.peak_reserved_bytes),
        _largest_segment(stream),
        expandable,
    )
    judged = _judged(stream, cut, gpu, unlimited, expandable)
    sizes = falling.sizes
    blocks = [block.resized(sizes.get(index, 0)) for index, block in enumerate(stream.blocks)]
    seen = replay(blocks, alive, cut.later, falling.allocator.allocated_bytes)
    peaks = {phase: n for phase, n in falling.phase_peaks.items() if phase != "start"}
    work = work_of_step(stream, micro_batches)
    fields: dict[str, Any] = vars(seen) | {"phase_peaks": peaks}
    return Forecast(
        **fields,
        gpu=gpu,
        peak_reserved_bytes=(max(peak_bytes, judged.reserved[0]), judged.reserved[1]),
        unlimited_reserved_bytes=unlimited,
        verdict=judged.verdict,
        retries=judged.retries,
        loaded_bytes=loaded_bytes,
        resident_bytes=resident_bytes,
        operations=work.operations,
        flops=work.flops,
        ideal_seconds=work.seconds,
        pinned_host_bytes=stream.pinned_host_bytes,
    )


def _rising(stream: Stream, cut: Moments, gpu: Gpu, expandable: bool) -> Playback:
    """All of it where addresses rise and something multiplied matrices before the first step."""
    rising = Playback(stream.blocks, expandable=expandable)
    rising.play(cut.before)
    stays = {block for _, block, _ in cut.first} - {block for _, block, _ in cut.later}
    workspace = [
        event
        for event in cut.first
        if event[1] in stays and stream.blocks[event[1]].n_bytes == gpu.workspace_bytes
    ][:1]
    rising.play(workspace + [event for event in cut.first if event not in workspace])
    rising.play(cut.later)
    return rising


def _largest_segment(stream: Stream) -> int:
    """Bytes that the driver would be asked for by the step's largest request."""
    step = stream.events[stream.marks["ready"] :]
    requests = (stream.blocks[block].n_bytes for sign, block, _ in step if sign > 0)
    return max(map(segment_bytes, requests), default=0)


def _reserved_bounds(
    peak: int, simulated: tuple[int, int], largest: int, expandable: bool
) -> tuple[int, int]:
    """Lowest and highest peak of reserved memory, given two simulated ones.

    Args:
        peak: Of tensors; no allocator reserves less.
        simulated: Peaks of reserved memory with falling and with rising addresses.
        largest: Segment for the largest request, which may miss its hole, and grow one instead.
        expandable: Whether segments grow. Then holes may also close that stay open here: on an H200
            up to 3.1 % less was reserved than simulated. No allocator reserves less than `peak`.
    """
    missed = min(largest, int(MISSED_HOLE_SHARE * max(simulated)))
    low = peak if expandable else max(peak, min(simulated) - SLACK)
    high = max(*simulated, min(simulated) + missed) + SLACK
    return low, high


def work_of_step(stream: Stream, micro_batches: int) -> Work:
    """What a step computes, with as many micro batches as it has.

    A micro batch ends with the last event of its backward pass; what comes after the last one
    (unscale, clip, update) is done once a step.
    """
    ready, phases = stream.marks["ready"], [phase for _, _, phase in stream.events]
    ends = [
        n + 1
        for n, phase in enumerate(phases)
        if n >= ready and phase == "backward" and phases[n + 1 : n + 2] != ["backward"]
    ]
    parts: list[list[Work]] = [[] for _ in [*ends, "update"]]
    for work in stream.work:
        if work.n_events > ready:
            parts[bisect_left(ends, work.n_events)].append(work)
    further = max(0, micro_batches - len(ends)) if ends else 0
    times = [1] * len(parts)
    if ends:
        times[-2] = 1 + further  # the last micro batch stands for the further ones
    counted = list(zip(times, parts, strict=True))
    return Work(
        n_events=len(phases),
        operations=sum(n * work.operations for n, part in counted for work in part),
        flops=sum(n * work.flops for n, part in counted for work in part),
        seconds=sum(n * work.seconds for n, part in counted for work in part),
    )


@dataclass(frozen=True)
class Judged:
    """How it goes on a card of limited memory: verdict, retries, bounds of reserved memory."""

    verdict: str
    retries: int
    reserved: tuple[int, int]


def _judged(
    stream: Stream, cut: Moments, gpu: Gpu, unlimited: tuple[int, int], expandable: bool
) -> Judged:
    """Whether it runs in the GPU's memory, cached segments given back when that helps.

    Args:
        stream: What is run.
        cut: Its events.
        gpu: The card.
        unlimited: Bounds of what the allocator takes where it is not limited.
        expandable: Whether segments grow. Giving back the pages that are free in one is not
            modelled, so such a run must do without.
    """
    limit = gpu.usable_bytes
    if unlimited[1] <= limit:
        return Judged(FITS, 0, unlimited)
    card = Playback(stream.blocks, descending=True, expandable=expandable, limit_bytes=limit)
    if not _runs(card, cut):
        return Judged(DOES_NOT_FIT, card.allocator.retries, unlimited)
    low = 0 if expandable else card.allocator.peak_reserved_bytes - SLACK
    return Judged(TIGHT, card.allocator.retries, (low, limit))


def _runs(card: Playback, cut: Moments) -> bool:
    """Whether no step runs out where the allocator cannot have more than the card.

    The second step is another one than the first: the optimizer's state lies where there was room.
    The third may be: what was given back in the second comes again in other pieces. When a step
    leaves the allocator as it found it, all further ones do the same. A reader's own step is taken
    once, here too: what it leaves (gradients, state) its next call finds or drops, as only that
    call would show.
    """
    try:
        card.play(cut.before)
        card.play(cut.first)
        for _ in range(LATER_STEPS if cut.first else 1):
            found = card.allocator.layout()
            card.play(cut.later)
            if card.allocator.layout() == found:
                break
    except MemoryError:
        return False
    return True
