"""Rows with images: what a real trainer keeps on a CPU when its batch has `pixel_values`.

The forecast's tower runs CUDA's kernels, the real one's a CPU's: attention is eager on both sides.
"""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from fitcast.cuda.kernels import LT_WORKSPACE_BYTES
from fitcast.forecasting.huggingface import forecast_run
from fitcast.gpus import T4
from fitcast.memory.ledger import MemoryLedger

LENGTH, SIDE, IMAGE = 256, 112, 99
TOWER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "patch_size": 14,
         "num_attention_heads": 4, "image_size": SIDE}  # fmt: skip
TEXT = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
FAMILIES = {
    "gemma3": (Gemma3ForConditionalGeneration, 4, Gemma3Config(
        text_config=TEXT | {"sliding_window": 32},
        vision_config=SiglipVisionConfig(**TOWER).to_dict(), mm_tokens_per_image=4,
        image_token_id=IMAGE)),
    "llava": (LlavaForConditionalGeneration, 64, LlavaConfig(
        text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**TOWER),
        image_token_id=IMAGE, vision_feature_layer=-1)),
}  # fmt: skip
# Two of cuBLAS, and that of cuBLASLt, which computes the towers' products with a bias.
WORKSPACES = 2 * T4.workspace_bytes + LT_WORKSPACE_BYTES
TARGETS = {"text": r".*language_model.*(q|v)_proj", "tower too": ["q_proj", "v_proj", "fc1", "fc2"]}
QUIET = {"report_to": "none", "use_cpu": True, "max_steps": 2, "save_strategy": "no",
         "disable_tqdm": True, "logging_strategy": "no", "remove_unused_columns": False,
         "per_device_train_batch_size": 2}  # fmt: skip


def real_step(family, arguments, peft_config, images):
    """Peak of Trainer's own steps on rows that hold images, on real tensors.

    An epoch has one batch: accelerate fetches the next one ahead, which a GPU's host would hold.
    """
    from peft import get_peft_model

    kind, tokens, config = FAMILIES[family]
    ids = [IMAGE] * tokens * images + [7] * (LENGTH - tokens * images)
    row = {"input_ids": ids, "labels": ids, "attention_mask": [1] * LENGTH}
    row["pixel_values"] = np.zeros((images, 3, SIDE, SIDE), np.float32)
    if family == "gemma3":
        row["token_type_ids"] = [0] * LENGTH

    def collate(rows):
        batch = default_data_collator(rows)
        return batch | {"pixel_values": batch["pixel_values"].flatten(0, 1)}

    model = get_peft_model(kind._from_config(config, attn_implementation="eager"), peft_config)
    trainer = Trainer(model=model, args=arguments, train_dataset=[row] * 2, data_collator=collate)
    with MemoryLedger(model) as ledger:
        trainer.train()
    return ledger.report().peak_bytes


def asked(family, arguments, **changes):
    kind, _, config = FAMILIES[family]
    options = {"sequence_length": LENGTH, "dtype": "float32", "attn_implementation": "eager",
               "padded": False} | changes  # fmt: skip
    with torch.device("meta"):
        model = kind(config)
    return forecast_run(model, arguments, **options)


@pytest.mark.parametrize(
    ("family", "targets", "images"),
    [
        ("gemma3", "tower too", 1),
        pytest.param("gemma3", "text", 2, marks=pytest.mark.slow),
        pytest.param("llava", "tower too", 2, marks=pytest.mark.slow),
        pytest.param("llava", "text", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_step_on_images_is_that_of_a_real_trainer(tmp_path, family, targets, images):
    arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    adapters = LoraConfig(target_modules=TARGETS[targets], lora_dropout=0.0)
    seen = asked(family, arguments, peft_config=adapters, images=images)
    measured = real_step(family, arguments, adapters, images)
    assert seen.peak_allocated_bytes - WORKSPACES == pytest.approx(measured, rel=3e-3)
    assert f"each row holds {images} images, whose tokens are among its own" in seen.notes


@pytest.mark.parametrize(
    ("config", "images", "message"),
    [
        (LlamaConfig(**TEXT), 1, "images must be 0 for llama, got 1; it has no vision tower"),
        (
            "qwen2.5-vl-7b",
            1,
            "images must be 0 for qwen2_5_vl, got 1; its tower's grid follows each picture's size: "
            "write the step with pictures of yours and use forecast_step",
        ),
        (LlamaConfig(**TEXT), -1, "images must be a whole number from 0, got -1"),
    ],
)
def test_images_that_cannot_be_are_refused(tmp_path, config, images, message):
    from tools.measure_runs import CONFIGS

    arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    model = str(CONFIGS / config) if isinstance(config, str) else config
    with pytest.raises(ValueError, match=f"^{message}"):
        forecast_run(model, arguments, sequence_length=LENGTH, images=images)
