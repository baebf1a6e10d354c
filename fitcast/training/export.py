"""From a trained model to files: the adapter alone, or merged into a base of 16 bits.

A QLoRA adapter was trained beside the *quantized* weights. Merged into the original ones it meets
numbers that it has never seen; merged into the dequantized ones, those that it was trained with.

Not modelled: GGUF and other formats of inference engines, uploads.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora


def save_adapter(model: torch.nn.Module, folder: str | Path) -> int:
    """Write the adapter alone, in PEFT's format; returns the bytes of its weights' file."""
    model.save_pretrained(str(folder))
    return (Path(folder) / "adapter_model.safetensors").stat().st_size


def load_adapter(recipe: TrainRecipe, folder: str | Path) -> torch.nn.Module:
    """The recipe's base, loaded afresh, with the adapter of `save_adapter`, in eval mode.

    Raises:
        FileNotFoundError: No adapter there.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"folder must hold an adapter, got {folder} without an "
            "adapter_config.json; write one with export.save_adapter"
        )
    return _with_adapter(qlora.load_base(recipe), recipe, folder).eval()


def _with_adapter(base: torch.nn.Module, recipe: TrainRecipe, folder: str | Path):
    model = qlora.apply_levers(qlora.add_adapters(base, recipe), recipe)
    model.load_adapter(str(folder), "default")
    return model


def merge(
    recipe: TrainRecipe, adapter: str | Path, base: Literal["original", "dequantized"]
) -> torch.nn.Module:
    """A plain model without adapters: W + (alpha / rank) B A in every adapted layer.

    Args:
        recipe: That of the training run; its base is "nf4".
        adapter: Folder written by `save_adapter`.
        base: What W is: the "original" 16-bit weights, or those "dequantized" from NF4.

    Source: LoRA (Hu et al. 2021, section 4.1); QLoRA (Dettmers et al. 2023, section 3).
    """
    if base not in ("original", "dequantized"):
        raise ValueError(f"base must be 'original' or 'dequantized', got {base!r}; pick one")
    plain = replace(recipe, base=recipe.amp_dtype or "float32")
    model = qlora.load_base(plain)
    if base == "dequantized":
        _copy_dequantized(qlora.load_base(recipe), model)
    return _with_adapter(model, plain, adapter).merge_and_unload().eval()


@torch.no_grad()
def _copy_dequantized(quantized: torch.nn.Module, model: torch.nn.Module) -> None:
    from bitsandbytes.functional import dequantize_4bit

    for name, parameter in quantized.named_parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            model.get_parameter(name).copy_(dequantize_4bit(parameter.data, state))


def save_merged(model: torch.nn.Module, folder: str | Path) -> int:
    """Write a merged model in float16, for any program that loads a Hugging Face model.

    The model itself becomes float16. Returns the bytes of its weights' files.
    """
    model.half().save_pretrained(str(folder))
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def load_merged(recipe: TrainRecipe, folder: str | Path) -> torch.nn.Module:
    """The model of `save_merged`, in the recipe's dtype (float32 on CPU), in eval mode."""
    plain = replace(
        recipe,
        base=recipe.amp_dtype or "float32",
        lora_rank=None,
        loss="chunked" if recipe.loss == "lean" else recipe.loss,
    )
    return qlora.load_base(plain, source=str(folder)).to(gpus.device()).eval()
