"""A training step of the usual recipe beside ours: seconds, tokens per second, peak, forecast.

    python tools/bench_step.py

On a CPU the bundled model, on a GPU Llama-3.2-1B with random weights (time and memory do not depend
on them). Ratios come from one run on one machine. With TRL installed, its SFTTrainer takes the same
steps.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers

from course_utils import data
from course_utils.data import BUNDLED
from fitcast import gpus
from fitcast.forecasting.forecast import forecast
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import measurement, random_weights
from fitcast.training import trainer as training
from fitcast.units import show_bytes

STEPS = 5
OURS = {
    "attention": "explicit_kv",
    "loss": "lean",
    "norm": "native",
    "mlp": "lean",
    "adapters": "lean",
    "rotary": "lean",
    "lora_dropout": 0.0,
}


def of_this_machine(gpu: gpus.Gpu | None, folder: str) -> TrainRecipe:
    """The usual recipe in a size that this machine can train."""
    if gpu is None:
        return TrainRecipe(model=BUNDLED, micro_batch_size=4, sequence_length=512)
    recipe = TrainRecipe(model=BUNDLED, micro_batch_size=4, sequence_length=2048).for_gpu(gpu)
    weights = random_weights.write("llama-3.2-1b", folder, qlora.storage_dtype(recipe))
    return dataclasses.replace(recipe, model=str(weights))


def measured(recipe: TrainRecipe, gpu: gpus.Gpu | None) -> tuple[float, int]:
    """Tokens per second, and the peak: the GPU's own, or the ledger's on a CPU."""
    found = measurement.measure_step(recipe, training.build_model(recipe), STEPS)
    return found.tokens_per_second, (
        found.report.peak_bytes if gpu is None else found.peak_allocated_bytes
    )


def measured_trl(recipe: TrainRecipe, gpu: gpus.Gpu | None) -> tuple[float, int]:
    """The same steps by TRL's SFTTrainer, with its own defaults for everything it decides."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    class Clock(transformers.TrainerCallback):
        def __init__(self):
            self.seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            gpus.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            gpus.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    clock, model = Clock(), qlora.load_base(recipe)
    rows = measurement.random_batches(recipe, "cpu")[0]["input_ids"].tolist() * (STEPS + 3)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            callbacks=[clock],
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=AutoTokenizer.from_pretrained(data.bundled_model_dir()),
            peft_config=LoraConfig(
                r=recipe.lora_rank,
                lora_alpha=recipe.lora_alpha,
                lora_dropout=recipe.lora_dropout,
                task_type="CAUSAL_LM",
                target_modules=list(recipe.lora_targets),
            ),
            args=SFTConfig(
                folder,
                per_device_train_batch_size=recipe.micro_batch_size,
                max_steps=STEPS + 2,
                fp16=recipe.amp_dtype == "float16",
                bf16=recipe.amp_dtype == "bfloat16",
                optim="paged_adamw_8bit",
                max_length=recipe.sequence_length,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                dataset_kwargs={"skip_prepare_dataset": True},
                use_cpu=gpu is None,
            ),
        )
        gpus.reset_peak()
        trainer.train()
        peak = gpus.peak_allocated_bytes()
        if gpu is None:  # the ledger slows steps down: some more, watched
            with MemoryLedger(trainer.model) as ledger:
                trainer.train()
            peak = ledger.report().peak_bytes
    return recipe.tokens_per_step / statistics.median(clock.seconds[2 : STEPS + 2]), peak


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    gpu = gpus.detect()
    print(f"\n{STEPS} optimizer steps on {gpu.name if gpu else 'this CPU'}")
    with tempfile.TemporaryDirectory() as folder:
        usual = of_this_machine(gpu, folder)
        first_speed, first_peak = measured(usual, gpu)
        runs = {"the usual recipe": (first_speed, first_peak, usual)}
        ours = dataclasses.replace(usual, **OURS)
        runs["ours"] = (*measured(ours, gpu), ours)
        if importlib.util.find_spec("trl"):  # last: a Trainer's cycles outlive it
            gc.collect()
            runs["TRL's SFTTrainer"] = (*measured_trl(usual, gpu), None)
        for name, (speed, peak, recipe) in runs.items():
            said = (
                f"forecast {show_bytes(forecast(recipe, gpu or gpus.T4).peak_bytes)}"
                if recipe and gpu
                else ""
            )
            print(
                f"  {name:18} {speed:9,.0f} tokens/s {speed / first_speed:5.2f}x   peak "
                f"{show_bytes(peak):>10} {peak / first_peak:5.0%}   {said}"
            )


if __name__ == "__main__":
    main()
