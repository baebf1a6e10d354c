"""Measure the frontier of one T4: long contexts and large models, with a T4's memory and kernels.

    python tools/measure_frontier.py OUT.json [--rows REGEX] [--minutes 5]
    python tools/measure_frontier.py OUT.json --forecasts

Each row is a recipe, run in a process of its own: random weights at the real shapes, quantized on
the GPU, three or four optimizer steps of `qlora.training_step`. The file is written after every
row; a row that fails says why, and one that there is no time for, too. `--forecasts` adds, without
a GPU, what was to be expected.

Protocol: FlashAttention and cuDNN attention off, memory limited to what a T4 leaves to tensors.
`peak_*` are those of the steps after the first, in which the optimizer makes its state; seconds are
the median of theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # no CUDA in the parent: it forks
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fitcast import gpus, models
from fitcast.recipe import TrainRecipe

# The card of every row: this GPU's work spaces, a T4's attention kernels.
H200_WITH_T4_KERNELS = dataclasses.replace(gpus.H200, flash_attention=False)
LIMIT_BYTES = gpus.T4.usable_bytes  # of tensors and what the allocator keeps beside them
LEAN: dict[str, Any] = dict(
    amp_dtype="float16",
    lora_dropout=0.0,
    attention="explicit_kv",
    loss="lean",
    norm="native",
    mlp="lean",
    adapters="lean",
    rotary="lean",
    expandable_segments=True,
)
ALL = {"lora_rank": 32, "lora_targets": "all-linear"}
B8, B24, B14 = "llama-3.1-8b", "tests/data/configs/mistral-24b", "tests/data/configs/qwen3-14b"
MANY = {"micro_batch_size": 4, "sequence_length": 2048}


def row(name: str, seconds: float, model: str, steps: int = 4, **changes: Any) -> dict:
    """A recipe with what it is called, and about how long it takes."""
    return {
        "name": name,
        "seconds": seconds,
        "steps": steps,
        "recipe": {"model": model} | LEAN | changes,
    }


ROWS = [
    row("8B, 4 x 2048, all on the host", 13, B8, **MANY, offload_checkpoints=True),
    row("8B, 4 x 2048, 31 on the host", 13, B8, **MANY, offload_checkpoints=31),
    row("8B, 4 x 2048, tiles", 13, B8, **MANY, mlp_tile_tokens=2048),
    row("8B, 4 x 2048, tiles, 16 on the host", 13, B8, **MANY, mlp_tile_tokens=4096,
        offload_checkpoints=16),
    row("24B, 1 x 2048", 25, B24, sequence_length=2048, mlp_tile_tokens=1024,
        embedding="host"),
    row("8B, 1 x 40960", 45, B8, 2, sequence_length=40960, mlp_tile_tokens=4096,
        offload_checkpoints=24),
    row("8B, 1 x 49152, r=32 all-linear", 62, B8, 2, **ALL, sequence_length=49152,
        mlp_tile_tokens=4096, offload_checkpoints=26, embedding="host"),
    row("held: 8B, 2 x 3072, r=32 all-linear", 14, B8, 3, **ALL, micro_batch_size=2,
        sequence_length=3072, mlp_tile_tokens=1024, offload_checkpoints=12),
    row("held: phi-4-mini, 1 x 12288", 15, "phi-4-mini", 3, sequence_length=12288,
        lora_targets=("qkv_proj", "o_proj"), mlp_tile_tokens=3000, offload_checkpoints=20),
    row("held: 14B, 1 x 4096, embedding on the host", 18, B14, 3, sequence_length=4096,
        embedding="host", offload_checkpoints=30),
]  # fmt: skip


def build(recipe: TrainRecipe, layers: int | None = None) -> Any:
    """The recipe's model with random weights, each quantized where it will stay.

    Args:
        recipe: What is to be trained.
        layers: How many, if not all.
    """
    import torch

    from fitcast.step import qlora

    model = on_meta(recipe, layers)
    device, made, noise = gpus.device(), {}, {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = weight(module, parameter, device, noise)
                setattr(module, name, made[id(parameter)])
        if type(module).__name__.endswith("RotaryEmbedding"):
            vars(module)["_buffers"].update(type(module)(model.config).to(device)._buffers)
    noise.clear()
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    torch.manual_seed(recipe.seed)
    model = qlora.add_adapters(qlora.prepare_base(model, recipe), recipe)
    return qlora.apply_levers(model, recipe).train()


def on_meta(recipe: TrainRecipe, layers: int | None = None) -> Any:
    """The base's modules on the meta device, with bitsandbytes' linear layers."""
    from transformers.quantizers.auto import AutoHfQuantizer

    from fitcast.forecasting import fake
    from fitcast.step import qlora

    config = models.config(recipe.model)
    config.num_hidden_layers = layers or config.num_hidden_layers
    model: Any = fake.meta_model(config, qlora.storage_dtype(recipe))
    quantization: Any = qlora.quantization(recipe)
    quantizer = AutoHfQuantizer.from_config(quantization)
    quantizer.pre_quantized = False
    quantizer.preprocess_model(model=model, device_map=None)
    model.is_loaded_in_4bit = True
    return model


def weight(module: Any, parameter: Any, device: str, noise: dict) -> Any:
    """A random parameter on the device: in 4 bits, if its layer's are."""
    import bitsandbytes
    import torch

    nn: Any = bitsandbytes.nn

    if parameter.ndim < 2:
        return torch.nn.Parameter(torch.ones_like(parameter, device=device), requires_grad=False)
    if not isinstance(module, nn.Linear4bit):
        values = torch.empty_like(parameter, device=device).normal_(std=0.02)
        return torch.nn.Parameter(values, requires_grad=False)
    shape = (module.out_features, module.in_features)
    if shape not in noise:
        noise[shape] = torch.randn(shape, device=device, dtype=torch.float16) * 0.02
    made = nn.Params4bit(
        noise[shape], requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to(device)
    module.quant_state = made.quant_state
    return made


def measure(spec: dict) -> dict[str, Any]:
    """Peak and speed of the row's steps."""
    import torch

    from fitcast.step import levers, qlora
    from fitcast.training.measurement import random_batches

    recipe = TrainRecipe(**spec["recipe"])
    gpus.use_expandable_segments(recipe.expandable_segments)
    for switch in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp):
        switch(False)
    start, device = time.monotonic(), gpus.device()
    model = build(recipe)
    if device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(LIMIT_BYTES / total)
    optimizer = qlora.build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    batches = random_batches(recipe, device)
    gpus.synchronize()
    ready, seconds = time.monotonic(), []
    read = {"loading_seconds": round(ready - start, 1), "resident_bytes": allocated()}
    for step in range(spec["steps"]):
        if step == 1:
            gpus.reset_peak()
        began = time.perf_counter()
        loss = qlora.training_step(model, optimizer, batches, recipe, scaler)
        gpus.synchronize()
        seconds.append(time.perf_counter() - began)
    return (
        read
        | {
            "loss": loss.item(),
            "states": len(optimizer.state),  # none, if every step was skipped
            "step_seconds": seconds,
            "tokens_per_second": recipe.tokens_per_step / statistics.median(seconds[1:]),
            "peak_allocated_bytes": gpus.peak_allocated_bytes(),
            "peak_reserved_bytes": gpus.peak_reserved_bytes(),
            "pinned_host_bytes": levers.pinned_host_bytes(model),
            "retries": torch.cuda.memory_stats()["num_alloc_retries"] if device == "cuda" else 0,
        }
    )


