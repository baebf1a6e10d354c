"""Measure what else a script does on a GPU: evaluate, generate, merge, resume, DPO, GRPO, loops.

    python tools/measure_others.py OUT.json [--minutes 9] [--workers 3]

Each row is held against the forecast of the same objects (`forecast_of`). Rows, processes and
counters are those of tools/measure_runs.py; the peak is that of what the row is about: an
evaluation after a step, `generate()`, `merge_and_unload()`, all of a resumed `train()`, the last
step of the others.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import measure_runs
from tools.measure_runs import ALL, FULL, LORA, STEPS, config_of, load, objects

ONE, THREE, EIGHT, QWEN = "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen3-1.7b"


def row(name: str, kind: str, model: str, length: int, batch: int, **changes: Any) -> dict:
    """A run of measure_runs with what is done in it, and that one's own numbers."""
    own = {key: changes.pop(key) for key in set(changes) & OWN}
    return measure_runs.row(f"{kind}: {name}", model, length, batch, **changes) | {
        "kind": kind,
        "own": own,
    }


OWN = {"new_tokens", "compute_metrics", "eval_rows", "autocast", "keep"}
FOUR = {"num_generations": 4, "per_device_train_batch_size": 4, "temperature": 1.0}
HELD = [
    row("Trainer's default batch", "evaluation", ONE, 512, 2, padded=True),
    row("logits kept", "evaluation", ONE, 512, 2, padded=True, compute_metrics=True, eval_rows=24),
    row("8B, batch 2", "evaluation", EIGHT, 1024, 1, padded=True,
        arguments={"per_device_eval_batch_size": 2}),
    row("SFTTrainer", "evaluation", QWEN, 1024, 2, trainer="SFTTrainer", quantization=None,
        arguments={"per_device_eval_batch_size": 4}),
    row("fp16 full eval", "evaluation", ONE, 768, 2, padded=True,
        arguments={"fp16_full_eval": True}),
    row("8B nf4", "generation", EIGHT, 2048, 1, new_tokens=96),
    row("8B nf4, four prompts", "generation", EIGHT, 1024, 4, new_tokens=64),
    row("16 bits, adapters", "generation", QWEN, 1536, 2, quantization=None, new_tokens=64),
    row("no adapters", "generation", THREE, 1024, 1, quantization=None, peft=None, new_tokens=48),
    row("1B", "merge", ONE, 128, 1, quantization=None),
    row("3B, all-linear", "merge", THREE, 128, 1, quantization=None, peft=ALL),
    row("QLoRA, paged", "resume", ONE, 1024, 2, peft=ALL),
    row("full, AdamW", "resume", "qwen3-0.6b", 512, 1, **FULL, arguments={"optim": "adamw_torch"}),
    row("adapters off", "pairs", ONE, 768, 2, trainer="DPOTrainer", dtype="float32",
        quantization=None),
    row("computed before", "pairs", QWEN, 512, 2, trainer="DPOTrainer", dtype="float32",
        quantization=None, arguments={"precompute_ref_log_probs": True}),
    row("second model", "pairs", "qwen3-0.6b", 512, 1, trainer="DPOTrainer", **FULL,
        arguments={"optim": "adamw_torch"}),
    row("adapters", "texts of its own", ONE, 512, 4, trainer="GRPOTrainer", dtype="float32",
        quantization=None, arguments=FOUR | {"max_completion_length": 256}),
    row("compared", "texts of its own", THREE, 384, 4, trainer="GRPOTrainer", dtype="float32",
        quantization=None, peft=ALL,
        arguments=FOUR | {"max_completion_length": 128, "beta": 0.04}),
    row("second model", "texts of its own", "qwen3-0.6b", 256, 4, trainer="GRPOTrainer", **FULL,
        arguments=FOUR | {"max_completion_length": 192, "beta": 0.04, "optim": "adamw_torch"}),
    row("8B without autocast", "loop", EIGHT, 1024, 1, peft=ALL, autocast=False, keep=True),
    row("3B, autocast", "loop", THREE, 1024, 2, autocast=True, keep=False),
    row("full, output kept", "loop", "qwen3-0.6b", 512, 2, **FULL, autocast=True, keep=True),
    row("SFTTrainer", "levers", QWEN, 2048, 2, trainer="SFTTrainer", quantization=None,
        peft=LORA | {"lora_dropout": 0.0}),
    row("8B, Trainer", "levers", EIGHT, 2048, 4, peft=LORA | {"lora_dropout": 0.0}),
    row("padded", "levers", QWEN, 1536, 4, padded=True, peft=ALL | {"lora_dropout": 0.0}),
]  # fmt: skip


