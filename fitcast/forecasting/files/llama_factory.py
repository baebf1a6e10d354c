"""A file of LLaMA-Factory, `llamafactory-cli train run.yaml`: its names for Trainer and PEFT.

Sources: src/llamafactory/hparams (model_args.py, finetuning_args.py, data_args.py, parser.py) for
names and defaults; src/llamafactory/model (adapter.py, model_utils/quantization.py,
checkpointing.py) for what becomes of them. Its adapters, and all weights of a full fine-tune, are
float32 unless `pure_bf16` is set.
"""

from __future__ import annotations

import re
from typing import Any

from fitcast.forecasting.files.reading import Values
from fitcast.forecasting.files.script import (
    NOT_MODELLED,
    QUIET,
    Script,
    known_model,
    pass_on,
    refuse_bfloat16,
)
from fitcast.gpus import Gpu
from fitcast.units import refusal, with_article

# Keys that only LLaMA-Factory has: one of them tells its file from TRL's.
KEYS = {
    "stage", "finetuning_type", "template", "cutoff_len", "quantization_bit", "lora_rank",
    "lora_target", "flash_attn", "dataset", "dataset_dir", "additional_target", "use_unsloth",
}  # fmt: skip
SILENT = re.compile(
    QUIET.pattern + r"|dataset|dataset_dir|eval_dataset|media_dir|template|max_samples"
    r"|overwrite_cache|preprocessing_.*|streaming|buffer_size|mix_strategy|interleave_probs"
    r"|val_size|tokenized_path|tool_format|train_on_prompt|mask_history|ignore_pad_token_for_loss"
    r"|cache_dir|use_fast_tokenizer|split_special_tokens|model_revision|low_cpu_mem_usage"
    r"|hf_hub_token|ms_hub_token|om_hub_token|print_param_status|infer_.*|vllm_.*|export_.*"
    r"|swanlab_.*|use_swanlab|loraplus_.*|pref_.*|kto_.*|simpo_gamma|dpo_label_smoothing|ld_alpha"
    r"|predict_with_generate|compute_accuracy|use_kv_cache|offload_folder|enable_thinking"
    r"|default_system|rope_scaling|create_new_adapter|quantization_device_map"
    r"|use_v1_kernels|include_effective_tokens_per_second|include_num_input_tokens_seen"
)
UNSLOTH = "it replaces the model's own code; the forecast is that of the code it replaces"
OWN_OPTIMIZER = "its projected state is not followed; the forecast has that of `optim`"
PATCHED = NOT_MODELLED | {
    "use_unsloth": UNSLOTH,
    "use_unsloth_gc": "checkpoints stay on the card in the forecast, and go to the host there",
    "enable_liger_kernel": "Liger's Triton kernels replace the model's own",
    "shift_attn": "LongLoRA's shifted attention is another one than the model's",
    "mixture_of_depths": "other layers than the model's own",
    "upcast_layernorm": "norms keep the dtype of the other weights in the forecast",
    "upcast_lmhead_output": "the logits' second copy in float32 is left out",
    "neat_packing": "texts packed into one row see each other in the forecast, without a mask",
    "use_galore": OWN_OPTIMIZER,
    "use_apollo": OWN_OPTIMIZER,
    "use_badam": OWN_OPTIMIZER,
    "use_adam_mini": OWN_OPTIMIZER,
    "use_muon": OWN_OPTIMIZER,
    "use_llama_pro": "only its new layers train there",
    "pissa_init": "loading measures all weights once more there",
    "resize_vocab": "the embedding keeps the length of the checkpoint's",
    "add_tokens": "the embedding keeps the length of the checkpoint's",
    "add_special_tokens": "the embedding keeps the length of the checkpoint's",
    "moe_aux_loss_coef": "the router's loss is left out",
    "fp8": "products in 8 bits are not followed",
    "image_max_pixels": "batches hold text only in the forecast",
    "video_max_pixels": "batches hold text only in the forecast",
    "adapter_name_or_path": "adapters are forecast as the file describes new ones",
}
ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "sdpa", "fa3": "sdpa"}


