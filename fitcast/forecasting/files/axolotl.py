"""A file of axolotl, `axolotl train run.yml`: its names for Trainer, PEFT and bitsandbytes.

Sources: src/axolotl/utils/schemas (config.py, peft.py, training.py, model.py) for names and
defaults; src/axolotl/loaders/model.py for dtypes and quantization (double, NF4, in the run's
dtype); examples/llama-3. Not modelled: the float32 norms that a full fine-tune without
FlashAttention has there.
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
    refuse_bfloat16,
)
from fitcast.gpus import Gpu
from fitcast.units import with_article

SILENT = re.compile(
    QUIET.pattern + r"|base_model_config|model_type|tokenizer_.*|processor_type|strict|datasets"
    r"|test_datasets|pretraining_dataset|dataset_.*|val_set_size|chat_template.*|special_tokens"
    r"|wandb_.*|mlflow_.*|comet_.*|use_(wandb|mlflow|comet|tensorboard)|num_epochs|train_on_inputs"
    r"|early_stopping_patience|warmup.*|xformers_.*|auto_resume_from_checkpoints|default_system.*"
    r"|loss_watchdog_.*|shuffle_.*|save.*|loraplus_.*|lora_on_cpu|lora_model_dir|lora_fan_in.*"
    r"|low_cpu_mem_usage|revision_of_model|evals_per_epoch|eval_batch_size|eval_sample_packing"
    r"|eval_table_size|is_llama_derived_model|is_mistral_.*|trust_remote_code|roles.*|max_grad_norm"
    r"|cosine_.*|gc_steps|skip_prepare_dataset|remove_unused_columns|resize_token_.*|bench_dataset"
    r"|batch_size|world_size|rl_beta|dpo_.*|hf_use_auth_token|torchdistx_path|seed|sample_packing_.*"
    r"|pad_to_sequence_len|embeddings_skip_upcast|field_.*|push_.*|merge_.*|process_.*"
)
KERNELS = "its Triton kernels keep other tensors than the model's own code"
WHOLE = "its shards are not run; the forecast is that of one whole copy"
TOKENS = "the embedding keeps the length of the checkpoint's"
PATCHED = NOT_MODELLED | {
    "lora_mlp_kernel": KERNELS,
    "lora_qkv_kernel": KERNELS,
    "lora_o_kernel": KERNELS,
    "lora_embedding_kernel": KERNELS,
    "unsloth_lora_mlp": KERNELS,
    "unsloth_lora_qkv": KERNELS,
    "unsloth_lora_o": KERNELS,
    "unsloth_rms_norm": KERNELS,
    "unsloth_rope": KERNELS,
    "unsloth_cross_entropy_loss": KERNELS,
    "flash_attn_rms_norm": KERNELS,
    "flash_attn_cross_entropy": KERNELS,
    "flash_attn_fuse_mlp": KERNELS,
    "flash_attn_fuse_qkv": KERNELS,
    "liger_rope": KERNELS,
    "liger_rms_norm": KERNELS,
    "liger_layer_norm": KERNELS,
    "liger_glu_activation": KERNELS,
    "liger_swiglu": KERNELS,
    "liger_cross_entropy": KERNELS,
    "liger_fused_linear_cross_entropy": "it never builds the logits, which the forecast has",
    "cut_cross_entropy": "it never builds the logits, which the forecast has",
    "chunked_cross_entropy": "the forecast's loss builds all logits at once",
    "plugins": "what a plugin patches is not known here",
    "activation_offloading": "activations that wait in host memory are not followed",
    "layer_offloading": "weights that wait in host memory are not followed",
    "tiled_mlp": "the forecast has the MLP in one piece",
    "s2_attention": "LongLoRA's shifted attention is another one than the model's",
    "flex_attention": "forecast as PyTorch's own kernel, sdpa",
    "sage_attention": "forecast as PyTorch's own kernel, sdpa",
    "fsdp_version": WHOLE,
    "tensor_parallel_size": WHOLE,
    "sequence_parallel_degree": WHOLE,
    "context_parallel_size": WHOLE,
    "relora": "its restarts merge the adapters, which is not followed",
    "relora_steps": "its restarts merge the adapters, which is not followed",
    "lisa_n_layers": "a changing part of the layers trains there",
    "unfrozen_parameters": "all weights train in the forecast",
    "qat": "quantizing while training is not followed",
    "fp8": "products in 8 bits are not followed",
    "gptq": "see the checkpoint's own quantization_config",
    "peft": "only LoRA as lora_* keys describe it is followed",
    "tokens": TOKENS,
    "added_tokens_overrides": TOKENS,
    "gpu_memory_limit": "the card's own memory is the limit here",
    "max_memory": "all weights are on the card in the forecast",
    "device_map": "all weights are on the card in the forecast",
    "multipack_real_batches": "rows are those of micro_batch_size",
}
LOADED = {"bf16": "bfloat16", "fp16": "float16"}


def script(values: dict[str, Any], gpu: Gpu) -> Script:
    """The run of a file for `axolotl train`."""
    found = Values(values)
    model = known_model(found.text("base_model"), "base_model")
    rl = found.one_of("rl", ("none", "dpo"), "none", "other ways are not forecast from a file")
    adapter = found.one_of(
        "adapter", ("none", "lora", "qlora"), "none", "other adapters are not forecast from a file"
    )
    arguments, notes = _arguments(found, gpu)
    quantization = _quantization(found, adapter)
    dtype = _dtype(arguments, quantization)
    if quantization and "load_in_4bit" in quantization:
        quantization["bnb_4bit_compute_dtype"] = dtype
        quantization |= found.raw("bnb_config_kwargs", {})
    lora = _lora(found)
    length = found.whole("sequence_len", 512)
    packed = found.yes_no("sample_packing")
    attention, flash, attention_notes = _attention(found, gpu)
    if packed and not flash:
        notes.append("sample_packing keeps packed texts apart by a mask without FlashAttention")
    if rl == "dpo":
        arguments["max_length"] = length
    return Script(
        tool="axolotl",
        model=model,
        arguments=arguments,
        config_class="DPOConfig" if rl == "dpo" else "TrainingArguments",
        lora=lora if adapter != "none" else None,
        quantization=quantization,
        dtype=dtype,
        attention=attention,
        sequence_length=length,
        padded=not flash if packed else None,
        notes=[*notes, *attention_notes, *found.notes(SILENT, PATCHED, PATCHED)],
    )


def _arguments(found: Values, gpu: Gpu) -> tuple[dict[str, Any], list[str]]:
    """Fields of TrainingArguments, and what is not followed of them."""
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": found.whole("micro_batch_size", 1),
        "gradient_accumulation_steps": found.whole("gradient_accumulation_steps", 1),
        **_precision(found, gpu),
    }
    optimizer, notes = found.text("optimizer", "adamw_torch_fused"), []
    if optimizer in _optimizers():
        arguments["optim"] = optimizer
    else:
        notes.append(f"optimizer: {optimizer} is axolotl's own: AdamW's two averages stand for it")
    arguments["optim_args"] = found.raw("optim_args")
    arguments["neftune_noise_alpha"] = found.number("neftune_noise_alpha")
    how = found.raw("gradient_checkpointing", False)
    options = found.raw("gradient_checkpointing_kwargs", {"use_reentrant": False})
    if how:
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_kwargs"] = options
    if isinstance(how, str):
        notes.append(f"gradient_checkpointing: {how} keeps its checkpoints on the card here")
    return {name: v for name, v in arguments.items() if v is not None}, notes


def _optimizers() -> set[str]:
    from transformers.training_args import OptimizerNames

    return {optimizer.value for optimizer in OptimizerNames}


def _precision(found: Values, gpu: Gpu) -> dict[str, bool]:
    """`auto`, axolotl's default, is bfloat16 where the card has it, else float16."""
    bf16 = found.raw("bf16", found.raw("bfloat16", "auto"))
    fp16 = found.raw("fp16", found.raw("float16", False))
    if bf16 == "auto":
        bf16 = gpu.has_bfloat16 and not fp16
        fp16 = not bf16
    for key, value in (("bf16", bf16), ("fp16", fp16)):
        found.left[key] = value
    chosen = {key: found.yes_no(key) for key in ("bf16", "fp16")}
    if chosen["bf16"]:
        refuse_bfloat16(gpu)
    return chosen


