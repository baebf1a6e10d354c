"""What a script's objects have to be is said by their names, and what is odd in a note."""

import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    MambaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)  # fmt: skip

from fitcast import TrainRecipe, count_block, fit, forecast, levers
from fitcast.gpus import T4

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # deprecated is not gone
TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4,
)  # fmt: skip
SGD = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def arguments(**options):
    return TrainingArguments(
        "unused", **dict(per_device_train_batch_size=1, use_cpu=True, report_to="none") | options
    )


def asked(run=TINY, said=None, **options):
    said = said or arguments()
    return forecast(run, said, **dict(sequence_length=16) | options)


class Broken(Trainer):
    def compute_loss(self, *args, **options):
        raise RuntimeError("mine")


class BrokenCallback(TrainerCallback):
    def on_step_begin(self, *args, **options):
        return [1, 2] + torch.zeros(2, 3) @ torch.zeros(2, 3)


class Never(Trainer):
    def train(self, *args, **options):
        return None


class Idle(Trainer):
    def training_step(self, *args, **options):
        return torch.zeros(())


# What was given -> what the refusal says.
REFUSED = {
    "a card's name": (dict(gpu="A100-40"), r"^gpu must be a Gpu, .*preset\('A100-40'\)$"),
    "another name": (dict(gpu="A1000"), r"^gpu must be a Gpu, got 'A1000'; .*preset\('"),
    "adapters as a dict": (dict(peft_config={"r": 8}), "^peft_config must .*=LoraConfig"),
    "an optimizer": (dict(optimizers=(SGD, None)), "^optimizers must .*optimizer_cls_and_kwargs"),
    "a class in quotes": (dict(trainer="MyT"), "^trainer must be a class, got 'MyT'"),
    "no row": (dict(said=arguments(per_device_train_batch_size=0)), "^per_dev.* be at least 1"),
    "its own error": (
        dict(trainer=Broken),
        r"^trainer must .*test_wrong_arguments.py:\d+ \(mine\); mend",
    ),
    "a callback's": (
        dict(callbacks=[BrokenCallback()]),
        r"^trainer must .*test_wrong_arguments.py:\d+ \(",
    ),
    "no step": (dict(trainer=Never), r"^trainer must take an optimizer step .* none from Never"),
    "length below 2": (dict(sequence_length=-5), "^sequence_length must .* got -5; for example"),
    "length as text": (dict(sequence_length="512"), "^sequence_length .* got '512'; for example"),
    "no length": (dict(sequence_length=None), "^sequence_length .*Arguments does not say how long"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_was_given(case):
    options, said = REFUSED[case]
    with pytest.raises(ValueError, match=said) as refused:
        asked(**options)
    assert "ours to mend" not in str(refused.value)


def test_a_card_in_place_of_arguments_is_a_gpu_too():
    for run in ("llama-3.2-1b", TrainRecipe(model="llama-3.2-1b", amp_dtype="float16")):
        with pytest.raises(ValueError, match=r"^gpu must be a Gpu, got 'T4'; .*preset\('T4'\)$"):
            forecast(run, "T4")


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda run: fit(run, None), "gpu"), (lambda run: fit(run, "T4"), "gpu"),
        (lambda run: levers(run, 3), "gpu"), (lambda run: fit("name"), "recipe"),
        (lambda run: levers("name"), "recipe"), (lambda run: count_block("x"), "recipe"),
    ],
)  # fmt: skip
def test_a_question_takes_a_recipe_and_a_card(ask, field):
    with pytest.raises(ValueError, match=f"^{field} must be a (Gpu|TrainRecipe), got .*; write "):
        ask(TrainRecipe(model="llama-3.2-1b", amp_dtype="float16"))


def test_a_trainer_whose_rows_are_not_known_is_refused_by_its_name():
    """Reported: KTO ended in "Repo id must use alphanumeric chars"."""
    trl = pytest.importorskip("trl")
    with pytest.raises(ValueError, match="^trainer must .*RewardTrainer, got KTOTrainer; .*_step"):
        asked(said=trl.KTOConfig("unused", bf16=False, use_cpu=True, report_to="none"))


def notes(**options):
    return " ".join(asked(**options).notes)


def test_a_step_in_which_nothing_trains_is_said():
    said = "the step has no backward pass"
    assert said in notes(trainer=Idle)
    assert said not in notes()


def test_sizes_that_a_config_leaves_out_are_said(tmp_path):
    """Reported: two keys made an 8B model that "fits"."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1}))
    said = notes(run=str(tmp_path))
    assert "config.json" not in said and "hidden_size" not in said
    assert f"{tmp_path} does not say intermediate_size=11008, num_attention_heads=32, " in said
    TINY.save_pretrained(tmp_path)
    assert "does not say" not in notes(run=str(path))


@pytest.mark.slow
def test_sizes_are_said_of_a_recipe_too(tmp_path):
    fields = dict(model_type="llama", hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    recipe = TrainRecipe(model=str(tmp_path), amp_dtype="float16", sequence_length=16)
    assert any(
        "does not say intermediate_size=11008" in note for note in forecast(recipe, T4).notes
    )


@pytest.mark.slow
def test_kernels_of_other_packages_are_said():
    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=1)
    assert "mamba runs its own slow code here" in notes(run=config)


@pytest.mark.slow
def test_online_training_says_that_generation_is_left_out():
    trl = pytest.importorskip("trl")
    grpo = trl.GRPOConfig(
        "unused", bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=2,
        num_generations=2, max_completion_length=8,
    )  # fmt: skip
    assert "generation is left out of this step: forecast_generation" in notes(said=grpo)
