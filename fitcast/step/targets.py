"""Which layers of a family get adapters when nobody named any: PEFT's own choice, or attention's.

PEFT knows about forty families by name. For others its training stops with "Please specify
`target_modules`"; here the linear layers of attention are taken, and a caller can say so.
"""

from __future__ import annotations

import torch

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def peft_targets(model_type: str) -> tuple[str, ...] | str:
    """PEFT's default LoRA targets of a family, names or a pattern; empty where it knows none.

    Source: peft/utils/constants.py.

    Example:
        >>> peft_targets("gpt2")
        ('c_attn',)
    """
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN,
    )

    found = KNOWN.get(model_type, ())
    return found if isinstance(found, str) else tuple(found)


def attention_targets(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of the linear layers within attention: the four projections, if it has them.

    Of a Mamba without attention those of its mixer, except `out_proj`, which PEFT refuses there.

    Args:
        model: The decoder, on any device.
    """
    for part in ("Attention", "MLA", "Mixer"):
        names = _linear_children(model, part)
        if names:
            break
    if set(PROJECTIONS) <= set(names):
        return PROJECTIONS
    return tuple(name for name in names if part != "Mixer" or name != "out_proj")


def _linear_children(model: torch.nn.Module, part: str) -> list[str]:
    """Names of linear layers in modules whose class is called something with `part`."""
    names: dict[str, None] = {}
    for module in model.modules():
        if part in type(module).__name__:
            names |= {name: None for name, layer in module.named_children() if _is_linear(layer)}
    return list(names)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
