"""Who waits for whom in a training step: GPU, host, and what CUDA graphs would change.

    python tools/profile_step.py OUT.json [--rows REGEX] [--minutes 4] [--smoke]

Each row is a process of its own, on Llama-3.1-8B's shape with random weights in nf4:

- "step": optimizer steps timed without a profiler, then one under `torch.profiler`: how long the
  GPU works, how long it stands idle, how many operations the host launches, and how long the host
  takes for each. A step whose GPU is busy for most of its time gains nothing from fewer launches.
- "graph": one decoder layer as checkpointing runs it (forward without a graph, later forward and
  backward), launched by Python and replayed from CUDA graphs: seconds, and bytes that the capture
  holds. And whether bitsandbytes' dequantization may be captured.
- "graphed callables": PyTorch's own `make_graphed_callables` on the same layer.

FlashAttention and cuDNN attention are off, as on a T4. A row that fails says why. The file is
written after each row. `--smoke` runs a small model, on a CPU too, to try the tool itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from tools.measure_frontier import B8, LEAN, build, versions

FAST: dict[str, Any] = dict(adapters="in_place", loss="compiled", mlp="compiled",
                            rotary="compiled", flat_optimizer=True)  # fmt: skip
MANY = {"micro_batch_size": 4, "sequence_length": 2048}
ONE = {"micro_batch_size": 1, "sequence_length": 512}
# row: what is done, seconds that it may take, changes of the lean recipe
ROWS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "step, 4 x 2048, lean": ("step", 40, MANY),
    "step, 4 x 2048, compiled": ("step", 60, MANY | FAST),
    "step, 2 x 2048 twice, 15 forget": (
        "step", 60, FAST | {"micro_batch_size": 2, "sequence_length": 2048,
                            "gradient_accumulation_steps": 2, "checkpointed_layers": 15}),
    "step, 1 x 512, lean": ("step", 40, ONE),
    "step, 1 x 512, plain parts": (
        "step", 40, ONE | {"adapters": "in_place", "loss": "fused", "flat_optimizer": True}),
    "step, 1 x 512, compiled": ("step", 60, ONE | FAST),
    "graph, 1 x 512": ("graph", 40, ONE),
    "graph, 4 x 2048": ("graph", 40, MANY),
    "graphed callables, 1 x 512": ("callables", 40, ONE),
}  # fmt: skip


def recipe_of(changes: dict[str, Any], smoke: bool) -> TrainRecipe:
    """A row's recipe; a smoke run's is small and in float32."""
    if not smoke:
        return TrainRecipe(model=B8, **LEAN | changes)
    from course_utils.data import BUNDLED

    small = {"base": "float32", "amp_dtype": None, "sequence_length": 32, "optimizer": "adamw"}
    return TrainRecipe(model=BUNDLED, **LEAN | changes | small)


def model_of(recipe: TrainRecipe, layers: int | None = None) -> Any:
    """The recipe's model with random weights, maybe with fewer layers."""
    if recipe.base == "nf4":
        return build(recipe, layers)
    from fitcast.training.trainer import build_model

    return build_model(recipe).train()


# --- a step ------------------------------------------------------------------------------------


def profile_step(recipe: TrainRecipe) -> dict[str, Any]:
    """Seconds of a step, of the GPU's work and of the host's part in it."""
    import torch

    from fitcast.forecasting.launches import measured_seconds
    from fitcast.step import qlora
    from fitcast.training.measurement import random_batches

    device = gpus.device()
    model = model_of(recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device, init_scale=64.0, enabled=recipe.amp_dtype is not None)
    batches = random_batches(recipe, device)

    def step() -> None:
        qlora.training_step(model, optimizer, batches, recipe, scaler)

    began = time.perf_counter()
    step()
    gpus.synchronize()
    first = time.perf_counter() - began
    step()
    seconds, asked = [], []
    for _ in range(5):
        gpus.synchronize()
        began = time.perf_counter()
        step()
        asked.append(time.perf_counter() - began)  # until the host has launched all
        gpus.synchronize()
        seconds.append(time.perf_counter() - began)
    found = {
        "first_step_seconds": first,
        "step_seconds": statistics.median(seconds),
        "host_seconds": statistics.median(asked),
        "tokens_per_second": recipe.tokens_per_step / statistics.median(seconds),
        "launch_seconds_measured_for_fit": measured_seconds(),
        "peak_allocated_bytes": gpus.peak_allocated_bytes(),
    }
    return found | under_the_profiler(step)


