"""Families whose training in float16 gives NaN, each with who measured it.

float16 ends at 65 504; bfloat16 and float32 do not. On a card without bfloat16 these families train
in float32, or not at all. Not known here: families that nobody has reported.
"""

from __future__ import annotations

from dataclasses import dataclass

from fitcast.gpus import Gpu
from fitcast.units import with_article


@dataclass(frozen=True)
class Overflow:
    """What happens to a family in float16, and where it was reported."""

    family: str
    what: str
    source: str


_GEMMA3 = Overflow(
    "Gemma 3", "activations reach about 800 000", "github.com/unslothai/unsloth/pull/4014"
)
_GEMMA3N = Overflow(
    "Gemma 3n", "activations pass its range", "unsloth_zoo/model_lists.py, FORCE_FLOAT32"
)
_GPT_OSS = Overflow(
    "gpt-oss",
    "activations pass its range in the last layers",
    "github.com/microsoft/onnxruntime-genai/pull/2444",
)
_QWEN35 = Overflow(
    "Qwen3.5",
    "the gated delta layers give NaN gradients",
    "unsloth_zoo/model_lists.py, FORCE_FLOAT32",
)
_BACKWARD = "gradients pass its range along the residual stream"
_PULL_866 = "github.com/unslothai/unsloth-zoo/pull/866"
_QWEN3_MOE = Overflow("Qwen3-MoE", _BACKWARD, _PULL_866)
_GLM4_MOE = Overflow("GLM-4 MoE", _BACKWARD, _PULL_866)
_GEMMA4 = Overflow("Gemma 4", _BACKWARD, _PULL_866)

# model_type of a config -> what is known.
FAMILIES: dict[str, Overflow] = {
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gpt_oss": _GPT_OSS,
    "qwen3_5": _QWEN35,
    "qwen3_5_text": _QWEN35,
    "qwen3_5_moe": _QWEN35,
    "qwen3_5_moe_text": _QWEN35,
    "qwen3_moe": _QWEN3_MOE,
    "glm4_moe": _GLM4_MOE,
    "glm4_moe_lite": _GLM4_MOE,
}


def float16_warning(model_type: str, gpu: Gpu) -> str | None:
    """A sentence where float16 is not safe for a family; `None` where nothing is known.

    Args:
        model_type: As a config.json has it.
        gpu: Where it has bfloat16, the sentence says to use that.

    Example:
        >>> from fitcast.gpus import T4
        >>> float16_warning("llama", T4) is None
        True
    """
    known = FAMILIES.get(model_type)
    if known is None:
        return None
    remedy = (
        "train in bfloat16 (bf16=True)"
        if gpu.has_bfloat16
        else f"{with_article(gpu.name)} has no bfloat16, so train in float32 or take another card"
    )
    return f"{known.family} is not safe in float16: {known.what} ({known.source}); {remedy}"
