"""Before the run: what would stop it, found in seconds and before any download.

Source: the traps are those of facts met in practice; each message names its fix.
"""

from __future__ import annotations

import torch

from . import hardware
from .recipe import TrainRecipe


def refuse_silent_failures(recipe: TrainRecipe, model: torch.nn.Module, overrides: dict) -> None:
    """Raise for settings that Trainer accepts and that then crawl, crash late or learn nothing.

    Raises:
        ValueError: bfloat16 on a GPU that only emulates it; 16-bit adapters under a gradient
            scaler; fp16_full_eval, which makes the adapters 16-bit in place; nothing to train.
    """
    gpu = hardware.detect()
    if gpu is not None:
        recipe.check_on(gpu)
    elif recipe.amp_dtype == "float16":
        raise ValueError("amp_dtype must be None or 'bfloat16' without a GPU, got 'float16'; use "
                         "recipe.for_gpu(hardware.detect())")
    if overrides.get("fp16_full_eval"):
        raise ValueError("fp16_full_eval must be False in a run that trains, got True; evaluation "
                         "would turn the adapters into float16, which cannot be trained")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model must have trainable parameters, got none; call qlora.add_adapters")
    if recipe.amp_dtype == "float16" and any(p.dtype == torch.float16 for p in trainable):
        raise ValueError("adapters must be float32 when amp_dtype is 'float16', got float16; the "
                         "gradient scaler cannot unscale them: model.float() the adapters")
