"""Before training: five questions to a loaded model, each of which has saved somebody's night.

Asking changes nothing: weights, gradients, modes and chance are afterwards what they were.

Not modelled: whether the data are any good.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import torch
from peft import PeftModel

from fitcast import gpus
from fitcast.memory.operations import OperationLog
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import batching, data
from fitcast.training.preflight import Finding, Preflight
from fitcast.training.restoring import evaluating, kept_modes, unchanged
from fitcast.units import show_bytes

OVERFIT_STEPS = 100  # at most: it ends as soon as the loss has halved
OVERFIT_RATE, TIMES_THE_RECIPES = 1e-2, 10  # the smaller of the two rates
# Kernels that never write the (seq x seq) scores to memory; the last one is the CPU's.
FUSED = ("flash", "efficient", "cudnn")


def attention_kernel(model: torch.nn.Module, batch: dict, recipe: TrainRecipe) -> str:
    """Name of the attention operation that a training forward pass dispatches, or "scores".

    Args:
        model: In any mode; each of its modules is back in its own mode afterwards.
        batch: Tensors input_ids, labels and maybe attention_mask, (rows, tokens).
        recipe: Uses amp_dtype and loss.
    """
    with kept_modes(model), OperationLog() as log, qlora.autocast(recipe, gpus.device()):
        model.train()
        qlora.compute_loss(model, batch, recipe)
    for name, _ in log.counts:
        if "attention" in name and "backward" not in name and any(word in name for word in FUSED):
            return name.strip("_")
    return "scores"


def check_gates(
    model: torch.nn.Module, rows: Sequence[dict], recipe: TrainRecipe, pad_token_id: int
) -> Preflight:
    """Ask all five; the model is afterwards what it was.

    1. With fresh adapters the loss is the base's: they start as zero. (Where the weights
       themselves are trained there is no other model to compare with: the loss is a number.)
    2. Every trainable parameter gets a finite gradient, and they are not all zero.
    3. One batch, seen again and again, is learned by heart: the loss can fall.
    4. Attention runs in a kernel that does not write its scores.
    5. Two whole steps with the longest rows fit: what would run out of memory hours later does so
       in the first minute.

    Args:
        model: With fresh adapters, as from `training.build_model`, or without any.
        rows: Encoded examples; the first micro batch of them is used, and the longest one.
        recipe: That of the run to come.
        pad_token_id: What fills the shorter rows.
    """
    by_length = sorted(rows, key=lambda row: -len(row["input_ids"]))
    batch, longest = (
        _to_device(data.collate(list(some)[: recipe.micro_batch_size], pad_token_id))
        for some in (rows, by_length)
    )
    with unchanged(model):
        first, start = _step_0(model, batch, recipe)
        kernel = attention_kernel(model, batch, recipe)
        gradients = _gradients(model, batch, recipe)
        overfit = _overfit(model, batch, recipe, start / 2)
    fix = "set attention='explicit_kv'" if kernel == "scores" else None
    fit = check_longest(model, longest, recipe)
    return Preflight([first, gradients, overfit, Finding("attention", kernel, fix), fit])


def _to_device(batch: dict) -> dict:
    return {name: tensor.to(gpus.device()) for name, tensor in batch.items()}


def check_longest(model: torch.nn.Module, batch: dict, recipe: TrainRecipe) -> Finding:
    """Two optimizer steps of two micro batches, with the run's own loss and optimizer, undone.

    The second step meets the optimizer's state, its second micro batch the first one's gradients.

    Args:
        model: As for `check_gates`.
        batch: The longest micro batch: tensors of (rows, tokens).
        recipe: That of the run to come.
    """
    rows, tokens = batch["input_ids"].shape
    gpus.reset_peak()
    try:
        with unchanged(model):
            model.train()
            optimizer = qlora.build_optimizer(model, recipe)
            scaler = torch.amp.GradScaler(gpus.device(), enabled=recipe.amp_dtype == "float16")
            accumulated = min(recipe.gradient_accumulation_steps, 2)
            for _ in range(2):
                qlora.training_step(model, optimizer, [batch] * accumulated, recipe, scaler)
            peak = gpus.peak_allocated_bytes()
        fits, said = True, f"peak {show_bytes(peak)}" if peak is not None else "it runs"
    except RuntimeError as error:
        if not batching.is_out_of_memory(error):
            raise
        fits, said = False, "out of memory"
    if not fits:  # here the exception is gone, and with it what its frames held
        model.zero_grad(set_to_none=True)
        gc.collect()
    remedy = "halve micro_batch_size and double gradient_accumulation_steps"
    return Finding("longest", f"{rows} x {tokens} tokens: {said}", None if fits else remedy)


def _step_0(model: torch.nn.Module, batch: dict, recipe: TrainRecipe) -> tuple[Finding, float]:
    """The first gate, and the loss (nats per labelled token) from which the third one starts."""
    start, fix = _loss(model, batch, recipe), None
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            base = _loss(model, batch, recipe)
        found = f"loss {start:.2f}, the base's {base:.2f}"
        if start != base:
            fix = "build the model afresh: these adapters are trained already"
    else:
        found = f"loss {start:.2f}, no adapters to switch off"
        if not math.isfinite(start):
            fix = "look at the weights' files and at amp_dtype"
    return Finding("step 0", found, fix), start


def _loss(model: torch.nn.Module, batch: dict, recipe: TrainRecipe) -> float:
    with evaluating(model), qlora.autocast(recipe, gpus.device()):
        return qlora.compute_loss(model, batch, recipe).item()


def _gradients(model: torch.nn.Module, batch: dict, recipe: TrainRecipe) -> Finding:
    """The second gate: one backward pass, in training mode."""
    model.train()
    with qlora.autocast(recipe, gpus.device()):
        qlora.compute_loss(model, batch, recipe).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    norm = math.hypot(*(grad.norm().item() for grad in grads if grad is not None))
    finite = math.isfinite(norm) and all(grad is not None for grad in grads)
    return Finding(
        "gradients",
        f"{'finite' if finite else 'not finite'}, norm {'above' if norm > 0 else 'is'} 0",
        None if finite and norm > 0 else "call enable_input_require_grads, or lower the loss scale",
    )


def _overfit(model: torch.nn.Module, batch: dict, recipe: TrainRecipe, target: float) -> Finding:
    """The third gate: one batch again and again, until its loss is below the target."""
    model.train()
    model.zero_grad()
    rate = min(OVERFIT_RATE, TIMES_THE_RECIPES * recipe.learning_rate)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    scaler = torch.amp.GradScaler(gpus.device(), enabled=recipe.amp_dtype == "float16")
    learned = False
    for _ in range(OVERFIT_STEPS):
        learned = qlora.training_step(model, optimizer, [batch], recipe, scaler).item() < target
        if learned:
            break
    return Finding(
        "overfit",
        f"one batch, at most {OVERFIT_STEPS} steps: loss falls by "
        f"{'more' if learned else 'less'} than half",
        None if learned else "look at the labels, then at learning_rate and lora_rank",
    )
