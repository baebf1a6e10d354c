"""A deep model's stream of memory events from that of a shallow one, exact to the byte.

Transformer layers repeat: in each pass over the layers, all but the first and the last ones do the
same to memory. So four layers of a kind are run, the second and the third are proven equal event
by event, and the third is repeated. If they differ, there is no expansion and the caller runs the
whole model.

Words: a segment is consecutive events of one layer; a pass (`sweep`) goes through the layers once,
upwards or downwards; the places of a layer that was run are the layers of the deep model that do
what it did.

Where kinds alternate, a unit of several layers is repeated: `stream.layers` says which, and
"layer" means unit here. Not modelled: layers that repeat in no rhythm.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from fitcast.memory.report import Block, Event
from fitcast.memory.stream import Stream, Work

RUN = 4  # layers of a kind that are run: first, two to compare, last

Name = tuple[int | None, int | None, object]  # of a block: pass, layer, which one there


class NotRepeating(Exception):
    """The layers that should repeat do not."""


@dataclass
class Segment:
    """Consecutive events of one layer (`None`: of no layer) in one pass over the layers."""

    layer: int | None
    events: list[Event] = field(default_factory=list)
    sweep: int = 0  # which pass
    operations: int = 0
    flops: int = 0
    seconds: float = 0.0
    shared: list[Work] = field(default_factory=list)  # of operations over several layers' tensors
    marks: tuple[str, ...] = ()  # moments just before


def kinds(num_layers: int, *ends: int) -> list[int]:
    """How many layers of each kind, given where kinds end: first m, then k, then all the others."""
    edges = sorted({0, *ends, num_layers})
    return [high - low for low, high in itertools.pairwise(edges)]


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
    places = _places(counts)
    segments = _segments(stream)
    names = _names(segments, stream)
    repeated = [layer for layer, deep in enumerate(places) if len(deep) > 1]
    _check(segments, names, stream.blocks, repeated)
    deep = _Expansion(stream, segments, names, places).stream()
    for block, per_layer in deep.growing.items():
        deep.blocks[block].n_bytes += per_layer * (sum(counts) - len(places))
    return deep


def _places(counts: list[int]) -> list[list[int]]:
    """For each layer that was run, the layers of the deep model that do the same."""
    places: list[list[int]] = []
    first = 0
    for n in counts:
        layers = list(range(first, first + n))
        if n > RUN:
            places += [layers[:1], layers[1:2], layers[2:-1], layers[-1:]]
        else:
            places += [[layer] for layer in layers]
        first += n
    return places


# --- cutting -----------------------------------------------------------------------------------


def _segments(stream: Stream) -> list[Segment]:
    """Cut the events where the layer changes; number the passes over the layers."""
    cutter = _Cutter(stream)
    for position, piece in _pieces(stream):
        cutter.begin(position, piece[0][2])
        if piece[0][0] > 0:
            cutter.allocate(piece[0])
        else:
            cutter.free(piece)
    _number_passes(cutter.segments)
    cutter.spread_work()
    return [s for s in cutter.segments if s.events or s.layer is None]


def _pieces(stream: Stream) -> Iterator[tuple[int, list[Event]]]:
    """Each allocation alone, frees in a row together, and the position of the first event.

    A mark and the end of a phase come between frees.
    """
    marks = set(stream.marks.values())
    start, piece = 0, []
    for position, event in enumerate(stream.events):
        sign, _, phase = event
        in_a_row = piece and sign < 0 and piece[-1][0] < 0 and piece[-1][2] == phase
        if piece and (not in_a_row or position in marks):
            yield start, piece
            piece = []
        if not piece:
            start = position
        piece.append(event)
    if piece:
        yield start, piece


class _Cutter:
    """Sorts events into segments, one after the other.

    Attributes:
        segments: Those found so far; the last one is being filled.
    """

    def __init__(self, stream: Stream):
        self.segments = [Segment(None)]
        self._stream = stream
        self._layer: int | None = None  # that is being run
        self._phase: str | None = None
        self._home: dict[int, int | None] = {}  # block -> layer that was run when it came
        self._segment_of: list[Segment] = []  # event -> its segment
        self._starts: dict[int, tuple[str, ...]] = {}  # position -> marks there
        for name, position in stream.marks.items():
            self._starts[position] = (*self._starts.get(position, ()), name)

    def begin(self, position: int, phase: str) -> None:
        """A mark and a new phase end the pass."""
        if position in self._starts:
            self._outside(self._starts[position])
        if self._phase not in (None, phase):
            self._outside()
        self._phase = phase

    def _outside(self, marks: tuple[str, ...] = ()) -> None:
        self.segments.append(Segment(None, marks=marks))
        self._layer = None

    def allocate(self, event: Event) -> None:
        """A block belongs to its module's layer; one of no module to the layer being run."""
        block = event[1]
        if module := self._stream.blocks[block].module:
            self._layer = self._stream.layers.unit(module)
        self._home[block] = self._layer
        self._add(event, self._layer)

    def free(self, events: list[Event]) -> None:
        """Frees belong to the layer being run, unless they are of all layers at once.

        Those come in an order of their own. It is replaced by that of the layers, and each belongs
        to the layer that its block came from.
        """
        if not any(self._is_far(block) for _, block, _ in events):
            for event in events:
                self._add(event, self._layer)
            return
        homes = {block: self._home[block] for _, block, _ in events}
        for event in sorted(
            events, key=lambda e: (-1 if homes[e[1]] is None else homes[e[1]], e[1])
        ):
            home = homes[event[1]]
            self._add(event, self._layer if home is None else home)

    def _is_far(self, block: int) -> bool:
        """Whether a block came from another layer than the one being run and its neighbours."""
        home = self._home[block]
        return home is not None and (self._layer is None or abs(home - self._layer) > 1)

    def _add(self, event: Event, layer: int | None) -> None:
        if self.segments[-1].layer != layer:
            self.segments.append(Segment(layer))
        self.segments[-1].events.append(event)
        self._segment_of.append(self.segments[-1])

    def spread_work(self) -> None:
        """Work belongs to the segment of the event before it."""
        last = len(self._segment_of) - 1
        for work in self._stream.work:
            segment = self._segment_of[min(max(work.n_events - 1, 0), last)]
            if work.shares:
                segment.shared.append(work)
            else:
                segment.operations += work.operations
                segment.flops += work.flops
                segment.seconds += work.seconds


