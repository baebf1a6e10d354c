"""Train a recipe with `transformers.Trainer`, measure it, and survive what kills it.

`QLoRATrainer` is Trainer with four changes: the loss and the optimizer come from `qlora`, so that
the forecast and the run are the same code; what would go wrong silently is refused; every step logs
its speed and memory; checkpoints are whole or not there. Under torchrun the same class trains on
several GPUs (`tools/train_many_gpus.py`).

Not modelled: DeepSpeed, several GPUs in one process.

Source: transformers/trainer.py, 5.15 to 5.23.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, set_seed

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora, ranks
from fitcast.training import checkpoints, data, sharded
from fitcast.training.preflight import refuse_silent_failures
from fitcast.training.resume import checkpoint_to_resume, deciding
from fitcast.units import Said, refusal


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a run did.

    Attributes:
        steps: For each optimizer step, from the first one on, also when resumed: step, loss (nats
            per labelled token), grad_norm, learning_rate, tokens_per_second (padding counted),
            peak_allocated_bytes and peak_reserved_bytes (`None` on CPU).
        resumed_from: The checkpoint that it continued, if any.
    """

    steps: list[dict[str, Any]]
    resumed_from: Path | None

    @property
    def losses(self) -> list[float]:
        """Training loss of each optimizer step, in nats per labelled token."""
        return [step["loss"] for step in self.steps]


def build_model(recipe: TrainRecipe, source: str | None = None) -> torch.nn.Module:
    """The model that a recipe trains: base, adapters (the same ones for the same seed), levers.

    Args:
        recipe: Uses everything but the schedule.
        source: Folder of the base's weights, as for `qlora.load_base`.
    """
    base = qlora.load_base(recipe, source)
    set_seed(recipe.seed)
    return qlora.apply_levers(qlora.add_adapters(base, recipe), recipe)


def train(
    recipe: TrainRecipe,
    model: torch.nn.Module,
    rows: Any,
    tokenizer: Any,
    output_dir: str | Path,
    *,
    resume: bool | str | Path = True,
    stop_at: int | None = None,
    drive: str | Path | None = None,
    on_step: Callable[[dict], None] | None = None,
    **overrides: Any,
) -> TrainingRun:
    """Train `model` in place, from the last whole checkpoint if there is one.

    Args:
        recipe: What to train; a resumed run may change `resume.FREE_TO_CHANGE` of it.
        model: As from `build_model(recipe)`.
        rows: Encoded examples, as from `data.encode(..., recipe.sequence_length)`.
        tokenizer: Only its padding token is used.
        output_dir: Folder of the checkpoints, one run only.
        resume: True for the last whole checkpoint here or on the Drive, a path for that one, False
            to insist on a fresh start.
        stop_at: End after this optimizer step, as if interrupted: schedule and data stay those of
            the whole run.
        drive: A mounted folder that gets a copy of each checkpoint.
        on_step: Called with each step's row.
        overrides: Further TrainingArguments, but for what the recipe decides and what the loop does
            not read; a resumed run keeps those of `resume.DECIDING`.

    Raises:
        ValueError: The recipe and the GPU, the processes, the rows, the overrides or the checkpoint
            do not go together; or there are later checkpoints than `resume`.
        FileNotFoundError: `resume` names a checkpoint that is not whole.
        FloatingPointError: The loss is no longer a number.
    """
    if stop_at is not None and stop_at < 1:
        raise refusal("stop_at", "be a step from 1, or None", stop_at, "1 is the first")
    output_dir, drive = Path(output_dir), Path(drive) if drive else None
    trainer = QLoRATrainer(
        recipe,
        model,
        rows,
        tokenizer,
        output_dir,
        drive=drive,
        stop_at=stop_at,
        on_step=on_step,
        **overrides,
    )
    checkpoint = checkpoint_to_resume(
        recipe, output_dir, drive, resume, trainer.rows_sha256, deciding(trainer.args)
    )
    if checkpoint and checkpoints.step_of(checkpoint) >= (stop_at or recipe.max_steps):
        trainer._load_from_checkpoint(str(checkpoint))  # done already
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return TrainingRun(steps=steps, resumed_from=checkpoint)


class QLoRATrainer(Trainer):
    """Trainer whose step is `qlora`'s, whose log has speed and memory, whose saves are atomic."""

    def __init__(
        self,
        recipe: TrainRecipe,
        model: torch.nn.Module,
        rows: Any,
        tokenizer: Any,
        output_dir: Path,
        *,
        drive: Path | None = None,
        stop_at: int | None = None,
        on_step: Callable[[dict], None] | None = None,
        **overrides: Any,
    ):
        refuse_silent_failures(recipe, model, overrides)
        summary = data.summarize(rows)
        self.rows_sha256 = summary.sha256 if summary else None
        self.recipe, self.drive = recipe, drive
        self._staging: Path | None = None  # where a checkpoint is being written, during a save
        self._tokens, self._started = 0, 0.0
        arguments = recipe.to_training_arguments(
            str(output_dir), **{"logging_steps": 1} | overrides
        )
        if arguments.n_gpu > 1:  # one process, one GPU: Trainer would split each batch among all
            arguments._n_gpu = 1
        super().__init__(
            model,
            arguments,
            train_dataset=rows,
            callbacks=[Watch(stop_at, on_step)],
            data_collator=functools.partial(data.collate, pad_token_id=tokenizer.pad_token_id),
        )
        if recipe.world_size != self.args.world_size:
            raise refusal(
                "world_size",
                f"be {self.args.world_size}, the processes of this run",
                recipe.world_size,
                "start it under torchrun, or change it",
            )
        if summary:
            self._compare(summary)
        if ranks.is_wrapped(model):
            sharded.tell_accelerate(self)
        elif self.args.world_size > 1:
            ranks.answer_with_the_loss(model)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the step's labelled tokens
        self.remove_callback(PrinterCallback)

    def _compare(self, rows: data.RowSummary) -> None:
        """Refuse rows that the forecast of this recipe does not cover; say what it leaves out."""
        if rows.longest > self.recipe.sequence_length:
            raise refusal(
                "rows",
                f"have at most sequence_length, {self.recipe.sequence_length}, tokens",
                Said(f"one of {rows.longest}"),
                "encode them with it, or raise it",
            )
        uneven = self.recipe.micro_batch_size > 1 and rows.shortest < rows.longest
        if uneven and not self.recipe.padded and self.is_world_process_zero():
            print(
                f"Warning: padded is False, but rows of {rows.shortest} to {rows.longest} tokens "
                "are padded and carry a mask, which a forecast of this recipe leaves out; set "
                "padded=True."
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimizer, the one that the forecast counts (`model` is Trainer's own)."""
        if self.optimizer is None:
            self.optimizer = qlora.build_optimizer(cast(torch.nn.Module, self.model), self.recipe)
        return self.optimizer

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro batch's share of the step's loss: its token losses over all tokens' number.

        Args:
            model: The model, or the wrapper around it that averages gradients among processes.
            inputs: input_ids, labels and maybe attention_mask, (batch, tokens).
            return_outputs: Whether Trainer wants a pair, as in evaluation.
            num_items_in_batch: Labelled tokens of the whole step, in all processes.

        Returns:
            A scalar in nats per labelled token, or the pair of it and a dict.
        """
        asked = (inputs, self.recipe, num_items_in_batch)
        with self.accelerator.autocast():  # a chunked loss does not pass through model.forward
            loss = qlora.compute_loss(model, *asked)  # within the forward of a wrapper
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP divides the gradients by it
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one micro batch.

        Args:
            model, inputs, num_items_in_batch: As for `compute_loss`.

        Returns:
            The loss, a scalar without a graph.

        Raises:
            FloatingPointError: The step's loss is NaN or infinite; no weight has changed yet.
            ValueError: It is because no token of the step has a label.
        """
        if self._tokens == 0:
            gpus.reset_peak()
            self._started = time.perf_counter()
        self._tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._gather_gradients()
            so_far = (self._tr_loss + loss).item()
            if not math.isfinite(so_far):
                self._refuse_to_step(so_far, num_items_in_batch)
        return loss

    def _gather_gradients(self) -> None:
        """Into one, for an optimizer of one flat parameter, before they are unscaled."""
        wrapped: Any = self.optimizer
        flat = getattr(getattr(wrapped, "optimizer", wrapped), "flat", None)
        if flat is not None:
            flat.gather()

    def _refuse_to_step(self, loss: float, num_items_in_batch: Any) -> None:
        step = self.state.global_step + 1
        if num_items_in_batch is not None and num_items_in_batch == 0:
            raise refusal(
                "rows",
                "hold a labelled token in each step",
                Said(f"none at step {step}"),
                "drop rows without an answer",
            )
        no_number = refusal(
            "loss",
            "be a finite number",
            Said(f"{loss} at step {step}"),
            f"lower learning_rate ({self.recipe.learning_rate:g}) or train in another amp_dtype "
            f"({self.recipe.amp_dtype}). The weights are those of step {step - 1}.",
        )
        raise FloatingPointError(str(no_number))

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Trainer's log, with each step's speed (tokens a second) and memory peak (bytes).

        Args:
            logs: A line of the log; those of training have a `loss`.
            start_time: As for Trainer.
        """
        if "loss" in logs:  # reading the loss has waited for the GPU
            seconds = time.perf_counter() - self._started
            logs |= {
                "tokens_per_second": self._tokens / seconds,
                "peak_allocated_bytes": gpus.peak_allocated_bytes(),
                "peak_reserved_bytes": gpus.peak_reserved_bytes(),
            }
            self._tokens = 0
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(cast(str, self.args.output_dir))
        target = output_dir / f"{checkpoints.PREFIX}{self.state.global_step}"
        self._staging = output_dir / checkpoints.STAGING
        facts = {
            "recipe": dataclasses.asdict(self.recipe),
            "rows_sha256": self.rows_sha256,
            "arguments": deciding(self.args),
        }
        try:
            with contextlib.ExitStack() as stack:
                self._together(
                    lambda: (
                        self.args.should_save
                        and stack.enter_context(checkpoints.written_whole(target, facts))
                    )
                )
                self._together(lambda: Trainer._save_checkpoint(self, model, trial))
        except Exception as error:  # a SaveError where the folder is, elsewhere whatever was raised
            print(f"Warning: {error}")
            return
        finally:
            self._staging = None
        if self.args.should_save:
            try:
                checkpoints.prune(target)
            except OSError as error:
                print(f"Warning: older checkpoints were not deleted: {error}")
            if self.drive:
                checkpoints.mirror(target, self.drive)

    def _together(self, work: Callable[[], object]) -> None:
        """Do `work` in every process; what fails in one fails in all, and none waits for ever."""
        error = None
        try:
            work()
        except Exception as raised:
            error = raised
        failed: Any = self.accelerator.reduce(
            torch.tensor([float(error is not None)], device=self.args.device)
        )
        if error or failed.item():
            raise error or checkpoints.SaveError("another process could not save")


class Watch(TrainerCallback):
    """Passes each step's row on, and ends the run where it was told to."""

    def __init__(self, stop_at: int | None, on_step: Callable[[dict], None] | None):
        self.stop_at, self.on_step = stop_at, on_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and log as this run says; a resumed state still knows the intervals of its first."""
        state.compute_steps(args, state.max_steps)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if self.on_step and logs and "loss" in logs:
            self.on_step({"step": state.global_step, **logs})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.stop_at:
            control.should_training_stop = True
