"""A run on fake tensors, from loading the weights to the end of a step, as a stream of events.

The stream is what the caching allocator would see: allocations and frees, in order. It comes from
the code of the real run (`qlora`), watched by a ledger. Not modelled: the order in which loading
threads place the weights of a 16-bit base; several processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.forecasting import fake
from fitcast.forecasting.load import blueprint, place_weights
from fitcast.forecasting.refusals import explained
from fitcast.gpus import Gpu
from fitcast.memory.stream import DeviceLedger, Stream, work_recorder
from fitcast.recipe import TrainRecipe
from fitcast.step import levers, qlora

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MICRO_BATCHES = 2  # of a step; the third does to memory what the second did


def fake_run(recipe: TrainRecipe, gpu: Gpu, config: PretrainedConfig) -> Stream:
    """Load, add adapters, take one optimizer step: `marks` are load, adapters and step.

    Raises:
        ValueError: The model's own code does not run so; the sentence says where.
    """
    try:
        return _run(recipe, gpu, config)
    except ValueError:  # a sentence already
        raise
    except Exception as error:
        raise explained(error, config.model_type) from error


def _run(recipe: TrainRecipe, gpu: Gpu, config: PretrainedConfig) -> Stream:
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
        ledger.note_inputs(batches)
        ledger.mark("ready")
        qlora.training_step(model, optimizer, batches[:MICRO_BATCHES], recipe, scaler)
        ledger.mark("step")
    stream = ledger.stream()
    stream.pinned_host_bytes = levers.pinned_host_bytes(model)
    return stream


def fake_batch(recipe: TrainRecipe) -> dict[str, torch.Tensor]:
    """A micro batch, (micro batch, sequence) token ids; padded ones carry a mask."""
    ids = torch.zeros(recipe.micro_batch_size, recipe.sequence_length, dtype=torch.long)
    mask = {"attention_mask": torch.ones_like(ids)} if recipe.has_mask else {}
    return {"input_ids": ids, "labels": torch.zeros_like(ids)} | mask