def _number_passes(segments: list[Segment]) -> None:
    """A pass goes from layer to layer, in one direction, with nothing between."""
    sweep, direction, before = 0, 0, None
    for segment in segments:
        if segment.layer is not None:
            step = 0 if before is None else segment.layer - before
            if step in (1, -1) and direction in (0, step):
                direction = step
            else:
                sweep, direction = sweep + 1, 0
            segment.sweep = sweep
        before = segment.layer


# --- comparing ---------------------------------------------------------------------------------


def _names(segments: list[Segment], stream: Stream) -> dict[int, Name]:
    """block -> (pass, layer, which one); blocks of no layer go by their own number.

    Which one: the n-th of its operation in its module, so that one more in the first layer does
    not rename the others.
    """
    names: dict[int, Name] = {}
    count: Counter[tuple] = Counter()
    for segment in segments:
        for sign, block, _ in segment.events:
            if sign > 0 and segment.layer is None:
                names[block] = (None, None, block)
            elif sign > 0:
                made = stream.blocks[block]
                which = (stream.layers.anonymous(made.module), made.operation)
                count[segment.sweep, segment.layer, which] += 1
                nth = count[segment.sweep, segment.layer, which]
                names[block] = (segment.sweep, segment.layer, (*which, nth))
    return names


def _check(
    segments: list[Segment], names: dict[int, Name], blocks: list[Block], repeated: list[int]
) -> None:
    """Prove that in every pass each repeated layer does what the layer before it does."""
    seen: dict[int, dict[int, list[tuple]]] = {}  # pass -> layer -> what happened
    for segment in segments:
        if segment.layer is not None:
            layers = seen.setdefault(segment.sweep, {})
            layers.setdefault(segment.layer, []).extend(_story(segment, names, blocks))
    for sweep, layers in seen.items():
        for layer in repeated:
            met = layers.keys() & range(layer - 2, layer + 2)
            if len(met) not in (0, RUN) and not met <= {layer - 2, layer + 1}:
                raise NotRepeating(f"pass {sweep} meets layers {sorted(met)} only")
            if layers.get(layer) != layers.get(layer - 1):
                raise NotRepeating(f"layers {layer - 1} and {layer} differ in pass {sweep}")


