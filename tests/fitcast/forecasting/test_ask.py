"""The public `forecast` hands a question to whom it belongs, and names what is missing."""

from types import SimpleNamespace

import pytest
from peft import LoraConfig
from transformers import LlamaConfig, Trainer, TrainingArguments

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


CONFIG = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


def slip(ask, *given, **said):
    return lambda: ask(CONFIG, *given, quantisation_config=None, **said)


ARGUMENTS = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)


@pytest.mark.parametrize(
    "question",
    [
        slip(fitcast.forecast, ARGUMENTS, sequence_length=8),
        slip(fitcast.forecast_evaluation, ARGUMENTS, sequence_length=8),
        slip(fitcast.forecast_resume, ARGUMENTS, sequence_length=8),
        slip(fitcast.forecast_generation, prompt_tokens=8, new_tokens=8),
        slip(fitcast.forecast_merge, LoraConfig()),
    ],
    ids=["training", "evaluation", "resume", "generation", "merge"],
)
def test_a_slip_in_a_keyword_is_no_bug_of_ours(question):
    """Reported: "got an unexpected keyword argument ...; please report it"."""
    with pytest.raises(ValueError, match="^keyword must .* did you mean quantization_config\\?$"):
        question()


class Weighted(Trainer):
    def __init__(self, *args, weights=None, **others):
        super().__init__(*args, **others)


def test_a_keyword_of_the_readers_own_trainer_is_known():
    given = dict(weights=[1.0], optimizers=(None, None))
    run = huggingface.describe_run(CONFIG, ARGUMENTS, sequence_length=8, trainer=Weighted, **given)
    assert run.trainer_options == given
    with pytest.raises(ValueError, match="did you mean weights"):
        huggingface.describe_run(
            CONFIG, ARGUMENTS, sequence_length=8, trainer=Weighted, weigths=[1.0]
        )
    with pytest.raises(ValueError, match="^keyword must be one that .* Trainer takes, got 'bogus'"):
        huggingface.describe_run(CONFIG, ARGUMENTS, sequence_length=8, bogus=1)
