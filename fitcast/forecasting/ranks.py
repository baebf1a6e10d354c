"""What one of several ranks needs when the model is sharded: FSDP2's own code, under a pretence.

The step is the run's (`step.ranks`, `step.qlora`); `fully_shard` cuts, gathers, prefetches and
frees as it does on GPUs, on fake tensors, in a process group whose messages go nowhere. FSDP2 frees
and takes back the storage of gathered weights without an operation, so the ledger is told.

Not modelled: streams (each has memory of its own in the allocator's cache, so that what is reserved
may lie outside its interval), parts on the host, NCCL's own buffers,
collectives whose temporaries PyTorch makes within an operation on sharded tensors.

Sources: torch/distributed/fsdp/_fully_shard, `_fsdp_param.py` and `_fsdp_collectives.py`;
torch/distributed/_tools/fake_collectives.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fitcast import models
from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.forecasting import fake
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.load import blueprint
from fitcast.forecasting.run import MICRO_BATCHES, fake_batch
from fitcast.forecasting.verdict import Forecast, report
from fitcast.gpus import Gpu
from fitcast.memory.stream import DeviceLedger, Stream, work_recorder
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora, ranks
from fitcast.units import refusal

STRATEGIES = ("ddp", "fsdp2")
FSDP_PARAM = "torch.distributed.fsdp._fully_shard._fsdp_param"


class RankLedger(DeviceLedger):
    """Counts a rank's part of a sharded tensor, and storages that are emptied and filled again."""

    def counts(self, tensor: Any) -> bool:
        return super().counts(_local(tensor))

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
        strategy: "ddp", the whole model on each, or "fsdp2", a part of it.
        world_size: How many ranks; under FSDP2 each further one makes parts smaller.
        offload: Whether FSDP2's parts wait on the host: refused, since it is not modelled.

    Raises:
        ValueError: Another strategy, too few ranks, or an optimizer that takes no parts.
    """
    if strategy not in STRATEGIES:
        raise refusal(
            "strategy", f"be {' or '.join(STRATEGIES)}", strategy,
            "a device map trains one card after the other and is not forecast",
        )  # fmt: skip
    if world_size < 2:
        raise refusal("world_size", "be 2 or more with a strategy", world_size, "leave both out")
    if strategy == "ddp":
        return forecast(dataclasses.replace(recipe, world_size=world_size), gpu)
    if offload:
        raise refusal(
            "offload", "be False in a forecast", offload,
            "parts on the host are not modelled; a run may have them, and needs less",
        )  # fmt: skip
    ranks.check_optimizer(recipe)
    recipe.check_on(gpu)
    config = models.config(recipe.model)
    stream = sharded_stream(recipe, gpu, config, world_size=world_size)
    steps = recipe.gradient_accumulation_steps
    return report(stream, gpu, micro_batches=steps, expandable=recipe.expandable_segments)


def sharded_stream(recipe: TrainRecipe, gpu: Gpu, config: Any, *, world_size: int = 2) -> Stream:
    """Memory events of the first of `world_size` ranks: load, adapters, one optimizer step.

    Args:
        recipe: What is trained; its micro batch is one rank's.
        gpu: Each rank's card.
        config: Of the model.
        world_size: How many ranks.
    """
    ledger = RankLedger()
    kernels = CudaKernels(gpu, on_work=work_recorder(ledger, gpu))
    with pretended_group(world_size) as mesh:
        model = blueprint(recipe, config, torch.float16)
        ranks.pack(model)
        qlora.apply_levers(model, recipe)
        ranks.shard(model, mesh)
        with pretend_cuda(gpu), told(ledger), fake.fake_tensors(), ledger, kernels:
            dtype = qlora.storage_dtype(recipe)
            with ledger.phase("load"):
                ranks.place(model, _without_numbers, dtype, lambda _: "cpu")
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
    return ledger.stream()


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

    layers = importlib.import_module("bitsandbytes.nn.modules")
    adam = importlib.import_module("torch.optim.adam")
    with (
        mock.patch.object(adam, "_default_to_fused_or_foreach", one_by_one),
        mock.patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: False),
        mock.patch.object(layers, "fix_4bit_weight_quant_state_from_module", remember_scales),
        mock.patch.object(module, "alloc_storage", alloc_storage),
        mock.patch.object(module, "free_storage", free_storage),
    ):
        yield


def one_by_one(*_: Any, **__: Any) -> tuple[bool, bool]:
    """Sharded parameters are updated one after the other: their class is none of foreach's.

    Source: torch/optim/optimizer.py, `_default_to_fused_or_foreach`.
    """
    return False, False


def remember_scales(layer: Any) -> None:
    """A gathered 4-bit weight finds its scales in its layer; its class cannot hold a fake tensor.

    Source: bitsandbytes/nn/modules.py, `fix_4bit_weight_quant_state_from_module`.
    """
    layer.weight.quant_state = layer.quant_state
