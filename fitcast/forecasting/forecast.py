"""What a training step will need on a GPU, from a machine without one: no weights, no formulas.

`forecast` runs the real step of `qlora` on fake tensors, re-expressed as CUDA's kernels would
allocate, and replays the allocations through CUDA's caching allocator:

    forecast(TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", sequence_length=2048)).fits

Not modelled: fragmentation of earlier work in the same process beyond the stated interval, other
processes on the GPU, several GPUs, data-dependent code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses import fake_tensor

from fitcast import models
from fitcast.cuda.allocator import LARGE_SEGMENT, Playback, segment_bytes
from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.forecasting import depth, fake
from fitcast.forecasting.run import MICRO_BATCHES, fake_run
from fitcast.gpus import T4, Gpu
from fitcast.memory.report import MemoryReport, replay
from fitcast.memory.stream import DeviceLedger, Stream, later_step, work_recorder
from fitcast.recipe import TrainRecipe
from fitcast.units import show_bytes, with_article

# What the step does not decide about reserved memory: other versions' small temporaries take or
# spare a segment in forward, in backward and in the optimizer; one temporary misses the hole that
# it fitted here, unless it has this share of all memory, hence a segment cut to its own size (or
# segments are expandable: then there are no holes between them).
SLACK = 3 * LARGE_SEGMENT
SHARES_A_SEGMENT = 0.1
# What a recipe may change without changing a byte.
NO_MEMORY = {
    "learning_rate": 2e-4,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "world_size": 1,
    "warmup_fraction": 0.0,
    "max_steps": 1,
    "logging_steps": 1,
    "save_steps": 1,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class Forecast(MemoryReport):
    """What a step will need on a GPU. Bytes, as `torch.cuda.memory_stats` will count them.

    Attributes of a `MemoryReport` describe a step after the first; blocks have the sizes that the
    allocator gives them. `phase_peaks` are over all phases, "load" included.

    Attributes:
        gpu: The GPU.
        peak_reserved_bytes: Between which bounds the allocator's memory will peak.
        device_bytes: The same with the CUDA context: what `nvidia-smi` shows.
        fits: Whether the step runs within the GPU's memory.
        margin_bytes: What is left of the GPU's memory in the worse case; negative when it is short.
        loaded_bytes: After loading the base model; `None` when nothing was loaded.
        resident_bytes: Before the first step: weights and adapters.
        operations: About how many operations the step launches.
        flops: Multiplications and additions of its matrix products.
        ideal_seconds: Its time if every operation ran at the GPU's peak rate or bandwidth.
    """

    gpu: Gpu
    peak_reserved_bytes: tuple[int, int]
    fits: bool
    loaded_bytes: int | None
    resident_bytes: int
    operations: int
    flops: int
    ideal_seconds: float

    @property
    def peak_allocated_bytes(self) -> int:
        """Most bytes in tensors, rounded by the allocator."""
        return self.peak_bytes

    @property
    def device_bytes(self) -> tuple[int, int]:
        """Lowest and highest use of the device, context included."""
        low, high = self.peak_reserved_bytes
        return low + self.gpu.context_bytes, high + self.gpu.context_bytes

    @property
    def margin_bytes(self) -> int:
        """Bytes of the GPU left over at the upper bound."""
        return self.gpu.total_bytes - self.device_bytes[1]

    def __str__(self) -> str:
        low, high = (show_bytes(n, "GiB") for n in self.device_bytes)
        verdict = "fits" if self.fits else "does not fit"
        card = f"{with_article(self.gpu.name)} ({show_bytes(self.gpu.total_bytes)})"
        return (
            f"{verdict} {card}: peak {show_bytes(self.peak_allocated_bytes)} in tensors, {low} "
            f"to {high} of the device; highest in {self.peak_phase} at {self.peak_operation} "
            f"in {self.peak_module or 'no module'}"
        )


def forecast(recipe: TrainRecipe, gpu: Gpu = T4) -> Forecast:
    """What one optimizer step of `recipe` will need on `gpu`, with its kernels and its memory.

    Raises:
        ValueError: The recipe cannot run: a precision that the GPU lacks, a sequence beyond the
            model's limit, targets that match no layer, a model not built like Llama.

    Example:
        >>> recipe = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=64)
        >>> forecast(recipe, T4).fits
        True
    """
    recipe.check_on(gpu)
    return _forecast(dataclasses.replace(recipe, **NO_MEMORY), gpu)


@functools.lru_cache(maxsize=48)
def _forecast(recipe: TrainRecipe, gpu: Gpu) -> Forecast:
    micro_batches = recipe.gradient_accumulation_steps
    return _report(
        run_stream(recipe, gpu),
        gpu,
        max(1, micro_batches / MICRO_BATCHES),
        recipe.expandable_segments,
    )


def run_stream(recipe: TrainRecipe, gpu: Gpu, *, whole: bool = False) -> Stream:
    """The memory events of load and first step; unless `whole`, of few layers where they repeat."""
    config = checked_config(recipe)
    total = config.num_hidden_layers
    k = total if recipe.checkpointed_layers == "all" else recipe.checkpointed_layers
    if k > total:
        raise ValueError(
            f"checkpointed_layers must be from 0 to {total}, the layers of "
            f"{recipe.model}, got {k}; use 'all' for every layer"
        )
    counts = depth.kinds(total, k)
    alike = len(set(getattr(config, "layer_types", None) or ["one"])) == 1
    if not whole and alike:
        few = depth.run_layers(counts)
        shallow = dataclasses.replace(recipe, checkpointed_layers=few[0] if k else 0)
        try:
            return depth.deepen(_shallow_run(shallow, gpu, sum(few)), counts)
        except depth.NotRepeating:
            pass  # then the whole model is run
    return fake_run(recipe, gpu, config)


@functools.lru_cache(maxsize=32)
def _shallow_run(recipe: TrainRecipe, gpu: Gpu, num_layers: int) -> Stream:
    config = checked_config(recipe)
    config.num_hidden_layers = num_layers
    if (types := getattr(config, "layer_types", None)) and len(types) > num_layers:
        config.layer_types = types[:num_layers]
    return fake_run(recipe, gpu, config)


def checked_config(recipe: TrainRecipe):
    """The model's config, if this recipe can run it.

    Raises:
        ValueError: Not a plain decoder, or a sequence beyond its limit.
    """
    config = models.config(recipe.model)
    if not getattr(config, "num_hidden_layers", None) or getattr(config, "is_encoder_decoder", 0):
        raise ValueError(
            f"model must be a decoder-only language model, got {recipe.model} of kind "
            f"{config.model_type!r}; see models.NAMES"
        )
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None):
            raise ValueError(
                f"model must not be a mixture of experts, got {recipe.model} with "
                f"{name}={getattr(config, name)}; what its kernels need is not known"
            )
    limit = getattr(config, "max_position_embeddings", None)
    if limit and recipe.sequence_length > limit:
        raise ValueError(
            f"sequence_length must be at most {limit} for {recipe.model}, got "
            f"{recipe.sequence_length}; shorten the sequences"
        )
    return config


def forecast_step(
    model: torch.nn.Module, step: Callable[[torch.nn.Module], object], gpu: Gpu = T4
) -> Forecast:
    """What `step(model)` will need on `gpu`, for any step that you write.

    Args:
        model: A model of `fake.fake_model`, or a real one: it is left as it was.
        step: Makes its inputs and its optimizer, runs forward, backward, update; twice, if the peak
            of all later steps is asked for: in the first the optimizer has no state yet. It sees
            fake tensors, which have shapes and no numbers.

    Raises:
        ValueError: The step asks a tensor for its numbers (`loss.item()`, `if loss > 1`), uses an
            operation that has no fake version, or an optimizer that was made outside.
    """
    ledger = DeviceLedger()
    kernels = CudaKernels(gpu, on_work=work_recorder(ledger, gpu))
    with fake.faked(model), pretend_cuda(gpu), fake.fake_tensors(), ledger, kernels:
        ledger.watch(model)
        ledger.mark("ready")
        try:
            step(model)
        except (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
        ) as error:
            raise ValueError(
                f"step must not ask a tensor for its numbers, got {error.func}; drop "
                ".item(), float(...), print and `if` on tensors"
            ) from error
        except fake_tensor.UnsupportedFakeTensorException as error:
            raise ValueError(
                f"step must use operations with a fake version, got {error}; write "
                "it with PyTorch's own"
            ) from error
        ledger.mark("step")
    return _report(ledger.stream(), gpu)


def _report(stream: Stream, gpu: Gpu, repeats: float = 1, expandable: bool = False) -> Forecast:
    """Replay the events through the allocator and report the second step."""
    loading, first = stream.marks.get("load", 0), stream.marks["ready"]
    before, step = stream.events[:first], stream.events[first:]
    later = later_step(step) if loading else step  # a reader's own step is taken once
    device = Playback(stream.blocks, descending=True, expandable=expandable)
    device.play(before[:loading])
    loaded = device.allocator.allocated_bytes
    device.play(before[loading:])
    resident = device.allocator.allocated_bytes
    # the other one's addresses rise, and something multiplied matrices before
    other = Playback(stream.blocks, expandable=expandable)
    other.play(before)
    if loading:
        device.play(step)
        kept = {block for _, block, _ in step} - {block for _, block, _ in later}
        early = [
            event
            for event in step
            if event[1] in kept and stream.blocks[event[1]].n_bytes == gpu.workspace_bytes
        ][:1]
        other.play(early + [event for event in step if event not in early])
    initial = list(device.chunks)
    peak = device.play(later)
    other.play(later)
    simulated = [d.allocator.peak_reserved_bytes for d in (device, other)]
    largest = max(
        (segment_bytes(stream.blocks[b].n_bytes) for sign, b, _ in step if sign > 0), default=0
    )
    miss = 0 if expandable else min(largest, int(SHARES_A_SEGMENT * max(simulated)))
    low, high = max(peak, min(simulated) - SLACK), max(*simulated, min(simulated) + miss) + SLACK
    blocks = [block.resized(device.sizes.get(i, 0)) for i, block in enumerate(stream.blocks)]
    report = replay(blocks, initial, later, device.allocator.allocated_bytes)
    peaks = {phase: n for phase, n in device.phase_peaks.items() if phase != "start"}
    after = [work[1:] for work in stream.work if work[0] > first]
    operations, flops, seconds = (
        repeats * sum(column) for column in zip((0, 0, 0.0), *after, strict=True)
    )
    return Forecast(
        **vars(report) | {"phase_peaks": peaks},
        gpu=gpu,
        peak_reserved_bytes=(low, high),
        fits=_fits(stream, gpu, peak, high, expandable),
        loaded_bytes=loaded if loading else None,
        resident_bytes=resident,
        operations=int(operations),
        flops=int(flops),
        ideal_seconds=seconds,
    )


def _fits(stream: Stream, gpu: Gpu, peak: int, reserved: int, expandable: bool) -> bool:
    """Whether it runs in the GPU's memory, cached segments given back when that helps."""
    if peak > gpu.usable_bytes or reserved <= gpu.usable_bytes or expandable:
        return max(peak, reserved * expandable) <= gpu.usable_bytes
    try:
        Playback(stream.blocks, descending=True, limit_bytes=gpu.usable_bytes).play(stream.events)
    except MemoryError:
        return False
    return True
