"""Lesson 04: its exercises know right from wrong, its claims hold outside its cells."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from course_utils.data import BUNDLED
from course_utils.exercises import lesson_04
from course_utils.exercises.checks import not_yet, right
from course_utils.exercises.lesson_04 import PUBLISHED
from course_utils.figures import widgets
from fitcast import gpus
from fitcast.forecasting.forecast import forecast
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import measurement


def eps(dtype):
    return torch.finfo(dtype).eps


def spacing(x, dtype):
    return 2.0 ** math.floor(math.log2(x)) * eps(dtype)


def unfinished_spacing(x, dtype):
    power = ...
    return 2.0**power * eps(dtype)


def linears(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def copied(model):
    return sum(2 * module.weight.numel() for _, module in linears(model))


def unfinished_copies(model):
    return ...


# exercise: (reference, {wrong answer's name: answer}, untouched)
EXERCISES = {
    "check_spacing": (
        spacing,
        {
            "at 1 only": lambda x, dtype: eps(dtype),
            "smooth": lambda x, dtype: x * eps(dtype),
            "nearest power": lambda x, dtype: 2.0 ** round(math.log2(x)) * eps(dtype),
            "upside down": lambda x, dtype: eps(dtype) / 2.0 ** math.floor(math.log2(x)),
            "half": lambda x, dtype: spacing(x, dtype) / 2,
            "raises": lambda x, dtype: x / 0,
        },
        unfinished_spacing,
    ),
    "check_copies": (
        copied,
        {
            "four bytes": lambda model: 2 * copied(model),
            "numbers": lambda model: copied(model) // 2,
            "all weights": lambda model: 2 * sum(p.numel() for p in model.parameters()),
            "no head": lambda model: (
                2 * sum(m.weight.numel() for n, m in linears(model) if n != "lm_head")
            ),
            "only right for the bundled model": lambda model: 3047424,
            "not a function": 3,
        },
        unfinished_copies,
    ),
    "check_published": (
        PUBLISHED | {"bnb_4bit_compute_dtype": "float16"},
        {
            "unchanged": dict(PUBLISHED),
            "bf16 on a T4": PUBLISHED | {"fp16": False, "bf16": True},
            "float32 compute dtype": PUBLISHED | {"bnb_4bit_compute_dtype": "float32"},
            "no 4 bits": PUBLISHED | {"load_in_4bit": False},
            "no mixed precision": PUBLISHED | {"fp16": False, "bnb_4bit_compute_dtype": "float16"},
            "changed more": PUBLISHED
            | {"bnb_4bit_compute_dtype": "float16", "learning_rate": 1e-4},
            "only the change": {"bnb_4bit_compute_dtype": "float16"},
            "not settings": "float16",
        },
        ...,
    ),
}


def complaints(check, reference, mistakes, untouched) -> list[str]:
    """What is wrong with a check, going by answers whose verdict is known."""
    found = [] if check(reference).passed else [f"refuses the reference: {check(reference)}"]
    verdicts = {mistake: check(answer) for mistake, answer in mistakes.items()}
    found += [f"accepts {mistake}" for mistake, verdict in verdicts.items() if verdict.passed]
    if len({repr(verdict) for verdict in verdicts.values()}) < len(verdicts):
        found.append("says the same of different mistakes")
    for answer in (untouched, ...):
        verdict = check(answer)
        if verdict.passed is not None or "not attempted yet" not in repr(verdict).lower():
            found.append(f"says of an untouched exercise: {verdict}")
    return found


@pytest.mark.parametrize("name", EXERCISES)
def test_check_knows_right_from_wrong(name):
    assert complaints(getattr(lesson_04, name), *EXERCISES[name]) == []


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize(
    ("stub", "complaint"),
    [
        (lambda *_: right("well done."), "accepts"),
        (lambda *_: not_yet("no."), "refuses the reference"),
    ],
    ids=["accepts everything", "refuses everything"],
)
def test_check_that_judges_nothing_is_caught(name, stub, complaint):
    found = complaints(stub, *EXERCISES[name])
    assert any(complaint in text for text in found)
    assert any("untouched" in text for text in found)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (PUBLISHED, "nothing has changed; a step's products with weights still run"),
        (PUBLISHED | {"bnb_4bit_compute_dtype": "float32"}, "in float32"),
        (PUBLISHED | {"load_in_4bit": False}, "gives up the 4 bits"),
        (PUBLISHED | {"fp16": False, "bf16": True}, "must be 'float16' on a T4"),
    ],
)
def test_published_settings_are_run_not_read(answer, words):
    assert words in repr(lesson_04.check_published(answer))


def test_one_format_needs_fewer_casts():
    mixed, one = (
        lesson_04.run_published(PUBLISHED | {"bnb_4bit_compute_dtype": name})
        for name in ("bfloat16", "float16")
    )
    assert set(mixed.matmuls) == {"bfloat16", "float16"} and set(one.matmuls) == {"float16"}
    assert sum(mixed.matmuls.values()) == sum(one.matmuls.values())
    assert mixed.copied_bytes > 2 * one.copied_bytes


LORA = TrainRecipe(
    model="llama-3.2-1b",
    base="float32",
    lora_dropout=0.0,
    checkpointed_layers=0,
    sequence_length=64,
)


def test_autocast_over_a_frozen_float32_base_costs_its_copies():
    """2 bytes for each weight of a linear layer, but for what activations save."""
    plain, mixed = (
        forecast(replace(LORA, amp_dtype=amp), gpus.T4).peak_bytes for amp in (None, "float16")
    )
    linear = 1_235_814_400 - 16 * 2 * 2048 - 2048  # all but the norms; the head is tied
    assert 0.9 * 2 * linear < mixed - plain < 2 * linear


def step(amp_dtype):
    """Live bytes at the peak of a real step of the bundled model, all weights trained."""
    recipe = TrainRecipe(
        model=BUNDLED,
        base="float32",
        lora_rank=None,
        lora_dropout=0.0,
        checkpointed_layers=0,
        amp_dtype=amp_dtype,
        sequence_length=32,
        optimizer="adamw",
    )
    return measurement.measure_step(recipe, qlora.load_base(recipe), steps=1).report


def test_float16_and_bfloat16_take_the_same_bytes():
    """The lesson counts in bfloat16 where there is no GPU; a T4 would count the same."""
    half, other, full = step("bfloat16"), step("float16"), step(None)
    for holder in ("weights", "optimizer state", "activations"):  # a scaler is a few bytes more
        assert half.composition[holder] == other.composition[holder]
    assert half.saved_activation_bytes == other.saved_activation_bytes
    for holder in ("weights", "optimizer state"):
        assert half.composition[holder] == full.composition[holder]


def test_updates_explorer_draws_every_choice():
    explorer = widgets.updates_explorer({"one": [torch.ones(4)], "small": [torch.full((4,), 1e-3)]})
    assert "float16 0%" in explorer.figure.alt
    explorer.controls["learning_rate"].value = 1e-2
    assert "float16 100%" in explorer.picture.value
    explorer.controls["learning_rate"].value = 1e-6
    explorer.controls["of"].value = "small"
    assert (
        "small. With an update of 1e-06 move: float32 100%, float16 100%" in explorer.picture.value
    )


@pytest.mark.parametrize(("major", "emulated", "native"), [(7, True, False), (8, True, True)])
def test_pytorch_says_bfloat16_of_a_t4_too(monkeypatch, major, emulated, native):
    """PyTorch's own function on a pretended card; the tensor that it tries is really made."""
    for name, value in {
        "is_available": True,
        "current_device": torch.device("cpu"),
        "get_device_properties": SimpleNamespace(major=major),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert torch.cuda.is_bf16_supported() is emulated
    assert torch.cuda.is_bf16_supported(including_emulation=False) is native
    assert gpus.T4.has_bfloat16 is False and gpus.T4.capability[0] == 7
