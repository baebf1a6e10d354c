"""The model of a recipe on the meta device, and its weights placed as loading places them."""

from __future__ import annotations

from typing import Any

import torch

from fitcast.forecasting import fake
from fitcast.forecasting.place import place
from fitcast.memory.stream import DeviceLedger
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import Said, refusal


def blueprint(
    recipe: TrainRecipe, config: Any, storage: torch.dtype = torch.uint8
) -> torch.nn.Module:
    """The model with its adapters on the meta device: modules and shapes, no memory.

    Args:
        recipe: What is trained.
        config: Of the model.
        storage: Of packed 4-bit weights, as `qlora.quantization` takes it.

    Raises:
        ValueError: Its layers are not where a Llama's are, or a LoRA target matches none.
    """
    model: Any = fake.meta_model(config, qlora.storage_dtype(recipe))
    if not hasattr(getattr(model, "model", None), "layers"):
        raise refusal(
            "model",
            "be a decoder built like Llama, with its layers in model.layers",
            Said(f"one of kind {config.model_type!r}"),
            "for another write a step of your own and use forecast_step",
        )
    if recipe.base == "nf4":
        from transformers.quantizers.auto import AutoHfQuantizer

        quantization = qlora.quantization(recipe, storage)
        assert quantization is not None  # nf4 has one
        quantizer = AutoHfQuantizer.from_config(quantization)
        quantizer.pre_quantized = False
        quantizer.preprocess_model(model=model, device_map=None)
        model.is_loaded_in_4bit = True  # as `from_pretrained` marks it
    return qlora.add_adapters(qlora.prepare_base(model, recipe), recipe)


def place_weights(model: torch.nn.Module, recipe: TrainRecipe, ledger: DeviceLedger) -> None:
    """Give every parameter its memory in the order of the real run, temporaries included."""
    place(model, qlora.storage_dtype(recipe), ledger)
