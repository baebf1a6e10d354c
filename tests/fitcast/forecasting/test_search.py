"""What fits and what each change is worth, against exhaustive search and measured speeds."""

import dataclasses
import itertools
import json
import random
from concurrent.futures import Executor, Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import GraniteConfig

from course_utils.data import BUNDLED
from course_utils.topics import recorded
from fitcast import models
from fitcast.forecasting import search
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.launches import RECORDED_SECONDS
from fitcast.forecasting.search import (
    DoesNotFit,
    Lever,
    fit,
    levers,
    tokens_per_second,
)
from fitcast.gpus import H200, T4
from fitcast.recipe import TrainRecipe
from fitcast.units import MIB

ROWS = json.loads((Path(__file__).parents[2] / "data" / "h200_steps.json").read_text("utf-8"))[
    "rows"
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A wide, shallow model, so that the search is short and memory is tight all the same."""
    config = models.config("llama-3.2-1b")
    config.num_hidden_layers = 2
    path = tmp_path_factory.mktemp("shallow")
    config.save_pretrained(path)
    return TrainRecipe(
        model=str(path), amp_dtype="float16", sequence_length=1024, gradient_accumulation_steps=4
    )


@pytest.fixture(scope="module")
def small_gpu():
    return dataclasses.replace(T4, name="small", total_bytes=2600 * MIB)


@pytest.mark.slow
def test_fit_finds_what_exhaustive_search_finds(recipe, small_gpu):
    best = fit(recipe, small_gpu)
    assert best.forecast.fits and best.forecast.margin_bytes >= 0
    assert best.recipe.effective_batch_size == 4
    fastest, faster = 0.0, dataclasses.replace(recipe, **search.COMPILED)
    for micro, k, loss, attention, keep in itertools.product(
        (1, 2, 4), (0, 1, 2), ("full", "compiled"), ("stock", "explicit_kv"), (False, True)
    ):
        if k or not keep:
            candidate = dataclasses.replace(
                faster,
                micro_batch_size=micro,
                gradient_accumulation_steps=4 // micro,
                loss=loss,
                checkpointed_layers=k,
                attention=attention,
                keep_attention=keep,
                expandable_segments=True,
            )
            f = forecast(candidate, small_gpu)
            if f.margin_bytes >= 0:
                fastest = max(fastest, tokens_per_second(candidate, f))
    low, high = best.tokens_per_second
    assert low < tokens_per_second(best.recipe, best.forecast) < high
    assert tokens_per_second(best.recipe, best.forecast) == pytest.approx(fastest, rel=0.01)


def test_micro_batches_end_where_recipes_do(monkeypatch):
    """A card on which everything fits; the larger the micro batch, the faster."""

    def roomy(recipe, gpu):
        seconds = recipe.gradient_accumulation_steps * (1 + recipe.micro_batch_size / 1000)
        return SimpleNamespace(
            margin_bytes=1, pinned_host_bytes=0, ideal_seconds=seconds, operations=0, gpu=gpu
        )

    monkeypatch.setattr(search, "forecast", roomy)
    recipe = TrainRecipe(model=BUNDLED, amp_dtype="float16", sequence_length=2)
    for target, micro, accumulated in ((8192, 4096, 2), (24, 8, 3), (65536, 4096, 16)):
        best = fit(recipe, H200, target).recipe
        assert (best.micro_batch_size, best.gradient_accumulation_steps) == (micro, accumulated)


@pytest.mark.parametrize(
    ("options", "capability", "mlp", "loss"),
    [
        ({}, (7, 5), "compiled", "compiled"),
        ({"compiled": False}, (7, 5), "lean", "fused"),
        ({}, (6, 1), "lean", "fused"),  # Triton's kernels want 7.0
    ],
)
def test_compiled_parts_are_picked_where_they_may_be(monkeypatch, options, capability, mlp, loss):
    def roomy(recipe, gpu):
        return SimpleNamespace(
            margin_bytes=1,
            pinned_host_bytes=0,
            operations=0,
            gpu=gpu,
            ideal_seconds=1 + (recipe.mlp == "stock"),
        )

    monkeypatch.setattr(search, "forecast", roomy)
    recipe = TrainRecipe(model=BUNDLED, amp_dtype="float16", sequence_length=2)
    found = fit(recipe, dataclasses.replace(T4, capability=capability), **options).recipe
    assert (found.mlp, found.loss) == (mlp, loss)
    assert found.adapters == "in_place" and found.flat_optimizer


def test_where_the_host_is_slow_parts_are_written_out(monkeypatch):
    """A card that waits for Python: compiled calls take longer than what they spare."""

    def waiting(recipe, gpu):
        operations = {"stock": 3000, "lean": 1000, "compiled": 1100}[recipe.mlp]
        return SimpleNamespace(
            margin_bytes=1, pinned_host_bytes=0, ideal_seconds=1e-9, operations=operations, gpu=gpu
        )

    monkeypatch.setattr(search, "forecast", waiting)
    recipe = TrainRecipe(model=BUNDLED, amp_dtype="float16", sequence_length=2)
    found = fit(recipe, T4).recipe
    assert (found.mlp, found.rotary, found.loss) == ("lean", "lean", "fused")


def test_attention_is_kept_by_as_many_layers_as_fit(monkeypatch):
    """A card with room for the output of five layers of 16: they are found."""

    def five(recipe, gpu):
        forgetting = recipe.checkpointed_layers == "all" or recipe.checkpointed_layers == 16
        kept = 16 if recipe.keep_attention is True else int(recipe.keep_attention)
        return SimpleNamespace(
            margin_bytes=5 - kept if forgetting else -1, pinned_host_bytes=0,
            ideal_seconds=20 - kept, operations=0, gpu=gpu,
        )  # fmt: skip

    monkeypatch.setattr(search, "forecast", five)
    recipe = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=2)
    assert fit(recipe, T4).recipe.keep_attention == 5


def world(seed):
    """A card and a model whose bytes and seconds are formulas: margin, ideal seconds, operations.

    Args:
        seed: For its numbers; among them what a micro batch costs beside its tokens.
    """
    draw = random.Random(seed)
    weights, batch, layer, attention = (draw.uniform(*ends) for ends in (
        (0.1, 0.6), (0.001, 0.03), (0.01, 0.1), (0.001, 0.02)))  # fmt: skip
    again, beside = draw.uniform(0.1, 0.9), 10 ** draw.uniform(-2, 0.3)
    launches = draw.choice([0, 0, 2e4])

    def needs(micro, k, kept_outputs):
        held = weights + micro * (batch + layer * (16 - k) + attention * kept_outputs)
        layers = 48 + k * again - kept_outputs * again / 2
        return 1 - held, 64 / micro * (micro + beside) * layers, 64 / micro * launches * layers

    return needs


def test_what_is_not_weighed_would_have_been_no_faster(monkeypatch):
    """Batches that a search passes over, against every batch of made-up cards."""
    recipe = TrainRecipe(
        model="llama-3.2-1b", amp_dtype="float16", sequence_length=64,
        gradient_accumulation_steps=64,
    )  # fmt: skip
    monkeypatch.setattr(search, "_losses", lambda recipe, lean: (lean,))
    spared, largest = 0, 0

    def made_up(recipe, gpu):
        nonlocal largest
        largest = max(largest, recipe.micro_batch_size)
        k = 16 if recipe.checkpointed_layers == "all" else recipe.checkpointed_layers
        outputs = k if recipe.keep_attention is True else int(recipe.keep_attention)
        margin, ideal, operations = needs(recipe.micro_batch_size, k, outputs)
        return SimpleNamespace(
            margin_bytes=margin, pinned_host_bytes=0, gpu=gpu, ideal_seconds=ideal,
            operations=operations,
        )  # fmt: skip

    monkeypatch.setattr(search, "forecast", made_up)
    for seed in range(60):
        needs, largest = world(seed), 0
        best = fit(recipe, T4)
        every = [
            (2**n, needs(2**n, k, outputs)) for n in range(7) for k in range(17)
            for outputs in (0, k)
        ]  # fmt: skip
        fitting = [(micro, *work) for micro, (margin, *work) in every if margin >= 0]
        fastest = min(search._seconds(T4, *work, None) for _, *work in fitting)
        found = best.forecast.ideal_seconds, best.forecast.operations
        assert search._seconds(T4, *found, None) <= fastest * (1 + 1e-9), seed
        spared += largest < max(micro for micro, *_ in fitting)
    assert 5 < spared < 55  # where larger batches gain much, each is looked at


def test_who_waits_takes_part():
    """What nobody has begun is done here; answers keep their order."""

    class Nobody(Executor):
        def submit(self, function, /, *items, **options):
            return Future()

    done = []
    assert search._each(Nobody(), lambda n: done.append(n) or n * n, [(1,), (2,), (3,)]) == [
        1,
        4,
        9,
    ]
    assert done == [1, 3, 2]


def test_target_is_kept_and_hours_follow(monkeypatch, recipe, small_gpu):
    def roomy(recipe, gpu):
        seconds = recipe.gradient_accumulation_steps * (1 + recipe.micro_batch_size / 1000)
        return SimpleNamespace(
            margin_bytes=1, pinned_host_bytes=0, ideal_seconds=seconds, operations=0, gpu=gpu
        )

    monkeypatch.setattr(search, "forecast", roomy)
    two_gpus = dataclasses.replace(recipe, world_size=2)
    best = fit(two_gpus, small_gpu, target_effective_batch=4, utilisation=0.5)
    assert best.recipe.effective_batch_size == 4 and best.recipe.world_size == 2
    (speed, again), (fewest, most) = best.tokens_per_second, best.hours(1_000_000)
    assert speed == again and fewest == most == pytest.approx(1_000_000 / 2 / speed / 3600)


@pytest.mark.slow
def test_nothing_fits_says_how_much_it_would_take(recipe, small_gpu):
    tiny = dataclasses.replace(small_gpu, total_bytes=900 * MIB)
    one = dataclasses.replace(recipe, gradient_accumulation_steps=1)
    with pytest.raises(DoesNotFit, match="recipe must fit 900.00 MiB of a small, got at least 1"):
        fit(one, tiny)


@pytest.mark.slow
def test_a_model_with_scaled_logits_keeps_the_full_loss(tmp_path):
    shape = {
        name: getattr(models.config(BUNDLED), name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    }
    GraniteConfig(**shape, logits_scaling=8.0).save_pretrained(tmp_path)
    recipe = TrainRecipe(model=str(tmp_path), sequence_length=64)
    assert forecast(recipe, T4).fits
    assert fit(recipe, T4).recipe.loss == "full"


@pytest.mark.parametrize(
    ("target", "utilisation", "field"),
    [
        (3, 0.6, "target_effective_batch"),
        (0, 0.6, "target_effective_batch"),
        (True, 0.6, "target_effective_batch"),
        (200_000, 0.6, "target_effective_batch"),
        (4, 0.0, "utilisation"),
        (4, 1.5, "utilisation"),
    ],
)
def test_absurd_question_is_refused_before_the_search(
    recipe, small_gpu, target, utilisation, field
):
    two_gpus, weighed = dataclasses.replace(recipe, world_size=2), []
    with pytest.raises(ValueError, match=f"^{field} must be .*got") as refusal:
        fit(two_gpus, small_gpu, target, utilisation=utilisation, progress=weighed.append)
    assert weighed == [] and not isinstance(refusal.value, DoesNotFit)


@pytest.mark.parametrize(
    "weighed",
    [
        ("rank 8", "explicit K/V attention", "4-bit base"),
        pytest.param((), id="all", marks=pytest.mark.slow),
    ],
)
def test_levers_are_single_changes_ranked_by_bytes(recipe, monkeypatch, weighed):
    every = search.single_changes
    monkeypatch.setattr(
        search,
        "single_changes",
        lambda *given: {n: f for n, f in every(*given).items() if not weighed or n in weighed},
    )
    base = dataclasses.replace(recipe, loss="chunked", sequence_length=4096)
    ranked = levers(base, T4)
    assert [lever.saved_bytes for lever in ranked] == sorted(
        (lever.saved_bytes for lever in ranked), reverse=True
    )
    peak = forecast(base, T4).peak_allocated_bytes
    for lever in ranked:
        changed = {
            field.name
            for field in dataclasses.fields(base)
            if getattr(base, field.name) != getattr(lever.recipe, field.name)
        }
        assert 1 <= len(changed) <= 2, lever.change
        assert lever.saved_bytes == peak - forecast(lever.recipe, T4).peak_allocated_bytes
    by_name = {lever.change: lever for lever in ranked}
    attention = by_name["explicit K/V attention"]  # the kernel that need not write scores
    assert attention.saved_bytes > 100 * MIB and attention.speedup > 1.2
    assert "chunked loss" not in by_name
    assert by_name["rank 8"].saved_bytes < 3 * MIB  # a lower rank saves almost nothing


def test_a_lever_reads_as_a_sentence(recipe):
    lever = Lever(
        change="explicit K/V attention",
        recipe=recipe,
        saved_bytes=1536 * MIB,
        speedup=2.1,
        forecast=None,
    )
    assert str(lever) == "explicit K/V attention: -1.50 GiB, 2.1x faster"
    assert (
        str(dataclasses.replace(lever, saved_bytes=-MIB, speedup=0.5))
        == "explicit K/V attention: +1.00 MiB, 2.0x slower"
    )


@pytest.mark.slow
def test_speed_of_large_steps_is_the_measured_one(tmp_path):
    """Rows of 8B with 8192 tokens a step, where the GPU and not Python decides."""
    config = models.config("llama-3.1-8b")
    config.save_pretrained(tmp_path)
    gpu = dataclasses.replace(H200, flash_attention=False)
    large = [
        row
        for row in ROWS
        if row["model"] == "llama-8b"
        and row["micro_batch_size"] == 4
        and row["sequence_length"] == 2048
    ]
    assert len(large) == 4
    for row in large:
        recipe = TrainRecipe(
            model=str(tmp_path),
            amp_dtype="float16",
            sequence_length=2048,
            micro_batch_size=4,
            loss=row["loss"],
            attention={"efficient": "explicit_kv"}.get(row["attention"], "stock"),
        )
        estimate = tokens_per_second(recipe, forecast(recipe, gpu))
        assert estimate == pytest.approx(row["tokens_per_s"], rel=0.1)


def test_speed_of_a_step_of_small_operations_is_pythons():
    """The recorded step of 64 tokens, where the GPU waits for Python."""
    (row,) = (row for row in recorded.recording()["rows"] if row["group"] == "launch")
    recipe = TrainRecipe(**row["recipe"])
    f = forecast(recipe, dataclasses.replace(H200, flash_attention=False))  # it ran on an H200
    assert f.operations * RECORDED_SECONDS > 2 * f.ideal_seconds / H200.sustained[0]
    assert tokens_per_second(recipe, f) == pytest.approx(row["tokens_per_second"], rel=0.02)
