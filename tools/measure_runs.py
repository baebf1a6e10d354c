"""Measure Hugging Face training runs on a CUDA GPU, to hold the open forecast against.

    python tools/measure_runs.py OUT.json [--rows look|held|sft] [--minutes 9] [--workers 3]

Each row says a run in the names of a script: model, trainer class, its arguments, PEFT and
quantization. It is made from random weights at the real shapes, in a process of its own, and takes
eight optimizer steps of the class's own `train()`. `objects` turns a row into what a script would
hold; `forecast_of` gives the same objects to the forecast. The file is written after every row; a
row that fails says why. Memory counters are per process, so rows may share the GPU; no times.

Protocol: FlashAttention and cuDNN attention off, as on a T4; cuBLAS keeps this GPU's work spaces.
`peak_*` are those of the eighth step, after `reset_peak_memory_stats`, cache not emptied.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # no CUDA in the parent: it forks
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fitcast import gpus

# The card of every row: this GPU's memory and work spaces, a T4's attention kernels.
H200_WITH_T4_KERNELS = dataclasses.replace(gpus.H200, flash_attention=False)
CONFIGS = ROOT / "tests" / "data" / "configs"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
       "bnb_4bit_compute_dtype": "float16"}  # fmt: skip
INT8 = {"load_in_8bit": True}
STEPS = 8  # the first ones are skipped while the loss scale falls, and make no optimizer state
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}  # fmt: skip
COMMON = {"fp16": True, "gradient_checkpointing": True, "optim": "paged_adamw_8bit"}


def row(name: str, model: str, length: int = 1024, batch: int = 2, **changes: Any) -> dict:
    """A run as JSON: a QLoRA of Trainer's, unless the changes say otherwise."""
    arguments = COMMON | {"per_device_train_batch_size": batch} | changes.pop("arguments", {})
    known = {"trainer": "Trainer", "peft": LORA, "quantization": NF4, "dtype": "float16",
             "padded": False, "layers": None, "texts": None}  # fmt: skip
    if unknown := set(changes) - set(known):
        raise ValueError(f"a row must not have {', '.join(unknown)}")
    return {"name": name, "model": model, "sequence_length": length, "arguments": arguments} \
        | known | changes  # fmt: skip


