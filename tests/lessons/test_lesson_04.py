"""Lesson 04: its exercises know right from wrong, its claims hold outside its cells."""

import functools
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from course_utils.data import BUNDLED
from course_utils.exercises import lesson_04
from course_utils.exercises.lesson_04 import PUBLISHED
from course_utils.figures import widgets
from course_utils.topics.precision import OperationLog, products_of_4_bits
from fitcast import gpus
from fitcast.forecasting.forecast import forecast
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import measurement
from tests.lessons.exercises import complaints


def eps(dtype):
    return torch.finfo(dtype).eps


def spacing(x, dtype):
    return 2.0 ** math.floor(math.log2(x)) * eps(dtype)


def linears(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]


def copied(model):
    return sum(2 * module.weight.numel() for _, module in linears(model))


def to_power(power):
    return lambda x, dtype: 2.0 ** power(x) * eps(dtype)


# exercise: answers that pass, {what is wrong with one: (answer, words of its verdict)}
EXERCISES = {
    "check_spacing": (
        [spacing, lambda x, dtype: torch.tensor(spacing(x, dtype), dtype=torch.float64)],
        {
            "at 1 only": (lambda x, dtype: eps(dtype), "that is the distance at 1.0"),
            "smooth": (lambda x, dtype: x * eps(dtype), "scales smoothly"),
            "nearest power": (to_power(lambda x: round(math.log2(x))), "round the power down"),
            "int() for floor": (to_power(lambda x: int(math.log2(x))), "int() cuts towards 0"),
            "log for log2": (to_power(lambda x: math.floor(math.log(x))), "log is to base e"),
            "log10 for log2": (to_power(lambda x: math.floor(math.log10(x))), "log10 to base 10"),
            "a smooth log": (to_power(math.log), "log is to base e"),
            "a smooth log10": (to_power(math.log10), "log10 to base 10"),
            "rounded up": (to_power(lambda x: math.ceil(math.log2(x))), "down, not up"),
            "a power too high": (
                to_power(lambda x: math.floor(math.log2(x)) + 1),
                "(1.0, torch.float32) should give 1.1920928955078125e-07, got 2.38418",
            ),
            "upside down": (
                lambda x, dtype: eps(dtype) / 2.0 ** math.floor(math.log2(x)),
                "you divided by the power",
            ),
            "half": (lambda x, dtype: spacing(x, dtype) / 2, "that is half of it"),
            "raises": (lambda x, dtype: x / 0, "your answer raised ZeroDivisionError"),
        },
    ),
    "check_copies": (
        [copied, lambda model: torch.tensor(copied(model))],
        {
            "four bytes": (lambda model: 2 * copied(model), "counts 4 bytes each"),
            "numbers": (lambda model: copied(model) // 2, "that counts numbers"),
            "all weights": (
                lambda model: 2 * sum(p.numel() for p in model.parameters()),
                "that counts every weight",
            ),
            "no head": (
                lambda model: (
                    2 * sum(m.weight.numel() for n, m in linears(model) if n != "lm_head")
                ),
                "the head is a linear layer too",
            ),
            "only right for the bundled model": (
                lambda model: 3047424,
                "for llama-3.2-1b it should be 2.30 GiB, got 2.91 MiB",
            ),
            "text": (lambda model: "2.91 MiB", "for bundled it should be 2.91 MiB, got '2.91 MiB'"),
            "not a function": (3, "a function is asked for, got int"),
        },
    ),
    "check_published": (
        [
            PUBLISHED | {"bnb_4bit_compute_dtype": "float16"},
            PUBLISHED | {"bnb_4bit_compute_dtype": torch.float16},
        ],
        {
            "unchanged": (
                dict(PUBLISHED),
                "nothing has changed; of a step's products with 4-bit weights 28 get bfloat16 and "
                "run in float16",
            ),
            "bf16 on a T4": (
                PUBLISHED | {"fp16": False, "bf16": True},
                "bf16 must be False on a T4",
            ),
            "float32 compute dtype": (
                PUBLISHED | {"bnb_4bit_compute_dtype": "float32"},
                "28 get float32 and run in float16",
            ),
            "no 4 bits": (PUBLISHED | {"load_in_4bit": False}, "gives up the 4 bits"),
            "no mixed precision": (
                PUBLISHED | {"fp16": False, "bnb_4bit_compute_dtype": "float16"},
                "without fp16 the products leave",
            ),
            "changed more": (
                PUBLISHED | {"bnb_4bit_compute_dtype": "float16", "learning_rate": 1e-4},
                "one change is enough; you changed bnb_4bit_compute_dtype, learning_rate",
            ),
            "only the change": (
                {"bnb_4bit_compute_dtype": "float16"},
                "the names must stay those of the published settings",
            ),
            "not settings": ("float16", "the settings as a dict are asked for, got str"),
        },
    ),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_check_knows_right_from_wrong(name, monkeypatch):
    for slow in ("fake_model", "copies"):  # of the same three models for each answer
        monkeypatch.setattr(lesson_04, slow, functools.cache(getattr(lesson_04, slow)))
    assert complaints(getattr(lesson_04, name), name, *EXERCISES[name]) == []


def test_of_the_third_questions_weights_only_the_small_one_moves():
    weights = torch.tensor([4.0, 0.1], dtype=torch.float16)
    before = weights.clone()
    for _ in range(1000):
        weights += 0.0001
    assert (weights != before).tolist() == [False, True]


def test_a_compute_dtype_of_its_own_is_a_detour_of_forward():
    """By bitsandbytes' source: the layer casts its input, backward takes the gradient's format."""
    mixed, one = (
        lesson_04.run_published(PUBLISHED | {"bnb_4bit_compute_dtype": name})
        for name in ("bfloat16", "float16")
    )
    half = 4 * 7  # of four layers' products, forward or backward
    assert mixed.seen == {("bfloat16", "float16"): half, ("float16", "float16"): half}
    assert mixed.detours == half and one.seen == {("float16", "float16"): 2 * half}


def test_on_an_l4_two_other_settings_leave_one_format():
    """The Task after exercise 04.2; bfloat16 is that card's by its capability."""
    assert gpus.L4.has_bfloat16
    l4 = lesson_04.run_published(PUBLISHED | {"fp16": False, "bf16": True})
    assert l4.detours == 0 and set(l4.seen) == {("bfloat16", "bfloat16")}


def test_a_gpu_gets_more_tokens_than_bitsandbytes_multiplies_packed():
    """On an H200 sixteen tokens of the published recipe had no detour, and it passed unchanged."""
    source = Path(bitsandbytes.__file__).with_name("backends") / "cuda" / "ops.py"
    most = re.findall(r"_custom_max_m = (\d+)", source.read_text("utf-8"))
    assert max(map(int, most)) < lesson_04.ON_A_GPU


def test_watching_products_changes_none():
    """A dispatch mode does: under one, forward's products run in bfloat16, and backward's too."""
    from bitsandbytes.autograd._functions import MatMul4Bit

    own = vars(MatMul4Bit)["forward"]
    with products_of_4_bits() as quiet:
        lesson_04.run_published(PUBLISHED)
        assert vars(MatMul4Bit)["forward"] is not own
    assert vars(MatMul4Bit)["forward"] is own and quiet.detours == 28
    with OperationLog():
        assert ("bfloat16", "bfloat16") in lesson_04.run_published(PUBLISHED).seen


LORA = TrainRecipe(
    model="llama-3.2-1b",
    base="float32",
    lora_dropout=0.0,
    checkpointed_layers=0,
    sequence_length=64,
)


@pytest.mark.slow
def test_autocast_over_a_frozen_float32_base_costs_its_copies():
    """2 bytes for each weight of a linear layer, but for what activations save."""
    plain, mixed = (
        forecast(replace(LORA, amp_dtype=amp), gpus.T4).peak_bytes for amp in (None, "float16")
    )
    linear = 1_235_814_400 - 16 * 2 * 2048 - 2048  # all but the norms; the head is tied
    assert 0.9 * 2 * linear < mixed - plain < 2 * linear


@pytest.mark.slow
def test_with_checkpointing_the_heads_copy_is_what_autocast_adds():
    plain, mixed = (
        forecast(replace(LORA, amp_dtype=amp, checkpointed_layers=16), gpus.T4).peak_bytes
        for amp in (None, "float16")
    )
    assert mixed - plain == pytest.approx(2 * 128_256 * 2048, rel=0.05)


@functools.cache
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


def test_autocast_keeps_a_norms_output_once_for_each_product_that_reads_it():
    def kept(report, operation):
        return sum(
            block.shape == (1, 32, 192) and block.operation.startswith(operation)
            for block in report.saved
        )

    norms, readers = 4 * 2 + 1, 4 * (3 + 2) + 1  # query, key, value; gate, up; the head
    assert kept(step(None), "mul") == 2 * norms  # normalised, and then times the norm's weight
    assert kept(step("bfloat16"), "mul") == norms
    assert kept(step("bfloat16"), "_to_copy") == readers


@pytest.mark.slow
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
