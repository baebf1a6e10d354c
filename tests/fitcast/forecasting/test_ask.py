"""The public `forecast` hands a question to whom it belongs, and names what is missing."""

from types import SimpleNamespace

import pytest

import fitcast
from fitcast import T4, TrainRecipe
from fitcast.forecasting import forecast as recipes
from fitcast.forecasting import huggingface
from fitcast.gpus import H100

RECIPE = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=64)


@pytest.fixture
def asked(monkeypatch):
    """What was handed on, and to whom."""
    calls = []
    for module, name in ((recipes, "forecast"), (huggingface, "forecast_run")):
        monkeypatch.setattr(module, name, lambda *a, name=name, **o: calls.append((name, a, o)))
    return calls


def test_a_recipe_goes_one_way_and_a_script_the_other(asked):
    arguments = SimpleNamespace(max_length=64)
    fitcast.forecast(RECIPE)
    fitcast.forecast(RECIPE, H100)
    fitcast.forecast(RECIPE, gpu=H100)
    fitcast.forecast("llama-3.2-1b", arguments, dtype="float16")
    fitcast.forecast("llama-3.2-1b", arguments, gpu=H100)
    run = ("llama-3.2-1b", arguments)
    assert asked == [
        ("forecast", (RECIPE, T4), {}),
        ("forecast", (RECIPE, H100), {}),
        ("forecast", (RECIPE, H100), {}),
        ("forecast_run", run, {"gpu": T4, "dtype": "float16"}),
        ("forecast_run", run, {"gpu": H100}),
    ]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda: fitcast.forecast("llama-3.2-1b"), "arguments must be the run's.*got none; write"),
        (lambda: fitcast.forecast("llama-3.2-1b", T4), "arguments must be .* got the card T4; "),
        (lambda: fitcast.forecast(RECIPE, peft_config=3), "peft_config must not .* got int; "),
        (lambda: fitcast.forecast(RECIPE, SimpleNamespace()), "arguments must not .*Namespace; "),
    ],
)
def test_half_a_question_says_what_is_missing(asked, question, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        question()
    assert asked == []
