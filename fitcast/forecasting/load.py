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

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class NotPlain(ValueError):
    """A model that the recipe's own step does not run; a stock trainer may.

    Attributes:
        why: A few words for the forecast's notes.
    """

    def __init__(self, model: str, why: str):
        self.why = why
        said = refusal(
            "model",
            "be a dense decoder built like Llama",
            Said(f"{model}: {why}"),
            "forecast its settings one at a time, or write a step and use forecast_step",
        )
        super().__init__(str(said))


def not_plain(config: Any) -> str:
    """Why the recipe's own step does not run a model of this config; "" if it does."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    if stored := getattr(config, "quantization_config", None):
        method = stored.get("quant_method", "few bits") if isinstance(stored, dict) else "few bits"
        return f"its checkpoint is stored by {method}"
    if not getattr(config, "num_hidden_layers", None) or type(config) not in mapping:
        return f"{config.model_type} is more than a decoder of text"
    if any(getattr(config, name, None) for name in EXPERTS):
        return f"{config.model_type} is a mixture of experts"
    kind = mapping[type(config)]
    if not getattr(kind, "_supports_sdpa", True):
        return f"{config.model_type} has no SDPA attention"
    return ""


def blueprint(
    recipe: TrainRecipe, config: Any, storage: torch.dtype = torch.uint8
) -> torch.nn.Module:
    """The model with its adapters on the meta device: modules and shapes, no memory.

    Args:
        recipe: What is trained.
        config: Of the model.
        storage: Of packed 4-bit weights, as `qlora.quantization` takes it.

    Raises:
        NotPlain: Its layers are not where a Llama's are.
        ValueError: A LoRA target matches none.
    """
    model: Any = fake.meta_model(config, qlora.storage_dtype(recipe))
    if not hasattr(getattr(model, "model", None), "layers"):
        raise NotPlain(recipe.model, f"{config.model_type} has its layers elsewhere")
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