def main_peak(seen: Any, spec: dict) -> int:
    """Of a forecast, the peak that the row was measured for. Bytes."""
    if spec["kind"] == "evaluation":
        return seen.phase_peaks["evaluation"]
    if spec["kind"] == "generation":
        return max(seen.phase_peaks[name] for name in ("prefill", "decode"))
    return seen.phase_peaks["merge"] if spec["kind"] == "merge" else seen.peak_allocated_bytes


def own_step(spec: dict) -> Any:
    """A loop of somebody's own: two steps, no scaler, the output alive or dropped."""
    import torch

    own, length = spec["own"], spec["sequence_length"]
    batch = spec["arguments"]["per_device_train_batch_size"]

    def steps(model: Any, count: int = 2, between: Any = lambda: None) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(count):
            between()
            ids = torch.full((batch, length), 7, dtype=torch.long, device="cuda")
            with torch.autocast("cuda", dtype=torch.float16, enabled=own["autocast"]):
                output = model(input_ids=ids, labels=ids)
            loss = output.loss
            if not own["keep"]:
                del output
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return steps


def forecast_of(spec: dict, gpu: Any) -> Any:
    """The forecast of a row, from the same objects."""
    import torch
    from peft import get_peft_model

    import fitcast
    from fitcast.forecasting.huggingface import forecast_run

    with tempfile.TemporaryDirectory() as folder:
        said = objects(spec, folder)
    arguments, trainer = said.pop("arguments"), said.pop("trainer")
    config, kind, own = config_of(spec), spec["kind"], spec["own"]
    if kind == "merge":
        return fitcast.forecast_merge(config, said["peft_config"], gpu=gpu, dtype=spec["dtype"])
    if kind == "generation":
        return fitcast.forecast_generation(
            config, prompt_tokens=spec["sequence_length"], new_tokens=own["new_tokens"],
            batch_size=arguments.per_device_train_batch_size, gpu=gpu, dtype=spec["dtype"], **said,
        )  # fmt: skip
    if kind == "loop":
        base = fitcast.fake_model(
            config, getattr(torch, spec["dtype"]), quantization_config=said["quantization_config"]
        )
        model = get_peft_model(base, said["peft_config"]) if spec["peft"] else base
        return fitcast.forecast_step(model, own_step(spec), gpu)
    options = said | {"trainer": trainer, "dtype": spec["dtype"], "padded": spec["padded"],
                      "sequence_length": spec["sequence_length"], "gpu": gpu}  # fmt: skip
    if kind == "evaluation":
        if own.get("compute_metrics"):
            options |= {"compute_metrics": lambda _: {}, "eval_rows": own["eval_rows"]}
        return fitcast.forecast_evaluation(config, arguments, **options)
    if kind == "resume":
        return fitcast.forecast_resume(config, arguments, **options)
    if kind == "levers":
        return fitcast.forecast(config, arguments, levers=True, **options)
    return forecast_run(config, arguments, **options)


def measure(spec: dict, folder: Path) -> dict[str, Any]:
    """Do it, read the allocator. Bytes."""
    import torch

    held = objects(spec, str(folder / "out"))
    model = load(spec, folder, held["quantization_config"])
    read = {"loaded_bytes": torch.cuda.memory_allocated()}
    KINDS[spec["kind"]](model, spec, held, folder)
    torch.cuda.synchronize()
    return read | _peaks()


def _peaks() -> dict[str, int]:
    import torch

    return PEAKS or {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


PEAKS: dict[str, int] = {}  # those of an evaluation, which ends before the process does


def _reset() -> None:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()


def _adapted(model: Any, held: dict, spec: dict) -> Any:
    from peft import get_peft_model

    if held["peft_config"] is None:
        return model
    if held["arguments"].gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, held["peft_config"])


def _trainer(model: Any, spec: dict, held: dict, steps: int, *callbacks: Any, **more: Any) -> Any:
    """The row's trainer, ready to train so many steps."""
    from datasets import Dataset

    from fitcast.forecasting import stage

    arguments = held["arguments"]
    arguments.max_steps, arguments.logging_strategy, arguments.disable_tqdm = steps, "no", True
    data = measure_runs.rows_of(spec)
    if spec["trainer"] == "Trainer":
        model = _adapted(model, held, spec)
    else:
        more |= {"processing_class": stage.tokenizer(), "peft_config": held["peft_config"]}
        if spec["trainer"] == "SFTTrainer":
            arguments.dataset_kwargs = {"skip_prepare_dataset": True}
        elif spec["trainer"] == "GRPOTrainer":
            prompt = spec["sequence_length"] - arguments.max_completion_length
            data = Dataset.from_list([{"prompt": "<s> " * prompt}] * 64)
            more["reward_funcs"] = stage.no_reward
        else:
            length = spec["sequence_length"]
            data = Dataset.from_list([_pair(length, arguments)] * 64)
    second = more.pop("second", None)
    if second is not None and spec["trainer"] == "DPOTrainer":
        more["ref_model"] = second
    with stage._rows_are_ready(held["trainer"], second):  # pairs come as token ids
        trainer = held["trainer"](
            model=model, args=arguments, train_dataset=data, callbacks=list(callbacks), **more
        )
    if spec["trainer"] == "GRPOTrainer":
        trainer._generate = lambda prompts: _given_texts(spec, arguments, len(prompts))
    return trainer


