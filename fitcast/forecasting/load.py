"""A model's weights on fake tensors, placed one by one as the real loading places them.

Not modelled: the order in which loading threads place the weights of a 16-bit base.
"""

from __future__ import annotations

import torch

from fitcast.forecasting import fake
from fitcast.memory.stream import DeviceLedger
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora


def blueprint(recipe: TrainRecipe, config) -> torch.nn.Module:
    """The model with its adapters on the meta device: modules and shapes, no memory.

    Raises:
        ValueError: Its layers are not where a Llama's are, or a LoRA target matches none.
    """
    model = fake.meta_model(config, qlora.storage_dtype(recipe))
    if not hasattr(getattr(model, "model", None), "layers"):
        raise ValueError(
            f"model must be a decoder built like Llama, with its layers in "
            f"model.layers, got one of kind {config.model_type!r}; for another write "
            "a step of your own and use forecast_step"
        )
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
        sizes = {
            name: p.numel() // 2 if hasattr(p, "quant_type") else p.numel() * dtype.itemsize
            for name, p in base.items()
        }
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
                    put(
                        parameter,
                        torch.nn.Parameter(
                            module._parameters[place].detach().to(parameter.dtype),
                            requires_grad=parameter.requires_grad,
                        ),
                    )
    ledger.mark("load")
    with ledger.phase("adapters"):
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
        weight, compress_statistics=parameter.compress_statistics, quant_type=parameter.quant_type
    )
    new = torch.nn.Parameter(packed, requires_grad=False)  # Params4bit cannot hold a fake tensor
    new.quant_type, new.compress_statistics = parameter.quant_type, parameter.compress_statistics
    new.quant_state = module.quant_state = state
    return new
