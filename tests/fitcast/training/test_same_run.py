"""What a run is: which recipe and rows a checkpoint goes on with, and what trains of a recipe."""

import dataclasses
import json

import pytest
import torch

from fitcast.step import qlora, ranks
from fitcast.training import checkpoints, data, preflight
from fitcast.training import trainer as training
from fitcast.training.resume import FREE_TO_CHANGE
from tests.tiny import ROWS, TOKENIZER, tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("same") / "model", max_steps=6, save_steps=2)


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """The losses of a run that nothing interrupts."""
    return train(recipe, tmp_path_factory.mktemp("whole")).losses


def train(recipe, output_dir, rows=ROWS, **options):
    return training.train(
        recipe, training.build_model(recipe), rows, TOKENIZER, output_dir, **options
    )


# --- what may change -----------------------------------------------------------------------------

CHANGES = {
    "sequence_length": 128,
    "padded": True,
    "causal_padding": True,
    "checkpointed_layers": 0,
    "offload_checkpoints": True,
    "keep_attention": True,
    "expandable_segments": True,
    "logging_steps": 3,
    "save_steps": 5,
}


def test_every_field_that_may_change_is_tried():
    assert set(CHANGES) == FREE_TO_CHANGE


@pytest.mark.slow
@pytest.mark.parametrize("field", CHANGES)
def test_what_changes_no_number_may_change_on_the_way(recipe, whole, tmp_path, field):
    train(recipe, tmp_path, stop_at=3)
    padded = {"padded": True} if field == "causal_padding" else {}
    other = dataclasses.replace(recipe, **padded | {field: CHANGES[field]})
    rest = train(other, tmp_path)
    assert rest.resumed_from.name == "checkpoint-2" and rest.losses == whole


@pytest.mark.slow
def test_a_resumed_run_saves_when_its_own_recipe_says(recipe, tmp_path):
    train(recipe, tmp_path, stop_at=3)
    train(dataclasses.replace(recipe, save_steps=5), tmp_path)
    # after step 5, as asked, and at the end, as always; every second step would have left 4 and 6
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}


@pytest.mark.one_fast
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        pytest.param("gradient_accumulation_steps", 1, marks=pytest.mark.slow),
        pytest.param("lora_dropout", 0.1, marks=pytest.mark.slow),
        ("max_steps", 7),
    ],
)
def test_what_changes_the_run_may_not(recipe, tmp_path, field, value):
    train(recipe, tmp_path, stop_at=2)
    words = f"^{field} must be .* to resume .*checkpoint-2, got {value}; use that recipe"
    with pytest.raises(ValueError, match=words):
        train(dataclasses.replace(recipe, **{field: value}), tmp_path)


@pytest.mark.slow
def test_other_rows_are_another_run(recipe, tmp_path):
    train(recipe, tmp_path, stop_at=2)
    shorter = ROWS.map(lambda row: {name: values[:12] for name, values in row.items()})
    for rows in (shorter, ROWS.select(range(49)), list(reversed(list(ROWS)))):
        with pytest.raises(ValueError, match="^rows must be those of .*checkpoint-2 to resume it"):
            train(recipe, tmp_path, rows)
    as_they_were = json.loads(json.dumps([dict(row) for row in ROWS]))  # through a file, as a list
    assert train(recipe, tmp_path, as_they_were, stop_at=3).resumed_from.name == "checkpoint-2"


@pytest.mark.slow
def test_a_checkpoint_from_before_rows_were_noted_is_resumed(recipe, tmp_path):
    train(recipe, tmp_path, stop_at=2)
    manifest = tmp_path / "checkpoint-2" / checkpoints.MANIFEST
    facts = json.loads(manifest.read_text())
    assert facts.pop("rows_sha256") == data.summarize(ROWS).sha256
    manifest.write_text(json.dumps(facts))
    assert train(recipe, tmp_path, stop_at=3).resumed_from.name == "checkpoint-2"


