"""What Python needs to launch one operation of a training step: measured here, or as recorded.

A step of small operations takes as long as the host needs to ask for them. That differs from host
to host by more than two, so it is measured where the run will be: in a second, on a tiny model that
keeps no GPU busy. Not modelled: other programs on the host's CPU.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fitcast import gpus
from fitcast.cuda.kernels import NO_WORK
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora

RECORDED_SECONDS = 4.5e-5  # recorded_runs.json, group "launch"
RECORDED = "recorded on an H200's host, 2026-11"


@dataclasses.dataclass(frozen=True)
class LaunchRate:
    """Seconds of the host's time for one operation, Python included, and where that is from."""

    seconds: float
    basis: str

    def __str__(self) -> str:
        return f"{1e6 * self.seconds:.0f} µs to launch an operation ({self.basis})"


def launch_rate(gpu: gpus.Gpu) -> LaunchRate:
    """Measured if this machine has that card, else recorded on another host."""
    here = gpus.detect()
    if here is None or here.name != gpu.name:
        return LaunchRate(RECORDED_SECONDS, RECORDED)
    return LaunchRate(measured_seconds(), "measured on this host")


@functools.cache
def measured_seconds(steps: int = 5) -> float:
    """Seconds for one operation of a tiny LoRA step on this machine's device, median of `steps`."""
    model, recipe, batch = _tiny()
    optimizer = qlora.build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(gpus.device(), enabled=recipe.amp_dtype is not None)

    def step() -> None:
        qlora.training_step(model, optimizer, [batch], recipe, scaler)
        gpus.synchronize()

    with _Count() as count:
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / count.operations


def _tiny() -> tuple[Any, TrainRecipe, dict[str, torch.Tensor]]:
    """Four layers of 64 hidden numbers, with the levers that `fit` picks from, and 32 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    on_gpu = gpus.device() == "cuda"
    recipe = TrainRecipe(
        model="llama-3.1-8b",  # a name that there is; the config below is what is built
        amp_dtype="float16" if on_gpu else None,
        lora_dropout=0.0,
        attention="explicit_kv",
        loss="lean",
        optimizer="adamw",
    )
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        base: Any = LlamaForCausalLM(config)
        base = base.to(gpus.device(), qlora.storage_dtype(recipe))
        _hold_in_4_bits(base)
        model = qlora.add_adapters(qlora.prepare_base(base, recipe), recipe)
    ids = torch.zeros(1, 32, dtype=torch.long, device=gpus.device())
    model = qlora.apply_levers(model, recipe).train()
    return model, recipe, {"input_ids": ids, "labels": ids}


def _hold_in_4_bits(model: Any) -> None:
    """Linear layers as QLoRA has them: bitsandbytes' Python is a good part of a launch."""
    import bitsandbytes

    nn: Any = bitsandbytes.nn
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            made = nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                compute_dtype=layer.weight.dtype,
            )  # fmt: skip
            made.weight = nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, made.to(layer.weight.device))


class _Count(TorchDispatchMode):
    """Counts operations as a forecast does: without views and what allocates only."""

    operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not func.is_view and func._schema.name not in NO_WORK:
            self.operations += 1
        return func(*args, **(kwargs or {}))
