import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_utils.data import BUNDLED
from fitcast import gpus, recipe
from fitcast.recipe import TrainRecipe

sizes = st.integers(1, 64)


@given(micro=sizes, accumulation=sizes, world=sizes, length=st.integers(2, 4096))
def test_effective_batch_counts_the_sequences_of_one_update(micro, accumulation, world, length):
    r = TrainRecipe(
        model=BUNDLED,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        world_size=world,
        sequence_length=length,
    )
    sequences = [1 for _ in range(world) for _ in range(accumulation) for _ in range(micro)]
    assert r.effective_batch_size == len(sequences)
    assert r.tokens_per_step == sum(length for _ in sequences)


@given(micro=sizes, accumulation=sizes, factor=st.sampled_from([2, 4]))
def test_trading_micro_batch_for_accumulation_keeps_the_update(micro, accumulation, factor):
    r = TrainRecipe(
        model=BUNDLED, micro_batch_size=micro * factor, gradient_accumulation_steps=accumulation
    )
    traded = dataclasses.replace(
        r, micro_batch_size=micro, gradient_accumulation_steps=accumulation * factor
    )
    assert traded.effective_batch_size == r.effective_batch_size
    assert traded.tokens_per_step == r.tokens_per_step


WRONG = [
    (field, value)
    for field, (low, high) in recipe.WHOLE_NUMBERS.items()
    for value in (low - 1, high + 1, 1.5, "8", True, None)
]
WRONG += [
    (field, value)
    for field, high in recipe.FRACTIONS.items()
    for value in (-0.1, high * 1.01, "0.1", float("nan"), None)
]
WRONG += [(field, "no such thing") for field in recipe.CHOICES]
WRONG += [
    (field, 1)
    for field in (
        "double_quant",
        "kbit_upcast",
        "padded",
        "keep_attention",
        "causal_padding",
        "flat_optimizer",
        "expandable_segments",
    )
]
WRONG += [
    ("model", "no such thing"),
    ("model", 7),
    ("mlp_tile_tokens", 0),
    ("mlp_tile_tokens", True),
    ("offload_checkpoints", 1),
    ("offload_checkpoints", 1001),
    ("lora_rank", 0),
    ("lora_rank", "16"),
    ("lora_rank", None),
    ("lora_targets", ()),
    ("lora_targets", "q_proj"),
    ("lora_targets", ("q_proj", 3)),
    ("lora_dropout", 1),
    ("warmup_fraction", 1.0),
    ("checkpointed_layers", -1),
    ("checkpointed_layers", "some"),
    ("checkpointed_layers", None),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_bad_field_names_itself_its_value_and_a_remedy(field, value):
    with pytest.raises(ValueError, match=rf"^{field} must .*got .*; \S+"):
        TrainRecipe(**{"model": "llama-3.2-1b", field: value})


def test_every_field_is_covered_by_a_bad_value():
    assert {f.name for f in dataclasses.fields(TrainRecipe)} == {field for field, _ in WRONG}


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_a_recipe_comes_back_from_json(targets):
    r = TrainRecipe(model=BUNDLED, lora_targets=targets, max_steps=7)
    again = TrainRecipe(**json.loads(json.dumps(dataclasses.asdict(r))))
    assert again == r and hash(again) == hash(r)


def test_choices_are_those_of_the_type_hints():
    assert recipe.CHOICES["amp_dtype"] == (None, "float16", "bfloat16")
    assert recipe.CHOICES["loss"] == ("full", "chunked", "lean", "fused", "compiled")
    assert len(recipe.CHOICES) == 10


def test_the_last_checkpoint_is_not_offloaded():
    with pytest.raises(ValueError, match="offload_checkpoints must be True or below"):
        TrainRecipe(model=BUNDLED, offload_checkpoints=4, checkpointed_layers=4)
    TrainRecipe(model=BUNDLED, offload_checkpoints=4, checkpointed_layers=5)


def test_offload_without_checkpoints():
    with pytest.raises(ValueError, match="offload_checkpoints must be False when"):
        TrainRecipe(model=BUNDLED, offload_checkpoints=True, checkpointed_layers=0)


def test_a_t4_refuses_bfloat16():
    for field in ("amp_dtype", "base"):
        with pytest.raises(ValueError, match=f"{field} must be 'float16' on a T4, got 'bfloat16'"):
            TrainRecipe(**{"model": "llama-3.2-1b", field: "bfloat16"}).check_on(gpus.T4)
    TrainRecipe(model=BUNDLED, amp_dtype="bfloat16").check_on(gpus.L4)
    assert TrainRecipe(model=BUNDLED).for_gpu(gpus.T4).amp_dtype == "float16"
    assert TrainRecipe(model=BUNDLED).for_gpu(None).amp_dtype is None


def test_training_arguments_say_the_same(tmp_path):
    r = TrainRecipe(
        model=BUNDLED,
        micro_batch_size=2,
        gradient_accumulation_steps=16,
        max_steps=200,
        learning_rate=3e-4,
    )
    arguments = r.to_training_arguments(str(tmp_path), use_cpu=True)
    assert (
        arguments.per_device_train_batch_size
        * arguments.gradient_accumulation_steps
        * arguments.world_size
        == r.effective_batch_size
        == 32
    )
    assert arguments.get_warmup_steps(200) == 6  # 3 % of 200 optimizer steps
    assert arguments.optim == "paged_adamw_8bit"
    assert arguments.logging_nan_inf_filter is False


def test_training_arguments_take_the_newest_name_on_every_version(tmp_path):
    arguments = TrainRecipe(model=BUNDLED).to_training_arguments(
        str(tmp_path), use_cpu=True, activation_checkpointing=True
    )
    names = ("activation_checkpointing", "gradient_checkpointing")
    assert any(getattr(arguments, name, False) is True for name in names)


def test_what_a_recipe_decides_is_in_the_arguments(tmp_path):
    """`train` refuses an override of these: each has to follow the recipe."""
    r = TrainRecipe(model=BUNDLED, amp_dtype="bfloat16", optimizer="adamw")
    changed = dataclasses.replace(
        r,
        micro_batch_size=3,
        gradient_accumulation_steps=5,
        max_steps=7,
        learning_rate=0.5,
        weight_decay=0.25,
        max_grad_norm=2.0,
        warmup_fraction=0.5,
        optimizer="adamw_8bit",
        amp_dtype=None,
        save_steps=2,
        seed=9,
    )
    one, other = r.trainer_settings(), changed.trainer_settings()
    assert {name for name in one if one[name] == other[name]} == {"fp16"}
    arguments = changed.to_training_arguments(str(tmp_path), use_cpu=True)
    for name, value in other.items():
        assert getattr(arguments, name) == value, name


def test_removed_training_argument(tmp_path):
    with pytest.raises(ValueError, match="evaluation_strategy must be a field of Training"):
        TrainRecipe(model=BUNDLED).to_training_arguments(str(tmp_path), evaluation_strategy="steps")
