"""What else a training script does on the card: evaluate, and go on from a checkpoint.

    forecast_evaluation(model, arguments, gpu=T4, compute_metrics=metrics, eval_rows=200)
    forecast_resume(model, arguments, gpu=T4, peft_config=LoraConfig(...))

Both run the trainer's own code, on weights, adapters and optimizer state that a real step of its
`train()` has made before. The peak is that of the evaluation, or of the states' arrival and the
step after it. Not modelled: what `compute_metrics` does on the host.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fitcast.forecasting.huggingface import describe_run, forecast_script, train
from fitcast.forecasting.stage import Stage
from fitcast.forecasting.verdict import Forecast
from fitcast.gpus import T4, Gpu
from fitcast.units import refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

MOST_BATCHES = 32  # that are evaluated here, where each leaves its logits on the card


def forecast_evaluation(
    model: str | PretrainedConfig | PreTrainedModel,
    arguments: TrainingArguments,
    *,
    gpu: Gpu = T4,
    eval_rows: int | None = None,
    expandable_segments: bool = False,
    **options: Any,
) -> Forecast:
    """What the trainer's own `evaluate()` will need, when `train()` calls it after a step.

    Logits are kept as the trainer keeps them: when `compute_metrics` is given, unless
    `prediction_loss_only` or `batch_eval_metrics` says otherwise; on the card until the end, unless
    `eval_accumulation_steps` moves them.

    Args:
        model: As `forecast_run` takes it.
        arguments: Say `per_device_eval_batch_size` (transformers' default is 8), ...
        gpu: The card.
        eval_rows: Of the evaluation's data set; by default two batches.
        expandable_segments: As PYTORCH_ALLOC_CONF says it.
        options: What else `forecast_run` takes; among them `compute_metrics`.

    Raises:
        ValueError: As `forecast_run` does; a number of rows below 1.
    """
    if eval_rows is not None and (type(eval_rows) is not int or eval_rows < 1):
        raise refusal("eval_rows", "be a positive whole number", eval_rows, "count your data set")
    size = arguments.per_device_eval_batch_size
    batches = 2 if eval_rows is None else -(-eval_rows // size)
    run = describe_run(model, arguments, **options)
    run = dataclasses.replace(run, padded=run.padded or (size > 1 and "padded" not in options))
    keeps = _keeps_logits(arguments, options)
    count = min(batches, MOST_BATCHES if keeps else 2)  # the third batch is like the second

    def script(stage: Stage) -> None:
        if stage.trainer.compute_metrics is not None and not arguments.batch_eval_metrics:
            stage.trainer.compute_metrics = lambda _: {}  # the host's, on numbers that nobody has
        evaluate(stage, count)

    seen = forecast_script(run, gpu, script, expandable=expandable_segments)
    said = [f"evaluation of batches of {size} rows (per_device_eval_batch_size)"]
    if keeps:
        said.append(f"the logits of all {count} batches stay on the card until its end")
    if keeps and batches > count:
        said.append(f"the data set has {batches} batches: the peak is that of the first {count}")
    if keeps and eval_rows is None:
        said.append("how many batches your data set has is not said: give eval_rows")
    return dataclasses.replace(seen, notes=(*seen.notes, *said))


def _keeps_logits(arguments: TrainingArguments, options: dict[str, Any]) -> bool:
    """Whether logits pile up on the card. Source: transformers/trainer.py, `evaluate`."""
    return (
        options.get("compute_metrics") is not None
        and not arguments.prediction_loss_only
        and not arguments.batch_eval_metrics
        and arguments.eval_accumulation_steps is None
    )


def evaluate(stage: Stage, count: int) -> None:
    """One optimizer step, then an evaluation of `count` batches, as `train()` goes through both."""
    from transformers import TrainerCallback

    ledger, trainer = stage.ledger, stage.trainer
    batches = stage.batches(count, stage.run.arguments.per_device_eval_batch_size)
    trainer.get_eval_dataloader = lambda *_: batches
    phase = ledger.phase("evaluation")

    class Evaluates(TrainerCallback):
        """Asks for an evaluation after the step, as `eval_strategy` would."""

        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = True
            ledger.mark("ready")
            phase.__enter__()
            return control

        def on_evaluate(self, args, state, control, **kwargs):
            phase.__exit__(None, None, None)
            ledger.mark("step")

    trainer.add_callback(Evaluates())
    train(stage, lambda ledger: None)
