"""A file of TRL's command line, `trl sft --config run.yaml`: fields of its own classes.

Sources: trl/trainer/model_config.py; trl/scripts/sft.py and trl/trainer/utils.py
(`get_quantization_config`, `get_peft_config`); huggingface.co/docs/trl, "Command Line Interfaces".
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from fitcast.forecasting.files.reading import Values
from fitcast.forecasting.files.script import (
    NOT_MODELLED,
    QUIET,
    Script,
    config_class,
    known_model,
    pass_on,
    refuse_bfloat16,
)
from fitcast.gpus import Gpu

SILENT = re.compile(
    QUIET.pattern + r"|dataset_.*|datasets|streaming|model_revision|ignore_bias_buffers"
    r"|chat_template_path|eos_token|pad_token|shuffle_dataset|truncation_mode|config"
)
PATCHED = NOT_MODELLED | {
    "activation_offloading": "activations that wait in host memory are not followed",
    "bnb_4bit_quant_storage": "the bytes are the same in any dtype",
    "num_processes": "the forecast is that of one card",
}


def script(values: dict[str, Any], gpu: Gpu) -> Script:
    """The run of TRL's command line; `trl dpo` is told by keys that only DPO has."""
    found = Values(values)
    kind = "DPOConfig" if _only_in_dpo() & values.keys() else "SFTConfig"
    model = known_model(found.text("model_name_or_path"), "model_name_or_path")
    dtype = found.text("dtype", found.text("torch_dtype", "float32"))
    lora, quantization = _lora(found), _quantization(found, dtype)
    attention = found.text("attn_implementation")
    for key in PATCHED:
        found.taken.add(key)
    patched = {key: found.left.pop(key) for key in PATCHED if key in found.left}
    arguments = pass_on(found, kind)
    found.left |= patched
    notes = found.notes(SILENT, PATCHED)
    if arguments.get("bf16", not arguments.get("fp16")):  # TRL's default
        refuse_bfloat16(gpu)
    return Script(
        tool="TRL",
        model=model,
        arguments=arguments,
        config_class=kind,
        lora=lora,
        quantization=quantization,
        dtype=dtype,
        attention=attention,
        notes=notes,
    )


def _only_in_dpo() -> set[str]:
    names = [
        {f.name for f in dataclasses.fields(config_class(name))}  # pyright: ignore[reportArgumentType]
        for name in ("DPOConfig", "SFTConfig")
    ]
    return names[0] - names[1]


def _lora(found: Values) -> dict[str, Any] | None:
    used = found.yes_no("use_peft")
    fields = {
        "r": found.whole("lora_r", 16),
        "lora_alpha": found.whole("lora_alpha", 32),
        "lora_dropout": found.number("lora_dropout", 0.05),
        "target_modules": found.names("lora_target_modules"),
        "target_parameters": found.names("lora_target_parameters"),
        "modules_to_save": found.names("lora_modules_to_save"),
        "use_rslora": found.yes_no("use_rslora"),
        "use_dora": found.yes_no("use_dora"),
        "task_type": found.text("lora_task_type", "CAUSAL_LM"),
    }
    if fields["target_modules"] == ["all-linear"]:
        fields["target_modules"] = "all-linear"
    return {k: v for k, v in fields.items() if v is not None} if used else None


def _quantization(found: Values, dtype: str | None) -> dict[str, Any] | None:
    kind = found.text("bnb_4bit_quant_type", "nf4")
    nested = found.yes_no("use_bnb_nested_quant")
    if found.yes_no("load_in_4bit"):
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
            "bnb_4bit_compute_dtype": dtype,
        }
    return {"load_in_8bit": True} if found.yes_no("load_in_8bit") else None
