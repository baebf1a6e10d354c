"""Models of any size without their weights: every tensor knows its shape, none holds a number.

A fake tensor runs through the same Python and the same autograd as a real one, so a `MemoryLedger`
around a step of an 8B model counts its bytes exactly, on a laptop, in about a second:

    model = fake_model("llama-3.1-8b")
    with fake_tensors(), MemoryLedger(model) as ledger:
        ids = torch.zeros(1, 2048, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
    ledger.report().peak_bytes

Enter `fake_tensors()` before the ledger: PyTorch asks the mode entered last first. The bytes are
those of a CPU step; `forecast` adds what CUDA's kernels do differently. Not modelled: values
(`loss.item()` raises), so nothing that branches on them.

Source: torch/_subclasses/fake_tensor.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fitcast import models
from fitcast.forecasting.fake_mode import FastFakeMode

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@functools.cache
def _mode() -> FastFakeMode:
    return FastFakeMode()


@contextlib.contextmanager
def fake_tensors(packed: Collection[tuple[int, ...]] = ()) -> Iterator[FastFakeMode]:
    """Everything inside makes and takes fake tensors.

    transformers asks the values of `position_ids` whether several texts are packed into one row,
    and answers "yes" when it cannot read them. Here that answer is for batches said to be packed.

    Args:
        packed: Shapes of `position_ids`, (rows, tokens), of batches with several texts in a row.
    """
    from transformers import masking_utils

    indices = masking_utils.find_packed_sequence_indices

    def answer(position_ids: torch.Tensor) -> torch.Tensor | None:
        return indices(position_ids) if tuple(position_ids.shape) in packed else None

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", answer), _mode():
        yield _mode()


def fake_model(
    what: str | PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    quantization_config: Any = None,
) -> torch.nn.Module:
    """A Hugging Face causal language model on fake tensors, all weights trainable, no cache.

    Args:
        what: A config, or a model as `models.config` knows it.
        dtype: Of the weights that are not quantized.
        attention: "sdpa" or "eager", as `attn_implementation`.
        quantization_config: A `BitsAndBytesConfig`, as `from_pretrained` takes it: the linear
            layers are held in 4 or 8 bits, and frozen.

    Raises:
        ValueError: The config is not that of a causal language model.
    """
    model = meta_model(models.config(what) if isinstance(what, str) else what, dtype, attention)
    if quantization_config is None:
        return on_fake_tensors(model)
    return _quantized(model, dtype, quantization_config)


def _quantized(model: Any, dtype: torch.dtype, quantization_config: Any) -> torch.nn.Module:
    """The model with its weights as its quantizer leaves them. Which card it is changes nothing."""
    from fitcast.cuda.kernels import CudaKernels
    from fitcast.cuda.libraries import pretend_cuda
    from fitcast.forecasting.base import quantize
    from fitcast.forecasting.place import place
    from fitcast.gpus import T4
    from fitcast.memory.stream import DeviceLedger

    quantize(model, quantization_config)
    ledger = DeviceLedger()
    with pretend_cuda(T4), fake_tensors(), ledger, CudaKernels(T4):
        place(model, dtype, ledger)
    return model.train()


def meta_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> torch.nn.Module:
    """The model's modules on the meta device, weights tied where the config says so."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention
            )
    except Exception as error:  # a model class may do anything with its config
        raise ValueError(
            f"model must be a causal language model of transformers, got a config of "
            f"kind {config.model_type!r}; see models.NAMES ({error})"
        ) from error
    model.config.use_cache = False
    return model.train()


@contextlib.contextmanager
def faked(model: torch.nn.Module, made: dict[int, Any] | None = None) -> Iterator[torch.nn.Module]:
    """Inside, the model stands on fake tensors; afterwards all of its modules are as they were.

    Args:
        model: Real, fake, or in part each.
        made: As `on_fake_tensors` takes it.
    """
    before = [(module, _kept(module)) for module in model.modules()]
    try:
        yield on_fake_tensors(model, made)
    finally:
        for module, kept in before:
            vars(module).clear()
            vars(module).update(kept)


def _kept(module: torch.nn.Module) -> dict[str, Any]:
    """A module's attributes; what is a dictionary (parameters, submodules, hooks) as a copy."""
    return {
        name: copy.copy(value) if isinstance(value, dict) else value
        for name, value in vars(module).items()
    }


def on_fake_tensors(model: torch.nn.Module, made: dict[int, Any] | None = None) -> torch.nn.Module:
    """The same model with each parameter and buffer replaced by a fake one on the CPU.

    On the CPU, because a fake CUDA tensor under autograd aborts a PyTorch built without CUDA.
    Weights that bitsandbytes holds in 4 or 8 bits keep what it knows of them.

    Args:
        model: Real, or fake already: then its tensors become others all the same.
        made: id of a tensor -> its fake, of modules before this one; gains this one's. Where it is
            given, tensors that are fake already stay.
    """
    stays = FakeTensor if made is not None else ()
    made = {} if made is None else made  # tied weights stay one tensor
    with _mode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or isinstance(tensor, stays):
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = _fake_copy(tensor)
                    tensors[name] = made[id(tensor)]
            _tell_bitsandbytes(module)
    return model


def _fake_copy(tensor: Any) -> torch.Tensor:
    if not isinstance(tensor, torch.nn.Parameter):
        return torch.empty_like(tensor, device="cpu")
    if not any(hasattr(tensor, mark) for mark in ("quant_type", "has_fp16_weights")):
        copied = torch.empty_like(tensor, device="cpu")
        return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return _fake_weight(tensor)


def _fake_weight(tensor: Any) -> torch.nn.Parameter:
    """A weight in 4 or 8 bits; bitsandbytes' own kinds of parameter cannot hold a fake tensor."""
    new: Any = torch.nn.Parameter(
        torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"), requires_grad=False
    )
    for name in ("quant_type", "compress_statistics", "blocksize", "quant_storage", "module"):
        if hasattr(tensor, name):
            setattr(new, name, getattr(tensor, name))
    if hasattr(tensor, "has_fp16_weights"):
        new.has_fp16_weights, new.CB = tensor.has_fp16_weights, new.data
        new.SCB = None if tensor.SCB is None else torch.empty_like(tensor.SCB, device="cpu")
    else:
        new.quant_state, new.bnb_quantized = _fake_state(tensor.quant_state), True
    return new


def _fake_state(state: Any) -> Any:
    """bitsandbytes' scales of a 4-bit weight, quantized ones included, without their numbers."""
    if state is None:
        return None
    new = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(new, name, torch.empty_like(value, device="cpu"))
    new.state2 = _fake_state(getattr(state, "state2", None))
    return new


def _tell_bitsandbytes(module: Any) -> None:
    """Its layers hold a part of what they know beside the weight."""
    weight: Any = module._parameters.get("weight")
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # a CPU's kernels repack the weight
    if getattr(weight, "quant_state", None) is not None and hasattr(module, "quant_state"):
        module.quant_state = weight.quant_state
    if hasattr(weight, "has_fp16_weights") and hasattr(module, "state"):
        module.state = copy.copy(module.state)
        for name in ("CB", "SCB"):
            if getattr(module.state, name, None) is not None:  # it has been run before
                setattr(module.state, name, getattr(weight, name))
