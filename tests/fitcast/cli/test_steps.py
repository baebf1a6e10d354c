"""Evaluation, resuming and generation on the command line: what Python says of the same objects."""

import json
import re

import pytest

from course_utils.data import BUNDLED
from fitcast import models
from fitcast.cli import main as cli
from fitcast.forecasting.generation import forecast_generation
from fitcast.forecasting.merging import forecast_merge
from fitcast.forecasting.other_steps import forecast_evaluation, forecast_resume
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
SMALL = ["forecast", "--model", BUNDLED, "--sequence-length", "64", "--lora-targets", "all-linear"]
RECIPE = TrainRecipe(
    model=BUNDLED, sequence_length=64, amp_dtype="float16", lora_targets="all-linear"
)


def asked(capsys, *words):
    assert cli.main([*SMALL, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def objects():
    """What a script with this recipe makes."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir="unused", use_cpu=True, report_to=[], fp16=True, optim="paged_adamw_8bit",
        per_device_eval_batch_size=4, per_device_train_batch_size=1,
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    adapters = LoraConfig(
        r=16, lora_alpha=RECIPE.lora_alpha, lora_dropout=RECIPE.lora_dropout,
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    return arguments, {
        "peft_config": adapters,
        "quantization_config": qlora.quantization(RECIPE),
        "dtype": "float16",
        "gpu": T4,
    }


@pytest.mark.slow
def test_generation(capsys):
    told = asked(capsys, "--step", "generation", "--prompt-tokens", "32", "--new-tokens", "8",
                 "--prompts", "2")  # fmt: skip
    _, options = objects()
    same = forecast_generation(BUNDLED, prompt_tokens=32, new_tokens=8, batch_size=2, **options)
    assert told["peak_allocated_bytes"] == same.peak_allocated_bytes
    assert told["notes"] == list(same.notes) and "for 2 x 39 tokens" in told["notes"][-1]


@pytest.mark.slow
def test_evaluation_and_resuming(capsys):
    evaluated = asked(capsys, "--step", "evaluation", "--eval-batch-size", "4", "--eval-rows", "9",
                      "--checkpointed-layers", "all")  # fmt: skip
    arguments, options = objects()
    same = forecast_evaluation(
        BUNDLED, arguments, eval_rows=9, sequence_length=64, padded=False, **options
    )
    assert evaluated["peak_allocated_bytes"] == same.peak_allocated_bytes
    assert "evaluation" in evaluated["phase_peaks"]
    resumed = asked(capsys, "--step", "resume", "--checkpointed-layers", "all")
    arguments, options = objects()
    same = forecast_resume(BUNDLED, arguments, sequence_length=64, padded=False, **options)
    assert resumed["peak_allocated_bytes"] == same.peak_allocated_bytes
    assert "resume" in resumed["phase_peaks"]


def test_merging_is_into_weights_that_are_not_quantized(capsys):
    """The base in 16 bits and the adapters: all at once on the card."""
    told = asked(capsys, "--step", "merge")
    _, options = objects()
    del options["quantization_config"]
    same = forecast_merge(BUNDLED, **options)
    assert told["peak_allocated_bytes"] == same.peak_allocated_bytes
    assert "merged on the CPU it takes" in told["notes"][-1]
    assert (
        cli.main([*SMALL[:3], "--base", "float32", "--lora-rank", "none", "--step", "merge"]) == 2
    )
    assert "step must be another one for a run without adapters" in capsys.readouterr().err


def test_a_family_with_projections_of_its_own_gets_adapters_on_them(capsys, tmp_path):
    """Phi-4-mini, here its first two layers, has one product for query, key and value."""
    config = models.config("phi-4-mini")
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    model = str(tmp_path)
    asked = ("forecast", "--model", model, "--step", "generation", "--new-tokens", "4")
    assert cli.main([*asked, "--json"]) == 0
    by_default = json.loads(capsys.readouterr().out)
    assert cli.main([*asked, "--lora-targets", "o_proj,qkv_proj", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_default


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "evaluatoin"], "step must be one of .* did you mean 'evaluation'"),
        (["--eval-rows", "4"], "--eval-rows must be given with --step evaluation, got '4'"),
        (["--step", "resume", "--new-tokens", "4"], "--new-tokens must be given with --step gen"),
        (["--step", "generation", "--prompts", "0"], "prompts must be a whole number from 1"),
        (["--step", "generation", "--prompts", "two"], "prompts must be a whole number, got 'two'"),
    ],
)
def test_an_option_of_another_step_is_refused(capsys, words, message):
    assert cli.main([*SMALL, *words]) == 2
    assert re.search(message, capsys.readouterr().err)
