"""A run on fake tensors, from loading the weights to the end of a step, as a stream of events.

The stream is what the caching allocator would see: allocations and frees, in order. It comes from
the code of the real run (`qlora`), watched by a ledger. Not modelled: the order in which loading
threads place the weights of a 16-bit base; several processes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import fake, qlora
from .cuda_pretence import pretend_cuda
from .cuda_rules import CudaKernels
from .hardware import Gpu
from .ledger import MemoryLedger
from .memory_report import Block
from .recipe import TrainRecipe


@dataclass
class Stream:
    """What happened to memory.

    Attributes:
        blocks: Every storage, with its size as asked for.
        events: (+1 or -1, index of the block, phase) for each allocation or free, in order.
        marks: Name of a moment -> number of events before it.
        work: (number of events before it, FLOPs, seconds) of each operation.
        growing: Bytes that a block of no layer gains with each further layer.
    """

    blocks: list[Block]
    events: list[tuple[int, int, str]]
    marks: dict[str, int]
    work: list[tuple[int, int, float]] = field(default_factory=list)
    growing: dict[int, int] = field(default_factory=dict)


class DeviceLedger(MemoryLedger):
    """Counts what would live on the GPU: fake tensors, except Python's own scalars."""

    def __init__(self):
        super().__init__(device_type="cpu")
        self.marks: dict[str, int] = {}
        self.work: list[tuple[int, int, float]] = []
        self.growing: dict[int, int] = {}
        self._on_host: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        self._trained: list[str] = []
        self._owner = ""
        self._inputs: Iterator = iter(())

    def watch(self, model: torch.nn.Module) -> None:
        """Recognise this model's parameters, gradients and modules from now on."""
        self.model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._register_model(model)
        self._trained = [name for name, p in model.named_parameters() if p.requires_grad]
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._hooks.callback(parameter.register_post_accumulate_grad_hook(
                    lambda p: self._found(p.grad, "gradients")).remove)

    def mark(self, name: str) -> None:
        """Name this moment."""
        self.marks[name] = len(self._events)

    @contextlib.contextmanager
    def inside(self, module: str) -> Iterator[None]:
        """What is allocated here belongs to `module`."""
        self._modules.append(module)
        yield
        self._modules.pop()

    def counts(self, tensor: object) -> bool:
        return isinstance(tensor, FakeTensor) and super().counts(tensor) \
            and tensor.untyped_storage()._cdata not in self._on_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._inputs = iter(args[0] if args and isinstance(args[0], (list, tuple)) else args)
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
        self._owner = "" if joined else self._module_of(next(self._inputs, None))
        super()._allocated(tensor, operation)
        if joined and tensor.shape[:1] == (len(self._trained),) and not self._module_now() \
                and self.phase_now() != "backward":
            self.growing[len(self._blocks) - 1] = tensor[0].nbytes * sum(
                "layers.1." in name for name in self._trained)
        self._owner = ""

    def _module_of(self, tensor: object) -> str:
        index = self._index.get(tensor.untyped_storage()._cdata) \
            if isinstance(tensor, FakeTensor) else None
        return "" if index is None else self._blocks[index].module

    def _module_now(self) -> str:
        """Outside of modules, a tensor belongs where the one does that it was made from."""
        return super()._module_now() or self._owner

    def stream(self) -> Stream:
        """What was seen; blocks that existed before come first."""
        existed = [(1, block, "start") for block in self._initial]
        self.marks = {name: n + len(existed) for name, n in self.marks.items()}
        self.work = [(n + len(existed), *rest) for n, *rest in self.work]
        self._events = existed + self._events
        return Stream(self._blocks, self._events, self.marks, self.work, self.growing)


def fake_run(recipe: TrainRecipe, gpu: Gpu, config) -> Stream:
    """Load, add adapters, take one optimizer step: `marks` are load, adapters and step."""
    ledger = DeviceLedger()
    kernels = CudaKernels(gpu, on_work=work_recorder(ledger, gpu))
    model = blueprint(recipe, config)
    with pretend_cuda(gpu), fake.fake_tensors(), ledger, kernels:
        place_weights(model, recipe, ledger)
        ledger.watch(model)
        qlora.apply_levers(model, recipe).train()
        optimizer = qlora.build_optimizer(model, recipe)
        scaler = torch.amp.GradScaler("cpu") if recipe.amp_dtype == "float16" else None
        batches = [fake_batch(recipe) for _ in range(recipe.gradient_accumulation_steps)]
        ledger.mark("ready")
        qlora.training_step(model, optimizer, batches, recipe, scaler)
        ledger.mark("step")
    return ledger.stream()