def _dtype(arguments: dict[str, Any], quantization: dict[str, Any] | None) -> str:
    """Source: src/axolotl/utils/config/__init__.py, `normalize_config`."""
    if arguments["bf16"]:
        return "bfloat16"
    in_8_bits = bool(quantization and "load_in_8bit" in quantization)
    return "float16" if arguments["fp16"] or in_8_bits else "float32"


def _quantization(found: Values, adapter: str) -> dict[str, Any] | None:
    four, eight = found.yes_no("load_in_4bit"), found.yes_no("load_in_8bit")
    if adapter == "qlora" and four:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
    if four:
        return {"load_in_4bit": True}
    return {"load_in_8bit": True} if eight else None


def _lora(found: Values) -> dict[str, Any]:
    everywhere = found.yes_no("lora_target_linear")
    targets = found.names("lora_target_modules")
    fields = {
        "r": found.whole("lora_r", 8),
        "lora_alpha": found.whole("lora_alpha", 16),
        "lora_dropout": found.number("lora_dropout", 0.0),
        "target_modules": "all-linear" if everywhere else targets,
        "target_parameters": found.names("lora_target_parameters"),
        "modules_to_save": found.names("lora_modules_to_save"),
        "layers_to_transform": found.raw("peft_layers_to_transform"),
        "use_rslora": found.yes_no("peft_use_rslora"),
        "use_dora": found.yes_no("peft_use_dora"),
        "task_type": "CAUSAL_LM",
    }
    return {name: value for name, value in fields.items() if value is not None}


def _attention(found: Values, gpu: Gpu) -> tuple[str | None, bool, list[str]]:
    """Its name for transformers, whether it is FlashAttention, and what there is to say."""
    eager, flash = found.yes_no("eager_attention"), found.yes_no("flash_attention")
    sdpa = found.yes_no("sdp_attention")
    named = found.text("attn_implementation", found.text("attention"))
    if named is not None:
        flash, eager = flash or "flash" in named, eager or named == "eager"
    if not flash:
        return "eager" if eager else "sdpa" if sdpa or named else None, False, []
    notes = ["flash_attention is forecast as PyTorch's own kernel, sdpa"]
    if not gpu.has_flash_attention:
        notes.append(
            f"{with_article(gpu.name)} has no FlashAttention: write sdp_attention: true instead"
        )
    return "sdpa", gpu.has_flash_attention, notes