def script(values: dict[str, Any], gpu: Gpu) -> Script:
    """The run of a file for `llamafactory-cli train`."""
    found = Values(values)
    model = known_model(found.text("model_name_or_path"), "model_name_or_path")
    kinds = ("sft", "pt", "dpo"), ("lora", "full")
    stage = found.one_of("stage", kinds[0], "sft", "other stages are not forecast from a file")
    trains = found.one_of("finetuning_type", kinds[1], "lora", "other ways are not forecast here")
    patched = {key: found.left.pop(key) for key in PATCHED if key in found.left}
    pure = found.yes_no("pure_bf16")
    lora = _lora(found) if trains == "lora" else None
    arguments = _arguments(found, stage)
    length = found.whole("cutoff_len", 2048)
    packing = found.yes_no("packing", stage == "pt") or bool(patched.get("neat_packing"))
    if arguments.get("bf16") or pure:
        refuse_bfloat16(gpu, "pure_bf16" if pure else "bf16")
    dtype = _dtype(arguments, pure, trains, gpu)
    quantization = _quantization(found, dtype)
    attention, attention_notes = _attention(found, gpu)
    found.left |= patched
    notes = found.notes(SILENT, PATCHED, PATCHED)
    if stage == "dpo":
        notes.append("stage: dpo is forecast as TRL's DPOTrainer; LLaMA-Factory has its own")
        arguments["max_length"] = length
    return Script(
        tool="LLaMA-Factory",
        model=model,
        arguments=arguments,
        config_class="DPOConfig" if stage == "dpo" else "TrainingArguments",
        lora=lora,
        quantization=quantization,
        dtype=dtype,
        attention=attention,
        sequence_length=length,
        padded=False if packing else None,
        notes=[*attention_notes, *notes],
    )


def _lora(found: Values) -> dict[str, Any]:
    rank = found.whole("lora_rank", 8) or 8
    targets = found.names("lora_target") or ["all"]
    fields = {
        "r": rank,
        "lora_alpha": found.whole("lora_alpha", 2 * rank),
        "lora_dropout": found.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if targets == ["all"] else targets,
        "modules_to_save": found.names("additional_target"),
        "use_rslora": found.yes_no("use_rslora"),
        "use_dora": found.yes_no("use_dora"),
        "task_type": "CAUSAL_LM",
    }
    return {name: value for name, value in fields.items() if value is not None}


def _arguments(found: Values, stage: str) -> dict[str, Any]:
    """Its checkpointing is on unless switched off, and reentrant."""
    off = found.yes_no("disable_gradient_checkpointing")
    reentrant = found.yes_no("use_reentrant_gc", True)
    arguments = pass_on(found, "DPOConfig" if stage == "dpo" else "TrainingArguments")
    if not off:
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    return arguments


def _dtype(arguments: dict[str, Any], pure: bool, trains: str, gpu: Gpu) -> str | None:
    if pure:
        return "bfloat16"
    if trains == "full":
        return "float32"  # it casts all that trains
    if arguments.get("bf16"):
        return "bfloat16"
    return "float16" if arguments.get("fp16") or not gpu.has_bfloat16 else None


def _quantization(found: Values, dtype: str | None) -> dict[str, Any] | None:
    bits = found.whole("quantization_bit")
    kind = found.text("quantization_type", "nf4")
    double = found.yes_no("double_quantization", True)
    found.one_of(
        "quantization_method", ("bnb",), "bnb", "other libraries' weights are not forecast here"
    )
    if bits == 4:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": dtype or "bfloat16",
        }
    if bits not in (None, 8):
        raise refusal("quantization_bit", "be 4 or 8", bits, "bitsandbytes has no other widths")
    return {"load_in_8bit": True} if bits == 8 else None


def _attention(found: Values, gpu: Gpu) -> tuple[str | None, list[str]]:
    asked = found.one_of("flash_attn", ATTENTION, "auto", "for example flash_attn: sdpa")
    notes = []
    if asked in ("fa2", "fa3"):
        notes = [f"flash_attn: {asked} is forecast as PyTorch's own kernel, sdpa"]
        if not gpu.has_flash_attention:
            notes.append(f"{with_article(gpu.name)} has no FlashAttention: write flash_attn: sdpa")
    return ATTENTION[asked], notes
