"""The closing act, the budgets and the usual recipe: they print what was recorded or done."""

import dataclasses
import re

import pytest
import torch

from course_utils.topics import budget, ladder, recorded, usual_recipe
from fitcast import models
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.load import blueprint
from fitcast.gpus import L4, T4
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import GB, GIB, MIB, show_bytes


@pytest.fixture(scope="module")
def usual():
    return ladder.usual("llama-3.1-8b")


def test_the_usual_recipe_is_the_recorded_one(usual):
    assert usual.recipe.micro_batch_size == 4 and usual.recipe.sequence_length == 2048
    assert not usual.forecast.fits
    error = usual.forecast.peak_allocated_bytes / usual.measured["peak_allocated_bytes"] - 1
    assert abs(error) < 0.02
    assert ladder.usual("phi-4-mini").recipe.model == "phi-4-mini"


def test_the_table_shows_peaks_speeds_and_ratios(usual):
    rows = ladder.rungs("ladder", names=("the usual recipe", "chunked loss"))
    first, second = ladder.table(rows).splitlines()[1:3]
    measured = rows[1].measured
    assert first.endswith("1.00x") and " does not fit " in first and " fits " in second
    assert show_bytes(measured["peak_allocated_bytes"]) in second
    assert f"{measured['tokens_per_second']:,.0f}" in second
    ratio = measured["tokens_per_second"] / usual.measured["tokens_per_second"]
    assert second.endswith(f"{ratio:.2f}x")


@pytest.mark.slow
def test_twins_show_both_worlds_and_say_what_nobody_measured():
    pairs = ladder.twins()
    assert [pair.no_mask.recipe.padded for pair in pairs] == [False] * len(ladder.IN_SHORT)
    assert all(pair.padded.recipe == dataclasses.replace(pair.no_mask.recipe, padded=True)
               for pair in pairs)  # fmt: skip
    first, second, third = ladder.peaks(pairs).splitlines()[2:5]
    assert first.count("does not fit") == second.count("does not fit") == 2
    assert third.count(" fits") == 2
    seen = pairs[0].no_mask.measured["peak_allocated_bytes"]
    assert first.split("does not fit")[0].rstrip().endswith(show_bytes(seen))
    pairs[0].padded.measured.clear()
    assert ladder.peaks(pairs).splitlines()[2].endswith(" -  does not fit")
    times = [re.findall(r" (\d\.\d)x", line)[0] for line in ladder.speeds(pairs).splitlines()[2:4]]
    assert times[0] == "1.0" and float(times[1]) > 1.5  # without a mask: 2.1 were measured


def test_the_fastest_were_within_a_t4s_memory(monkeypatch):
    monkeypatch.setattr(ladder, "forecast", lambda recipe, gpu: None)  # asked of what was measured
    best = ladder.fastest("fit", 2)
    speeds = [rung.measured["tokens_per_second"] for rung in best]
    assert speeds == sorted(speeds, reverse=True)
    limited = [
        r["tokens_per_second"]
        for r in recorded.rows("fit")
        if r["limited"] and r["outcome"] == "trained"
    ]
    assert speeds[0] == max(limited)
    assert all(rung.measured["peak_allocated_bytes"] <= T4.usable_bytes for rung in best)


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guess", "real", "words"),
    [
        ((5, 5), 5.3 * GIB, "holds"),
        ((4, 8), 7 * GB, "holds"),
        ((10, 14), 21 * GB, "1.5 times as much"),
        (None, 8 * GIB, "missing on paper"),
        ((0.5, 1), GB // 1000, "500 times too much"),
        ((0.1, 0.1), 0, "small either way"),
        (None, 1000, "small either way"),
    ],
)
def test_a_guess_on_paper_is_judged(guess, real, words):
    assert words in budget._verdict(guess and budget.Guess("", *guess), int(real))


def test_a_budgets_rows_add_up_to_the_peak(usual, capsys):
    measured = {"peak_allocated_bytes": 7 * GIB, "composition": usual.forecast.composition}
    budget.compare("llama-3.1-8b", usual.forecast, measured)
    said = capsys.readouterr().out
    sizes = {"B": 1, "KiB": 1024, "MiB": MIB, "GiB": GIB}
    found = re.findall(r"^\w+.*? ([\d.]+) ([KMG]iB|B) +([\d.]+) ([KMG]iB|B)   ", said, re.MULTILINE)
    (*rows, total), (*counted, measured) = (
        [float(row[i]) * sizes[row[i + 1]] for row in found] for i in (0, 2)
    )
    assert len(rows) == 7 and sum(rows) == pytest.approx(total, rel=0.01)
    assert counted == rows and measured == 7 * GIB


@pytest.mark.slow
def test_formulas_give_what_is_counted_where_they_hold():
    recipe = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=512)
    model = qlora.add_adapters(qlora.prepare_base(_quantized(recipe), recipe), recipe)
    planned = forecast(recipe, T4)
    rows = {row.holder: row for row in budget.checklist(recipe, model, planned, planned)}
    for holder in ("weights", "adapters", "gradients"):
        assert rows[holder].formula_bytes == pytest.approx(rows[holder].forecast_bytes, rel=0.02)
    assert rows["inputs"].formula_bytes == 16 * 512
    assert rows["activations"].forecast_bytes > rows["activations"].formula_bytes


def _quantized(recipe):
    """The 4-bit model's parameters on meta, with the state that tells their true shapes."""
    model = blueprint(dataclasses.replace(recipe, lora_rank=1), models.config(recipe.model))
    model = model.unload()
    for parameter in model.parameters():
        if hasattr(parameter, "quant_type"):
            parameter.quant_state = torch.nn.Parameter(parameter.detach())  # has the true shape
    return model


# --- the usual recipe ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(usual):
    return {
        line.line.split("=")[0].split("(")[0]: line for line in usual_recipe.judge(usual.recipe)
    }


@pytest.mark.slow
def test_refused_lines_are_refused_by_transformers(lines):
    from transformers import TrainingArguments

    refused = {name for name, line in lines.items() if line.verdict == "refused"}
    assert {"warmup_ratio", "evaluation_strategy", "group_by_length"} <= refused
    for name in usual_recipe.ARGUMENTS:
        known = name in {field.name for field in dataclasses.fields(TrainingArguments)}
        assert known == (lines[name].verdict != "refused"), name


def test_each_remedy_is_accepted(tmp_path):
    from transformers import TrainingArguments

    for name in ("warmup_ratio", "evaluation_strategy", "group_by_length"):
        eval(
            f"TrainingArguments(output_dir={str(tmp_path)!r}, {usual_recipe.REMEDIES[name]})",
            {"TrainingArguments": TrainingArguments},
        )


def test_bfloat16_wastes_time_on_a_t4_only(usual, lines):
    assert lines["bnb_4bit_compute_dtype"].verdict == "wastes"
    assert usual_recipe._compute_dtype(usual.recipe, L4).verdict == "works"


def test_waste_is_what_was_recorded(usual, lines):
    row = next(r for r in recorded.rows("ladder") if r["name"] == "with k-bit upcast")
    more = row["peak_allocated_bytes"] - usual.measured["peak_allocated_bytes"]
    said = float(re.search(r"([\d.]+) GiB", lines["prepare_model_for_kbit_training"].why)[1])
    assert said == pytest.approx(more / GIB, rel=0.02)


def test_evaluation_in_16_bits_is_what_the_trainer_refuses(lines):
    assert lines["fp16_full_eval"].verdict == "breaks"
    assert lines["optim"].verdict == lines["learning_rate"].verdict == "works"
