"""Count every byte of a training step: who holds it, since which operation, until when.

`MemoryLedger` watches each operation that PyTorch dispatches and keeps one entry per storage, from
its first appearance until its last reference is gone. It works the same on CPU, on CUDA and on fake
tensors, because it looks at storages, never at an allocator.

Not modelled: what a kernel allocates and frees inside itself (cuBLAS workspaces, a softmax
backward's temporary), the allocator's rounding and fragmentation, the CUDA context. On a GPU,
workspaces and rounding are the difference to `max_memory_allocated`.

Sources: torch/utils/_python_dispatch.py, torch/autograd/graph.py (`saved_tensors_hooks`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch._C._autograd import _get_sequence_nr
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fitcast.memory.report import Block, Event, MemoryReport, replay, tensors_in, where
from fitcast.units import refusal, show_bytes


class MemoryLedger(TorchDispatchMode):
    """Counts live bytes by category, where the model is (CPU or CUDA), while it is active.

    One ledger can be entered again and again: what it saw adds up.

    Args:
        model: Its parameters count as weights, or as adapters when named `lora_`; its gradients and
            module paths are recognised. Storages met later that belong to nobody count as inputs.
        optimizer: Its state, where it has some already.
        inputs: Tensors (or nested containers of them) that count as inputs.
        budget_bytes: More live bytes than this raise `torch.OutOfMemoryError`.

    Raises:
        ValueError: `budget_bytes` is not a positive number.
        torch.OutOfMemoryError: An operation's result does not fit `budget_bytes`.

    Example:
        >>> with MemoryLedger() as ledger:
        ...     y = torch.zeros(256) + 1
        >>> ledger.report().peak_bytes
        2048
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        inputs: object = (),
        budget_bytes: int | None = None,
    ):
        super().__init__()
        if budget_bytes is not None and (isinstance(budget_bytes, bool) or budget_bytes <= 0):
            raise refusal(
                "budget_bytes", "be a positive number", budget_bytes, "None means no limit"
            )
        self.budget_bytes = budget_bytes
        self.device_type = "cpu"
        self.live_bytes = 0
        self._blocks: list[Block] = []
        self._index: dict[int, int] = {}  # address of a live storage -> its block
        self._initial: list[int] = []  # blocks that existed before the ledger
        self._events: list[Event] = []
        self._phase: str | None = None
        self._in_optimizer = False
        self._modules: list[str] = []  # modules being run, outermost first
        self._module_of_node: dict[int, str] = {}  # autograd sequence number -> module path
        self._newest_node = -1
        self._names: dict[int, str] = {}
        self._trainable: list[weakref.ref[torch.nn.Parameter]] = []  # of the watched models
        self._optimizer = weakref.ref(optimizer) if optimizer is not None else None
        self._doing = ""
        self._active = False
        self._hooks = contextlib.ExitStack()
        if model is not None:
            self.watch(model)
        if optimizer is not None:
            self._register_optimizer(optimizer)
        self.note_inputs(inputs)

    def watch(self, model: torch.nn.Module) -> None:
        """Recognise this model's parameters, gradients and modules from now on."""
        self._names = {id(module): name for name, module in model.named_modules()}
        if (first := next(model.parameters(), None)) is not None:
            self.device_type = first.device.type
        for name, parameter in model.named_parameters():
            self._found(parameter, "adapters" if "lora_" in name else "weights")
            self._found(parameter.grad, "gradients")
            for tensor in _quantization_state(parameter):
                self._found(tensor, "weights")
            if parameter.requires_grad:
                self._trainable.append(weakref.ref(parameter))
                if self._active:
                    self._watch_gradient(parameter)
        for buffer in model.buffers():
            self._found(buffer, "weights")

    def _watch_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Recognise the parameter's gradient as soon as backward is done with it."""
        hook = parameter.register_post_accumulate_grad_hook(
            lambda p: self._found(p.grad, "gradients")
        )
        self._hooks.callback(hook.remove)

    def note_inputs(self, batches: object) -> None:
        """These tensors, nested as they may be, are inputs."""
        for tensor in tensors_in(batches):
            self._found(tensor, "inputs")

    def _register_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for tensor in tensors_in(list(optimizer.state.values())):
            self._found(tensor, "optimizer state")

    def _found(self, tensor: Any, category: str, rename: bool = True) -> None:
        """Name a tensor's category; one whose making was not seen existed before the ledger."""
        if not self.counts(tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._index:
            self._initial.append(self._add(tensor, storage, category, "existed before", module=""))
        elif rename:
            block = self._blocks[self._index[storage._cdata]]
            if block.category in ("activations", "temporaries"):
                block.category = category

    def _add(
        self,
        tensor: torch.Tensor,
        storage: torch.UntypedStorage,
        category: str,
        operation: str,
        module: str,
    ) -> int:
        """Note a storage that appeared, and its end when it comes; the block's number."""
        block, address = len(self._blocks), storage._cdata
        n_bytes = storage.nbytes()
        ledger = weakref.ref(self)

        def freed(_: object) -> None:
            if (self := ledger()) is not None:
                self._index.pop(address, None)
                self.live_bytes -= n_bytes
                self._events.append((-1, block, self.phase_now()))

        self._index[address] = block
        self.live_bytes += n_bytes
        self._blocks.append(
            Block(
                n_bytes,
                category,
                operation,
                module,
                self.phase_now(),
                tuple(tensor.shape),
                tensor.dtype,
                alive=weakref.ref(storage, freed),
            )
        )
        return block

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Self]:
        """Name what happens inside (e.g. "load") instead of forward, backward or optimizer."""
        before, self._phase = self._phase, name
        try:
            yield self
        finally:
            self._phase = before

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[Self]:
        """What is allocated inside is said to come from `name`, not from an operation."""
        before, self._doing = self._doing, name
        try:
            yield self
        finally:
            self._doing = before

    def phase_now(self) -> str:
        """The phase of this moment: the one named by `phase`, else what PyTorch is doing."""
        in_backward = torch._C._current_graph_task_id() != -1
        return self._phase or (
            "optimizer" if self._in_optimizer else "backward" if in_backward else "forward"
        )

    def _module_now(self) -> str:
        """Path of the running module; in backward, of the one whose forward made the node."""
        if self._modules:  # forward, or forward again under checkpointing
            return self._modules[-1]
        node = torch._C._current_autograd_node()
        return self._module_of_node.get(node._sequence_nr(), "") if node is not None else ""

    def __enter__(self) -> Self:
        keep = self._hooks.callback
        keep(nn_module.register_module_forward_pre_hook(self._enter_module).remove)
        keep(nn_module.register_module_forward_hook(self._leave_module, always_call=True).remove)
        keep(register_optimizer_step_pre_hook(self._start_optimizer).remove)
        keep(register_optimizer_step_post_hook(self._end_optimizer).remove)
        self._hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x))
        for known in self._trainable:
            if (parameter := known()) is not None:
                self._found(parameter.grad, "gradients")  # made while the ledger was not looking
                self._watch_gradient(parameter)
        if self._optimizer is not None and (optimizer := self._optimizer()) is not None:
            self._register_optimizer(optimizer)
        self._active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            self._active = self._in_optimizer = False  # an error may have left a step in between
            self._modules.clear()
            self._hooks.close()

    def _enter_module(self, module: torch.nn.Module, _: Any) -> None:
        self._modules.append(self._names.get(id(module), type(module).__name__))

    def _leave_module(self, *_: Any) -> None:
        self._modules.pop()

    def _start_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._in_optimizer = True

    def _end_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._in_optimizer = False
        self._register_optimizer(optimizer)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        index = self._index.get(tensor.untyped_storage()._cdata)
        if index is not None:
            block = self._blocks[index]
            block.saved = True
            if block.category == "temporaries":
                block.category = "activations"
        return tensor.detach()  # an output kept by its own node would be a cycle that leaks

    def counts(self, tensor: Any) -> bool:
        """Whether this is a tensor with memory on the device that the ledger watches."""
        return (
            isinstance(tensor, torch.Tensor)
            and tensor.device.type == self.device_type
            and tensor.untyped_storage().nbytes() > 0
        )

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every operation pays for telling torch.compile to stay away

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # `torch.tensor(...)` being born
            for tensor in tensors_in((args, kwargs)):
                self._found(tensor, "inputs", rename=False)
        self._remember_node()
        result = func(*args, **kwargs)
        if not kwargs.get("pin_memory"):  # pinned memory is the host's, not the device's
            for tensor in tensors_in(result):
                if self.counts(tensor):
                    self._allocated(tensor, func.__name__)
        return result

    def _remember_node(self) -> None:
        """Note which module made the newest autograd node: it exists before its first operation."""
        newest = _get_sequence_nr() - 1
        if newest != self._newest_node:
            self._newest_node = newest
            self._module_of_node[newest] = self._module_now()

    def _allocated(self, tensor: torch.Tensor, operation: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._index:
            return
        self._check_budget(storage.nbytes())
        # Forward code that runs inside backward is a checkpoint being recomputed: it builds a graph
        # (backward itself does not), or runs in a module (an autograd function's own forward).
        recomputed = self.phase_now() == "backward" and (torch.is_grad_enabled() or self._modules)
        block = self._add(
            tensor,
            storage,
            "activations" if recomputed else "temporaries",
            self._doing or operation,
            self._module_now(),
        )
        self._events.append((1, block, self._blocks[block].phase))

    def _check_budget(self, wanted: int) -> None:
        if self.budget_bytes is not None and self.live_bytes + wanted > self.budget_bytes:
            free = max(0, self.budget_bytes - self.live_bytes)
            module = self._module_now()
            raise torch.OutOfMemoryError(
                f"Out of memory. Tried to allocate {show_bytes(wanted)}. The budget is "
                f"{show_bytes(self.budget_bytes)} of which {show_bytes(free)} is free. "
                f"{show_bytes(self.live_bytes)} is in use, {where(module, self.phase_now())}."
            )

    def report(self) -> MemoryReport:
        """What was watched so far."""
        return replay(self._blocks, self._initial, self._events, self.live_bytes)


def _quantization_state(parameter: torch.nn.Parameter) -> Iterable[torch.Tensor]:
    """The scales of a bitsandbytes 4-bit weight, which are plain attributes, not parameters."""
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
        state = getattr(state, "state2", None)
