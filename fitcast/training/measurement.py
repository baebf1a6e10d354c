"""What a training step costs here: time, the GPU's own peaks, and the ledger's bytes anywhere.

The three are taken from different steps, so that none disturbs another: the ledger slows a step
down, and a clock needs several.

Not modelled: what is not a training step (evaluation, saving), heat, other programs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fitcast import gpus, models
from fitcast.memory.ledger import MemoryLedger
from fitcast.memory.report import MemoryReport
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training.restoring import kept_modes
from fitcast.units import refusal

MOST_SKIPPED_STEPS = 20  # the gradient scaler starts at 2**16 and halves: it needs far fewer


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One optimizer step of a recipe, measured.

    Attributes:
        seconds: Of one optimizer step, median of those timed.
        tokens_per_second: Tokens of one step (padding counted) by `seconds`.
        peak_allocated_bytes: Most bytes in tensors, by CUDA's allocator; `None` on CPU.
        peak_reserved_bytes: Most bytes that the allocator held; `None` on CPU.
        report: The ledger's account of one step.
    """

    seconds: float
    tokens_per_second: float
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    report: MemoryReport


def measure_step(recipe: TrainRecipe, model: torch.nn.Module, steps: int = 3) -> Measurement:
    """Train `model` on random full-length sequences for some steps, and measure.

    Changes the adapters: measure before or after a run, on a model that nobody needs. Its modules
    are afterwards in the modes in which they were.

    Args:
        recipe: Uses everything but the schedule; world_size is that of this process, 1.
        model: As from `training.build_model(recipe)`.
        steps: How many steps are timed.

    Raises:
        ValueError: No step is to be timed.
    """
    if steps < 1:
        raise refusal("steps", "be at least 1", steps, "3 give a median")
    device = gpus.device()
    batches = random_batches(recipe, device)
    optimizer = qlora.build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device, enabled=recipe.amp_dtype == "float16")

    def step() -> None:
        qlora.training_step(model, optimizer, batches, recipe, scaler)
        gpus.synchronize()

    with kept_modes(model):
        model.train()
        for _ in range(MOST_SKIPPED_STEPS):  # the optimizer's state appears in its first real step
            step()
            if optimizer.state:
                break
        gpus.reset_peak()
        seconds = statistics.median(_seconds(step, steps))
        allocated, reserved = gpus.peak_allocated_bytes(), gpus.peak_reserved_bytes()
        with MemoryLedger(model, optimizer=optimizer, inputs=batches) as ledger:
            step()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return Measurement(
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        report=ledger.report(),
    )


def _seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each of several calls; `work` has to wait for the GPU itself."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def random_batches(recipe: TrainRecipe, device: str) -> list[dict[str, torch.Tensor]]:
    """The micro batches of one optimizer step: random tokens, all labelled.

    Args:
        recipe: Uses model (its vocabulary), micro_batch_size, gradient_accumulation_steps,
            sequence_length, padded and seed.
        device: Where the tensors are made.

    Returns:
        For each micro batch input_ids, labels and, if padded, an attention_mask of ones, each
        (micro batch, sequence), int64.
    """
    shape = (recipe.micro_batch_size, recipe.sequence_length)
    random = torch.Generator().manual_seed(recipe.seed)
    vocab_size = models.config(recipe.model).vocab_size
    batches = []
    for _ in range(recipe.gradient_accumulation_steps):
        ids = torch.randint(vocab_size, shape, generator=random).to(device)
        batches.append({"input_ids": ids, "labels": ids.clone()})
        if recipe.padded:
            batches[-1]["attention_mask"] = torch.ones_like(ids)
    return batches


def matmul_flops(name: str, size: int = 4096, repeats: int = 10) -> float | None:
    """FLOP/s of a square matrix product on this GPU, median; `None` without a GPU.

    Args:
        name: Dtype of the matrices, as "float16".
        size: Rows and columns of both.
        repeats: How many products are timed.
    """
    if gpus.detect() is None:
        return None
    x = torch.randn(size, size, device=gpus.device()).to(getattr(torch, name))

    def product() -> None:
        torch.matmul(x, x)
        gpus.synchronize()

    product()  # the first one loads the kernel: not counted
    return 2 * size**3 / sorted(_seconds(product, repeats))[repeats // 2]
