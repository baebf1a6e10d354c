"""What one of several ranks needs when the model is sharded: FSDP2's own code, under a pretence.

The step is the run's (`step.ranks`, `step.qlora`); `fully_shard` cuts, gathers, prefetches and
frees as it does on GPUs, on fake tensors, in a process group whose messages go nowhere. FSDP2 frees
and takes back the storage of gathered weights without an operation, so the ledger is told.

FSDP2 gathers and reduces on streams of its own. Each has a cache of its own in the allocator: what
one gave back no other can have, so that a rank reserves a fifth to two fifths more than it holds.

cuBLAS takes its workspaces with the first products. Whether these come before the first gathered
layer depends on the model's code (transformers 5.17 multiplies in its rotary embedding, 5.23 does
not), and decides whether they cut the largest hole: the bounds hold for both.

Parts on the host (`offload`) come to the card one by one, their gradients go back to the host, and
there the optimizer runs.

Not modelled: NCCL's own buffers, which the allocator never sees; collectives whose temporaries
PyTorch makes within an operation on sharded tensors.

Sources: torch/distributed/fsdp/_fully_shard, `_fsdp_param.py` and `_fsdp_collectives.py`;
torch/distributed/_tools/fake_collectives.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh

from fitcast import models
from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.forecasting import fake
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.load import blueprint
from fitcast.forecasting.run import MICRO_BATCHES, fake_batch
from fitcast.forecasting.verdict import (
    DOES_NOT_FIT,
    FITS,
    MISSED_HOLE_SHARE,
    TIGHT,
    Forecast,
    report,
)
from fitcast.gpus import Gpu
from fitcast.memory.stream import DeviceLedger, Stream, later_step, work_recorder
from fitcast.recipe import TrainRecipe
from fitcast.step import levers, qlora, ranks
from fitcast.units import refusal

STRATEGIES = ("ddp", "fsdp2", "device_map")
FSDP_PARAM = "torch.distributed.fsdp._fully_shard._fsdp_param"
VERDICTS = (FITS, TIGHT, DOES_NOT_FIT)  # from good to bad


class RankLedger(DeviceLedger):
    """Counts a rank's part of a sharded tensor, and storages that are emptied and filled again.

    It notes on which stream each block is made: FSDP2 gathers, sends and reduces on three of its
    own, which PyTorch's stand-ins for CPUs (`torch.cpu.Stream`) tell apart.
    """

    def __init__(self, offload: bool = False) -> None:
        super().__init__()
        self.offload = offload
        self._streams: list[Any] = [torch.cpu.current_stream()]
        self._making_for_host = False

    def _add(self, *args: Any, **kwargs: Any) -> int:
        block = super()._add(*args, **kwargs)
        self._blocks[block].stream = self._stream_now()
        return block

    def _stream_now(self) -> int:
        """Number of the stream that is current, in the order in which they were met."""
        current = torch.cpu.current_stream()
        if current not in self._streams:
            self._streams.append(current)
        return self._streams.index(current)

    def counts(self, tensor: Any) -> bool:
        local = _local(tensor)
        on_host = self._making_for_host or self.offload and self._in_optimizer
        if on_host and isinstance(local, FakeTensor):
            storage = local.untyped_storage()
            if storage._cdata not in self._index:
                self._on_host[storage._cdata] = storage
        return super().counts(local)

    def copy_on_host(self, tensor: torch.Tensor, locked: bool = True) -> torch.Tensor:
        """A tensor of this shape that takes no memory of the card."""
        self._making_for_host = True
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        finally:
            self._making_for_host = False

    def _found(self, tensor: Any, category: str, rename: bool = True) -> None:
        super()._found(_local(tensor), category, rename)

    def _allocated(self, tensor: torch.Tensor, operation: str) -> None:
        super()._allocated(_local(tensor), operation)

    def _start_optimizer(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._in_optimizer = True  # over parts, which are no fake tensors but hold some

    def emptied(self, tensor: torch.Tensor) -> None:
        """A tensor's storage has been given back, though the tensor lives on."""
        address = tensor.untyped_storage()._cdata
        block = self._index.pop(address, None)
        if block is not None:
            self.live_bytes -= self._blocks[block].n_bytes
            self._blocks[block].alive = None  # its end is noted now, and not again
            self._events.append((-1, block, self.phase_now()))


def _local(tensor: Any) -> Any:
    return getattr(tensor, "_local_tensor", tensor)


