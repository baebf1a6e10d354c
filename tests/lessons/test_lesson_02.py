"""Lesson 02: what it promises, and its exercises: references pass, mistakes fail in own words."""

import re
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from course_utils.data import BUNDLED
from course_utils.exercises import lesson_02
from course_utils.figures import widgets
from course_utils.topics.checkpointing import WorkCounter
from fitcast import gpus
from fitcast.forecasting.forecast import forecast
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.step.levers import decoder_layers, unwrap
from fitcast.units import GIB, show_bytes
from tests.lessons.exercises import complaints

RECIPE = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=16,
    lora_dropout=0.0,
    checkpointed_layers=0,
    optimizer="adamw",
    micro_batch_size=2,
    sequence_length=32,
)


class Forget(torch.autograd.Function):
    """The reference answer."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(x)
        output.backward(grad)
        return None, x.grad


def recomputed(ctx):
    x = ctx.saved_tensors[0].detach().requires_grad_()
    with torch.enable_grad():
        return x, ctx.function(x)


def backward(function):
    """`Forget` with another backward."""
    return type("Mistaken", (Forget,), {"backward": staticmethod(function)}).apply


def without_grad_mode(ctx, grad):
    x = ctx.saved_tensors[0].detach().requires_grad_()
    ctx.function(x).backward(grad)
    return None, x.grad


def passes_grad_on(ctx, grad):
    x, output = recomputed(ctx)
    output.backward(grad)
    return None, grad


def starts_from_ones(ctx, grad):
    x, output = recomputed(ctx)
    output.backward(torch.ones_like(grad))
    return None, x.grad


def starts_from_nothing(ctx, grad):
    x, output = recomputed(ctx)
    output.backward()
    return None, x.grad


def only_the_input(ctx, grad):
    x, output = recomputed(ctx)
    return None, torch.autograd.grad(output, x, grad)[0]


def twice(ctx, grad):
    x, output = recomputed(ctx)
    output.backward(grad, retain_graph=True)
    first = x.grad.clone()
    output.backward(grad)
    return None, first


def returns_only_x(ctx, grad):
    x, output = recomputed(ctx)
    output.backward(grad)
    return x.grad


def empty_backward(ctx, grad): ...


def by_torch_autograd_grad(ctx, grad):
    """The same without `.backward()`: what is asked for is asked by name."""
    x, output = recomputed(ctx)
    weights = list(ctx.function.parameters())
    gradients = torch.autograd.grad(output, [x, *weights], grad)
    for weight, found in zip(weights, gradients[1:], strict=True):
        weight.grad = found
    return None, gradients[0]


class OnTheContext(Forget):
    """Keeps `x` as an attribute; nothing frees it early, and here nothing need."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.x = function, x
        return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.x.detach().clone().requires_grad_(True)
        with torch.set_grad_enabled(True):
            ctx.function(x).backward(grad)
        return None, x.grad


class KeepsTheOutput(Forget):
    @staticmethod
    def forward(ctx, function, x):
        ctx.function, output = function, function(x)
        ctx.save_for_backward(x, output)
        return output


class KeepsTheGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        with torch.enable_grad():
            ctx.x = x.detach().requires_grad_()
            ctx.output = function(ctx.x)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad):
        ctx.output.backward(grad)
        return None, ctx.x.grad


ALL, SOME = [6, 5, 4, 3, 2, 1], [4, 3, 3, 2, 2, 1]


def traces(keep_all, keep_135):
    return {"keep_all": keep_all, "keep_135": keep_135}


EIGHT = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", sequence_length=1024)


def check_smallest_k(answer):
    return lesson_02.check_smallest_k(answer, EIGHT, gpus.T4, 12 * GIB)


def test_traces():
    wrong = {
        "counted after the step": (traces([5, 4, 3, 2, 1, 0], SOME), "before its own input"),
        "nothing is freed": (traces([6] * 6, SOME), "keep_all: what backward has used is freed"),
        "no room for what is recomputed": (traces(ALL, [3, 3, 2, 2, 1, 1]), "takes room as well"),
        "everything recomputed at once": (traces(ALL, ALL), "one segment at a time"),
        "kept ones stay": (traces(ALL, [3] * 6), "keep_135: what backward has used is freed"),
        "a slip at step 3": (traces(ALL, [4, 3, 3, 3, 2, 1]), "step 3, memory holds a1, a3"),
        "too short": (traces(ALL, [4, 3]), "keep_135 is a list of 6 counts"),
        "a number": (traces(6, 4), "keep_all is a list of 6 counts"),
        "half done": (traces(ALL, ...), "1 of 2 `...` still there: `keep_135 = ...`"),
    }
    right = [
        traces(ALL, SOME),
        traces(range(6, 0, -1), tuple(SOME)),
        traces(np.array(ALL), torch.tensor(SOME)),
        traces([float(count) for count in ALL], [np.int64(count) for count in SOME]),
        traces(torch.arange(6, 0, -1), [torch.tensor(count) for count in SOME]),
    ]
    assert complaints(lesson_02.check_traces, "check_traces", right, wrong) == []


