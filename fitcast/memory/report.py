"""What a ledger saw, replayed: the peak, who held it, which operation caused it, the timeline.

Not modelled: anything the ledger did not see; see `ledger`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

CATEGORIES: tuple[str, ...] = (
    "weights",
    "adapters",
    "gradients",
    "optimizer state",
    "activations",
    "temporaries",
    "inputs",
)


COMPILED = (
    "compiled "  # before a part of the step that one kernel computes, in an operation's place
)
# Where an operation is that belongs to no module: in which phase, in a reader's words.
OUTSIDE = {"optimizer": "in the optimizer's step", "load": "in loading", "adapters": "in loading"}
BESIDE = "beside the model's modules, as a loss or a script's own code is"

Event = tuple[int, int, str]  # +1 allocated or -1 freed, index of the block, phase


@dataclass(slots=True)
class Block:
    """One storage: `n_bytes` bytes, what it is for, and the operation and module that made it.

    `stream` is the CUDA stream on which it was made, 0 the one where a step computes; `parameter`
    the place among the watched model's parameters and then buffers, in the model's own order.
    """

    n_bytes: int
    category: str
    operation: str
    module: str
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    saved: bool = False  # autograd packed it for backward
    alive: weakref.ref | None = field(default=None, repr=False)  # its callback reports the end
    stream: int = 0
    parameter: int | None = field(default=None, repr=False, compare=False)

    def resized(self, n_bytes: int) -> Block:
        """The same block with another size."""
        return Block(
            n_bytes,
            self.category,
            self.operation,
            self.module,
            self.phase,
            self.shape,
            self.dtype,
            self.saved,
            stream=self.stream,
            parameter=self.parameter,
        )


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """What a ledger saw. All sizes in bytes.

    Attributes:
        peak_bytes: Most bytes alive at once.
        composition: Bytes of each category at the peak.
        peak_operation, peak_module, peak_phase: What was allocated when the peak was reached.
        phase_peaks: Most bytes alive in each phase: forward, backward, optimizer, or your own.
        saved_activation_bytes: Most bytes at once that autograd kept for backward, weights and
            inputs excluded.
        live_bytes: Bytes alive at the end.
        largest: The blocks alive at the peak, largest first.
        saved: The blocks behind `saved_activation_bytes`, oldest first, freed ones included.
        timeline: For each category its bytes alive after each event (allocation or free).
        phases: The phase of each event.
    """

    peak_bytes: int
    composition: dict[str, int]
    peak_operation: str
    peak_module: str
    peak_phase: str
    phase_peaks: dict[str, int]
    saved_activation_bytes: int
    live_bytes: int
    largest: list[Block]
    saved: list[Block]
    timeline: dict[str, list[int]]
    phases: list[str]

    @property
    def peak_place(self) -> str:
        """Where the peak is, in a reader's words."""
        if self.peak_operation.startswith(COMPILED):
            return f"in the {self.peak_operation}"
        return f"at {self.peak_operation} {where(self.peak_module, self.peak_phase)}"


def where(module: str, phase: str) -> str:
    """A module's path with its preposition; of what belongs to none, what it belongs to."""
    return f"in {module}" if module else OUTSIDE.get(phase, BESIDE)


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def replay(
    blocks: list[Block], initial: list[int], events: list[Event], live_bytes: int
) -> MemoryReport:
    """Run through all events and report the highest moment. Categories are the final ones.

    A gradient is a gradient from its first byte, although only the end of its parameter's backward
    proves it.

    Args:
        blocks: Every storage seen.
        initial: Indices of those that existed before the first event.
        events: (+1 or -1, index, phase) for each allocation or free, in order.
        live_bytes: Bytes alive now.
    """
    live = dict.fromkeys(CATEGORIES, 0)
    for index in initial:
        live[blocks[index].category] += blocks[index].n_bytes
    timeline = {category: [n_bytes] for category, n_bytes in live.items()}
    total = peak = sum(live.values())
    saved = most_saved = 0
    phases, phase_peaks = ["start"], {}
    composition, peak_event = dict(live), -1
    for event, (sign, index, phase) in enumerate(events):
        block = blocks[index]
        live[block.category] += sign * block.n_bytes
        total += sign * block.n_bytes
        if block.saved and block.category == "activations":
            saved += sign * block.n_bytes
            most_saved = max(most_saved, saved)
        for category, n_bytes in live.items():
            timeline[category].append(n_bytes)
        phases.append(phase)
        phase_peaks[phase] = max(phase_peaks.get(phase, 0), total)
        if total > peak:
            peak, composition, peak_event = total, dict(live), event
    alive = set(initial)
    for sign, index, _ in events[: peak_event + 1]:
        (alive.add if sign > 0 else alive.discard)(index)
    cause = blocks[events[peak_event][1]] if peak_event >= 0 else None
    return MemoryReport(
        peak_bytes=peak,
        composition=composition,
        phase_peaks=phase_peaks,
        peak_operation=cause.operation if cause else "existed before",
        peak_module=cause.module if cause else "",
        peak_phase=cause.phase if cause else "start",
        saved_activation_bytes=most_saved,
        live_bytes=live_bytes,
        timeline=timeline,
        phases=phases,
        saved=[b for b in blocks if b.saved and b.category == "activations"],
        largest=sorted((blocks[i] for i in alive), key=lambda block: -block.n_bytes),
    )