def under_the_profiler(step: Callable[[], None]) -> dict[str, Any]:
    """What one step launches and how long the GPU is busy with it."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if gpus.device() == "cuda" else []
    with profile(activities=kinds) as profiler:
        step()
        gpus.synchronize()
    spans, launches, names = [], 0, {}
    for event in profiler.events():
        start, end = event.time_range.start, event.time_range.end
        if "cuda" in str(event.device_type).lower():
            spans.append((start, end))
            names[event.name] = names.get(event.name, 0) + end - start
        elif event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            launches += 1
    busy, idle = busy_and_idle(spans)
    longest = sorted(names.items(), key=lambda item: -item[1])[:12]
    return {
        "kernels": len(spans),
        "launches": launches,
        "gpu_busy_seconds": busy / 1e6,
        "gpu_idle_seconds": idle / 1e6,
        "longest_kernels_ms": {name[:80]: round(spent / 1e3, 2) for name, spent in longest},
    }


def busy_and_idle(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """How much of the time from the first to the last is covered, and how much is not.

    Example:
        >>> busy_and_idle([(0, 2), (1, 3), (5, 6)])
        (4, 2)
    """
    busy, until = 0, min(spans)[0] if spans else 0
    first = until
    for start, end in sorted(spans):
        busy += max(0, end - max(start, until))
        until = max(until, end)
    return busy, until - first - busy


# --- graphs ------------------------------------------------------------------------------------


def layer_as_checkpointed(recipe: TrainRecipe) -> tuple[Callable, Callable]:
    """The forward pass of a model's second layer, and the one with a backward behind it."""
    import torch

    from fitcast.step import levers

    model = model_of(recipe, layers=4)
    base = levers.unwrap(model)
    layer, device = levers.decoder_layers(model)[1], gpus.device()
    layer.gradient_checkpointing = False  # what it does is done by hand here
    shape = (recipe.micro_batch_size, recipe.sequence_length)
    dtype = getattr(torch, recipe.amp_dtype or "float32")
    x = torch.randn(*shape, base.config.hidden_size, device=device, dtype=dtype)
    x.requires_grad_()
    places = torch.arange(shape[1], device=device)[None]
    angles = base.model.rotary_emb(x.detach(), places)
    trained = [p for p in layer.parameters() if p.requires_grad]
    grad = torch.ones_like(x)

    def run() -> Any:
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32,
                            cache_enabled=False):  # fmt: skip
            out = layer(x, attention_mask=None, position_ids=places, position_embeddings=angles)
        return out[0] if isinstance(out, tuple) else out

    def forward() -> Any:
        with torch.no_grad():
            return run()

    def backward() -> Any:
        return torch.autograd.grad(run(), (x, *trained), grad)

    return forward, backward


def graphed(recipe: TrainRecipe) -> dict[str, Any]:
    """A checkpointed layer launched by Python and replayed: seconds of both, bytes held."""
    import torch

    forward, backward = layer_as_checkpointed(recipe)
    found = {"python_seconds": timed(lambda: (forward(), backward()))}
    if gpus.device() != "cuda":
        return found
    found["dequantize_in_capture"] = captured_dequantization()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward(), backward()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    graphs, kept, pool = [], [], torch.cuda.graph_pool_handle()
    for function in (forward, backward):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            kept.append(function())
        graphs.append(graph)
    found |= {
        "held_bytes": torch.cuda.memory_allocated() - before[0],
        "held_reserved_bytes": torch.cuda.memory_reserved() - before[1],
    }
    wanted = backward()
    for graph in graphs:
        graph.replay()
    pairs = zip(wanted, kept[1], strict=True)
    found["largest_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
    found["graph_seconds"] = timed(lambda: [graph.replay() for graph in graphs])
    return found | {"faster": found["python_seconds"] / found["graph_seconds"]}


def captured_dequantization() -> str:
    """Whether a 4-bit weight that a graph dequantizes comes out as it does by itself."""
    import bitsandbytes.functional as bnb
    import torch

    weight = torch.randn(256, 256, device="cuda", dtype=torch.float16)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    wanted = bnb.dequantize_4bit(packed, state)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = bnb.dequantize_4bit(packed, state)
        graph.replay()
        return "works" if torch.equal(out, wanted) else "gives other numbers"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]


