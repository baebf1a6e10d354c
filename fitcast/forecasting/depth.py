"""A deep model's stream of memory events from that of a shallow one, exact to the byte.

Transformer layers repeat: in each pass over the layers, all but the first and the last ones do the
same to memory. So four layers of a kind are run, the second and the third are proven equal event
by event, and the third is repeated. If they differ, there is no expansion and the caller runs the
whole model.

Where kinds alternate, a unit of several layers is repeated: `stream.layers` says which. Not
modelled: layers that repeat in no rhythm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fitcast.memory.layers import Layers
from fitcast.memory.report import Block
from fitcast.memory.stream import Stream

RUN = 4  # layers of a kind that are run: first, two to compare, last


class NotRepeating(Exception):
    """The layers that should repeat do not."""


@dataclass
class Segment:
    """Consecutive events of one layer (`None`: of no layer) in one pass over the layers."""

    layer: int | None
    events: list[tuple[int, int, str]] = field(default_factory=list)
    sweep: int = 0  # which pass
    operations: int = 0
    flops: int = 0
    seconds: float = 0.0
    marks: tuple[str, ...] = ()  # moments just before


def kinds(num_layers: int, checkpointed: int) -> list[int]:
    """How many layers of each kind: checkpointed ones come first."""
    return [n for n in (checkpointed, num_layers - checkpointed) if n]


def run_layers(counts: list[int]) -> list[int]:
    """How many layers of each kind to run."""
    return [min(n, RUN) for n in counts]


def deepen(stream: Stream, counts: list[int]) -> Stream:
    """The stream of a model with `counts` layers of each kind.

    Args:
        stream: Of a model with `run_layers(counts)` layers.
        counts: Layers of each kind.

    Raises:
        NotRepeating: Layers of a kind differ in what they do to memory.
    """
    if run_layers(counts) == counts:
        return stream
    places: list[list[int]] = []  # layer that was run -> layers of the deep model
    repeated, first = [], 0
    for n in counts:
        layers = range(first, first + n)
        if n > RUN:
            repeated.append(len(places) + 2)
            places += [[layers[0]], [layers[1]], [*layers[2:-1]], [layers[-1]]]
        else:
            places += [[layer] for layer in layers]
        first += n
    segments = _segments(stream, len(places))
    _check(segments, stream, repeated)
    deep = _expand(segments, stream, places)
    for block, per_layer in deep.growing.items():
        deep.blocks[block].n_bytes += per_layer * (sum(counts) - len(places))
    return deep


def _segments(stream: Stream, n_layers: int) -> list[Segment]:
    """Cut the events where the layer changes; number the passes over the layers."""
    home: dict[int, int | None] = {}  # block -> layer of the segment that allocated it
    layers = [stream.layers.unit(block.module) for block in stream.blocks]
    starts: dict[int, tuple[str, ...]] = {}
    for name, position in stream.marks.items():
        starts[position] = (*starts.get(position, ()), name)
    segments = [Segment(None)]
    position_of: list[Segment] = []  # event -> segment, for the work
    position, layer = 0, None

    def add(event, where):
        if segments[-1].layer != where:
            segments.append(Segment(where))
        segments[-1].events.append(event)
        position_of.append(segments[-1])

    events = stream.events
    while position < len(events):
        if position in starts:
            segments.append(Segment(None, marks=starts[position]))
            layer = None
        sign, block, phase = events[position]
        if position and phase != events[position - 1][2]:
            segments.append(Segment(None))  # a pass ends with its phase
            layer = None
        if sign > 0:
            layer = layers[block] if stream.blocks[block].module else layer
            home[block] = layer
            add(events[position], layer)
            position += 1
            continue
        end = position
        while (
            end < len(events)
            and events[end][0] < 0
            and events[end][2] == phase
            and (end == position or end not in starts)
        ):
            end += 1
        freed = events[position:end]
        far = {
            home[b]
            for _, b, _ in freed
            if home[b] is not None and (layer is None or abs(home[b] - layer) > 1)
        }
        if far:  # all layers at once, in an order of its own: theirs will do
            freed = sorted(freed, key=lambda e: (-1 if home[e[1]] is None else home[e[1]], e[1]))
        for event in freed:
            add(event, home[event[1]] if far and home[event[1]] is not None else layer)
        position = end
    _number_passes(segments, n_layers)
    for n_before, operations, flops, seconds in stream.work:
        where = position_of[min(max(n_before - 1, 0), len(position_of) - 1)]
        where.operations += operations
        where.flops += flops
        where.seconds += seconds
    return [s for s in segments if s.events or s.layer is None]


def _number_passes(segments: list[Segment], n_layers: int) -> None:
    sweep, step, before = 0, 0, None
    for segment in segments:
        if segment.layer is not None:
            if (
                before is None
                or segment.layer - before not in (1, -1)
                or step not in (0, segment.layer - before)
            ):
                sweep, step = sweep + 1, 0
            else:
                step = segment.layer - before
            segment.sweep = sweep
        before = segment.layer


def _names(segments: list[Segment], stream: Stream) -> dict[int, tuple]:
    """block -> (pass, layer, which one); blocks of no layer go by their own number.

    Which one: the n-th of its operation in its module, so that one more in the first layer does
    not rename the others.
    """
    names, count = {}, {}
    for segment in segments:
        for sign, block, _ in segment.events:
            if sign > 0 and segment.layer is None:
                names[block] = (None, None, block)
            elif sign > 0:
                made = stream.blocks[block]
                module = stream.layers.anonymous(made.module)
                key = (segment.sweep, segment.layer, module, made.operation)
                count[key] = count.get(key, 0) + 1
                names[block] = (segment.sweep, segment.layer, (*key[2:], count[key]))
    return names


def _check(segments: list[Segment], stream: Stream, repeated: list[int]) -> None:
    """Prove that in every pass each repeated layer does what the layer before it does."""
    names, seen = _names(segments, stream), {}

    def story(segment):
        for sign, block, phase in segment.events:
            sweep, layer, which = names[block]
            away = None if layer is None else layer - segment.layer
            b = stream.blocks[block]
            yield (sign, sweep, away, which, phase) + (
                (b.n_bytes, b.category, b.saved) if sign > 0 else ()
            )

    for segment in segments:
        if segment.layer is not None:
            seen.setdefault(segment.sweep, {}).setdefault(segment.layer, []).extend(story(segment))
    for sweep, layers in seen.items():
        for layer in repeated:
            met = layers.keys() & range(layer - 2, layer + 2)
            if len(met) not in (0, RUN) and not met <= {layer - 2, layer + 1}:
                raise NotRepeating(f"pass {sweep} meets layers {sorted(met)} only")
            if layers.get(layer) != layers.get(layer - 1):
                raise NotRepeating(f"layers {layer - 1} and {layer} differ in pass {sweep}")


def _expand(segments: list[Segment], stream: Stream, places: list[list[int]]) -> Stream:
    more = sum(map(len, places)) - len(places)
    layers = replace(stream.layers, periods=stream.layers.periods + more)
    names, deep = _names(segments, stream), Stream([], [], {}, layers=layers)
    made: dict[tuple, int] = {}

    def emit(segment: Segment, at: int | None) -> None:
        for sign, block, phase in segment.events:
            sweep, layer, which = names[block]
            if layer is not None and segment.layer is not None:
                layer = at + layer - segment.layer
            elif layer is not None:
                if len(places[layer]) > 1:
                    raise NotRepeating(f"layer {layer} is touched outside of every pass")
                layer = places[layer][0]
            name = (sweep, layer, which)
            if sign > 0:
                made[name] = len(deep.blocks)
                if block in stream.growing:
                    deep.growing[len(deep.blocks)] = stream.growing[block]
                deep.blocks.append(_copy(stream.blocks[block], layer, stream.layers, layers))
            elif name not in made:
                raise NotRepeating(f"{name} is freed before it is allocated")
            deep.events.append((sign, made[name], phase))
        deep.work.append((len(deep.events), segment.operations, segment.flops, segment.seconds))

    position = 0
    while position < len(segments):
        end = position + 1
        while (
            end < len(segments)
            and segments[position].layer is not None
            and segments[end].layer == segments[position].layer
        ):
            end += 1
        for segment in segments[position:end]:
            deep.marks |= dict.fromkeys(segment.marks, len(deep.events))
        segment = segments[position]
        wanted = [None] if segment.layer is None else places[segment.layer]
        before = segments[position - 1].layer if position else None
        after = segments[end].layer if end < len(segments) else None
        falling = segment.layer is not None and (
            before is not None
            and before > segment.layer
            or after is not None
            and after < segment.layer
        )
        for at in reversed(wanted) if falling else wanted:
            for part in segments[position:end]:
                emit(part, at)
        position = end
    for name, n_events in stream.marks.items():
        if n_events == len(stream.events):
            deep.marks[name] = len(deep.events)
    return deep


def _copy(block: Block, layer: int | None, old: Layers, new: Layers) -> Block:
    module = block.module if layer is None else old.moved(block.module, layer, new)
    return Block(
        block.n_bytes,
        block.category,
        block.operation,
        module,
        block.phase,
        block.shape,
        block.dtype,
        block.saved,
    )