def _given_texts(spec: dict, arguments: Any, count: int) -> tuple[Any, ...]:
    """What GRPO learns from, as long as it may be: the update alone is measured."""
    completion = arguments.max_completion_length
    prompt = [7] * (spec["sequence_length"] - completion)
    return [prompt] * count, [[7] * completion] * count, None, [""] * count, None, {}, None, None


def _pair(length: int, arguments: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt_ids": [7], "chosen_ids": [7] * (length - 1)}
    row["rejected_ids"] = row["chosen_ids"]
    if arguments.precompute_ref_log_probs:
        row |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    return row


def _each_step() -> Any:
    """Forgets the peak when a step begins."""
    from transformers import TrainerCallback

    class Counters(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _reset()

    return Counters()


def evaluate(model: Any, spec: dict, held: dict, folder: Path) -> None:
    """After the last step, as `eval_strategy` would."""
    from transformers import TrainerCallback

    size = held["arguments"].per_device_eval_batch_size
    rows = spec["own"].get("eval_rows") or 2 * size

    class Evaluates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_evaluate = state.global_step == STEPS
            _reset()
            return control

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            PEAKS.update(_peaks())

    held["arguments"].save_strategy = "no"
    data = measure_runs.rows_of(spec, rows)
    more: dict[str, Any] = {"eval_dataset": data}
    if spec["own"].get("compute_metrics"):
        more["compute_metrics"] = lambda _: {}
    _trainer(model, spec, held, STEPS, Evaluates(), **more).train()


def generate(model: Any, spec: dict, held: dict, folder: Path) -> None:
    import torch

    batch, length = held["arguments"].per_device_train_batch_size, spec["sequence_length"]
    if held["peft_config"] is not None:
        from peft import get_peft_model

        model = get_peft_model(model, held["peft_config"])
    model.eval()
    ids = torch.full((batch, length), 7, dtype=torch.long, device="cuda")
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, : length // 8] = 0
    new = spec["own"]["new_tokens"]
    _reset()
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new,
                   do_sample=False, pad_token_id=0, use_cache=True)  # fmt: skip


def merge(model: Any, spec: dict, held: dict, folder: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(model, held["peft_config"])
    _reset()
    model.merge_and_unload()


def resume(model: Any, spec: dict, held: dict, folder: Path) -> None:
    """Another process trains and saves; this one goes on for one step."""
    first = multiprocessing.get_context("spawn").Process(
        target=_train_and_save, args=(spec, folder)
    )
    first.start()
    first.join()
    held["arguments"].save_strategy = "no"
    trainer = _trainer(model, spec, held, STEPS + 1)
    _reset()
    trainer.train(resume_from_checkpoint=str(folder / "out" / f"checkpoint-{STEPS}"))


def _train_and_save(spec: dict, folder: Path) -> None:
    held = objects(spec, str(folder / "out"))
    model = load(spec, folder, held["quantization_config"])
    held["arguments"].save_strategy, held["arguments"].save_steps = "steps", STEPS
    _trainer(model, spec, held, STEPS).train()


def train(model: Any, spec: dict, held: dict, folder: Path) -> None:
    held["arguments"].save_strategy = "no"
    more = {}
    if spec["name"].endswith("second model"):  # TRL would load the checkpoint, which is gone
        more["second"] = load(spec, folder, held["quantization_config"])
    _trainer(model, spec, held, STEPS, _each_step(), **more).train()


def train_lean(model: Any, spec: dict, held: dict, folder: Path) -> None:
    import fitcast

    held["arguments"].save_strategy = "no"
    trainer = _trainer(model, spec, held, STEPS, _each_step())
    fitcast.apply_levers(trainer.model)
    trainer.train()


def loop(model: Any, spec: dict, held: dict, folder: Path) -> None:
    from peft import get_peft_model

    model = get_peft_model(model, held["peft_config"]) if held["peft_config"] else model
    own_step(spec)(model.train(), 4, _reset)


KINDS = {"evaluation": evaluate, "generation": generate, "merge": merge, "resume": resume,
         "pairs": train, "texts of its own": train, "levers": train_lean, "loop": loop}  # fmt: skip

if __name__ == "__main__":
    measure_runs.main({"held": HELD}, measure, __doc__ or "")