def test_arguments_that_change_the_run_may_not_change_on_the_way(recipe, tmp_path):
    """Reported: a run went on with another schedule, and said nothing."""
    cosine = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.4}}
    train(recipe, tmp_path, stop_at=2, **cosine)
    for other, name in (
        ({}, "lr_scheduler_type must be 'cosine'"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_kwargs must be {'num_cycles': 0.4}"),
        (cosine | {"dataloader_drop_last": True}, "dataloader_drop_last must be False"),
    ):
        with pytest.raises(ValueError, match=f"^{name} to resume .*checkpoint-2, got .*override"):
            train(recipe, tmp_path, **other)
    same = train(recipe, tmp_path, stop_at=3, **cosine, logging_first_step=True)
    assert same.resumed_from.name == "checkpoint-2"


def test_a_checkpoint_from_before_arguments_were_noted_is_resumed(recipe, tmp_path):
    train(recipe, tmp_path, stop_at=2)
    manifest = tmp_path / "checkpoint-2" / checkpoints.MANIFEST
    facts = json.loads(manifest.read_text())
    assert facts.pop("arguments")["lr_scheduler_type"] == "linear"
    manifest.write_text(json.dumps(facts))
    went_on = train(recipe, tmp_path, stop_at=3, lr_scheduler_type="cosine")
    assert went_on.resumed_from.name == "checkpoint-2"


# --- what trains ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_longer_than_the_recipe_says_are_refused(recipe, tmp_path):
    longest = max(map(len, ROWS["input_ids"]))
    short = dataclasses.replace(recipe, sequence_length=longest - 1)
    with pytest.raises(
        ValueError, match=f"rows must have at most .*{longest - 1}.*one of {longest}"
    ):
        train(short, tmp_path)
    fits = dataclasses.replace(recipe, sequence_length=longest)
    assert len(train(fits, tmp_path, stop_at=1).steps) == 1


def test_padding_that_the_recipe_denies_is_said(recipe, tmp_path, capsys):
    even = [row for row in ROWS if len(row["input_ids"]) == len(ROWS[0]["input_ids"])]
    one_by_one = dict(micro_batch_size=1, gradient_accumulation_steps=8)
    for changes, rows, said in (
        ({}, ROWS, True),
        ({"padded": True}, ROWS, False),
        ({}, even, False),
        (one_by_one, ROWS, False),
    ):
        training.QLoRATrainer(
            changed := dataclasses.replace(recipe, **changes),
            training.build_model(changed),
            rows,
            TOKENIZER,
            tmp_path,
        )
        assert ("padded is False, but rows of" in capsys.readouterr().out) == said


@pytest.mark.slow
def test_checkpointing_is_the_recipes(recipe, tmp_path):
    """Trainer would switch every layer on, whatever the recipe and its forecast say."""
    none = dataclasses.replace(recipe, checkpointed_layers=0)
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        with pytest.raises(ValueError, match=f"{name} must be left to the recipe, got True; .*_la"):
            train(none, tmp_path, **{name: True})
    assert len(train(none, tmp_path, stop_at=1, activation_checkpointing=False).steps) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.5),
        *(
            pytest.param(name, value, marks=pytest.mark.slow)
            for name, value in [
                ("per_device_train_batch_size", 8),
                ("optim", "sgd"),
                ("max_steps", 3),
                ("seed", 7),
                ("bf16", True),
            ]
        ),
    ],
)
def test_an_override_of_what_the_recipe_decides_is_refused(recipe, tmp_path, name, value):
    """Most of these would not even have been heard: the optimizer is the recipe's."""
    with pytest.raises(ValueError, match=f"^{name} must be .* as in the recipe, got .*change the"):
        train(recipe, tmp_path, **{name: value})
    same = recipe.trainer_settings()[name]
    assert len(train(recipe, tmp_path, stop_at=1, **{name: same}).steps) == 1


def test_other_overrides_that_spoil_a_run_are_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="auto_find_batch_size must be left to the recipe"):
        train(recipe, tmp_path, auto_find_batch_size=True)
    with pytest.raises(ValueError, match="bf16_full_eval must be False in a run that trains"):
        train(recipe, tmp_path, bf16_full_eval=True)


UNREAD = {
    "label_smoothing_factor": 0.1,
    "num_train_epochs": 3,  # TrainingArguments' default, and yet not what the run would do
    "adam_beta1": 0.0,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
    "optim_args": "rank=8",
    "optim_target_modules": "all-linear",
}


def test_an_override_that_the_loop_would_not_read_is_refused(recipe):
    """Reported: the losses were the same with and without."""
    assert set(UNREAD) == set(preflight.UNREAD)
    for name, value in UNREAD.items():
        with pytest.raises(ValueError, match=f"^{name} must be .*nothing here reads it, got .*out"):
            preflight._refuse_overrides(recipe, {name: value})
    preflight._refuse_overrides(recipe, {"adam_beta1": 0.9, "label_smoothing_factor": 0.0})


def test_what_an_unread_override_must_be_is_what_the_optimizer_has(recipe):
    parameter = torch.nn.Linear(1, 1)
    for optimizer in ("adamw", "adamw_8bit"):
        made = qlora.build_optimizer(parameter, dataclasses.replace(recipe, optimizer=optimizer))
        (beta1, beta2), epsilon = made.defaults["betas"], made.defaults["eps"]
        said = [preflight.UNREAD[f"adam_{name}"][0] for name in ("beta1", "beta2", "epsilon")]
        assert said == [beta1, beta2, epsilon]


# --- the loss inside a wrapper's forward ---------------------------------------------------------


@pytest.mark.parametrize("loss", ["full", "chunked", "lean"])
def test_a_forward_answers_with_the_loss_when_asked_for_it(recipe, loss):
    recipe = dataclasses.replace(recipe, loss=loss, base="float32", lora_dropout=0.0)
    model, plain = (training.build_model(recipe).train() for _ in range(2))
    batch = data.collate(list(ROWS)[:4], 0)
    ranks.answer_with_the_loss(model)
    asked = model(loss_of=(batch, recipe, 11))
    wanted = qlora.compute_loss(plain, batch, recipe, 11)
    assert torch.equal(asked, wanted)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
