"""Before training: four questions to a loaded model, each of which has saved somebody's night.

Not modelled: whether the data are any good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fitcast import gpus
from fitcast.memory.operations import OperationLog
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import data
from fitcast.training.preflight import Finding, Preflight

OVERFIT_STEPS = 100  # at most: it ends as soon as the loss has halved
OVERFIT_RATE, TIMES_THE_RECIPES = 1e-2, 10  # the smaller of the two rates
# Kernels that never write the (seq x seq) scores to memory; the last one is the CPU's.
FUSED = ("flash", "efficient", "cudnn")


def attention_kernel(model: torch.nn.Module, batch: dict, recipe: TrainRecipe) -> str:
    """Name of the attention operation that a training forward pass dispatches, or "scores"."""
    model.train()
    with OperationLog() as log, qlora.autocast(recipe, gpus.device()):
        qlora.compute_loss(model, batch, recipe)
    fused = [
        name
        for name, _ in log.counts
        if "attention" in name
        and "backward" not in name
        and any(kernel in name for kernel in FUSED)
    ]
    return fused[0].strip("_") if fused else "scores"


def check_gates(
    model: torch.nn.Module, rows: Sequence[dict], recipe: TrainRecipe, pad_token_id: int
) -> Preflight:
    """Ask all four; the adapters are afterwards what they were.

    1. With fresh adapters the loss is the base's: they start as zero.
    2. Every trainable parameter gets a finite gradient, and they are not all zero.
    3. One batch, seen again and again, is learned by heart: the loss can fall.
    4. Attention runs in a kernel that does not write its scores.

    Args:
        model: With fresh adapters, as from `training.build_model`.
        rows: Encoded examples; the first micro batch of them is used.
    """
    batch = data.collate(list(rows)[: recipe.micro_batch_size], pad_token_id)
    batch = {name: tensor.to(gpus.device()) for name, tensor in batch.items()}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    start, base = _start(model, batch, recipe)
    kernel = attention_kernel(model, batch, recipe)
    finite, norm = _gradients(model, batch, recipe, trainable)
    last = _overfit(model, batch, recipe, start / 2)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(before[name])
            parameter.grad = None
    return Preflight(
        [
            Finding(
                "step 0",
                f"loss {start:.2f}, the base's {base:.2f}",
                None
                if start == base
                else "build the model afresh: these adapters are trained already",
            ),
            Finding(
                "gradients",
                f"{'finite' if finite else 'not finite'}, norm {'above' if norm > 0 else 'is'} 0",
                None
                if finite and norm > 0
                else "call enable_input_require_grads, or lower the loss scale",
            ),
            Finding(
                "overfit",
                f"one batch, at most {OVERFIT_STEPS} steps: loss falls by "
                f"{'more' if last < start / 2 else 'less'} than half",
                None
                if last < start / 2
                else "look at the labels, then at learning_rate and lora_rank",
            ),
            Finding(
                "attention", kernel, "set attention='explicit_kv'" if kernel == "scores" else None
            ),
        ]
    )


def _start(model, batch, recipe) -> tuple[float, float]:
    model.eval()
    with torch.no_grad(), qlora.autocast(recipe, gpus.device()):
        start = qlora.compute_loss(model, batch, recipe).item()
        with model.disable_adapter():
            return start, qlora.compute_loss(model, batch, recipe).item()


def _gradients(model, batch, recipe, trainable) -> tuple[bool, float]:
    model.train()
    with qlora.autocast(recipe, gpus.device()):
        qlora.compute_loss(model, batch, recipe).backward()
    grads = [p.grad for p in trainable.values()]
    norm = math.hypot(*(g.norm().item() for g in grads if g is not None))
    return math.isfinite(norm) and all(g is not None for g in grads), norm


def _overfit(model, batch, recipe, target: float) -> float:
    """Loss of one batch, seen again and again, once it is below the target or time is up."""
    model.zero_grad()
    rate = min(OVERFIT_RATE, TIMES_THE_RECIPES * recipe.learning_rate)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    scaler = torch.amp.GradScaler(gpus.device(), enabled=recipe.amp_dtype == "float16")
    for _ in range(OVERFIT_STEPS):
        loss = qlora.training_step(model, optimizer, [batch], recipe, scaler).item()
        if loss < target:
            break
    return loss