@pytest.mark.slow
def test_a_trace_is_drawn_beside_the_right_one_when_it_is_there():
    folded = lesson_02.draw_traces(..., SOME)
    assert "keep a1, a3, a5: 4, 3, 3, 2, 2, 1 held" in folded._repr_html_()
    assert "held" not in repr(folded)
    for wrong in (3, [1, 2], [..., *SOME[1:]], "643322", [4, 3, 3, 3, 2, 1]):
        assert repr(lesson_02.draw_traces(ALL, wrong)) == repr(folded)
    drawn = lesson_02.draw_traces(range(6, 0, -1), np.array(SOME))
    assert "keep a1 to a6: 6 of 6 as counted" in drawn.alt
    assert "keep a1, a3, a5: 6 of 6 as counted" in drawn.alt


def test_forget():
    wrong = {
        "does not forget": (lambda f, x: f(x), "wait for backward; the target is at most 24.00 Ki"),
        "keeps the graph": (KeepsTheGraph.apply, "240.00 KiB wait for backward"),
        "keeps the output too": (KeepsTheOutput.apply, "48.00 KiB wait for backward"),
        "another result": (lambda f, x: Forget.apply(f, x) + 1, "not function(x)"),
        "no graph in backward": (backward(without_grad_mode), "under `torch.enable_grad()`"),
        "grad for x.grad": (backward(passes_grad_on), "backward returns what arrived at `x`"),
        "starts from ones": (backward(starts_from_ones), "starts from `grad`"),
        "starts from nothing": (backward(starts_from_nothing), "from the gradient that came in"),
        "no gradients for the weights": (backward(only_the_input), "the weights got no gradient"),
        "twice": (backward(twice), "from `grad`, once"),
        "a number": (3, "a function is asked for, got int"),
        "one gradient for two arguments": (
            backward(returns_only_x),
            "one value for each argument of forward",
        ),
        "backward still to write": (
            type("Half", (Forget,), {"backward": staticmethod(empty_backward)}).apply,
            "1 of 2 `...` still there: `def empty_backward",
        ),
    }
    right = [
        Forget.apply,
        OnTheContext.apply,
        backward(by_torch_autograd_grad),
        *(partial(checkpoint, use_reentrant=kind) for kind in (True, False)),
    ]
    assert complaints(lesson_02.check_forget, "check_forget", right, wrong) == []


def test_smallest_k():
    wrong = {
        "rounded up": (17, "that runs out of memory. Its peak is 12.02 GiB"),
        "too many": (33, "from 0 to 32"),
        "half a layer": (17.5, "a whole number"),
        "text": ("18 layers", "a whole number"),
    }
    assert complaints(check_smallest_k, "check_smallest_k", [18, np.int64(18)], wrong) == []


@pytest.mark.slow
def test_smallest_k_knows_where_a_wrong_one_comes_from():
    wrong = {
        "one too many": (19, "18 fit as well."),
        "the ones that remember": (14, "runs out of memory; it is how many layers may *remember*"),
        "GB for GiB": (20, "19 fit as well; it comes out when GB (10**9) are used"),
        "every layer": (32, "each layer that remembers saves time"),
        "none": (0, "that runs out of memory"),
    }
    assert complaints(check_smallest_k, "check_smallest_k", [18], wrong) == []


@pytest.mark.slow
def test_memory_is_linear_in_k():
    """What the hints of exercise 02.3 rest on."""
    peaks = [
        forecast(replace(EIGHT, checkpointed_layers=k)).peak_allocated_bytes
        for k in (16, 17, 18, 24, 32)
    ]
    assert peaks[0] - peaks[1] == pytest.approx(peaks[1] - peaks[2], rel=1e-3)
    assert peaks[0] - peaks[1] == pytest.approx((peaks[3] - peaks[4]) / 8, rel=1e-2)


