"""Lesson 02: what it promises, and its exercises: references pass, mistakes fail in own words."""

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from course_utils.data import BUNDLED
from course_utils.exercises import lesson_02
from course_utils.exercises.checks import not_yet, right
from course_utils.figures import widgets
from fitcast import gpus
from fitcast.forecasting.forecast import forecast
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.step.levers import decoder_layers, unwrap
from fitcast.units import GIB, show_bytes

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


def never_filled_in(ctx, grad):
    output = ...
    output.backward(...)
    return None, ...


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


class Untouched(Forget):
    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(...)
        return function(x)


ALL, SOME = [6, 5, 4, 3, 2, 1], [4, 3, 3, 2, 2, 1]


def traces(keep_all, keep_135):
    return {"keep_all": keep_all, "keep_135": keep_135}


EIGHT = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", sequence_length=1024)


def check_smallest_k(answer=...):
    return lesson_02.check_smallest_k(answer, EIGHT, gpus.T4, 12 * GIB)


CHECKS = {
    "check_traces": lesson_02.check_traces,
    "check_forget": lesson_02.check_forget,
    "check_smallest_k": check_smallest_k,
}
# exercise: (reference, {wrong answer's name: answer}, untouched answers)
EXERCISES = {
    "check_traces": (
        traces(ALL, SOME),
        {
            "counted after the step": traces([5, 4, 3, 2, 1, 0], SOME),
            "nothing is freed": traces([6] * 6, SOME),
            "no room for what is recomputed": traces(ALL, [3, 3, 2, 2, 1, 1]),
            "everything recomputed at once": traces(ALL, ALL),
            "kept ones stay": traces(ALL, [3] * 6),
            "a slip at step 3": traces(ALL, [4, 3, 3, 3, 2, 1]),
            "too short": traces(ALL, [4, 3]),
            "a number": traces(6, 4),
        },
        (..., traces(..., ...), traces(ALL, ...)),
    ),
    "check_forget": (
        Forget.apply,
        {
            "does not forget": lambda function, x: function(x),
            "keeps the graph": KeepsTheGraph.apply,
            "another result": lambda function, x: Forget.apply(function, x) + 1,
            "no graph in backward": backward(without_grad_mode),
            "grad for x.grad": backward(passes_grad_on),
            "starts from nothing": backward(starts_from_nothing),
            "no gradients for the weights": backward(only_the_input),
            "twice": backward(twice),
            "a number": 3,
        },
        (..., Untouched.apply, backward(never_filled_in)),
    ),
    "check_smallest_k": (
        18,
        {
            "rounded up": 17,
            "one too many": 19,
            "the ones that remember": 14,
            "GB for GiB": 20,
            "every layer": 32,
            "none": 0,
            "too many": 33,
            "half a layer": 17.5,
            "text": "18 layers",
        },
        (...,),
    ),
}
# Two answers that keep as much hear the same sentence.
ALIKE = {"check_traces": 0, "check_forget": 1, "check_smallest_k": 0}


def complaints(name, check) -> list[str]:
    """What is wrong with a check, going by answers whose verdict is known."""
    reference, mistakes, untouched = EXERCISES[name]
    found = []
    if not check(reference).passed:
        found.append(f"refuses the reference: {check(reference)}")
    verdicts = {mistake: check(answer) for mistake, answer in mistakes.items()}
    found += [
        f"accepts {mistake}" for mistake, verdict in verdicts.items() if verdict.passed is not False
    ]
    if len({repr(verdict) for verdict in verdicts.values()}) < len(verdicts) - ALIKE[name]:
        found.append("says the same of different mistakes")
    for answer in untouched:
        verdict = check(answer)
        if verdict.passed is not None or "not attempted yet" not in repr(verdict).lower():
            found.append(f"says of an untouched exercise: {verdict}")
    return found