def blueprint(recipe: TrainRecipe, config) -> torch.nn.Module:
    """The model with its adapters on the meta device: modules and shapes, no memory."""
    model = fake.meta_model(config, qlora.storage_dtype(recipe), "sdpa")
    if recipe.base == "nf4":
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(qlora.quantization(recipe))
        quantizer.pre_quantized = False
        quantizer.preprocess_model(model=model, device_map=None)
        model.is_loaded_in_4bit = True
    return qlora.add_adapters(qlora.prepare_base(model, recipe), recipe)


def place_weights(model: torch.nn.Module, recipe: TrainRecipe, ledger: DeviceLedger) -> None:
    """Give every parameter its memory in the order of the real run, temporaries included.

    Sources: transformers/core_model_loading.py (weights in order of their names, each quantized as
    it arrives) and modeling_utils.py, `caching_allocator_warmup`; peft, `cast_adapter_dtype`.
    """
    dtype = qlora.storage_dtype(recipe)
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))

    def put(old: torch.Tensor, new: torch.Tensor) -> None:
        for module, name in places[id(old)]:
            module._parameters[name] = new

    with ledger.phase("load"):
        sizes = {name: p.numel() // 2 if hasattr(p, "quant_type") else p.numel() * dtype.itemsize
                 for name, p in base.items()}
        torch.empty(sum(sizes.values()), dtype=torch.uint8)  # warms the allocator up
        ledger.growing[0] = sum(n for name, n in sizes.items() if "layers.1." in name)
        for name in sorted(base, key=_natural):
            with ledger.inside(name.rpartition(".")[0]):
                put(base[name], _load(base[name], dtype, places[id(base[name])][0][0]))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for name, parameter in base.items():
            if parameter.dtype != dtype and not hasattr(parameter, "quant_type"):
                module, place = places[id(parameter)][0]  # `prepare_base` upcast it
                with ledger.inside(name.rpartition(".")[0]):
                    put(parameter, torch.nn.Parameter(
                        module._parameters[place].detach().to(parameter.dtype),
                        requires_grad=parameter.requires_grad))
    ledger.mark("load")
    with ledger.phase("load"):
        made = {}
        for name, parameter in adapters.items():
            with ledger.inside(name.rpartition(".")[0]):
                made[name] = torch.empty_like(parameter, dtype=dtype, device="cpu")
        for name, parameter in adapters.items():
            with ledger.inside(name.rpartition(".")[0]):
                put(parameter, torch.nn.Parameter(made.pop(name).to(parameter.dtype)))
    ledger.mark("adapters")


def _natural(name: str) -> list[tuple[int, object]]:
    """Sorts layer 10 after layer 9. Source: core_model_loading.py, `dot_natural_key`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _load(parameter: torch.Tensor, dtype: torch.dtype, module: torch.nn.Module):
    """A weight on the device in the dtype of storage, quantized where the model says so."""
    weight = torch.empty(parameter.shape, dtype=dtype)
    if not hasattr(parameter, "quant_type"):
        return torch.nn.Parameter(weight, requires_grad=parameter.requires_grad)
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight, compress_statistics=parameter.compress_statistics, quant_type=parameter.quant_type)
    new = torch.nn.Parameter(packed, requires_grad=False)  # Params4bit cannot hold a fake tensor
    new.quant_type, new.compress_statistics = parameter.quant_type, parameter.compress_statistics
    new.quant_state = module.quant_state = state
    return new


def fake_batch(recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    """A micro batch, (micro batch, sequence) token ids; padded ones carry a mask."""
    ids = torch.zeros(recipe.micro_batch_size, recipe.sequence_length, dtype=torch.long)
    mask = {"attention_mask": torch.ones_like(ids)} if recipe.padded else {}
    return {"input_ids": ids, "labels": torch.zeros_like(ids)} | mask


def work_recorder(ledger: DeviceLedger, gpu: Gpu) -> Callable[[int, tuple, object], None]:
    """Notes each operation's FLOPs and the seconds it takes at least on `gpu`.

    At least: as long as its arithmetic at the peak rate or its traffic at the peak bandwidth,
    whichever is longer (Williams et al. 2009, the roofline model).
    """
    def record(flops: int, args: tuple, result: object) -> None:
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, result))
                   if isinstance(t, torch.Tensor)]
        traffic = sum(t.numel() * t.itemsize for t in tensors)
        rate = gpu.matmul_flops if tensors and tensors[0].itemsize < 4 else gpu.float32_flops
        seconds = max(flops / rate, traffic / gpu.bandwidth)
        ledger.work.append((len(ledger._events), flops, seconds))
    return record
