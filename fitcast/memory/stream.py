"""A ledger of what would live on the GPU, as a stream of events for the caching allocator.

Not modelled: tensors that a program makes on the CPU on purpose, except Python's own scalars.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fitcast.gpus import Gpu
from fitcast.memory.layers import Layers
from fitcast.memory.ledger import MemoryLedger
from fitcast.memory.report import Block, Event, tensors_in
from fitcast.units import Said, refusal

OPTIMIZER_BLOCK = 256  # numbers behind a scale of 8-bit state; source: bitsandbytes, optim


class Work(NamedTuple):
    """What one or some operations do.

    Attributes:
        n_events: Number of events before their end.
        operations: How many they are.
        flops: Their multiplications and additions.
        seconds: How long they take at least.
        shares: Of an operation outside of all modules, as the optimizer's: layer -> the part of
            its traffic that belongs to it.
        made: Of such an operation: the block that it has just made, if any.
    """

    n_events: int
    operations: int
    flops: int
    seconds: float
    shares: dict[int, float] = {}
    made: int | None = None


@dataclass
class Stream:
    """What happened to memory.

    Attributes:
        blocks: Every storage, with its size as asked for.
        events: (+1 or -1, index of the block, phase) for each allocation or free, in order.
        marks: Name of a moment -> number of events before it.
        work: What was computed. Of what is done once, to make what stays (the optimizer's state),
            nothing.
        growing: Bytes that a block of no layer gains with each further layer.
        layers: Which layer a block's module belongs to.
        pinned_host_bytes: Host memory that is locked for checkpoints.
    """

    blocks: list[Block]
    events: list[Event]
    marks: dict[str, int]
    work: list[Work] = field(default_factory=list)
    growing: dict[int, int] = field(default_factory=dict)
    layers: Layers = field(default_factory=Layers)
    pinned_host_bytes: int = 0


def later_step(step: list[Event]) -> list[Event]:
    """A step after the first: without what that allocates for good, as the optimizer's state.

    Args:
        step: Events of the first step.
    """
    born = {block for sign, block, _ in step if sign > 0}
    gone = {block for sign, block, _ in step if sign < 0}
    return [event for event in step if event[1] in born and event[1] in gone]


class DeviceLedger(MemoryLedger):
    """Counts what would live on the GPU: fake tensors, except Python's own scalars."""

    def __init__(self):
        super().__init__()
        self.marks: dict[str, int] = {}
        self.work: list[Work] = []
        self.growing: dict[int, int] = {}
        self.layers = Layers()
        self._on_host: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        self._trained: dict[str, int] = {}  # name of a parameter -> its numbers
        self._flat = False  # whether one vector of them all has been seen
        self._owner = ""
        self._inputs: Iterator = iter(())

    def watch(self, model: torch.nn.Module) -> None:
        """Recognise this model's parameters, gradients and modules from now on."""
        super().watch(model)
        self._trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        for place, tensor in enumerate((*model.parameters(), *model.buffers())):
            if (block := self._block_of(tensor)) is not None:
                self._blocks[block].parameter = place

    def watch_too(self, model: torch.nn.Module, prefix: str) -> None:
        """Recognise a second model's weights and modules, which train nothing, as well.

        Args:
            model: Beside the watched one.
            prefix: Before the names of its modules.
        """
        names, trained, trainable = self._names, self._trained, self._trainable
        super().watch(model)
        second = {number: prefix + name for number, name in self._names.items()}
        self._names, self._trained, self._trainable = names | second, trained, trainable

    def grows(self, tensor: torch.Tensor, n_bytes: int) -> None:
        """This tensor's block gains so many bytes with each further layer of the model."""
        block = self._block_of(tensor)
        if block is not None:
            self.growing[block] = n_bytes

    def _start_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if not all(isinstance(parameter, FakeTensor) for parameter in trained):
            raise refusal(
                "step",
                "make its optimizer itself",
                Said("one over real tensors"),
                "write optimizer = ...(model.parameters()) inside step",
            )
        super()._start_optimizer(optimizer)

    def note_work(
        self, flops: int, seconds: float, tensors: list[torch.Tensor], result: object
    ) -> None:
        """Note an operation that has just been done.

        Args:
            flops: Its multiplications and additions.
            seconds: How long it takes at least.
            tensors: What it reads and writes.
            result: What it gives back.
        """
        if self._modules or torch._C._current_graph_task_id() != -1:
            self.work.append(Work(len(self._events), 1, flops, seconds))
            return
        newest = len(self._blocks) - 1
        made = newest if any(self._block_of(t) == newest for t in tensors_in(result)) else None
        self.work.append(Work(len(self._events), 1, flops, seconds, self._shares(tensors), made))

    def _shares(self, tensors: list[torch.Tensor]) -> dict[int, float]:
        """layer -> which part of the tensors' bytes is its own; all, if it is the only layer."""
        n_bytes: dict[int, int] = {}
        for tensor in tensors:
            layer = self.layers.unit(self._module_of(tensor))
            if layer is not None:
                n_bytes[layer] = n_bytes.get(layer, 0) + _bytes_of(tensor)
        total = sum(n_bytes.values() if len(n_bytes) == 1 else map(_bytes_of, tensors))
        return {layer: n / total for layer, n in n_bytes.items() if n}

    def mark(self, name: str) -> None:
        """Name this moment."""
        self.marks[name] = len(self._events)

    @contextlib.contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """What is allocated here belongs to `module`."""
        self._modules.append(module)
        try:
            yield
        finally:
            self._modules.pop()

    def counts(self, tensor: Any) -> bool:
        if not isinstance(tensor, FakeTensor) or tensor.fake_device.type != "cpu":
            return False  # `tensor.device` would be an operation of its own, asked of every mode
        storage = tensor.untyped_storage()
        return storage._cdata not in self._on_host and storage.nbytes() > 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self._inputs = iter(_inputs_of(args))
        if func is torch.ops.aten.lift_fresh.default and args[0].dim() == 0:
            result = func(*args)  # torch.tensor(1.0) lives on the host
            storage = result.untyped_storage()
            self._on_host[storage._cdata] = storage
            return result
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self._inputs = iter(())  # held no longer than the operation
        return result

    def _allocated(self, tensor: torch.Tensor, operation: str) -> None:
        joined = operation in ("stack.default", "empty.memory_format")  # one of all parameters
        joined = joined or self._joins_all(tensor, operation)
        self._owner = "" if joined else self._module_of(next(self._inputs, None))
        super()._allocated(tensor, operation)
        if (
            joined
            and tensor.shape[:1] == (len(self._trained),)
            and not self._module_now()
            and self.phase_now() != "backward"
        ):
            self.growing[len(self._blocks) - 1] = tensor[0].nbytes * sum(
                self.layers.repeats(name) for name in self._trained
            )
        self._owner = ""
        self._grow_if_flat(tensor, operation)

    def _grow_if_flat(self, tensor: torch.Tensor, operation: str) -> None:
        """A vector of all trained numbers, and its 8-bit state's scales, grow with each layer."""
        block = self._block_of(tensor) if tensor.dim() == 1 else None
        if block is None or self._module_now() or self.phase_now() == "backward":
            return
        if self._joins_all(tensor, operation):
            self._blocks[block].category = "gradients" if self._flat else "adapters"
            self._flat = True
        for numbers in (1, OPTIMIZER_BLOCK):
            if self._flat and len(tensor) == -(-sum(self._trained.values()) // numbers):
                sizes = (n for name, n in self._trained.items() if self.layers.repeats(name))
                self.growing[block] = sum(sizes) // numbers * tensor.itemsize

    def _joins_all(self, tensor: torch.Tensor, operation: str) -> bool:
        """Whether this is one vector of all trained numbers, or of their gradients."""
        n_numbers = sum(self._trained.values())
        return operation == "cat.default" and n_numbers > 0 and tensor.shape == (n_numbers,)

    def _module_of(self, tensor: object) -> str:
        """Path of the module to which the block of a fake tensor belongs, "" where it has none."""
        index = self._block_of(tensor)
        return "" if index is None else self._blocks[index].module

    def _block_of(self, tensor: object) -> int | None:
        if not isinstance(tensor, FakeTensor):
            return None
        return self._index.get(tensor.untyped_storage()._cdata)

    def _module_now(self) -> str:
        """Outside of modules, a tensor belongs where the one does that it was made from."""
        return super()._module_now() or self._owner

    def stream(self) -> Stream:
        """What was seen so far; blocks that existed before come first."""
        existed = [(1, block, "start") for block in self._initial]
        before = len(existed)
        gone = {block for sign, block, _ in self._events if sign < 0}
        return Stream(
            blocks=self._blocks,
            events=existed + self._events,
            marks={name: before + n for name, n in self.marks.items()},
            work=[
                work._replace(n_events=before + work.n_events)
                for work in self.work
                if work.made is None or work.made in gone
            ],
            growing=self.growing,
            layers=self.layers,
        )


def _inputs_of(args: tuple) -> Sequence[Any]:
    """An operation's arguments; of one that takes a list of tensors (stack, cat), the list's."""
    return args[0] if args and isinstance(args[0], (list, tuple)) else args


def work_recorder(ledger: DeviceLedger, gpu: Gpu) -> Callable[[int, tuple, object], None]:
    """Notes in the ledger each operation's FLOPs and the seconds it takes at least on `gpu`.

    At least: as long as its arithmetic at the peak rate or its traffic at the peak bandwidth,
    whichever is longer (Williams et al. 2009, the roofline model).
    """

    def record(flops: int, args: tuple, result: object) -> None:
        tensors = list(tensors_in((args, result)))
        traffic = sum(map(_bytes_of, tensors))
        rate = gpu.matmul_flops if tensors and tensors[0].itemsize < 4 else gpu.float32_flops
        seconds = max(flops / rate, traffic / gpu.bandwidth)
        ledger.note_work(flops, seconds, tensors, result)

    return record


def _bytes_of(tensor: torch.Tensor) -> int:
    """Bytes that an operation moves which reads or writes all of a tensor once."""
    return tensor.numel() * tensor.itemsize