@pytest.mark.parametrize("name", EXERCISES)
def test_check_knows_right_from_wrong(name):
    assert complaints(name, CHECKS[name]) == []


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize(
    ("stub", "complaint"),
    [
        (lambda *_, **__: right("well done."), "accepts"),
        (lambda *_, **__: not_yet("no."), "refuses the reference"),
    ],
    ids=["accepts everything", "refuses everything"],
)
def test_check_that_judges_nothing_is_caught(name, stub, complaint):
    found = complaints(name, stub)
    assert any(complaint in text for text in found)
    assert any("untouched" in text for text in found)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (backward(without_grad_mode), "under `torch.enable_grad()`"),
        (backward(passes_grad_on), "backward returns what arrived at `x`"),
        (backward(starts_from_ones), "starts from `grad`"),
        (backward(starts_from_nothing), "starts from the gradient that came in"),
        (backward(only_the_input), "the weights got no gradient"),
        (backward(twice), "from `grad`, once"),
        (lambda function, x: function(x), "wait for backward; the target is at most 24.00 KiB"),
        (lambda function, x: Forget.apply(function, x) * 2, "not function(x)"),
    ],
)
def test_forget_names_the_mistake(answer, words):
    assert words in repr(lesson_02.check_forget(answer))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (17, "that runs out of memory. Its peak is 12.02 GiB"),
        (19, "18 fit as well"),
        (14, "how many layers may *remember*"),
        (20, "you used GB (10**9)"),
        (32, "each layer that remembers saves time"),
        (33, "from 0 to 32"),
        (17.5, "a whole number"),
    ],
)
def test_smallest_k_names_the_mistake(answer, words):
    assert words in repr(check_smallest_k(answer))


def test_memory_is_linear_in_k():
    """What the hints of exercise 02.3 rest on."""
    peaks = [
        forecast(replace(EIGHT, checkpointed_layers=k)).peak_allocated_bytes
        for k in (16, 17, 18, 24, 32)
    ]
    assert peaks[0] - peaks[1] == pytest.approx(peaks[1] - peaks[2], rel=1e-3)
    assert peaks[0] - peaks[1] == pytest.approx((peaks[3] - peaks[4]) / 8, rel=1e-2)


def test_two_long_sequences_of_3b_are_safe_on_a_t4_and_three_are_not():
    """What lesson 02 hands to lesson 03, in words."""
    steps = [
        forecast(replace(EIGHT, model="llama-3.2-3b", sequence_length=2048, micro_batch_size=n))
        for n in (2, 3)
    ]
    assert [step.fits for step in steps] == [True, True]
    assert steps[0].margin_bytes > GIB and steps[1].margin_bytes < -GIB


def test_rule_of_three_billion_is_wrong_on_both_sides():
    def fits(model, length):
        return forecast(
            replace(EIGHT, model=model, sequence_length=length, checkpointed_layers=0)
        ).fits

    assert fits("llama-3.1-8b", 512) and not fits("llama-3.2-1b", 2048)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_pytorchs_own_checkpoint_passes(use_reentrant):
    own = functools.partial(checkpoint, use_reentrant=use_reentrant)
    assert lesson_02.check_forget(own).passed


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


@pytest.mark.parametrize(
    "forget", [Forget.apply, functools.partial(checkpoint, use_reentrant=True)]
)
def test_reentrant_checkpoints_lose_adapters_silently(forget):
    """The learner's function behaves as PyTorch's reentrant kind does, in the real model."""
    found = gradients(adapted(forget, layers=3))
    assert [g is not None for g in found] == 24 * [False] + 8 * [True]
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients(adapted(forget, layers=4))


def test_either_repair_brings_them_back():
    plain = gradients(adapted(None, layers=0))
    marked = adapted(Forget.apply, layers=4)
    unwrap(marked).enable_input_require_grads()
    notes = adapted(functools.partial(checkpoint, use_reentrant=False), layers=4)
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


def test_widget_follows_the_forecast():
    explorer = widgets.forgetting_explorer()
    peak = forecast(
        TrainRecipe(
            model="llama-3.2-1b", amp_dtype="float16", sequence_length=2048, checkpointed_layers=8
        )
    ).peak_allocated_bytes
    assert f"8 of 16 layers: {show_bytes(peak)}, fits" in explorer.figure.alt
    assert "0 of 16 layers" in explorer.figure.alt and "does not fit" in explorer.figure.alt
    explorer.controls["sequence_length"].value = 256
    explorer.controls["layers_that_forget"].value = "25 %"
    assert "4 of 16 layers" in explorer.picture.value
    assert "does not fit" not in explorer.picture.value