def callables(recipe: TrainRecipe) -> dict[str, Any]:
    """`make_graphed_callables` on the layer's MLP and on its attention's query product."""
    import torch

    from fitcast.step import levers

    found: dict[str, Any] = {}
    if gpus.device() != "cuda":
        return found
    model = model_of(recipe, layers=4)
    layer = levers.decoder_layers(model)[1]
    shape = (recipe.micro_batch_size, recipe.sequence_length)
    width = levers.unwrap(model).config.hidden_size
    for name, module in (("mlp", layer.mlp), ("q_proj", layer.self_attn.q_proj)):
        x = torch.randn(*shape, width, device="cuda", dtype=torch.float16, requires_grad=True)
        grad = torch.ones_like(x)

        def step(module: Any = module, x: Any = x, grad: Any = grad) -> None:
            with torch.autocast("cuda", dtype=torch.float16, cache_enabled=False):
                out = module(x)
            out.backward(grad.to(out.dtype))

        try:
            plain, before = timed(step), torch.cuda.memory_allocated()
            with torch.autocast("cuda", dtype=torch.float16, cache_enabled=False):
                made = torch.cuda.make_graphed_callables(module, (x,))
            held = torch.cuda.memory_allocated() - before
            found[name] = {"python_seconds": plain, "held_bytes": held,
                           "graph_seconds": timed(lambda m=made: step(m))}  # fmt: skip
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return found


def timed(work: Callable[[], object], times: int = 20) -> float:
    """Seconds of one call, median of three rounds."""
    rounds = []
    for _ in range(4):
        gpus.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            work()
        gpus.synchronize()
        rounds.append((time.perf_counter() - began) / times)
    return statistics.median(rounds[1:])


# --- rows --------------------------------------------------------------------------------------

WORK = {"step": profile_step, "graph": graphed, "callables": callables}


def one_row(name: str, smoke: bool) -> dict[str, Any]:
    import torch

    for switch in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp):
        switch(False)
    what, _, changes = ROWS[name]
    recipe = recipe_of(changes, smoke)
    gpus.use_expandable_segments(recipe.expandable_segments and what == "step")
    try:
        return WORK[what](recipe)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300],
                "where": traceback.format_exc()[-1500:]}  # fmt: skip


def in_a_process(name: str, smoke: bool) -> dict[str, Any]:
    """A row by this script in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, str(out), "--row", name]
        try:
            subprocess.run(command + ["--smoke"] * smoke, timeout=2 * ROWS[name][1], check=False)
            return json.loads(out.read_text("utf-8"))
        except (subprocess.TimeoutExpired, OSError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default="", help="those whose names match this")
    parser.add_argument("--minutes", type=float, default=4, help="begin no row that ends later")
    parser.add_argument("--smoke", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        found = one_row(options.row, options.smoke)
        options.out.write_text(json.dumps(found), encoding="utf-8")
        return
    end = time.monotonic() + 60 * options.minutes
    record: dict[str, Any] = {"protocol": __doc__, "date": datetime.date.today().isoformat(),
                              "versions": versions(), "rows": {}}  # fmt: skip
    for name, (_, seconds, _) in ROWS.items():
        if re.search(options.rows, name):
            found: dict[str, Any] = {"error": "no time left"}
            if time.monotonic() + seconds / 2 < end:
                found = in_a_process(name, options.smoke)
            print(name, {k: v for k, v in found.items() if k != "longest_kernels_ms"}, flush=True)
            record["rows"][name] = found
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