@pytest.mark.slow
def test_two_long_sequences_of_3b_are_safe_on_a_t4_and_three_are_not():
    """What lesson 02 hands to lesson 03, in words."""
    steps = [
        forecast(replace(EIGHT, model="llama-3.2-3b", sequence_length=2048, micro_batch_size=n))
        for n in (2, 3)
    ]
    assert [step.fits for step in steps] == [True, True]
    assert steps[0].margin_bytes > GIB and steps[1].margin_bytes < -GIB


@pytest.mark.slow
def test_rule_of_three_billion_is_wrong_on_both_sides():
    def fits(model, rows, length):
        shape = {"micro_batch_size": rows, "sequence_length": length}
        return forecast(replace(EIGHT, model=model, checkpointed_layers=0, **shape)).fits

    assert fits("llama-3.1-8b", 1, 512) and not fits("llama-3.2-1b", 1, 2048)
    assert fits("llama-3.2-1b", 4, 512) and fits("llama-3.2-1b", 2, 1024)  # the same tokens


def adapted(forget, layers, recipe=RECIPE):
    """The bundled model with adapters, the first layers forgetting, embeddings not marked."""
    torch.manual_seed(0)
    model = qlora.add_adapters(qlora.load_base(recipe), recipe).train()
    unwrap(model).disable_input_require_grads()
    for layer in decoder_layers(model)[:layers]:
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, forget
    return model


def gradients(model) -> list:
    ids = torch.arange(64).view(2, 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("forget", [Forget.apply, partial(checkpoint, use_reentrant=True)])
def test_reentrant_checkpoints_lose_adapters_silently(forget):
    """The learner's function behaves as PyTorch's reentrant kind does, in the real model."""
    found = gradients(adapted(forget, layers=3))
    assert [g is not None for g in found] == 24 * [False] + 8 * [True]
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients(adapted(forget, layers=4))


@pytest.mark.slow
def test_the_learners_function_runs_on_where_pytorchs_stops():
    """With all weights trained: each layer's last product once more, and nothing else."""
    full, ids, flops = replace(RECIPE, lora_rank=None), torch.arange(64).view(2, 32), []
    for forget in (Forget.apply, partial(checkpoint, use_reentrant=False)):
        model = adapted(forget, 4, full)
        with WorkCounter() as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        flops.append(counter.flops)
    down = unwrap(model).model.layers[0].mlp.down_proj.weight
    assert flops[0] - flops[1] == 4 * 2 * ids.numel() * down.numel()


def test_either_repair_brings_them_back():
    plain = gradients(adapted(None, layers=0))
    marked = adapted(Forget.apply, layers=4)
    unwrap(marked).enable_input_require_grads()
    notes = adapted(partial(checkpoint, use_reentrant=False), layers=4)
    for model in (marked, notes):
        assert all(map(torch.equal, gradients(model), plain))


def test_a_layer_forgets_only_in_training_mode():
    """What section 3 shows: switched on, and yet everything is kept."""
    from fitcast.memory.ledger import MemoryLedger

    model = qlora.load_base(replace(RECIPE, lora_rank=None))
    qlora.apply_levers(model, replace(RECIPE, checkpointed_layers="all"))
    ids, kept = torch.arange(64).view(2, 32), {}
    for mode in (model.eval, model.train):
        mode()
        with MemoryLedger(model, inputs=ids) as ledger:
            loss = model(input_ids=ids, labels=ids).loss
        kept[mode.__name__] = ledger.report().saved_activation_bytes
        del loss
    assert kept["train"] < 0.3 * kept["eval"]


@pytest.mark.slow
def test_widget_follows_the_forecast():
    explorer = widgets.forgetting_explorer()
    peak = forecast(
        TrainRecipe(
            model="llama-3.2-3b", amp_dtype="float16", sequence_length=2048, checkpointed_layers=14
        )
    ).peak_allocated_bytes
    assert f"14 of 28 layers: {show_bytes(peak)}, does not fit" in explorer.figure.alt
    assert re.search(r"28 of 28 layers: [\d.]+ GiB, fits", explorer.figure.alt)
    explorer.controls["sequence_length"].value = 1024  # the lesson's task
    assert re.search(r"0 of 28 layers: [\d.]+ GiB, fits", explorer.picture.value)
    explorer.controls["layers_that_forget"].value = "25 %"
    assert "7 of 28 layers" in explorer.picture.value
    assert "does not fit" not in explorer.picture.value