def _story(segment: Segment, names: dict[int, Name], blocks: list[Block]) -> Iterator[tuple]:
    """A layer's events in words that are the same for every layer which does the same."""
    for sign, block, phase in segment.events:
        sweep, layer, which = names[block]
        away = None if layer is None or segment.layer is None else layer - segment.layer
        made = blocks[block]
        size = (made.n_bytes, made.category, made.saved) if sign > 0 else ()
        yield (sign, sweep, away, which, phase, *size)


# --- repeating ---------------------------------------------------------------------------------


class _Expansion:
    """Writes the deep model's stream, group of segments by group of segments."""

    def __init__(
        self,
        stream: Stream,
        segments: list[Segment],
        names: dict[int, Name],
        places: list[list[int]],
    ):
        self._shallow, self._names, self._places = stream, names, places
        self._groups = _groups(segments)
        more = sum(map(len, places)) - len(places)
        self._layers = replace(stream.layers, periods=stream.layers.periods + more)
        self._deep = Stream([], [], {}, layers=self._layers)
        self._made: dict[Name, int] = {}  # name in the deep model -> block

    def stream(self) -> Stream:
        """The deep model's stream."""
        for number, group in enumerate(self._groups):
            for segment in group:
                self._deep.marks |= dict.fromkeys(segment.marks, len(self._deep.events))
            for place in self._order(number):
                for segment in group:
                    self._write(segment, place)
            for segment in group:
                self._deep.work += map(self._work_of_more_layers, segment.shared)
        for name, position in self._shallow.marks.items():
            if position == len(self._shallow.events):
                self._deep.marks[name] = len(self._deep.events)
        return self._deep

    def _order(self, number: int) -> list[int] | list[None]:
        """The places of a group's layer in the order in which this pass comes through them."""
        layer = self._groups[number][0].layer
        if layer is None:
            return [None]
        before = self._layer_of_group(number - 1)
        after = self._layer_of_group(number + 1)
        falls = (before is not None and before > layer) or (after is not None and after < layer)
        return self._places[layer][::-1] if falls else self._places[layer]

    def _layer_of_group(self, number: int) -> int | None:
        return self._groups[number][0].layer if 0 <= number < len(self._groups) else None

    def _write(self, segment: Segment, place: int | None) -> None:
        deep = self._deep
        for sign, block, phase in segment.events:
            name = self._name_at(block, segment, place)
            if sign > 0:
                self._make(block, name)
            elif name not in self._made:
                raise NotRepeating(f"{name} is freed before it is allocated")
            deep.events.append((sign, self._made[name], phase))
        deep.work.append(Work(len(deep.events), segment.operations, segment.flops, segment.seconds))

    def _work_of_more_layers(self, work: Work) -> Work:
        """An operation over the tensors of several layers, as of the optimizer, grows with them.

        It stays one operation; one on a single layer's tensors is done again for each further one.
        """
        more = {layer: len(self._places[layer]) - 1 for layer in work.shares}
        factor = 1 + sum(share * more[layer] for layer, share in work.shares.items())
        again = sum(more.values()) if len(work.shares) == 1 else 0
        return Work(
            len(self._deep.events),
            work.operations * (1 + again),
            round(work.flops * factor),
            work.seconds * factor,
        )

    def _name_at(self, block: int, segment: Segment, place: int | None) -> Name:
        """The block's name in the deep model, seen from a layer's place there."""
        sweep, layer, which = self._names[block]
        if layer is None:
            return (sweep, None, which)
        if segment.layer is not None and place is not None:
            return (sweep, place + layer - segment.layer, which)
        if len(self._places[layer]) > 1:
            raise NotRepeating(f"layer {layer} is touched outside of every pass")
        return (sweep, self._places[layer][0], which)

    def _make(self, block: int, name: Name) -> None:
        number, made = len(self._deep.blocks), self._shallow.blocks[block]
        self._made[name] = number
        self._deep.blocks.append(self._moved(made, name[1]))
        if block in self._shallow.growing:
            self._deep.growing[number] = self._shallow.growing[block]

    def _moved(self, block: Block, layer: int | None) -> Block:
        """A copy of a block in the module of the same name in another layer."""
        copy = block.resized(block.n_bytes)
        if layer is not None:
            copy.module = self._shallow.layers.moved(block.module, layer, self._layers)
        return copy


def _groups(segments: list[Segment]) -> list[list[Segment]]:
    """Segments of one layer that follow each other; those of no layer stay alone."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and segment.layer is not None and groups[-1][0].layer == segment.layer:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups
