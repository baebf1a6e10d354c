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
(`loss.item()` raises), so nothing that branches on them; texts packed into one row.

Source: torch/_subclasses/fake_tensor.py.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from fitcast import models
from fitcast.forecasting.fake_mode import FastFakeMode

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@functools.cache
def _mode() -> FastFakeMode:
    return FastFakeMode()


@contextlib.contextmanager
def fake_tensors() -> Iterator[FastFakeMode]:
    """Everything inside makes and takes fake tensors.

    transformers asks the values of `position_ids` whether several texts are packed into one row,
    and answers "yes" when it cannot read them. Here the answer is the one of unpacked batches.
    """
    from transformers import masking_utils

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None), _mode():
        yield _mode()


def fake_model(
    what: str | PretrainedConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> torch.nn.Module:
    """A Hugging Face causal language model on fake tensors, all weights trainable, no cache.

    Args:
        what: A config, or a model as `models.config` knows it.
        dtype: Of the weights.
        attention: "sdpa" or "eager", as `attn_implementation`.

    Raises:
        ValueError: The config is not that of a causal language model.
    """
    model = meta_model(models.config(what) if isinstance(what, str) else what, dtype, attention)
    return on_fake_tensors(model)


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
    except ValueError as error:
        raise ValueError(
            f"model must be a causal language model of transformers, got a config of "
            f"kind {config.model_type!r}; see models.NAMES ({error})"
        ) from error
    model.config.use_cache = False
    return model.train()


@contextlib.contextmanager
def faked(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, the model stands on fake tensors; afterwards on its own again."""
    modules = list(model.modules())
    before = [(dict(m._parameters), dict(m._buffers)) for m in modules]
    try:
        yield on_fake_tensors(model)
    finally:
        for module, (parameters, buffers) in zip(modules, before, strict=True):
            module._parameters.update(parameters)
            module._buffers.update(buffers)


def on_fake_tensors(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with each parameter and buffer replaced by a fake one on the CPU.

    On the CPU, because a fake CUDA tensor under autograd aborts a PyTorch built without CUDA.
    """
    made: dict[int, Any] = {}  # tied weights stay one tensor
    with _mode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in made:
                        made[id(tensor)] = _fake_copy(tensor)
                    if tensor is not None:
                        tensors[name] = made[id(tensor)]
    return model


def _fake_copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy
