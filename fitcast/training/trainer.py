"""Train a recipe with `transformers.Trainer`, measure it, and survive what kills it.

`QLoRATrainer` is Trainer with four changes: the loss and the optimizer come from `qlora`, so that
the forecast and the run are the same code; what would go wrong silently is refused; every step logs
its speed and memory; checkpoints are whole or not there. Under torchrun the same class trains on
several GPUs (`tools/train_many_gpus.py`).

Not modelled: FSDP, DeepSpeed, several GPUs in one process.

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
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, set_seed

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import checkpoints, data
from fitcast.training.preflight import refuse_silent_failures
from fitcast.training.resume import checkpoint_to_resume


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
        rows: Encoded examples, as from `data.encode`.
        output_dir: Folder of the checkpoints, one run only.
        resume: True for the last whole checkpoint here or on the Drive, a path for that one, False
            to insist on a fresh start.
        stop_at: End after this optimizer step, as if interrupted: schedule and data stay those of
            the whole run.
        drive: A mounted folder that gets a copy of each checkpoint.
        on_step: Called with each step's row.
        overrides: Further TrainingArguments.

    Raises:
        ValueError: The recipe and the GPU, the processes, the rows or the checkpoint do not go
            together; or there are later checkpoints than `resume`.
        FileNotFoundError: `resume` names a checkpoint that is not whole.
        FloatingPointError: The loss is no longer a number.
    """
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"stop_at must be a step from 1, or None, got {stop_at}; 1 is the first")
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
    checkpoint = checkpoint_to_resume(recipe, output_dir, drive, resume)
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
        self.recipe, self.drive = recipe, drive
        self._staging: str | None = None  # where a checkpoint is being written, during a save
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
            raise ValueError(
                f"world_size must be {self.args.world_size}, the processes of this "
                f"run, got {recipe.world_size}; start it under torchrun, or change it"
            )
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the step's labelled tokens
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer that the forecast counts."""
        if self.optimizer is None:
            self.optimizer = qlora.build_optimizer(self.model, self.recipe)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The micro batch's share of the step's loss: its token losses over all tokens' number."""
        with self.accelerator.autocast():  # a chunked loss does not pass through model.forward
            loss = self._through(model)(inputs, self.recipe, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP divides the gradients by it
        return (loss, {"loss": loss}) if return_outputs else loss

    def _through(self, model: torch.nn.Module) -> Callable[..., torch.Tensor]:
        """`qlora.compute_loss` of a model; of a DDP-wrapped one inside the wrapper's forward.

        DDP averages gradients only after a forward of its own: a loss computed beside it would let
        every process train a model of its own, in silence.
        """
        if not isinstance(model, DistributedDataParallel):
            return functools.partial(qlora.compute_loss, model)

        def loss(*args):
            inner = model.module
            plain = inner.forward

            def forward(*arguments):
                inner.forward = plain  # the full loss calls it
                return qlora.compute_loss(inner, *arguments)

            inner.forward = forward
            try:
                return model(*args)
            finally:
                inner.forward = plain

        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of one micro batch.

        Raises:
            FloatingPointError: The step's loss is NaN or infinite; no weight has changed yet.
            ValueError: It is because no token of the step has a label.
        """
        if self._tokens == 0:
            gpus.reset_peak()
            self._started = time.perf_counter()
        self._tokens += inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and not math.isfinite(so_far := (self._tr_loss + loss)):
            if num_items_in_batch is not None and num_items_in_batch == 0:
                raise ValueError(
                    f"rows must hold a labelled token in each step, got none at step "
                    f"{self.state.global_step + 1}; drop rows without an answer"
                )
            raise FloatingPointError(
                f"loss must be a finite number, got {so_far.item()} at step "
                f"{self.state.global_step + 1}; lower learning_rate ({self.recipe.learning_rate:g})"
                f" or train in another amp_dtype ({self.recipe.amp_dtype}). The weights are those "
                f"of step {self.state.global_step}."
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with each step's speed and memory peak."""
        if "loss" in logs:  # reading the loss has waited for the GPU
            seconds = time.perf_counter() - self._started
            logs |= {
                "tokens_per_second": self._tokens / seconds,
                "peak_allocated_bytes": gpus.peak_allocated_bytes(),
                "peak_reserved_bytes": gpus.peak_reserved_bytes(),
            }
            self._tokens = 0
        super().log(logs, start_time)

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        output_dir = Path(self.args.output_dir)
        target = output_dir / f"{checkpoints.PREFIX}{self.state.global_step}"
        self._staging = str(output_dir / checkpoints.STAGING)
        facts = {"recipe": dataclasses.asdict(self.recipe)}
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
        failed = self.accelerator.reduce(
            torch.tensor([float(error is not None)], device=self.args.device)
        )
        if error or failed.item():
            raise error or checkpoints.SaveError("another process could not save")


class Watch(TrainerCallback):
    """Passes each step's row on, and ends the run where it was told to."""

    def __init__(self, stop_at: int | None, on_step: Callable[[dict], None] | None):
        self.stop_at, self.on_step = stop_at, on_step

    def on_log(self, args, state, control, logs=None, **_):
        if self.on_step and "loss" in logs:
            self.on_step({"step": state.global_step, **logs})

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.stop_at:
            control.should_training_stop = True