def allocated() -> int | None:
    """Bytes in tensors on the GPU now."""
    import torch

    return torch.cuda.memory_allocated() if gpus.device() == "cuda" else None


def child(spec: dict, pipe: Any) -> None:
    """One row, in a process of its own; whatever happens is sent."""
    try:
        pipe.send(measure(spec))
    except Exception:
        pipe.send({"error": traceback.format_exc()[-1500:]})


def in_child(spec: dict) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(spec, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return {"error": "the process ended without a word"}
    finally:
        process.join()


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {name: metadata.version(name) for name in names}


def add_forecasts(rows: list[dict]) -> None:
    """Beside each row what it would need on this card, and what on a T4."""
    from fitcast.forecasting.forecast import forecast

    for spec in rows:
        said = {
            name: forecast(TrainRecipe(**spec["recipe"]), card)
            for name, card in (("measured card", H200_WITH_T4_KERNELS), ("T4", gpus.T4))
        }
        spec["forecast"] = {
            name: {
                "peak_allocated_bytes": f.peak_allocated_bytes,
                "peak_reserved_bytes": f.peak_reserved_bytes,
                "device_bytes": f.device_bytes,
                "pinned_host_bytes": f.pinned_host_bytes,
                "verdict": f.verdict,
                "peak": f"{f.peak_phase}, {f.peak_operation}, {f.peak_module}",
            }
            for name, f in said.items()
        }


def save(rows: list[dict], path: Path) -> None:
    """Write beside the old file first, so that an interruption leaves a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"protocol": __doc__, "rows": rows}, indent=1) + "\n", "utf-8")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="", help="those whose names match this")
    parser.add_argument(
        "--minutes", type=float, default=5, help="begin no row that would end later"
    )
    parser.add_argument("--forecasts", action="store_true", help="only add them; needs no GPU")
    options = parser.parse_args()
    os.chdir(ROOT)  # where the configs are
    if options.forecasts:
        rows = json.loads(options.out.read_text("utf-8"))["rows"]
        add_forecasts(rows)
        return save(rows, options.out)
    import torch  # imported once, before the rows fork
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(1)  # a forked child of a parent with OpenMP threads would hang
    end, done = time.monotonic() + 60 * options.minutes, []
    for spec in (spec for spec in ROWS if re.search(options.rows, spec["name"])):
        stamp = {"versions": versions(), "date": datetime.date.today().isoformat()}
        found: dict[str, Any] = {"error": "no time left"}
        if time.monotonic() + spec["seconds"] < end:
            found = in_child(spec)
        print(spec["name"], {k: v for k, v in found.items() if k != "error"} or found, flush=True)
        done.append(spec | found | stamp)
        save(done, options.out)


if __name__ == "__main__":
    main()