def forecast_ranks(
    recipe: TrainRecipe,
    gpu: Gpu,
    *,
    strategy: str,
    world_size: int = 2,
    offload: bool = False,
) -> Forecast:
    """What each of several ranks will need for one optimizer step of `recipe`.

    Args:
        recipe: Its micro batch is one rank's; its own world_size is not asked.
        gpu: Each rank's card.
        strategy: "ddp", the whole model on each, or "fsdp2", a part of it; "device_map", some of
            its layers on each card, which one process uses one after the other.
        world_size: How many ranks or cards; under FSDP2 each further one makes parts smaller.
        offload: Whether FSDP2's parts wait on the host.

    Raises:
        ValueError: Another strategy, too few ranks, or an optimizer that takes no parts.
    """
    if strategy not in STRATEGIES:
        known = f"be {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}"
        raise refusal("strategy", known, strategy, "see fit, which chooses one")
    if world_size < 2:
        raise refusal("world_size", "be 2 or more with a strategy", world_size, "leave both out")
    if strategy != "fsdp2" and offload:
        rule = f"be False with {strategy}"
        raise refusal("offload", rule, offload, "only fsdp2 has parts to offload")
    if strategy == "device_map":
        from fitcast.forecasting.device_map import forecast_device_map

        return forecast_device_map(recipe, gpu, cards=world_size)
    if strategy == "ddp":
        return forecast(dataclasses.replace(recipe, world_size=world_size), gpu)
    ranks.check_optimizer(recipe)
    recipe.check_on(gpu)
    config = models.config(recipe.model)
    stream = sharded_stream(recipe, gpu, config, world_size=world_size, offload=offload)
    return report_rank(stream, gpu, recipe)


def report_rank(stream: Stream, gpu: Gpu, recipe: TrainRecipe) -> Forecast:
    """The stream's forecast, with bounds and verdict for early and for late workspaces.

    Args:
        stream: Of a rank.
        gpu: Its card.
        recipe: Says how many micro batches, and whether segments grow.
    """
    options: dict[str, Any] = {
        "micro_batches": recipe.gradient_accumulation_steps,
        "expandable": recipe.expandable_segments,
    }
    late = report(stream, gpu, **options)
    early = report(_workspaces_first(stream, gpu), gpu, **options)
    worse = max(late, early, key=lambda seen: VERDICTS.index(seen.verdict))

    def bounds(name: str) -> tuple[int, int]:
        pairs = getattr(late, name), getattr(early, name)
        return min(low for low, _ in pairs), max(high for _, high in pairs)

    low, high = bounds("peak_reserved_bytes")
    if worse.retries:  # which segments are whole when all streams give back is not known so well
        low = max(late.peak_allocated_bytes, int(low * (1 - MISSED_HOLE_SHARE)))
    return dataclasses.replace(
        late,
        verdict=worse.verdict,
        retries=worse.retries,
        peak_reserved_bytes=(low, high),
        unlimited_reserved_bytes=bounds("unlimited_reserved_bytes"),
    )


def _workspaces_first(stream: Stream, gpu: Gpu) -> Stream:
    """The same, as if cuBLAS took its workspaces before the step."""
    ready = stream.marks["ready"]
    step = stream.events[ready:]
    stays = {block for _, block, _ in step} - {block for _, block, _ in later_step(step)}
    first = [
        e for e in step if e[1] in stays and stream.blocks[e[1]].n_bytes == gpu.workspace_bytes
    ]
    moved = set(first)
    rest = [event for event in step if event not in moved]
    return dataclasses.replace(stream, events=[*stream.events[:ready], *first, *rest])


def sharded_stream(
    recipe: TrainRecipe, gpu: Gpu, config: Any, *, world_size: int = 2, offload: bool = False
) -> Stream:
    """Memory events of the first of `world_size` ranks: load, adapters, one optimizer step.

    Args:
        recipe: What is trained; its micro batch is one rank's.
        gpu: Each rank's card.
        config: Of the model.
        world_size: How many ranks.
        offload: Whether its parts wait on the host.
    """
    ledger = RankLedger(offload)
    with pretended_group(world_size) as mesh:
        model = packed_model(recipe, config)
        qlora.apply_levers(model, recipe)
        ranks.shard(model, mesh, offload=offload)
        return step_stream(ledger, model, recipe, gpu, around=told(ledger), offload=offload)


def whole_stream(recipe: TrainRecipe, gpu: Gpu, config: Any) -> Stream:
    """The same of one process with the whole model, placed tensor by tensor as the ranks do it.

    Args:
        recipe: What is trained.
        gpu: The card.
        config: Of the model.
    """
    model = packed_model(recipe, config)
    qlora.apply_levers(model, recipe)
    return step_stream(DeviceLedger(), model, recipe, gpu)


def packed_model(recipe: TrainRecipe, config: Any) -> torch.nn.Module:
    """The recipe's model on meta, its 4-bit weights in the shape in which they are stored."""
    model = blueprint(recipe, config, torch.float16)
    ranks.pack(model)
    return model