LOOK = [
    row("trainer, 1B", "llama-3.2-1b", 1024, 4),
    row("trainer, padded", "llama-3.2-1b", 1024, 4, padded=True),
    row("trainer, accumulated", "llama-3.2-1b", 1024, 2,
        arguments={"gradient_accumulation_steps": 3}),
    row("sft, 1B", "llama-3.2-1b", 1024, 4, trainer="SFTTrainer"),
    row("sft, padded", "llama-3.2-1b", 1024, 4, trainer="SFTTrainer", padded=True),
    row("sft, packed", "llama-3.2-1b", 2048, 2, trainer="SFTTrainer",
        arguments={"packing": True}),
    row("8-bit base", "llama-3.2-1b", 1024, 2, quantization=INT8),
    row("16-bit base", "llama-3.2-1b", 1024, 2, quantization=None),
    row("DoRA", "llama-3.2-1b", 1024, 2, peft=LORA | {"use_dora": True}),
    row("modules_to_save", "qwen3-0.6b", 1024, 2, dtype="float32",
        peft=LORA | {"modules_to_save": ["lm_head"]}),
    row("rsLoRA, all-linear, bias", "llama-3.2-1b", 1024, 2,
        peft=LORA | {"use_rslora": True, "target_modules": "all-linear"}),
    row("full, adamw_torch", "qwen3-0.6b", 512, 2, peft=None, quantization=None, dtype="float32",
        arguments={"optim": "adamw_torch"}),
    row("full, fused", "qwen3-0.6b", 512, 2, peft=None, quantization=None, dtype="float32",
        arguments={"optim": "adamw_torch_fused"}),
    row("full, adafactor", "qwen3-0.6b", 512, 2, peft=None, quantization=None, dtype="float32",
        arguments={"optim": "adafactor"}),
    row("full, sgd", "qwen3-0.6b", 512, 2, peft=None, quantization=None, dtype="float32",
        arguments={"optim": "sgd"}),
    row("full, lion 8-bit", "qwen3-0.6b", 512, 2, peft=None, quantization=None, dtype="float32",
        arguments={"optim": "lion_8bit"}),
    row("full, paged adamw 32-bit", "qwen3-0.6b", 512, 2, peft=None, quantization=None,
        dtype="float32", arguments={"optim": "paged_adamw_32bit"}),
    row("full, float32, no autocast", "qwen3-0.6b", 512, 2, peft=None, quantization=None,
        dtype="float32", arguments={"optim": "adamw_torch", "fp16": False}),
    row("gemma 2", "gemma-2-2b", 1024, 2),
    row("gemma 3", "gemma-3-1b", 1024, 2),
    row("stablelm", "stablelm-2-1.6b", 1024, 2),
    row("phi-2", "phi-2", 1024, 2, peft=LORA | {"target_modules": "all-linear"}),
    row("qwen2.5", "qwen2.5-7b", 1024, 2, layers=8),
    row("gpt2", "gpt2", 512, 2, peft=LORA | {"target_modules": ["c_attn"]}, quantization=None),
    row("falcon", "falcon-7b", 1024, 2, layers=6, peft=LORA | {"target_modules": "all-linear"}),
    row("gpt-oss", "gpt-oss-20b", 512, 1, layers=3, quantization=None),
    row("qwen3 moe", "qwen3-30b-a3b", 512, 1, layers=3, quantization=None),
    row("mixtral", "mixtral-8x7b", 512, 1, layers=2, quantization=None),
]  # fmt: skip
ALL = LORA | {"target_modules": "all-linear"}
FULL: dict[str, Any] = {"peft": None, "quantization": None, "dtype": "float32"}
# Predicted before they were looked at.
HELD = [
    row("held: trainer 8B", "llama-3.1-8b", 1536, 2),
    row("held: trainer 8B, padded", "llama-3.1-8b", 1536, 3, padded=True),
    row("held: trainer phi-4-mini", "phi-4-mini", 1024, 2,
        peft=LORA | {"target_modules": ["qkv_proj", "o_proj"]}),
    row("held: trainer, no checkpointing", "llama-3.2-1b", 768, 2,
        arguments={"gradient_checkpointing": False}),
    row("held: trainer, reentrant", "llama-3.2-1b", 768, 4,
        arguments={"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    row("held: trainer, accumulated 4", "qwen3-1.7b", 512, 3,
        arguments={"gradient_accumulation_steps": 4}),
    row("held: trainer, no clipping", "qwen3-1.7b", 1024, 2, arguments={"max_grad_norm": 0.0}),
    row("held: trainer, label smoothing", "qwen3-0.6b", 768, 2,
        arguments={"label_smoothing_factor": 0.1}),
    row("held: trainer, neftune", "llama-3.2-1b", 1024, 2,
        arguments={"neftune_noise_alpha": 5.0}),
    row("held: sft 8B", "llama-3.1-8b", 1536, 2, trainer="SFTTrainer"),
    row("held: sft, padded", "qwen3-1.7b", 1280, 3, trainer="SFTTrainer", padded=True),
    row("held: sft, packed", "llama-3.2-1b", 4096, 1, trainer="SFTTrainer",
        arguments={"packing": True}),
    row("held: sft, all-linear", "llama-3.2-3b", 1024, 2, trainer="SFTTrainer", peft=ALL),
    row("held: sft, 16-bit base", "qwen3-1.7b", 1024, 2, trainer="SFTTrainer",
        quantization=None),
    row("held: sft, full", "qwen3-0.6b", 1024, 2, trainer="SFTTrainer", peft=None,
        quantization=None, dtype="float32", arguments={"optim": "adamw_torch"}),
    row("held: 8-bit 3B", "llama-3.2-3b", 1024, 2, quantization=INT8, peft=ALL),
    row("held: 8-bit qwen", "qwen3-1.7b", 1536, 1, quantization=INT8),
    row("held: 16-bit base", "llama-3.2-3b", 1024, 1, quantization=None),
    row("held: fp4, single quantization", "llama-3.2-1b", 1024, 2,
        quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": "float16"}),
    row("held: float32 compute", "llama-3.2-1b", 512, 2,
        quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    row("held: DoRA", "qwen3-1.7b", 768, 2, peft=LORA | {"use_dora": True}),
    row("held: DoRA, all-linear", "llama-3.2-1b", 512, 4, peft=ALL | {"use_dora": True}),
    row("held: modules_to_save", "llama-3.2-1b", 768, 2, dtype="float32",
        peft=LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}),
    row("held: rank 64, bias", "qwen2.5-7b", 768, 2, layers=10,
        peft=ALL | {"r": 64, "bias": "lora_only"}),
    row("held: full, adamw_torch", "qwen3-0.6b", 1024, 1, **FULL,
        arguments={"optim": "adamw_torch"}),
    row("held: full, fused", "smollm2-1.7b", 512, 1, **FULL,
        arguments={"optim": "adamw_torch_fused"}),
    row("held: full, adafactor", "qwen3-0.6b", 256, 4, **FULL, arguments={"optim": "adafactor"}),
    row("held: full, lion 8-bit", "qwen3-0.6b", 768, 2, **FULL, arguments={"optim": "lion_8bit"}),
    row("held: full, lion", "qwen3-0.6b", 768, 2, **FULL, arguments={"optim": "lion_32bit"}),
    row("held: full, 8-bit adam", "qwen3-0.6b", 768, 2, **FULL,
        arguments={"optim": "adamw_bnb_8bit"}),
    row("held: full, sgd, float32", "qwen3-0.6b", 768, 2, **FULL,
        arguments={"optim": "sgd", "fp16": False}),
    row("held: gemma 2", "gemma-2-2b", 768, 2, peft=ALL),
    row("held: gemma 3", "gemma-3-1b", 1536, 2, padded=True),
    row("held: stablelm", "stablelm-2-1.6b", 1536, 3),
    row("held: phi-2", "phi-2", 1536, 1, peft=ALL),
    row("held: falcon", "falcon-7b", 768, 2, layers=10, peft=ALL),
    row("held: gpt2", "gpt2", 768, 4, peft=LORA | {"target_modules": ["c_attn", "c_fc"]},
        quantization=None),
    row("held: qwen3-8b", "qwen3-8b", 1024, 1, layers=16),
    row("held: qwen3 moe", "qwen3-30b-a3b", 768, 1, layers=4, quantization=None),
    row("held: mixtral", "mixtral-8x7b", 768, 1, layers=3, quantization=None),
    row("held: deepseek-v2", "deepseek-v2-lite", 512, 1, layers=4, quantization=None,
        peft=LORA | {"target_modules": ["q_proj", "o_proj"]}),
    row("held: phi-4-mini sft padded", "phi-4-mini", 1024, 2, trainer="SFTTrainer", padded=True,
        peft=LORA | {"target_modules": "all-linear"}),
]  # fmt: skip
BF16: dict[str, Any] = {
    "dtype": "bfloat16",
    "quantization": NF4 | {"bnb_4bit_compute_dtype": "bfloat16"},
}


def sft(name: str, model: str, length: int, batch: int, **changes: Any) -> dict:
    """A QLoRA of TRL's in bfloat16: it makes adapters of a 4-bit base so, which fp16 refuses.

    `texts` are the lengths of the texts that TRL packs, as parts of a row's.
    """
    own = {"fp16": False, "bf16": True} | changes.pop("arguments", {})
    return row(name, model, length, batch, trainer="SFTTrainer", arguments=own, **BF16, **changes)


def packed(model: str, length: int, batch: int, texts: list[float], **arguments: Any) -> dict:
    name = f"packed: {model} {batch}x{length} {len(texts)} texts {arguments or ''}".strip()
    return sft(name, model, length, batch, texts=texts, arguments={"packing": True} | arguments)


THREE = [0.5, 0.25, 0.25]
SFT = [
    sft("sft, 1B", "llama-3.2-1b", 1024, 4),
    sft("sft, padded", "qwen3-1.7b", 1280, 3, padded=True),
    sft("sft, 8B", "llama-3.1-8b", 1536, 2),
    sft("sft, 8B, padded", "llama-3.1-8b", 1024, 2, padded=True),
    sft("sft, all-linear", "llama-3.2-3b", 1024, 2, peft=ALL),
    sft("sft, phi-4-mini, padded", "phi-4-mini", 1024, 2, padded=True, peft=ALL),
    packed("llama-3.2-1b", 2048, 2, THREE),
    packed("llama-3.2-1b", 4096, 2, THREE),
    packed("llama-3.2-1b", 4096, 2, THREE, packing_strategy="wrapped"),
    packed("qwen3-0.6b", 8192, 2, THREE),
    packed("qwen3-1.7b", 2048, 4, THREE, gradient_checkpointing=False),
    packed("llama-3.1-8b", 4096, 1, THREE),
    packed("llama-3.2-3b", 3072, 2, THREE),
    packed("llama-3.2-1b", 2048, 2, [1.0]),  # a text a row: two behind each other in a batch
    packed("llama-3.2-1b", 2048, 1, [1.0]),  # one text alone: nothing to hide
    packed("gemma-3-1b", 2048, 2, THREE),
    sft("free of padding", "qwen3-0.6b", 2048, 4, texts=[1.0], arguments={"padding_free": True}),
]  # fmt: skip
ROWS = {"look": LOOK, "held": HELD, "sft": SFT}


def source_of(spec: dict) -> str:
    """A preset's name, or the folder of a config that the tests bring along."""
    folder = CONFIGS / spec["model"]
    return str(folder) if folder.is_dir() else spec["model"]


def config_of(spec: dict) -> Any:
    """The model's config, with fewer layers where the row asks for them."""
    from fitcast import models

    config = models.config(source_of(spec))
    if spec["quantization"] is None:  # gpt-oss's own says MXFP4; random weights have 16 bits
        vars(config).pop("quantization_config", None)
    if spec["layers"]:
        config.num_hidden_layers = spec["layers"]
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: spec["layers"]]
    return config


def objects(spec: dict, folder: str) -> dict[str, Any]:
    """What a script would hold: arguments, peft_config, quantization_config, trainer class."""
    import transformers
    from peft import LoraConfig

    if spec["trainer"] == "Trainer":
        trainer, kind, more = transformers.Trainer, transformers.TrainingArguments, {}
    else:
        import trl

        trainer = getattr(trl, spec["trainer"])
        kind = getattr(trl, spec["trainer"].replace("Trainer", "Config"))
        more = {"max_length": spec["sequence_length"], "bf16": False}
        if spec["trainer"] == "GRPOTrainer":  # its completions have a limit of their own
            del more["max_length"]
    arguments = kind(output_dir=folder, report_to="none", **(more | spec["arguments"]))
    quantization = spec["quantization"]
    return {
        "trainer": trainer,
        "arguments": arguments,
        "peft_config": LoraConfig(**spec["peft"]) if spec["peft"] else None,
        "quantization_config": transformers.BitsAndBytesConfig(**quantization)
        if quantization
        else None,
    }


def forecast_of(spec: dict, gpu: Any) -> Any:
    """The forecast of a row, from the same objects."""
    from fitcast.forecasting.huggingface import forecast_run

    if spec["arguments"].get("bf16"):  # which TrainingArguments refuses without a GPU
        spec = spec | {"arguments": spec["arguments"] | {"use_cpu": True}}
    with tempfile.TemporaryDirectory() as folder:
        return forecast_run(
            config_of(spec), gpu=gpu, dtype=spec["dtype"], padded=spec["padded"],
            sequence_length=spec["sequence_length"], **objects(spec, folder),
        )  # fmt: skip


def rows_of(spec: dict, count: int = 64) -> Any:
    """Rows as long as the longest; padded ones hide their last eighth; or texts to be packed."""
    length = spec["sequence_length"]
    if spec["texts"]:
        from datasets import Dataset

        lengths = [int(length * part) for part in spec["texts"]] * count * 6
        return Dataset.from_list([{"input_ids": [7] * n} for n in lengths])
    kept = length - length // 8 if spec["padded"] else length
    if spec["trainer"] != "Trainer":
        from datasets import Dataset

        lengths = [length if i % 2 == 0 or not spec["padded"] else kept for i in range(count)]
        return Dataset.from_list([{"input_ids": [7] * n, "labels": [7] * n} for n in lengths])
    row = {"input_ids": [7] * length, "attention_mask": [1] * kept + [0] * (length - kept),
           "labels": [7] * kept + [-100] * (length - kept)}  # fmt: skip
    return [row] * count


def load(spec: dict, folder: Path, quantization_config: Any) -> Any:
    """The row's model on the GPU, from a checkpoint of random weights; a T4's kernels from now."""
    import torch
    from transformers import AutoModelForCausalLM

    from fitcast.training import random_weights

    for switch in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp):
        switch(False)
    dtype = getattr(torch, spec["dtype"])
    shape = folder / "config"
    config_of(spec).save_pretrained(shape)
    checkpoint = random_weights.write(str(shape), folder, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, quantization_config=quantization_config,
            device_map={"": 0}, use_safetensors=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(checkpoint)


def measure(spec: dict, folder: Path) -> dict[str, Any]:
    """Load, train, read the allocator after the last step. Bytes."""
    import torch
    from transformers import TrainerCallback

    held = objects(spec, str(folder / "out"))
    model = load(spec, folder, held["quantization_config"])
    read = {"loaded_bytes": torch.cuda.memory_allocated()}

    class Counters(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    arguments = held["arguments"]
    arguments.max_steps, arguments.save_strategy = STEPS, "no"
    arguments.logging_strategy, arguments.disable_tqdm = "no", True
    options: dict[str, Any] = {}
    if spec["trainer"] != "Trainer":
        from fitcast.forecasting.stage import tokenizer

        if not spec["texts"]:
            arguments.dataset_kwargs = {"skip_prepare_dataset": True}
        options = {"processing_class": tokenizer(), "peft_config": held["peft_config"]}
    elif held["peft_config"] is not None:
        from peft import get_peft_model

        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, held["peft_config"])
    trainer = held["trainer"](
        model=model, args=arguments, train_dataset=rows_of(spec), callbacks=[Counters()], **options
    )
    read["before_training_bytes"] = torch.cuda.memory_allocated()
    trainer.train()
    torch.cuda.synchronize()
    return read | {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def _child(spec: dict, measure: Any, answer: Any) -> None:
    folder = Path(tempfile.mkdtemp(prefix="measured-"))
    try:
        answer.put(measure(spec, folder))
    except Exception as error:  # the row says why
        answer.put({"error": f"{type(error).__name__}: {error}"[:400],
                    "where": traceback.format_exc()[-1500:]})  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
    return {name: metadata.version(name) for name in names}


def main(sets: dict[str, list[dict]], measure: Any, protocol: str) -> None:
    """The command line of a tool that measures rows by `measure(row, folder)`, a process each."""
    parser = argparse.ArgumentParser(description=protocol.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", choices=sets, default=next(iter(sets)))
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose names begin so")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    begins = tuple(options.only or [""])
    waiting = [row for row in sets[options.rows] if row["name"].startswith(begins)]
    running, done = [], []
    while waiting or running:
        while waiting and len(running) < options.workers and time.monotonic() < end:
            answer = context.Queue()
            process = context.Process(target=_child, args=(waiting[0], measure, answer))
            process.start()
            running.append((waiting.pop(0), process, answer))
        for spec, process, answer in list(running):
            if not answer.empty() or not process.is_alive():
                read = {"error": "the process ended"} if answer.empty() else answer.get()
                process.join(10)
                running.remove((spec, process, answer))
                done.append(spec | read)
                print(spec["name"], read.get("peak_allocated_bytes", read.get("error")), flush=True)
                _write(options.out, protocol, done)
        if time.monotonic() > end + 30:
            for _, process, _ in running:
                process.kill()
            break
        time.sleep(0.2)


def _write(path: Path, protocol: str, rows: list[dict]) -> None:
    import torch

    path.write_text(
        json.dumps(
            {"gpu": torch.cuda.get_device_name(0), "versions": _versions(),
             "date": datetime.date.today().isoformat(), "protocol": protocol, "rows": rows},
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main(ROWS, measure, __doc__ or "")
