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
from unittest import mock

import torch
from bitsandbytes.optim import optimizer as bitsandbytes_optimizer
from torch.utils._pytree import tree_map

from fitcast.forecasting.huggingface import describe_run, forecast_script, run_stream, train
from fitcast.forecasting.stage import Stage
from fitcast.forecasting.verdict import Forecast
from fitcast.gpus import T4, Gpu
from fitcast.memory.report import tensors_in
from fitcast.memory.stream import DeviceLedger
from fitcast.units import refusal, show_bytes

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


def forecast_resume(
    model: str | PretrainedConfig | PreTrainedModel,
    arguments: TrainingArguments,
    *,
    gpu: Gpu = T4,
    expandable_segments: bool = False,
    **options: Any,
) -> Forecast:
    """What `train(resume_from_checkpoint=...)` will need: the states' arrival, then a step.

    Adapters are read onto the card and copied into the model by PEFT; the optimizer's state is read
    into the host's memory and loaded by the optimizer itself. Phase "resume" is the peak of that.

    Args:
        model, arguments, gpu, expandable_segments, options: As `forecast_run` takes them.

    Raises:
        ValueError: As `forecast_run` does.
    """
    run = describe_run(model, arguments, **options)
    saved: dict[int, Any] = {}  # trained parameters -> the optimizer's state

    def save(stage: Stage) -> None:
        stage.ledger.mark("ready")
        train(stage, lambda ledger: _save(stage, saved))
        stage.ledger.mark("step")

    def resume(stage: Stage) -> None:
        if run.peft_config is not None:
            _load_adapters(stage)
        stage.trainer.add_callback(_loads_when_training_begins(stage, saved))
        train(stage, lambda ledger: ledger.mark("step"))

    run_stream(run, gpu, save)
    seen = forecast_script(
        run, gpu, resume, expandable=expandable_segments,
        micro_batches=arguments.gradient_accumulation_steps,
    )  # fmt: skip
    peak = seen.phase_peaks.get("resume", seen.resident_bytes)  # SGD has no state to load
    while_loading = show_bytes(peak, "GiB")
    said = f"while the checkpoint's states arrive the peak is {while_loading}"
    return dataclasses.replace(seen, notes=(*seen.notes, said))


def _trained(trainer: Any) -> int:
    return sum(p.requires_grad for p in trainer.model.parameters())


def _save(stage: Stage, saved: dict[int, Any]) -> None:
    """Keep the optimizer's state as a checkpoint would, in the host's memory."""
    state = stage.trainer.optimizer.state_dict()
    saved[_trained(stage.trainer)] = tree_map(_on_host, state)


def _on_host(value: Any) -> Any:
    """The same without memory on the card; a number stays one, in which steps are counted."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 0:
        return torch.tensor(1.0, dtype=value.dtype)
    return torch.empty_like(value, device="meta")


def _load_adapters(stage: Stage) -> None:
    """As `PeftModel.load_adapter` does it: read onto the card, copied, and gone."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = stage.trainer.model
    with stage.ledger.phase("resume"):
        read = {name: torch.empty_like(t) for name, t in get_peft_model_state_dict(model).items()}
        set_peft_model_state_dict(model, read)


def _loads_when_training_begins(stage: Stage, saved: dict[int, Any]) -> Any:
    """Loads the optimizer's state where `train()` does: the next thing is the callbacks' turn."""
    from transformers import TrainerCallback

    trainer, ledger = stage.trainer, stage.ledger

    class Loads(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            with ledger.phase("resume"):
                _load_state(trainer, saved[_trained(trainer)], ledger)
            ledger.mark("ready")

    return Loads()


def _load_state(trainer: Any, saved: dict[str, Any], ledger: DeviceLedger) -> None:
    """The optimizer's own `load_state_dict`; what it moves to the card takes memory there."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    state = tree_map(_on_host, saved)
    homes = {
        id(tensor): names[id(parameters[number])].rpartition(".")[0]
        for number, tensors in state["state"].items()
        for tensor in tensors_in(tensors)
    }
    move = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.device.type != "meta":
            return move(tensor, *args, **kwargs)
        dtypes = [value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)]
        with ledger.inside(homes[id(tensor)]):
            return torch.empty(tensor.shape, dtype=dtypes[0] if dtypes else tensor.dtype)

    with (
        mock.patch.object(torch.Tensor, "to", to),
        mock.patch.object(bitsandbytes_optimizer, "deepcopy", lambda state: state),
    ):
        trainer.optimizer.load_state_dict(state)