def step_stream(
    ledger: DeviceLedger,
    model: torch.nn.Module,
    recipe: TrainRecipe,
    gpu: Gpu,
    *,
    around: contextlib.AbstractContextManager | None = None,
    offload: bool = False,
    kernels: CudaKernels | None = None,
    device_of: Callable[[str], Any] = lambda _: "cpu",
    warm_up: Callable[[], None] = lambda: None,
    loaded: Callable[[], None] = lambda: None,
) -> Stream:
    """What a ledger sees while a model on meta is placed and takes one optimizer step.

    Args:
        ledger: Fresh.
        model: Packed, with its levers, and sharded where it is.
        recipe: What is trained.
        gpu: The card.
        around: Entered beside the stand-ins for CUDA's libraries.
        offload: Whether parts wait on the host.
        kernels: The card's, when they are of another kind.
        device_of: Called with each parameter's name before it is made.
        warm_up: Called before the first one.
        loaded: Called once all weights are there.
    """
    kernels = kernels or CudaKernels(gpu, on_work=work_recorder(ledger, gpu))
    with (
        pretend_cuda(gpu),
        scales_at_hand(),
        around or contextlib.nullcontext(),
        fake.fake_tensors(),
        ledger,
        kernels,
    ):
        dtype = qlora.storage_dtype(recipe)
        with ledger.phase("load"):
            warm_up()
            ranks.place(model, _without_numbers, dtype, device_of, offload=offload)
        loaded()
        ledger.mark("load")
        ledger.mark("adapters")
        ledger.watch(model)
        model.train()
        optimizer = qlora.build_optimizer(model, recipe)
        scaler = torch.amp.GradScaler("cpu") if recipe.amp_dtype == "float16" else None
        batches = [fake_batch(recipe) for _ in range(recipe.gradient_accumulation_steps)]
        ledger.note_inputs(batches)
        ledger.mark("ready")
        qlora.training_step(model, optimizer, batches[:MICRO_BATCHES], recipe, scaler)
        ledger.mark("step")
    stream = ledger.stream()
    stream.pinned_host_bytes = levers.pinned_host_bytes(model)
    return stream


def _without_numbers(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@contextlib.contextmanager
def pretended_group(world_size: int) -> Iterator[Any]:
    """Inside, this process is rank 0 of so many; what it sends is lost. Yields their mesh.

    Source: torch/testing/_internal/distributed/fake_pg.py.
    """
    importlib.import_module("torch.distributed._tools.fake_collectives")
    group = importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=group.FakeStore())
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def told(ledger: RankLedger) -> Iterator[None]:
    """Inside, the ledger learns of storages that FSDP2 empties and fills without an operation."""
    module = importlib.import_module(FSDP_PARAM)
    alloc, free = module.alloc_storage, module.free_storage

    def alloc_storage(tensor: torch.Tensor) -> None:
        alloc(tensor)
        ledger._allocated(tensor, "all-gather")

    def free_storage(tensor: torch.Tensor) -> None:
        ledger.emptied(tensor)
        free(tensor)

    def gathered(parameter: Any) -> list[torch.Tensor]:
        parts = inputs.fget(parameter)
        return [part.clone() for part in parts] if parameter.offload_to_cpu else parts

    def to_sharded(parameter: Any, part: torch.Tensor) -> Any:
        moved = ledger.copy_on_host(part) if parameter.offload_to_cpu else part
        return sharded(parameter, moved)

    kind = module.FSDPParam
    inputs, sharded = kind.all_gather_inputs, kind.to_sharded_dtensor
    adam = importlib.import_module("torch.optim.adam")
    with (
        mock.patch.object(adam, "_default_to_fused_or_foreach", one_by_one),
        mock.patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: False),
        mock.patch.object(module, "alloc_storage", alloc_storage),
        mock.patch.object(module, "free_storage", free_storage),
        mock.patch.object(kind, "all_gather_inputs", property(gathered)),
        mock.patch.object(kind, "to_sharded_dtensor", to_sharded),
        mock.patch.object(ranks, "to_host", ledger.copy_on_host),
    ):
        yield


def one_by_one(*_: Any, **__: Any) -> tuple[bool, bool]:
    """Sharded parameters are updated one after the other: their class is none of foreach's.

    Source: torch/optim/optimizer.py, `_default_to_fused_or_foreach`.
    """
    return False, False


def scales_at_hand() -> contextlib.AbstractContextManager:
    """Inside, a 4-bit layer whose weight was put in as a plain tensor finds its scales."""
    layers = importlib.import_module("bitsandbytes.nn.modules")
    return mock.patch.object(layers, "fix_4bit_weight_quant_state_from_module", remember_scales)


def remember_scales(layer: Any) -> None:
    """A gathered 4-bit weight finds its scales in its layer; its class cannot hold a fake tensor.

    Source: bitsandbytes/nn/modules.py, `fix_4bit_weight_quant_state_from_module`.
    """
    layer.weight.quant_state = layer.quant_state
