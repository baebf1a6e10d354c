"""What accelerate, Trainer and TRL do when they see a CUDA device, on a machine without one.

Their own classes run (`forecasting.huggingface`); here is the little that has to be pretended:
mixed precision that accelerate allows on a GPU only, moves to a device that fake tensors cannot
make, Triton kernels that would be launched. Each function names its source. Not modelled:
DeepSpeed, FSDP, tensor parallelism, torch.compile, kernels from the hub.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from fitcast.gpus import Gpu


@contextlib.contextmanager
def pretend_trainer() -> Iterator[None]:
    """Inside, a model of fake tensors is where Trainer wants it; the process's state is kept."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.trainer_pt_utils import EvalLoopContainer

    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", stay))
        stack.enter_context(mock.patch.object(torch.Tensor, "data_ptr", address))
        stack.enter_context(mock.patch.object(Accelerator, "pad_across_processes", as_it_is))
        stack.enter_context(mock.patch.object(EvalLoopContainer, "to_cpu_and_numpy", to_host))
        stack.enter_context(adapters_on_fake_weights())
        try:
            AcceleratorState._shared_state.clear()  # of another precision, perhaps
            if "device" in PartialState._shared_state:
                PartialState._shared_state["device"] = torch.device("cpu")
            yield
        finally:
            for state, kept in zip(states, before, strict=True):
                state._shared_state.clear()
                state._shared_state.update(kept)


@contextlib.contextmanager
def adapters_on_fake_weights() -> Iterator[None]:
    """Inside, DoRA finds the weight of a quantized layer that is fake or on meta.

    It tells quantized weights by the class of the parameter, which a fake one has lost, and
    measures their norms when it is made, which is done on meta here. Source:
    peft/tuners/lora/dora.py and peft/utils/integrations.py, `dequantize_module_weight`.
    """
    from peft.tuners.lora import dora

    layer = dora.DoraLinearLayer
    made = layer.update_layer

    def on_meta(self, *, lora_A, lora_B, **options):
        made(self, lora_A=lora_A.to("meta"), lora_B=lora_B.to("meta"), **options)

    with (
        mock.patch.object(dora, "dequantize_module_weight", dequantized),
        mock.patch.object(dora, "deepcopy", lambda layer: layer),  # only FSDP needs the copy
        mock.patch.object(layer, "update_layer", on_meta),
    ):
        yield


def dequantized(layer: torch.nn.Module) -> torch.Tensor:
    """The weight of a layer, (outputs, inputs), in 16 bits where it is stored in 4 or 8."""
    import bitsandbytes.functional as bnb

    weight: Any = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    if getattr(weight, "SCB", None) is not None:
        return bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
    return weight


@contextlib.contextmanager
def arguments_as_on(gpu: Gpu) -> Iterator[None]:
    """Inside, `TrainingArguments(bf16=True)` asks this GPU, not the machine, whether it can.

    Source: transformers/training_args.py, which refuses bf16 without CUDA.
    """
    from transformers import training_args

    with mock.patch.object(training_args, "is_torch_bf16_gpu_available", lambda: gpu.has_bfloat16):
        yield


_to = torch.nn.Module.to


def stay(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`Module.to` without the move: fake tensors lie on the CPU, and stand for the GPU's.

    A new dtype is made all the same. Source of the refusal that this avoids:
    torch/nn/modules/module.py, `_apply` ("Couldn't swap").
    """
    dtypes = [value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
    return _to(self, dtype=dtypes[0]) if dtypes else self


def as_it_is(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """One process has the longest rows of all: nothing is padded, and no length is asked for.

    Source: accelerate/utils/operations.py, `pad_across_processes`.
    """
    return tensor


def to_host(self: Any) -> None:
    """What evaluation has gathered leaves the device; its numbers, which nobody has, are zeros.

    Source: transformers/trainer_pt_utils.py, `EvalLoopContainer.to_cpu_and_numpy`.
    """
    if self.tensors is not None:
        self.arrays, self.tensors = np.zeros(1), None


def address(self: torch.Tensor) -> int:
    """A number that tells storages apart, as addresses do: Trainer counts embeddings by it.

    Source: transformers/trainer.py, `create_optimizer`.
    """
    return self.untyped_storage()._cdata


@contextlib.contextmanager
def mixed_precision(precision: str) -> Iterator[None]:
    """Inside, accelerate grants fp16 and bf16 as on a GPU: autocast, scaler, fp32 outputs.

    Source: accelerate/accelerator.py, `Accelerator.__init__` and `prepare_model`, which wraps
    forward in autocast and converts its outputs to float32 where `native_amp` is set.

    Args:
        precision: "fp16", "bf16" or "no", as `mixed_precision` of an `Accelerator`.
    """
    from accelerate import Accelerator

    made = Accelerator.__init__

    def as_on_a_gpu(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if precision == "no":
            return
        self.state._shared_state["_mixed_precision"] = precision
        self.state._mixed_precision = precision
        self.native_amp = True
        if precision == "fp16":
            self.scaler = torch.amp.GradScaler("cpu")

    with mock.patch.object(Accelerator, "__init__", as_on_a_gpu):
        yield


@contextlib.contextmanager
def padding(padded: bool) -> Iterator[None]:
    """Whether a batch's mask hides anything: transformers looks, and drops one that does not.

    Source: transformers/masking_utils.py, `_ignore_causal_mask_sdpa`.
    """
    from transformers import masking_utils

    ignore = masking_utils._ignore_causal_mask_sdpa

    def answer(padding_mask, *args, **kwargs):
        return ignore(padding_mask if padded else None, *args, **kwargs)

    with mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", answer):
        yield


class NoLaunch:
    """A Triton kernel that is not launched: it writes into tensors that are there already."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def trl_kernels() -> Iterator[None]:
    """TRL's fused head as on a GPU with Triton: tiles in place, products that add in place.

    Source: trl/kernels/chunked_logprob.py (TRL 1.16). Without TRL, or with one that has no such
    module, nothing is changed.
    """
    with contextlib.ExitStack() as stack:
        if "trl" in sys.modules:
            with contextlib.suppress(ImportError):
                kernels = importlib.import_module("trl.kernels.chunked_logprob")
                utils = importlib.import_module("trl.trainer.utils")
                for target, name, stand_in in (
                    (kernels, "_use_triton", lambda device: True),
                    (utils, "_use_triton", lambda device: True),
                    (kernels, "_forward_kernel", NoLaunch()),
                    (kernels, "_backward_kernel", NoLaunch()),
                    (kernels, "_addmm_fp32", lambda total, a, b: None),
                    (kernels, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b))),
                ):
                    if hasattr(target, name) or name == "triton":
                        patch = mock.patch.object(target, name, stand_in, create=True)
                        stack.enter_context(patch)
        yield
