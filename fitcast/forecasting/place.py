"""The weights of any model on fake tensors, placed one by one as `from_pretrained` and PEFT do it.

Sources: transformers/core_model_loading.py (weights in order of their names, each quantized as it
arrives) and modeling_utils.py, `caching_allocator_warmup`; peft, `cast_adapter_dtype`;
bitsandbytes/nn/modules.py, `Params4bit._quantize` and `Int8Params._quantize`.

Not modelled: the order in which loading threads place the weights of a 16-bit base.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from fitcast.memory.stream import DeviceLedger

# Parameters that PEFT adds: adapters, DoRA's magnitudes, copies of modules that it trains whole.
ADDED = re.compile(r"\blora_|\bmodules_to_save\.(?!original)|\btrainable_tokens_")


def place(model: torch.nn.Module, dtype: torch.dtype, ledger: DeviceLedger) -> None:
    """Give every parameter of a model on meta its memory; `marks` are load and adapters.

    Args:
        model: Prepared by its quantizer, with adapters where it has some.
        dtype: Of the weights that are not quantized, as they are loaded.
        ledger: Books what is placed.
    """
    with ledger.phase("load"):
        place_weights(model, dtype, ledger)
    ledger.mark("load")
    with ledger.phase("adapters"):
        _place_added(model, dtype, ledger)
    ledger.mark("adapters")


def place_weights(
    model: torch.nn.Module, dtype: torch.dtype, ledger: DeviceLedger, prefix: str = ""
) -> None:
    """Give the weights of a model on meta their memory; those that PEFT adds stay on meta.

    Args:
        model: As `place` takes it.
        dtype: Likewise.
        ledger: Likewise.
        prefix: Before the names of its modules in the ledger.
    """
    base = {n: p for n, p in model.named_parameters() if not ADDED.search(n)}
    places = _places(model)
    sizes = {name: _stored_bytes(p, dtype) for name, p in base.items()}
    warm_up = torch.empty(sum(sizes.values()), dtype=torch.uint8)
    repeated = [n for name, n in sizes.items() if ledger.layers.repeats(prefix + name)]
    ledger.grows(warm_up, sum(repeated))
    del warm_up
    for name in sorted(base, key=natural):
        with ledger.inside(prefix + name.rpartition(".")[0]):
            module = places[id(base[name])][0][0]
            _put(places, base[name], _loaded(base[name], dtype, module))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    _cast_after_loading(base, dtype, places, ledger, prefix)


Places = dict[int, list[tuple[torch.nn.Module, str]]]  # id of a parameter -> who holds it


def _places(model: torch.nn.Module) -> Places:
    places: Places = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return places


def _put(places: Places, old: torch.Tensor, new: torch.nn.Parameter) -> None:
    for module, name in places[id(old)]:
        module._parameters[name] = new


def _cast_after_loading(
    base: dict[str, torch.nn.Parameter],
    dtype: torch.dtype,
    places: Places,
    ledger: DeviceLedger,
    prefix: str,
) -> None:
    """What a trainer or PEFT casts once it is there, as the k-bit preparation does."""
    for name, parameter in base.items():
        if parameter.dtype != dtype and not is_quantized(parameter):
            module, place_name = places[id(parameter)][0]
            loaded = module._parameters[place_name]
            if loaded is None or loaded.dtype == parameter.dtype:
                continue
            with ledger.inside(prefix + name.rpartition(".")[0]):
                cast = loaded.detach().to(parameter.dtype)
                new = torch.nn.Parameter(cast, requires_grad=parameter.requires_grad)
                _put(places, parameter, new)


def _place_added(model: torch.nn.Module, dtype: torch.dtype, ledger: DeviceLedger) -> None:
    added = {n: p for n, p in model.named_parameters() if ADDED.search(n)}
    places = _places(model)
    made = {}
    for name, parameter in added.items():
        with ledger.inside(name.rpartition(".")[0]):
            made[name] = torch.empty_like(parameter, dtype=dtype, device="cpu")
    for name, parameter in added.items():
        with ledger.inside(name.rpartition(".")[0]):
            cast = made.pop(name).to(parameter.dtype)
            new = torch.nn.Parameter(cast, requires_grad=parameter.requires_grad)
            _put(places, parameter, new)


def natural(name: str) -> list[tuple[int, object]]:
    """Sorts layer 10 after layer 9. Source: core_model_loading.py, `dot_natural_key`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether bitsandbytes will store this weight in 4 or 8 bits."""
    return hasattr(parameter, "quant_type") or hasattr(parameter, "has_fp16_weights")


def _stored_bytes(parameter: torch.Tensor, dtype: torch.dtype) -> int:
    if hasattr(parameter, "quant_type"):
        return parameter.numel() // 2
    return parameter.numel() * (1 if is_quantized(parameter) else dtype.itemsize)


def _loaded(
    parameter: torch.Tensor, dtype: torch.dtype, module: torch.nn.Module
) -> torch.nn.Parameter:
    """A weight on the device in the dtype of storage, quantized where the model says so."""
    weight = torch.empty(parameter.shape, dtype=dtype)
    if hasattr(parameter, "quant_type"):
        return _in_4_bits(weight, parameter, module)
    if is_quantized(parameter):
        return _in_8_bits(weight)
    if not dtype.is_floating_point or not parameter.dtype.is_floating_point:
        weight = torch.empty(parameter.shape, dtype=parameter.dtype)
    return torch.nn.Parameter(weight, requires_grad=parameter.requires_grad)


def _in_4_bits(weight: torch.Tensor, parameter: Any, module: Any) -> torch.nn.Parameter:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight, compress_statistics=parameter.compress_statistics, quant_type=parameter.quant_type
    )
    new: Any = torch.nn.Parameter(
        packed, requires_grad=False
    )  # Params4bit cannot hold a fake tensor
    new.quant_type, new.compress_statistics = parameter.quant_type, parameter.compress_statistics
    new.quant_state = module.quant_state = state
    return new


def _in_8_bits(weight: torch.Tensor) -> torch.nn.Parameter:
    """One byte a weight and a float32 scale a row, made from a copy in float16."""
    from bitsandbytes.functional import int8_vectorwise_quant

    bytes_, scales, _ = int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    new: Any = torch.nn.Parameter(bytes_, requires_grad=False)  # Int8Params cannot hold one either
    new.CB, new.SCB, new.has_fp16_weights = bytes_, scales, False
    return new
