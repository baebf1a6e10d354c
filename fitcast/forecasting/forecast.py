"""What a training step will need on a GPU, from a machine without one: no weights, no formulas.

`forecast` runs the real step of `qlora` on fake tensors, re-expressed as CUDA's kernels would
allocate, and replays the allocations through CUDA's caching allocator:

    forecast(TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", sequence_length=2048)).fits

Not modelled: fragmentation of earlier work in the same process beyond the stated interval, other
processes on the GPU, data-dependent code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable

import torch

from fitcast import models
from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.cuda.own_loops import on_the_card
from fitcast.forecasting import (
    beside,
    cache,
    data_parallel,
    depth,
    fake,
    loaders,
    own_optimizers,
    own_step,
)
from fitcast.forecasting.load import NotPlain, not_plain
from fitcast.forecasting.run import fake_run
from fitcast.forecasting.verdict import Forecast, report
from fitcast.gpus import T4, Gpu
from fitcast.memory.stream import Stream, work_recorder
from fitcast.recipe import TrainRecipe
from fitcast.step.overflow import float16_warning
from fitcast.units import refusal

__all__ = ["Forecast", "checked_config", "forecast", "forecast_step", "report", "run_stream"]

# What a recipe may change without changing a byte.
NO_MEMORY = {
    "learning_rate": 2e-4,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "warmup_fraction": 0.0,
    "max_steps": 1,
    "logging_steps": 1,
    "save_steps": 1,
    "seed": 0,
}


def forecast(recipe: TrainRecipe, gpu: Gpu = T4) -> Forecast:
    """What one optimizer step of `recipe` will need on `gpu`, with its kernels and its memory.

    A model that the recipe's own step does not run goes through a stock Trainer; `notes` say so.

    Raises:
        ValueError: The recipe cannot run: a precision that the GPU lacks, targets that match no
            layer, a lever that the model cannot take.

    Example:
        >>> recipe = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=64)
        >>> forecast(recipe, T4).fits
        True
    """
    recipe.check_on(gpu)
    processes = min(recipe.world_size, 2)  # any further one is like the second
    asked = dataclasses.replace(recipe, world_size=processes, **NO_MEMORY)
    return cache.remembered(asked, gpu, lambda: _plain_or_by_trainer(asked, gpu))


def _plain_or_by_trainer(recipe: TrainRecipe, gpu: Gpu) -> Forecast:
    try:
        return _forecast(recipe, gpu)
    except NotPlain as reason:
        from fitcast.forecasting.by_trainer import forecast_by_trainer

        return forecast_by_trainer(recipe, gpu, reason.why)


def _forecast(recipe: TrainRecipe, gpu: Gpu) -> Forecast:
    stream = run_stream(dataclasses.replace(recipe, world_size=1), gpu)
    if recipe.world_size > 1:
        stream = data_parallel.wrapped(stream)
    seen = report(
        stream,
        gpu,
        micro_batches=recipe.gradient_accumulation_steps,
        expandable=recipe.expandable_segments,
    )
    return dataclasses.replace(seen, notes=(*seen.notes, *_warnings(recipe, gpu)))


def _warnings(recipe: TrainRecipe, gpu: Gpu) -> list[str]:
    """What changes no byte and spoils the run: lengths nobody trained, numbers beyond float16."""
    config = models.config(recipe.model)
    said = list(models.about_sizes(recipe.model))
    limit = getattr(config, "max_position_embeddings", None)
    if limit and recipe.sequence_length > limit:
        # without a name: the answer is kept for every folder with this config
        said.append(f"the model was made for {limit} tokens: more need its RoPE scaled")
    unsafe = float16_warning(config.model_type, gpu) if recipe.amp_dtype == "float16" else None
    return [*said, unsafe] if unsafe else said


def run_stream(recipe: TrainRecipe, gpu: Gpu, *, whole: bool = False) -> Stream:
    """The memory events of load and first step; unless `whole`, of few layers where they repeat."""
    config = checked_config(recipe)
    total = config.num_hidden_layers
    k = total if recipe.checkpointed_layers == "all" else recipe.checkpointed_layers
    if k > total:
        raise refusal(
            "checkpointed_layers",
            f"be from 0 to {total}, the layers of {recipe.model}",
            k,
            "use 'all' for every layer",
        )
    counts = depth.kinds(total, *_ends(recipe, k).values())
    alike = len(set(getattr(config, "layer_types", None) or ["one"])) == 1
    if not whole and alike:
        few = depth.run_layers(counts)
        deep_to_few = dict(zip(_edges(counts), _edges(few), strict=True))
        shallow = dataclasses.replace(
            _of_few_layers(recipe, k, deep_to_few), expandable_segments=False
        )  # only the replay asks for those: runs with and without are one
        try:
            content = cache.content(recipe.model)
            run = _shallow_run(shallow, content, gpu, sum(few))
            m = _ends(recipe, k).get("offload_checkpoints", k)  # all layers' are alike
            pinned = run.pinned_host_bytes // max(1, deep_to_few[m]) * m
            return dataclasses.replace(depth.deepen(run, counts), pinned_host_bytes=pinned)
        except depth.NotRepeating:
            pass  # then the whole model is run
    return fake_run(recipe, gpu, config)


def _ends(recipe: TrainRecipe, k: int) -> dict[str, int]:
    """Where kinds of layers end: those that forget, those whose checkpoint is on the host, ...

    A switch is for all that forget, which then are of one kind.
    """
    m, kept = recipe.offload_checkpoints, recipe.keep_attention
    ends = {"checkpointed_layers": k}
    if not isinstance(m, bool):
        ends["offload_checkpoints"] = m
    if not isinstance(kept, bool):
        ends["keep_attention"] = k - kept  # the last ones keep
    return ends


def _edges(counts: list[int]) -> list[int]:
    """The first layer of each kind, and the number of all."""
    return list(itertools.accumulate(counts, initial=0))


def _of_few_layers(recipe: TrainRecipe, k: int, few: dict[int, int]) -> TrainRecipe:
    """The recipe of a model with few layers of each kind: where they end deep -> there."""
    ends = {field: few[end] for field, end in _ends(recipe, k).items()}
    if "keep_attention" in ends:
        ends["keep_attention"] = ends["checkpointed_layers"] - ends["keep_attention"]
    return dataclasses.replace(recipe, **ends)


@functools.lru_cache(maxsize=32)
def _shallow_run(recipe: TrainRecipe, content: str, gpu: Gpu, num_layers: int) -> Stream:
    """The stream of a model cut to `num_layers`; `content` tells two configs of one path apart."""
    config = checked_config(recipe)
    config.num_hidden_layers = num_layers
    if (types := getattr(config, "layer_types", None)) and len(types) > num_layers:
        config.layer_types = types[:num_layers]
    return fake_run(recipe, gpu, config)


def checked_config(recipe: TrainRecipe):
    """The model's config, if the recipe's own step can run it.

    Raises:
        NotPlain: Only a stock trainer can.
    """
    config = models.config(recipe.model)
    if why := not_plain(config):
        raise NotPlain(recipe.model, why)
    return config


def forecast_step(
    model: torch.nn.Module, step: Callable[[torch.nn.Module], object], gpu: Gpu = T4
) -> Forecast:
    """What `step(model)` will need on `gpu`, for any step that you write.

    Args:
        model: A model of `fake.fake_model`, or a real one: all of its modules, and the optimizers
            over it, are afterwards as they were, and so are real modules beside it that the step
            uses. Its weights may be in 4 or 8 bits, and it may have adapters.
        step: Makes its inputs or takes them from a DataLoader, runs forward, backward, update;
            twice, if the peak of all later steps is asked for: in the first the optimizer has no
            state yet. It sees fake tensors, which have shapes and no numbers. In it
            `torch.autocast("cuda", ...)`, `device="cuda"` and `.to("cuda")` mean what they mean on
            the card. It may add adapters and make its optimizer; or use one that was made over the
            model's parameters before.

    Raises:
        ValueError: The step asks a tensor for its numbers (`loss.item()`, `if loss > 1`), which is
            said with the line that asks; compiles, saves, or uses an operation that has no fake
            version; or an optimizer over tensors that are of no module.
    """
    own_step.check(model, step, gpu)
    ledger, notes = beside.OwnStepLedger(), []
    kernels = CudaKernels(gpu, on_work=work_recorder(ledger, gpu))
    before = dict(model.named_parameters(remove_duplicate=False))
    with contextlib.ExitStack() as stack:
        for context in (
            loaders.real_loaders(),
            fake.faked(model),
            own_step.optimizers_of(model, before),
            pretend_cuda(gpu),
            fake.fake_tensors(),
            on_the_card(notes),
            beside.Beside(ledger, model, before).faked(),
            ledger,
            kernels,
            own_step.new_parameters_watched(ledger, model),
            own_optimizers.optimizers_on_the_card(),
        ):
            stack.enter_context(context)
        ledger.watch(model)
        ledger.mark("ready")
        try:
            step(model)
        except Exception as error:  # the reader's code, which may do anything
            said = own_step.explained(error)
            if said is error:
                raise
            raise said from error
        ledger.mark("step")
    stream = ledger.stream()
    # Since the step, the fake weights have gone with their model, which no card would see.
    stream.events = stream.events[: stream.marks["step"]]
    if not notes and stream.marks["step"] == stream.marks["ready"]:
        notes.append(own_step.NOTHING)
    return dataclasses.replace(report(stream, gpu), notes=tuple(notes))
